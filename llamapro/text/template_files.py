"""Where a chat template comes from: the model's files, a .jinja file, or `BUILT_IN`."""

from pathlib import Path
from typing import Any, NamedTuple

from llamapro.errors import DataError, warn
from llamapro.files import user_path
from llamapro.text.token_files import read_object

# From the public descriptions of the formats by Meta, Mistral and OpenAI.
BUILT_IN = {
    name: (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("llama2", "llama3", "mistral", "chatml")
}
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
FOR_TOOLS = "tool_use"  # transformers' names
TOOLS_FILE = f"additional_chat_templates/{FOR_TOOLS}.jinja"


class Found(NamedTuple):
    """A template's `source`, and the `origin` that messages name.

    `has_other` says whether the model has another one for conversations with tools.
    """

    source: str
    origin: str
    is_built_in: bool = False
    has_other: bool = False


def find_template(directory: str | Path, template: str = "") -> Found:
    """Finds the chat template of a model, or the one that the user named.

    Args:
        directory: holds `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`; the
            one named "default" is taken from a list.
        template: a name in `BUILT_IN` or a .jinja file to use instead.

    Raises:
        DataError: there is no template, or it cannot be read.
    """
    if template in BUILT_IN:
        return Found(BUILT_IN[template], template, is_built_in=True)
    known, stored = ", ".join(BUILT_IN), None if template else _stored(directory)
    file = user_path(template) if template else Path(directory, _FILE)
    if template or file.exists():
        try:
            # A user's file may begin with a byte order mark; a model's is read as by transformers.
            source = file.read_text(encoding="utf-8-sig" if template else "utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DataError(
                f"{file}: the chat template cannot be read: {reason}; built-in: {known}"
            ) from None
        if (stored or source) != source:
            warn(f"{file}: taken, as in transformers; {_CONFIG} has another one")
        others = Path(directory, TOOLS_FILE)
        return Found(source, str(file), has_other=not template and others.exists())
    if not isinstance(stored, str):
        raise DataError(
            f"{directory}: the model has no chat template ({_FILE}, or chat_template in "
            f"{_CONFIG}); give a .jinja file or one of {known}"
        )
    has_other = _stored(directory, FOR_TOOLS) not in (None, stored)
    return Found(stored, str(Path(directory, _CONFIG)), has_other=has_other)


def own_template(directory: str | Path) -> str | None:
    """Returns the source of a model's own chat template, None if its directory has none."""
    file = Path(directory, _FILE)
    return file.read_text("utf-8", "replace") if file.exists() else _stored(directory) or None


def _stored(directory: str | Path, name: str = "default") -> Any:
    """Returns the template in tokenizer_config.json, the one of this name of several."""
    stored = read_object(Path(directory, _CONFIG)).get("chat_template")
    if isinstance(stored, list):
        named = (e for e in stored if isinstance(e, dict) and isinstance(e.get("name"), str))
        stored = {e["name"]: e.get("template") for e in reversed([*named])}
    return stored.get(name) if isinstance(stored, dict) else stored
