"""The `llamapro` command: `llamapro X ...` and `python -m llamapro X ...` run the command X.

A command's module is imported when the command runs, so that `llamapro --help` is fast.
"""

import argparse
import importlib
import os
import shlex
import sys
from typing import Any, NamedTuple

from llamapro import __version__, cli
from llamapro.errors import ConfigError, suggest
from llamapro.files import user_path
from llamapro.scripts import CONFIGS


class Command(NamedTuple):
    """The module of a command's `main(argv, prog)`, and its line in the overview."""

    module: str
    usage: str
    purpose: str


_CONVERT = "llamapro.scripts.convert"
COMMANDS = {
    "expand": Command(_CONVERT, "BASE_DIR OUT_DIR", "insert identity blocks into a checkpoint"),
    "train": Command("llamapro.scripts.train", "--config PRESET", "train the new blocks"),
    "prepare": Command(
        "llamapro.prepare", "--config PRESET [--shard I/N]", "tokenise ahead of training, in parts"
    ),
    "merge": Command(
        _CONVERT, "EXPANDED_DIR BLOCKS... OUT_DIR", "put trained blocks into their base"
    ),
    "strip": Command(_CONVERT, "DIR OUT_DIR", "take the new blocks out again"),
    "adopt": Command(_CONVERT, "DIR OUT_DIR", "record the new blocks that another tool inserted"),
    "from-meta": Command(_CONVERT, "META_DIR OUT_DIR", "convert a Meta release"),
    "from-gguf": Command(_CONVERT, "FILE OUT_DIR", "convert llama.cpp's GGUF, quantised or not"),
    "to-meta": Command(_CONVERT, "DIR OUT_DIR", "write a Meta release"),
    "export": Command(_CONVERT, "DIR FILE.gguf", "write GGUF for llama.cpp"),
    "inspect": Command(_CONVERT, "DIR", "show layers, new blocks, sizes and hashes"),
    "verify": Command(_CONVERT, "DIR", "check every byte, compare logits"),
    "push": Command("llamapro.push", "DIR|BLOCKS OWNER/NAME", "upload a model or new blocks"),
    "generate": Command("llamapro.generate", "DIR --prompt TEXT", "continue a text"),
    "chat": Command("llamapro.generate", "DIR", "answer the turns of a conversation"),
    "evaluate": Command("llamapro.evaluate", "DIR --data FILE...", "measure loss and accuracy"),
    "report": Command("llamapro.report", "RUN_DIR...", "compare runs: a table and a picture"),
    "presets": Command(__name__, "[copy NAME FILE]", "list the training presets, or copy one"),
}


def overview() -> str:
    """Returns the text of `llamapro --help`: one line per command."""
    rows = [(f"{name} {command.usage}", command.purpose) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    lines = "\n".join(f"  {usage:<{width}}  {purpose}" for usage, purpose in rows)
    return (
        "usage: llamapro COMMAND ...\n\n"
        "Expand a LLaMA with identity blocks, train only those, and merge them.\n\n"
        f"{lines}\n\n"
        "'llamapro COMMAND --help' shows all options of a command."
    )


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits with its status; an unknown command exits with 2."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        cli.run(lambda: print(overview()))
    if name == "--version":
        cli.run(lambda: print(__version__))
    if name == "train":  # whose threads may abort the interpreter's teardown
        cli.run(lambda: run_command(name, rest), leave=os._exit)
    cli.run(lambda: run_command(name, rest))


def run_command(name: str, argv: list[str]) -> None:
    """Imports a command's module and runs its `main`; ConfigError if there is no such command."""
    if name not in COMMANDS:
        raise ConfigError(
            f"llamapro {name}: no such command{suggest(name, list(COMMANDS))}; "
            "'llamapro --help' lists them"
        )
    module = COMMANDS[name].module
    if name == "presets":
        presets(argv)
    elif module == _CONVERT:  # whose own subcommands these are
        importlib.import_module(module).main([name, *argv], prog="llamapro")
    else:
        main = "main_chat" if name == "chat" else "main"
        getattr(importlib.import_module(module), main)(argv, prog=f"llamapro {name}")


def presets(argv: list[str]) -> None:
    """Lists the presets of `llamapro train`, or copies one to a file to be edited."""
    purpose = "List the presets of 'llamapro train', or copy one to a file."
    parser = argparse.ArgumentParser(prog="llamapro presets", description=purpose)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    actions = parser.add_subparsers(dest="action", metavar="[copy NAME FILE]")
    copy = actions.add_parser("copy", help="copy a preset to a file")
    same: Any = {"action": "store_true", "default": argparse.SUPPRESS}
    copy.add_argument("--json", **same, help="print one JSON object")
    copy.add_argument("name", metavar="NAME", help="a preset that 'llamapro presets' lists")
    copy.add_argument("file", metavar="FILE", help="the file to create")
    args = parser.parse_args(argv)
    texts = {file.stem: file.read_text("utf-8") for file in sorted(CONFIGS.glob("*.toml"))}
    if args.action is None:
        purposes = {name: text.partition("\n")[0].lstrip("# ") for name, text in texts.items()}
        lines = [f"{name:<12} {purpose}" for name, purpose in purposes.items()]
        cli.print_result({"presets": purposes}, args.json, "\n".join(lines))
        return
    if args.name not in texts:
        hint = suggest(args.name, list(texts)) or f" (there are: {', '.join(texts)})"
        raise ConfigError(f"{args.name}: no such preset{hint}")
    args.file = user_path(args.file)
    try:
        with open(args.file, "x", encoding="utf-8") as file:
            file.write(texts[args.name])
    except OSError as error:
        raise ConfigError(f"{args.file}: cannot be written: {error.strerror}") from None
    then = f"llamapro train --config {shlex.quote(str(args.file))} --dry-run"
    cli.print_result({"file": str(args.file)}, args.json, f"wrote {args.file}\nnext: {then}")


if __name__ == "__main__":
    main()
