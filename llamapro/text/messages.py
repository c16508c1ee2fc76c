"""Messages of a conversation, and what is wrong with them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llamapro.errors import suggest
from llamapro.text.sandbox import END, MARK, START

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Role and content; further keys go to the template as they are. `weight` 0: not trained.
Message = Mapping[str, Any]
# Characters that no text may have, because they mark places in a rendered one.
RESERVED = re.compile(f"[{MARK}{START}{END}]")


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
        elif not (content.strip() or message.get("tool_calls")) and role in ("user", "assistant"):
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
