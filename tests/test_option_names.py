"""What a message says to do can be done: an option that it names is one of the same command.

Every option of every command is given wrong values, and so is every file that it reads.
"""

import ast
import importlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llamapro.__main__ import COMMANDS
from llamapro.errors import UserError, warn

OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]")
# "llamapro from-meta needs --x" names the other command, and so does "next: llamapro train --x".
OTHER = re.compile(r"(?:next: |')llamapro ([a-z-]+)(?:[^'\n]*$|[^']*'[^;]*)", re.MULTILINE)
Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call(command, *arguments)`: all that a command says, and its error, in this process."""
    monkeypatch.setenv("COLUMNS", "400")

    def called(name: str, *arguments: object) -> str:
        warn.cache_clear()
        module, words = importlib.import_module(COMMANDS[name].module), list(map(str, arguments))
        main: Any = {"chat": "main_chat", "presets": "presets"}.get(name, "main")
        error = ""
        try:
            if COMMANDS[name].module.endswith("convert"):
                module.main([name, *words], "llamapro")
            elif name == "presets":
                module.presets(words)
            else:
                getattr(module, main)(words, prog=f"llamapro {name}")
        except SystemExit:
            pass
        except UserError as raised:
            error = str(raised)
        return "".join([*capsys.readouterr(), error])

    return called


@pytest.fixture
def words(
    tmp_path: Path, tiny_config: Any, write_random_checkpoint: Any, monkeypatch: Any
) -> Callable[[str], list[list[str]]]:
    """`words(command)`: right and wrong arguments in place of the words of its usage."""
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint = write_random_checkpoint(tmp_path / "model", tiny_config(num_hidden_layers=1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"content": "not the text key"}) + "\n")
    infinite = Path(shutil.copytree(checkpoint, tmp_path / "infinite"))
    tensors = load_file(infinite / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = math.inf
    save_file(tensors, infinite / "model.safetensors")

    def made(name: str) -> list[list[str]]:
        usage = COMMANDS[name].usage.replace("...", "").split()
        found = []
        for path in (checkpoint, infinite, tmp_path / "nowhere", rows):
            known = {"OUT_DIR": tmp_path / "out", "TEXT": "x", "PRESET": "demo-base", "FILE": rows}
            found.append([str(known.get(w, path) if w.isupper() else w) for w in usage])
        if name == "train":
            found = [[*found[0], "--model.config=", f"--model.path={checkpoint}", "--dry-run"]]
            found[0] += [f"--data.train={rows}"]
        needed = {"expand": ["--num-new-blocks=1"], "generate": ["--max-new-tokens=1"]}
        return [[*arguments, *needed.get(name, [])] for arguments in found]

    return made


def options_of(text: str) -> dict[str, bool]:
    """Returns the options in a help text, and whether each takes a value."""
    found = re.findall(r"(?<!\S)(--[a-z][\w.-]*)(?: ([A-Z{\[]))?", text)
    return {option: bool(value) for option, value in reversed(found)}  # the first: its own line


def named(text: str, own: set[str], call: Call) -> Iterator[str]:
    """Yields the options in a message that are not those of its command, or of one it names."""
    for other in OTHER.finditer(text):
        known = options_of(call(other[1], "--help")) if other[1] in COMMANDS else {}
        yield from (o for o in OPTION.findall(other[0]) if o not in own and o not in known)
    yield from (o for o in OPTION.findall(OTHER.sub("", text)) if o not in own)


SLOW = pytest.param("train", marks=pytest.mark.slow)  # it has 65 options


@pytest.mark.parametrize("name", [SLOW if name == "train" else name for name in COMMANDS])
def test_a_message_names_options_of_its_own_command(
    name: str, call: Call, words: Callable[[str], list[list[str]]]
) -> None:
    """Whatever option is wrong, and whatever a file holds."""
    options = options_of(call(name, "--help"))
    own = {*options, "--help"}
    right, *wrong = words(name)
    said = [call(name, *arguments) for arguments in wrong]
    for option, takes_value in options.items():
        said.append(call(name, *right, option, *(["-1"] if takes_value else [])))
    said.append(call(name, *right))
    assert len("".join(said)) > 100
    assert not {found for text in said for found in named(text, own, call)}


def test_an_option_that_the_sources_name_exists(call: Call, root: Path) -> None:
    """In some command: no message outlives the option that it names."""
    known = {o for name in COMMANDS for o in options_of(call(name, "--help"))} | {
        "--help",
        "--version",
        *("--outfile", "--outtype"),  # of llama.cpp's converter
    }
    for file in [*root.glob("llamapro/**/*.py"), root / "convert.py", root / "train.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and "torchrun" not in node.value:
                assert {*OPTION.findall(node.value)} <= known, f"{file}:{node.lineno}"
