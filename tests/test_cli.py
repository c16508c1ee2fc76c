"""Exit status, messages and cleaning up, which all commands share; and the command llamapro."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llamapro import __main__ as console
from llamapro import __version__, cli
from llamapro.__main__ import COMMANDS

# Output to a pipe is buffered and the process is no rank, whatever started the tests.
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "PYTHONUNBUFFERED")
}


def script(body: str) -> list[str]:
    """A command whose `main` has this body."""
    text = (
        "import signal, sys, time\n"
        "from llamapro import cli\n"
        "from llamapro.errors import CheckpointError, ConfigError, DataError\n"
        "def main():\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\ncli.run(main)\n"
    )
    return [sys.executable, "-c", text]


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(body), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=60
    )


@contextmanager
def started(body: str) -> Iterator[subprocess.Popen[str]]:
    """The command, once it has printed its first line."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        script(body), env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


WAITS = """
try:
    print("ready", flush=True)
    while True:  # signal.pause() waits for ever if the signal came just before it
        time.sleep(0.05)
finally:
    print("cleaned up", flush=True)
"""


def test_success_exits_0_with_the_result_alone() -> None:
    """Standard output has what the command printed and nothing else."""
    done = run("print('result')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")


def test_a_value_of_any_length_leaves_a_short_message() -> None:
    """The file's name and the fix stay; what lies between is left out."""
    done = run("raise DataError('x.json: ' + 'a' * 500_000 + '; remove it')")
    assert done.returncode == 2 and len(done.stderr) < 2000
    assert done.stderr.startswith("DataError: x.json: aaa") and done.stderr.endswith(
        "; remove it\n"
    )


@pytest.mark.parametrize("kind", ["ConfigError", "CheckpointError", "DataError"])
def test_users_mistake_is_one_line_and_exit_2(kind: str) -> None:
    """Kind and message on one line of standard error, no traceback, nothing on standard output."""
    done = run(f"raise {kind}('x.json: hidden_size is 0, expected more')")
    assert done.returncode == 2
    assert done.stderr == f"{kind}: x.json: hidden_size is 0, expected more\n"
    assert done.stdout == ""


