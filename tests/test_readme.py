"""The README and the pages beside it speak of what is there: files, commands, options, messages."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro.__main__ import COMMANDS, run_command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.meta import to_meta

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
    if path.name != "CHANGELOG.md"  # which names what has gone
}
OTHERS = {  # options of programs that are not ours
    "torchrun": {"--nproc-per-node", "--nnodes", "--max-restarts", "--config", "--run-dir"}
    | {"--rdzv-endpoint", "--rdzv-backend", "--rdzv-id", "--data.train", "--data.cache-dir"}
    | {"--signals-to-handle"},
    "llama.cpp/convert_hf_to_gguf.py": {"--outfile", "--outtype"},
    "sbatch": {"--nodes", "--dependency", "--signal", "--config", "--data.train"},
    "lm_eval": {"--model", "--model_args", "--batch_size", "--device", "--tasks", "--num_fewshot"}
    | {"--confirm_run_unsafe_code"},
}


def blocks(language: str = "", text: str | None = None) -> list[str]:
    """The fenced blocks of a language, in a text or in all pages."""
    text = "\n".join(PAGES.values()) if text is None else text
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(page: str | None = None, name: str = "") -> list[list[str]]:
    """The words of every command line in the fenced blocks; continued lines are one."""
    found = blocks(text=page)
    text = "".join(block for block in found if not block.startswith(("@", "--")))
    lines = re.sub(r"^[A-Z_]+=\S+ ", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines.splitlines()]
    return [line for line in words if not name or line[0] == name]


def help_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> set[str]:
    """The options in what a command prints when it is asked for --help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        call(*args, **kwargs)
    assert not end.value.code
    return options(output.getvalue())


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?", text))


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """The options that each command and each script knows, from its own help text."""
    known = {name: help_of(run_command, name, ["--help"]) for name in COMMANDS}
    text = "".join(PAGES.values())
    for script in set(re.findall(r"python ((?:experiments|benchmarks)/\w+\.py)", text)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, "--help"])
            patch.syspath_prepend(ROOT / Path(script).parent)
            known[script] = help_of(runpy.run_path, str(ROOT / script), run_name="__main__")
    return known | OTHERS


# ---- Names --------------------------------------------------------------------------------------


