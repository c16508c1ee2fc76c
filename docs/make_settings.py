"""Writes docs/settings.md, the reference of all settings of training, from the code.

python docs/make_settings.py
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

from llamapro.training import settings

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

Every setting of `llamapro train`. On the command line it is an option, `--train.steps 500`. In a
preset, which is a TOML file, it is a key of its table, `steps = 500` under `[train]`.
`--train.no-recompute` takes a flag of a preset back.
`llamapro presets copy NAME FILE` copies a preset to edit. (`python docs/make_settings.py` writes
this page from the code.)
"""


def meanings(group: type[Any]) -> dict[str, str]:
    """Returns the text under each field of a dataclass."""
    body = ast.parse(inspect.getsource(group)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def shown(default: object) -> str:
    """Returns a default as one writes it; nothing where the setting is empty."""
    match default:
        case bool():
            return f"`{str(default).lower()}`"
        case "" | ():
            return ""
        case tuple():
            return " ".join(f"`{value}`" for value in default)
        case _:
            return f"`{default}`"


def table(group: type[Any], prefix: str) -> str:
    """Returns the table of the plain fields of a group."""
    texts = meanings(group)
    rows = [
        f"| `{prefix}{field.name.replace('_', '-')}` | {shown(field.default)} "
        f"| {texts[field.name].replace('|', chr(92) + '|')} |"
        for field in dataclasses.fields(group)
        if field.name in texts
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows, ""])


def page() -> str:
    """Returns the page."""
    parts = [HEAD, table(settings.Settings, "--")]
    for field in dataclasses.fields(settings.Settings):
        if dataclasses.is_dataclass(group := field.default_factory):
            about = " ".join((inspect.getdoc(group) or "").split())
            parts += [f"## {field.name}\n\n{about}\n", table(group, f"--{field.name}.")]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