def test_programmers_mistake_keeps_its_traceback() -> None:
    """An error that is not the user's fault does not look as if it were."""
    done = run("raise KeyError('oops')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'oops'" in done.stderr


def test_one_rank_tells_and_all_exit_2() -> None:
    """Under torchrun, rank 0 prints the message; the others are silent with the same status."""
    body = "raise ConfigError('once')"
    first, second = (run(body, RANK=rank, LOCAL_RANK=rank) for rank in "01")
    assert (first.returncode, second.returncode) == (2, 2)
    assert (first.stderr, second.stderr) == ("ConfigError: once\n", "")


@pytest.mark.parametrize(
    "environment", [{"LOCAL_RANK": "3"}, {"RANK": "0", "LOCAL_RANK": "first"}], ids=["alone", "bad"]
)
def test_no_mistake_is_silent_because_of_a_variable(environment: dict[str, str]) -> None:
    """Only a rank that another one of its machine speaks for says nothing."""
    body = "from llamapro.errors import warn\nwarn('a')\nraise ConfigError('once')"
    assert run(body, **environment).stderr == "warning: a\nConfigError: once\n"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_output_is_no_error(descriptor: int) -> None:
    """As after '>&-'."""
    command = [*script("print('ready')"), "closed"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {descriptor}>&-', "sh", *command], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_behind_standard_output_is_one_message() -> None:
    """It has no name; nothing is kept for the interpreter's end."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            script("print('a', flush=True)"), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "standard output: No space left on device\n")


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
def test_signals_clean_up_and_tell_in_one_line(
    number: signal.Signals, status: int, message: str
) -> None:
    """Ctrl-C and SIGTERM run `finally`, so that partial output is removed, and say so briefly."""
    with started(WAITS) as process:
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (status, "cleaned up\n", message)


def test_reader_that_goes_away_is_no_error() -> None:
    """The command ends soon, as in `command | head -1`, and prints nothing on standard error."""
    with started("print('ready', flush=True)\nwhile True:\n    print('x' * 1000)") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == ""


def test_reader_that_goes_away_before_the_last_flush_is_no_error() -> None:
    """Output still buffered when `main` returns meets the closed pipe silently, too."""
    with started("print('ready', flush=True)\nprint('kept back')\nsys.stdin.read()") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == ""


def test_result_is_text_or_one_json_object() -> None:
    """`print_result` prints the text for people, or the object on one line for machines."""
    body = "cli.print_result({'loss': 1.5, 'name': 'größe'}, %s, 'loss 1.5')"
    assert run(body % False).stdout == "loss 1.5\n"
    printed = run(body % True).stdout
    assert json.loads(printed) == {"loss": 1.5, "name": "größe"}
    assert printed.count("\n") == 1


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    """A perplexity that overflows is null, wherever it stands."""
    cli.print_result({"a": [float("inf"), {"b": float("nan")}], "c": 1.5}, True, "")
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}], "c": 1.5}


def test_the_first_process_of_another_machine_tells_its_own_mistake() -> None:
    """A file that only it lacks; the others of the machine are silent."""
    body = "raise ConfigError('no such file')"
    second = run(body, RANK="8", LOCAL_RANK="0")
    assert second.returncode == 2 and second.stderr.startswith("rank 8 on ")
    assert run(body, RANK="9", LOCAL_RANK="1").stderr == ""


# ---- The command llamapro ----------------------------------------------------------------------


def test_help_lists_every_command_with_its_purpose(
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    """One line each; no arguments at all ask for help, too."""
    for arguments in ((), ("--help",), ("-h",)):
        status, shown, _ = run_command(console.main, *arguments)
        assert status == 0 and shown.startswith("usage: llamapro COMMAND")
        lines = shown.splitlines()
        assert all(sum(line.startswith(f"  {name} ") for line in lines) == 1 for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_text_of_one_form(
    name: str, run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usage names the command as it was called; a line is full, or ends a sentence."""
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, _ = run_command(console.main, name, "--help")
    assert status == 0 and shown.lstrip().startswith(f"usage: llamapro {name} ")
    assert ("Hold a conversation" in shown.split("options")[0]) == (name == "chat")
    about, *boxes = shown.partition("\n\n")[2].split("╭")
    assert max(map(len, about.splitlines()), default=0) <= 88
    for line, following in pairwise("".join(boxes).splitlines()):
        text, more = line.strip("│").rstrip(), following.strip("│").rstrip()
        column = len(more) - len(more.lstrip())
        if column > 4 and text[column - 1 : column] == " " and text[column:].strip():
            is_full = len(f"{text} {more.split()[0]}") > 76
            assert is_full or text.endswith("."), (text, more)


def test_unknown_command_suggests_the_nearest(
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    """Exit status 2 and one line."""
    status, shown, message = run_command(console.main, "genarate")
    assert (status, shown) == (2, "")
    assert "did you mean 'generate'?" in message and message.count("\n") == 1


def test_presets_are_listed_and_copied(
    root: Path,
    tmp_path: Path,
    run_command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A preset is copied by name; an existing file is never overwritten."""
    _, shown, _ = run_command(console.main, "presets", "--json")
    names = {file.stem for file in (root / "configs").glob("*.toml")}
    assert json.loads(shown)["presets"].keys() == names
    copy = ("presets", "copy", "sft", tmp_path / "mine.toml")
    assert run_command(console.main, *copy)[0] == 0
    assert (tmp_path / "mine.toml").read_text() == (root / "configs" / "sft.toml").read_text()
    assert "cannot be written" in run_command(console.main, *copy)[2]
    other = str(tmp_path / "an other.toml")
    _, shown, _ = run_command(console.main, *copy[:-1], other, "--json")
    assert json.loads(shown) == {"file": other}
    _, shown, _ = run_command(console.main, *copy[:-1], tmp_path / "it's mine.toml")
    assert shlex.split(shown.partition("next: ")[2])[3] == str(tmp_path / "it's mine.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    run_command(console.main, *copy[:-1], "~/home.toml")
    assert (tmp_path / "home.toml").exists()
    status, _, message = run_command(console.main, "presets", "copy", "stf", tmp_path / "x")
    assert status == 2 and "did you mean 'sft'?" in message


def test_the_preset_of_a_base_needs_no_clone(
    tmp_path: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    """Its configuration is found from any directory, by name."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Once upon a time there was a number. " * 500)
    options = ["--data.train", "text.txt", "--data.val", "text=text.txt", "--dry-run"]
    options += ["--config", "demo-base", "--model.tokenizer", tokenizer_file]
    train = partial(console.run_command, "train")
    status, shown, message = run_command(train, *options)
    assert status == 0 and "demo-base" in shown, message


def test_the_overview_is_fast(root: Path) -> None:
    """`python -m llamapro` imports no torch."""
    script = "import sys, llamapro.__main__ as m; print(m.overview()); assert 'torch' not in "
    done = subprocess.run(
        [sys.executable, "-c", script + "sys.modules"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "llamapro", "--version"], cwd=root, capture_output=True, text=True
    )
    assert done.stdout == f"{__version__}\n"


@pytest.mark.slow
def test_a_wheel_carries_the_commands_and_the_presets(root: Path, tmp_path: Path) -> None:
    """Unpacked far from the clone, it lists presets, plans a run by name and explains expand."""
    source, site = tmp_path / "source", tmp_path / "site"
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "docs", "demo-out")
    shutil.copytree(root, source, ignore=skipped)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"llamapro"}
    carried = {"scripts/train.py", "scripts/convert.py", "configs/llama2-7b.toml", "py.typed"}
    assert {f"llamapro/{name}" for name in carried} <= names

    def llamapro(*arguments: str) -> str:
        environment = ENVIRONMENT | {"PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "llamapro", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    assert "llama2-7b" in llamapro("presets")
    assert "usage: llamapro expand" in llamapro("expand", "--help")
    assert "data.train is empty" in llamapro("train", "--config", "llama2-7b", "--dry-run")
    # Its configuration is carried along; the tokenizer is made by the demo.
    assert "demo-out/tokenizer: no such" in llamapro("train", "--config", "demo-base", "--dry-run")


def test_bytes_that_are_no_utf_8_are_one_message(
    run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would fail later, where the run's files name what it was made of."""
    monkeypatch.setattr(sys, "argv", ["train.py", os.fsdecode(b"corpus-\xff.txt")])
    status, _, said = run_command(lambda _: None)
    assert status == 2
    assert "'corpus-\\udcff.txt' on the command line is not UTF-8" in said


def test_an_error_of_the_file_system_is_one_message(run_command: Callable[..., Any]) -> None:
    """Wherever it comes, with the file's name; one without a name is a mistake of ours."""

    def main(_: list[str]) -> None:
        Path("/nowhere/file").read_text()

    assert run_command(main) == (2, "", "/nowhere/file: No such file or directory\n")


@pytest.mark.parametrize(
    ("limits", "status", "message"),
    [((40, 200), 0, ""), ((40, 40), 2, "Too many open files: allow this process more, ")],
    ids=["soft", "hard"],
)
def test_a_command_may_open_as_many_files_as_the_system_allows(
    limits: tuple[int, int], status: int, message: str
) -> None:
    """A model of a thousand tensors needs as many; beyond the system's limit it is one message."""
    code = f"import os, resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits}); "
    code += "from llamapro import cli; cli.run(lambda: [os.dup(0) for _ in range(99)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.partition("'")[0]) == (status, message)


def test_a_machine_without_a_temporary_directory_is_told_what_to_set(
    run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose disk cannot be written."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    status, _, message = run_command(lambda *_, **__: tempfile.gettempdir())
    assert (status, message.strip()) == (
        2,
        "No usable temporary directory found in ['/proc']: set TMPDIR",
    )
