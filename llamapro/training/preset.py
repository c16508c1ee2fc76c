"""Presets and the command line, read into `Settings`; one message names all mistakes."""

import argparse
import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from llamapro import cli
from llamapro.errors import ConfigError, suggest
from llamapro.files import user_path
from llamapro.formatting import flatten
from llamapro.scripts import CONFIGS
from llamapro.training.settings import Settings

T = TypeVar("T")
EXAMPLES = """Trains the new blocks of an expanded LLaMA, or all weights, on text or chats.

Examples:
    llamapro train --config demo --dry-run
    llamapro train --processes 8 --config llama2-7b \\
        --data.train corpus/math corpus/code --data.val code=code.jsonl
    llamapro train --config sft --model.path checkpoints/merged \\
        --data.train chats.jsonl --run-dir runs/instruct

The same command run again resumes.
"""


def parse(
    argv: Sequence[str],
    prog: str = "train.py",
    kind: type[Settings] = Settings,
    description: str = EXAMPLES,
) -> Settings:
    """Reads preset and command line into settings of this kind; `description` heads its help.

    Raises ConfigError if an option is unknown, or the preset is missing, not TOML, or has unknown
    keys or values of a wrong type; SystemExit with status 2 on an impossible value, 0 after --help.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", default="")
    parser.add_argument("--replay.hold", nargs="?", dest="hold")
    preset, hold = vars(parser.parse_known_args(argv)[0]).values()
    default = read_toml(find_preset(preset), kind, hold is None) if preset else kind()
    about = {"description": description, "default": default, "return_unknown_args": True}
    settings, unknown = cli.arguments(kind, argv, prog, **about)
    if unknown:
        raise ConfigError(_hint(unknown[0], kind()))
    return settings


def _hint(word: str, settings: Settings) -> str:
    """Returns what a word that belongs to no option was meant to be."""
    names = {f"--{name.replace('_', '-')}" for name in settings.flat()}
    option = word.partition("=")[0]
    last = option.rpartition(".")[2].lstrip("-")
    if f"--{option.replace('_', '-')}" in names:
        return f"{word}: options begin with two dashes: --{option}"
    if not word.startswith("-"):
        if word.endswith(".toml") or find_preset(word).is_file():
            return f"{word}: a preset is named by --config: --config {word}"
        return f"{word}: belongs to no option; 'llamapro train --help' lists them"
    # The last part says more than the table, which is easily mistaken.
    parts = {name: name.rpartition(".")[2].lstrip("-") for name in names}
    close = difflib.get_close_matches(last, parts.values(), n=1, cutoff=0.8)
    same = sorted(name for name, part in parts.items() if part in close)
    same = [name for name in same if name.rpartition(".")[0] == option.rpartition(".")[0]] or same
    near = same or difflib.get_close_matches(option.replace("_", "-"), names, n=1)
    return f"{option}: no such option" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def find_preset(name: str, suffix: str = ".toml") -> Path:
    """Returns the file of a preset, given as a path or as the name of a bundled one."""
    named = CONFIGS / f"{name}{suffix}"
    path = user_path(name)
    return named if named.is_file() and not path.is_file() else path


def read_toml(
    path: Path,
    kind: type[T] = Settings,  # type: ignore[assignment]
    with_hold: bool = True,
) -> T:
    """Reads a preset into this kind of settings; raises ConfigError with every mistake in it.

    Without its bound, which the command line replaces, nothing follows from that.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        known = [str(p) for p in path.parent.glob("*.toml")]
        known += [p.stem for p in CONFIGS.glob("*.toml")]
        raise ConfigError(f"{path}: no such preset{suggest(str(path), known)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    if not with_hold and isinstance(raw.get("replay"), dict):
        raw["replay"].pop("hold", None)
    wrong: list[str] = []
    known_keys = [*flatten(dataclasses.asdict(kind()))]  # type: ignore[call-overload]
    settings = _build(kind, raw, "", known_keys, wrong)
    if isinstance(settings, Settings) and settings.config:
        wrong.append(f"config is {settings.config!r}, but a preset reads no other: copy its tables")
    if wrong:
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    return settings


def _build(
    kind: Any, raw: dict[str, Any], prefix: str, known_keys: list[str], wrong: list[str]
) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in raw.items():
        name = prefix + key
        if key not in hints:
            elsewhere = [known for known in known_keys if known.endswith(f".{key}")]
            hint = suggest(key, elsewhere, cutoff=0) or suggest(key, list(hints), cutoff=0.5)
            wrong.append(f"unknown key {name!r}{hint}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, dict):
                values[key] = _build(hints[key], value, name + ".", known_keys, wrong)
            else:
                wrong.append(f"{name} is {value!r}, expected a table [{name}]")
        else:
            try:
                values[key] = _convert(value, hints[key])
            except TypeError as error:
                wrong.append(f"{name} is {value!r}, expected {error}")
    return kind(**values)


def _convert(value: Any, hint: Any) -> Any:
    """Returns the value in its annotated type; raises TypeError naming the expected one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise TypeError(" or ".join(map(repr, args)))
        return value
    if origin is tuple:
        size = None if args[-1] is Ellipsis else len(args)
        if not isinstance(value, list) or (size is not None and len(value) != size):
            of = " or ".join(map(repr, typing.get_args(args[0]))) or args[0].__name__
            raise TypeError(f"a list of {size or 'any number of'} {of}")
        return tuple(_convert(item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError(
            {str: "text in quotes", int: "a whole number", float: "a number"}.get(hint, "a bool")
        )
    return value
