"""Messages of a conversation, how a template takes them, and what is wrong with them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from llamapro.errors import suggest
from llamapro.files import unique_keys
from llamapro.text.sandbox import END, MARK, START

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool", "function", "ipython")
# Role and content; further keys go to the template as they are. `weight` 0: not trained.
Message = Mapping[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers' names, best first
# Characters that no text may have, because they mark places in a rendered one.
RESERVED = re.compile(f"[{MARK}{START}{END}]")
PARTS = f"{MARK}parts"  # the texts of a content that was a list; `content` has them joined
OBJECT = f"{MARK}object"  # a tool's result that was an object; `content` has its JSON
_PROBE = "\ue000"  # a private character


class Forms:
    """The forms in which a template takes what messages have in several.

    It is asked with `show`, which returns the text that it makes of a message, "" if it cannot.
    """

    def __init__(self, show: Callable[[Message], str]):
        def takes_parts(role: str) -> bool:
            """Whether it takes a content as a list of parts; if not, they are joined."""
            text = show({"role": role, "content": [{"type": "text", "text": _PROBE}]})
            return _PROBE in text and f'"{_PROBE}"' not in text

        def show_call(arguments: Any) -> str:
            function = {"name": "f", "arguments": arguments}
            call = {"id": "123456789", "type": "function", "function": function}
            return show({"role": "assistant", "content": "", "tool_calls": [call]})

        def needs_objects() -> bool:
            """Whether it fails for arguments that are a text of JSON, or puts them in quotes."""
            said = show_call(json.dumps({_PROBE: 1}, ensure_ascii=False))
            return f'\\"{_PROBE}' in said if said else _PROBE in show_call({_PROBE: 1})

        self._takes_parts, self._needs_objects = cache(takes_parts), cache(needs_objects)

    def view(self, message: Message, place: str) -> dict[str, Any]:
        """Returns a message as the template takes it, its reasoning under transformers' names.

        Raises ValueError, which names the place, if a call has no object where one is needed.
        """
        view = {key: value for key, value in message.items() if key not in (PARTS, OBJECT)}
        view["content"] = message.get(OBJECT, message["content"])
        if (texts := message.get(PARTS)) and self._takes_parts(message["role"]):
            view["content"] = [{"type": "text", "text": text} for text in texts]
        if message.get("tool_calls") and self._needs_objects():
            view["tool_calls"] = [_with_object(call, place) for call in message["tool_calls"]]
        if said := next((message[key] for key in REASONING if message.get(key)), None):
            view |= {"reasoning_content": said, "thinking": message.get("thinking") or said}
        return view


def _with_object(call: Any, place: str) -> Any:
    """Returns a call with its arguments as an object; OpenAI has them as a text of JSON."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _with_object(call["function"], place)}
    if not isinstance(said := call.get("arguments"), str):
        return call
    what = f"{place}: the 'arguments' of {_called(call)!r}"
    return {**call, "arguments": parsed(what, said) if said else {}}


def flawed_call(messages: Sequence[Message]) -> str:
    """Returns a hint for the first call or result of a form with which many templates fail."""
    for number, message in enumerate(messages, 1):
        if OBJECT in message:
            return f"; turn {number}: the tool's result is an object: give it as a text of JSON"
        for call in message.get("tool_calls") or []:
            place = f"; turn {number}: the call of {_called(call)!r} has no"
            if not isinstance(function := call.get("function"), dict):
                return f"{place} 'function', an object with its name and arguments"
            if "arguments" not in function:
                return f"{place} 'arguments': give them, or {{}}"
    return ""


def parsed(what: str, value: Any) -> Any:
    """Returns what a text of JSON, as tables often hold, stands for; other values as they are.

    Raises ValueError, which begins with `what`, if it is none.
    """
    try:
        is_text = isinstance(value, str) and value
        return json.loads(value, object_pairs_hook=unique_keys) if is_text else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is a text that is no JSON ({error}): {value[:40]!r}") from None


def texts_of(message: Message) -> list[str]:
    """Returns the texts of a message, one for each part of its content."""
    return message.get(PARTS) or [message["content"]]


def says_more(message: Message) -> bool:
    """Whether a message has a call or reasoning, so that its content may be empty."""
    return any(message.get(key) for key in ("tool_calls", *REASONING))


def check_messages(messages: Sequence[Message], needs_assistant: bool = True) -> list[str]:
    """Returns what is wrong with the roles and contents of a conversation, [] if nothing is."""
    problems = []
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            hint = suggest(str(role).lower(), list(ROLES))
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
    given = given.union(variables) - {"role", "content", PARTS, OBJECT, "weight"}
    names = {key: (key, *REASONING[:2]) if key in REASONING else (key,) for key in given}
    return {key for key in given if not any(name in words for name in names[key])}


def check_shown(messages: Sequence[Message], text: str, tools: Sequence[Any] = ()) -> list[str]:
    """Returns what a template passed over: a tool, a call, or a turn of which it shows no word.

    Words that other turns have too must be there as often, but for the assistant, some of whose
    words a template may leave out with the reasoning.
    """
    text = text.casefold()
    shown, problems = Counter(re.findall(r"\w+", text)), []
    parts = (part.casefold() for message in messages for part in texts_of(message))
    all_said = Counter(word for part in parts for word in re.findall(r"\w+", part))
    named = Counter(map(_called, tools))  # how often a name has to be there
    for name in named:
        if name.casefold() not in text:
            problems.append(f"the template does not show the tool {name!r}")
    for number, message in enumerate(messages, 1):
        calls = message.get("tool_calls") or []
        for said in texts_of(message):
            content = said.casefold().strip()
            words = re.findall(r"\w+", content)
            least = dict.fromkeys(words, 1) if message["role"] == "assistant" else all_said
            if words and content not in text and all(shown[w] < least[w] for w in words):
                problems.append(
                    f"turn {number}: the template shows nothing of its text, "
                    f"{said[:40]!r} of {message['role']!r}; leave the "
                    f"{'text' if calls else 'turn'} out, or name another --data.chat-template"
                )
        for name in map(_called, calls):
            named[name] += 1
            if text.count(name.casefold()) < named[name]:
                problems.append(f"turn {number}: the template does not show its call of {name!r}")
    return problems


def _called(call: Any) -> str:
    """Returns the name of the function of a call or tool, "" if it is none that we know."""
    call = call.get("function", call) if isinstance(call, dict) else call
    return str(call.get("name", "")) if isinstance(call, dict) else ""
