"""Messages of a conversation, and what is wrong with them."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from llamapro.errors import suggest
from llamapro.text.sandbox import END, MARK, START

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Role and content; further keys go to the template as they are. `weight` 0: not trained.
Message = Mapping[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers' names, best first
# Characters that no text may have, because they mark places in a rendered one.
RESERVED = re.compile(f"[{MARK}{START}{END}]")


def with_reasoning(message: Message) -> dict[str, Any]:
    """Returns a message with its reasoning under the names that templates read, as transformers."""
    said = next((message[key] for key in REASONING if message.get(key)), None)
    if said is None:
        return {**message}
    return {**message, "reasoning_content": said, "thinking": message.get("thinking") or said}


def says_more(message: Message) -> bool:
    """Whether a message has a call or reasoning, so that its content may be empty."""
    return any(message.get(key) for key in ("tool_calls", *REASONING))


def check_messages(messages: Sequence[Message], needs_assistant: bool = True) -> list[str]:
    """Returns what is wrong with the roles and contents of a conversation, [] if nothing is."""
    problems = []
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            hint = suggest(str(role), list(ROLES))
            problems.append(
                f"turn {number}: unknown role {role!r}{hint}; known: {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            kind = "nothing" if content is None else type(content).__name__
            problems.append(f"turn {number}: the content is {kind}, expected a string")
        elif role in ("user", "assistant") and not (content.strip() or says_more(message)):
            problems.append(f"turn {number}: the content is empty")
        elif RESERVED.search(content):
            problems.append(
                f"turn {number}: has U+FDD0, U+FDD1 or U+FDD2, which are no characters; remove them"
            )
        elif re.search("[\ud800-\udfff]", content):
            problems.append(f"turn {number}: not valid Unicode: half a surrogate pair")
    if needs_assistant and all(message["role"] != "assistant" for message in messages):
        problems.append("no turn of the assistant: nothing to train on")
    return problems


def not_named(
    messages: Sequence[Message], variables: Iterable[str], words: Collection[str]
) -> set[str]:
    """Returns the keys of messages, and the variables, that are not among a template's words."""
    given = {key for message in messages for key, value in message.items() if value}
    given = given.union(variables) - {"role", "content", "weight"}
    names = {key: (key, *REASONING[:2]) if key in REASONING else (key,) for key in given}
    return {key for key in given if not any(name in words for name in names[key])}


def check_shown(messages: Sequence[Message], text: str) -> list[str]:
    """Returns which turns a template passed over: no word, or not the call, is in its text."""
    text = text.casefold()
    shown, problems = frozenset(re.findall(r"\w+", text)), []
    for number, message in enumerate(messages, 1):
        content, calls = message["content"].casefold().strip(), message.get("tool_calls") or []
        words = re.findall(r"\w+", content)
        if words and content not in text and shown.isdisjoint(words):
            problems.append(
                f"turn {number}: the template shows nothing of its text, "
                f"{message['content'][:40]!r} of {message['role']!r}; leave the "
                f"{'text' if calls else 'turn'} out, or use another template"
            )
        for name in map(_called, calls):
            if name.casefold() not in text:
                problems.append(f"turn {number}: the template does not show its call of {name!r}")
    return problems


def _called(call: Any) -> str:
    """Returns the name of the function that a call names, "" if it is none that we know."""
    call = call.get("function", call) if isinstance(call, dict) else call
    return str(call.get("name", "")) if isinstance(call, dict) else ""
