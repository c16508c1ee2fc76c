"""The built-in chat templates, and Jinja as it renders templates: like transformers', and marking.

A rendered text holds characters that no text has: `MARK` in the names of control tokens that people
wrote, `START` and `END` around what is inside {% generation %}, transformers' tag for what the
assistant wrote. Who renders takes them out again.
"""

import datetime
import json
import re
from pathlib import Path
from typing import Any

# From the formats' public descriptions: Meta's llama and llama3 repositories, Mistral's and
# OpenAI's.
BUILT_IN = {
    name: (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("llama2", "llama3", "mistral", "chatml")
}

# Unicode's noncharacters.
MARK, START, END = "\ufdd0", "\ufdd1", "\ufdd2"


def tagged_spans(marked: str) -> list[tuple[int, int]]:
    """Returns where {% generation %} was, in bytes of the text without marks."""
    spans, at, first = [], 0, 0
    for part in re.split(f"([{START}{END}])", marked.replace(MARK, "")):
        if part == START:
            first = at
        elif part == END:
            spans.append((first, at))
        else:
            at += len(part.encode())
    return spans


def environment() -> Any:
    """Returns Jinja set up as in transformers' `apply_chat_template`: sandboxed, no more rights."""
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = nodes.CallBlock(self.call_method("_enclose"), [], [], body)
            return call.set_lineno(line)

        def _enclose(self, caller: Any) -> str:
            return f"{START}{caller()}{END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
        return text.replace("\\ufdd0", MARK)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made
