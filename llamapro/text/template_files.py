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
DEFAULT_FILE = "additional_chat_templates/default.jinja"
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

    Raises DataError if there is no template, or it cannot be read.

    Args:
        directory: holds `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`; the
            one named "default" is taken from a list.
        template: a name in `BUILT_IN`, the name of one of the model's own templates, or a .jinja
            file to use instead.
    """
    if template in BUILT_IN:
        return Found(BUILT_IN[template], template, is_built_in=True)
    if template and isinstance(source := _all_named(directory).get(template), str):
        return Found(source, f"{directory}: the chat template {template!r}")
    known, stored = ", ".join(BUILT_IN), None if template else _stored(directory)
    file = user_path(template) if template else Path(directory, _FILE)
    has_file = Path(directory, TOOLS_FILE).exists()
    if not template and (other := Path(directory, DEFAULT_FILE)).exists():
        file = other  # as in transformers
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
        return Found(source, str(file), has_other=not template and has_file)
    if stored is None and (named := _named(directory)):
        raise DataError(
            f"{Path(directory, _CONFIG)}: chat_template has {', '.join(named)}, and none is named "
            f"'default'; name the right one, a .jinja file, or one of {known}"
        )
    if not isinstance(stored, str):
        raise DataError(
            f"{directory}: the model has no chat template ({_FILE}, or chat_template in "
            f"{_CONFIG}); give a .jinja file or one of {known}"
        )
    has_other = has_file or _stored(directory, FOR_TOOLS) not in (None, stored)
    return Found(stored, str(Path(directory, _CONFIG)), has_other=has_other)


def own_template(directory: str | Path) -> str | None:
    """Returns the source of a model's own chat template, None if its directory has none."""
    files = [Path(directory, name) for name in (DEFAULT_FILE, _FILE)]
    file = next((file for file in files if file.exists()), None)
    return file.read_text("utf-8", "replace") if file else _stored(directory) or None


def _stored(directory: str | Path, name: str = "default") -> Any:
    """Returns the template in tokenizer_config.json, the one of this name of several."""
    stored = read_object(Path(directory, _CONFIG)).get("chat_template")
    return _named(directory).get(name) if isinstance(stored, (list, dict)) else stored


def _all_named(directory: str | Path) -> dict[str, Any]:
    """Returns the model's templates by name, those in files of their own, too."""
    files = Path(directory, TOOLS_FILE).parent.glob("*.jinja")
    return _named(directory) | {file.stem: file.read_text("utf-8", "replace") for file in files}


def _named(directory: str | Path) -> dict[str, Any]:
    """Returns the templates in tokenizer_config.json by name, if it has several."""
    stored = read_object(Path(directory, _CONFIG)).get("chat_template")
    if isinstance(stored, list):
        named = (e for e in stored if isinstance(e, dict) and isinstance(e.get("name"), str))
        stored = {e["name"]: e.get("template") for e in named}
    return stored if isinstance(stored, dict) else {}