def test_file_map_lists_every_module() -> None:
    """Each room's row names its modules, all of them, and nothing that is not there."""
    page = PAGES[DOCS / "architecture.md"]
    rows = dict(re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", page, re.MULTILINE))
    for room in ("llamapro/", *(f"{p.parent.relative_to(ROOT)}/" for p in rooms()), "kernels/"):
        modules = {file.name for file in (ROOT / room).glob("*.py")} - {"__init__.py"}
        named = set(re.findall(r"`(\w+\.py)`", rows[room]))
        assert named == modules, room


def rooms() -> list[Path]:
    return sorted((ROOT / "llamapro").glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_it_names_exists(page: Path) -> None:
    """This holds for paths of the repository, not for outputs of commands and paths of yours."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."} - {
        "checkpoints",
        "runs",
    }
    for path in re.findall(r"(?<![\w/.*-])([\w.-]+(?:/[\w.-]+)*/?)(?![\w*/])", PAGES[page]):
        if path.partition("/")[0] in folders and "/" in path:
            assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"^make ([\w-]+)", PAGES[page], re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), target


def test_every_module_that_the_architecture_names_exists() -> None:
    """There a module is named by its room, `text/store.py`, without the package before it."""
    above_the_map = PAGES[DOCS / "architecture.md"].partition("## Files")[0]
    for path in re.findall(r"`(\w+(?:/\w+)*\.py)`", above_the_map):
        assert (ROOT / path).exists() or (ROOT / "llamapro" / path).exists(), path


def test_every_option_they_name_exists(known: dict[str, set[str]]) -> None:
    """A renamed option would leave a sentence that is not true."""
    named = options("\n".join(PAGES.values()))
    assert named <= set().union(*known.values(), {"--help", "--strict"})


def test_every_command_line_is_one_that_its_command_takes(known: dict[str, set[str]]) -> None:
    """Each command exists, and each option in its line is one of its own."""
    for words in commands():
        given = {word for word in words if word.startswith("--")}
        if words[0] in ("llamapro", "python"):
            assert given <= known[words[1]], words
        elif words[0] in OTHERS:
            assert given <= known[words[0]], words
        else:
            assert not given or "/" in words[0], words


def test_every_command_has_its_row() -> None:
    """The table of commands names them all."""
    cells = " ".join(re.findall(r"^\| (.*?) \|", PAGES[DOCS / "commands.md"], re.MULTILINE))
    named = set(re.findall(r"`(?:llamapro )?([a-z-]+)`", cells))
    assert named == set(COMMANDS)


def test_every_message_in_the_table_of_troubles_is_one_of_ours() -> None:
    """Whoever looks for a message finds it in the words in which it is printed."""
    files = [*ROOT.glob("*.py"), *(ROOT / "llamapro").rglob("*.py"), *ROOT.glob("experiments/*.py")]
    literals = "\n".join(
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    table = PAGES[DOCS / "troubleshooting.md"]
    for cell in re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE):
        for message in re.findall(r"`(.+?)`", cell):
            for part in re.split(r"\.\.\.|KEY a -> b|\bN ", message):
                assert part.strip(" ()") in literals, message


def test_settings_are_listed_as_the_code_has_them() -> None:
    """`python docs/make_settings.py` writes the page."""
    page = runpy.run_path(str(DOCS / "make_settings.py"))["page"]
    assert PAGES[DOCS / "settings.md"] == page()


def test_the_first_page_is_short_and_every_page_is_in_the_site() -> None:
    """At most 200 lines, and each page of docs/ stands in the navigation."""
    assert len(README.splitlines()) <= 200
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r" (\w+\.md)$", site, re.M))


def test_the_method_is_as_short_as_it_says() -> None:
    """Whoever makes it longer says so."""
    limits = dict(re.findall(r"`([\w/]+\.py)` \([^)]*?at most (\d+)", README))
    assert limits
    for file, limit in limits.items():
        assert len((ROOT / file).read_text().splitlines()) <= int(limit), file


# ---- Examples -----------------------------------------------------------------------------------


def test_the_paper_is_shown_as_the_example_has_it() -> None:
    """Word for word."""
    example = (ROOT / "examples" / "paper_in_15_lines.py").read_text(encoding="utf-8")
    assert example in blocks("python")


def run_lines(lines: list[list[str]], **names: str) -> str:
    """Runs lines of `llamapro`, with other words for some of theirs; returns standard output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for _, command, *rest in lines:
            run_command(command, [names.get(word, word) for word in rest])
    return output.getvalue()


def test_the_way_of_a_model_of_yours_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """The README's commands, and those of shared blocks, as they are printed, on a small model.

    Training alone is cut short: one process, two steps.
    """
    small = {"hidden_size": 16, "intermediate_size": 16}
    base = write_random_checkpoint(tmp_path / "hf", tiny_config(num_hidden_layers=8, **small))
    to_meta(base, tmp_path / "llama-2-7b")
    monkeypatch.chdir(tmp_path)
    for name in ("corpus/math/a.txt", "corpus/code/a.txt", "held-out/general.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("Once upon a time there was a number. " * 200)
    Path("held-out/code.jsonl").write_text('{"text": "def f(x): return x"}\n' * 50)
    from_meta, expand, train, *rest = commands(README, "llamapro")
    assert [words[1] for words in (from_meta, expand, train)] == ["from-meta", "expand", "train"]
    at = train.index("--processes")
    train = [*train[:at], *train[at + 2 :]]
    said = run_lines([from_meta, expand, [*train, "--dry-run"]])
    assert "bit-equal to the base's" in said and said.count("\nnext: ") == 3
    assert "15900" in said or "15,900" in said
    short = "--train.steps 2 --train.batch-size 2 --train.micro-batch-size 1 --data.seq-len 32 "
    short += "--eval.sequences 2"
    assert [words[1] for words in rest] == ["merge", "evaluate", "report"]
    said = run_lines([[*train, *short.split(), "--data.cache-dir", "cache"], *rest])
    assert "2 steps done" in said and "base tensors intact" in said and "learned" in said
    assert said.count("\nnext: ") == 3  # all but the report
    (file,) = Path("runs").rglob("trainable.safetensors")
    names = {"BASE": "checkpoints/llama2-7b", "trainable.safetensors": str(file), "OUT": "again"}
    names |= {"runs/code": "runs/llama2-7b-pro", "OWNER/NAME": "jo/llama-pro"}
    export, *shared = commands(PAGES[DOCS / "using.md"], "llamapro")
    assert export[1] == "export"  # which needs llama.cpp's converter
    assert [words[1] for words in shared] == ["generate", "merge", "push", "push"]
    shared[3].append("--dry-run")
    said = run_lines(shared, **names)
    assert "def square(" in said and "--blocks hf://jo/llama-pro" in said
    assert Checkpoint.open("again").sha256() == Checkpoint.open("checkpoints/merged").sha256()
