"""`--processes N` starts the ranks: one message for a mistake, and a signal saves and stops."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamapro import cli
from llamapro.checkpoints.run import training_checkpoints
from llamapro.errors import DataError
from llamapro.training.launcher import launch
from llamapro.training.preemption import KINDS


@pytest.fixture
def launch_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """`launch_ranks(code)` launches two ranks whose main function is this code."""
    handlers = {number: signal.getsignal(number) for number in KINDS}
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")  # `launch` sets it
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    monkeypatch.setattr(log, "disabled", log.disabled)

    def launch_ranks(code: str) -> int:
        script = tmp_path / "script.py"
        head = "import os, sys\nfrom llamapro import cli\nfrom llamapro.errors import DataError\n"
        body = textwrap.indent(textwrap.dedent(code), "    ")
        script.write_text(f"{head}def main():\n{body}\ncli.run(main)\n")
        return launch(str(script), ["word"], 2)

    yield launch_ranks
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_ranks_get_the_arguments_and_their_places(
    launch_ranks: Callable[[str], int], tmp_path: Path
) -> None:
    """All succeed: exit status 0."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    code = f"""
        words = [*sys.argv[1:], *(os.environ[name] for name in {names})]
        open({str(tmp_path)!r} + "/rank-" + os.environ["RANK"], "w").write(" ".join(words))
    """
    assert launch_ranks(code) == 0
    assert (tmp_path / "rank-0").read_text() == "word 0 0 2 2"
    assert (tmp_path / "rank-1").read_text() == "word 1 1 2 2"


def test_a_mistake_is_one_message_and_exit_status_2(
    launch_ranks: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one that only the ranks find; there is no traceback and no report."""
    assert launch_ranks('raise DataError("corpus: no such file")') == 2
    assert capfd.readouterr() == ("", "DataError: corpus: no such file\n")


def test_a_rank_that_fails_otherwise_is_named_with_its_exit_status(
    launch_ranks: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """A status becomes that of the launcher; after a signal the run can be continued."""
    assert launch_ranks('os._exit(7 if os.environ["RANK"] == "1" else 0)') == 7
    assert capfd.readouterr().err == "rank 1 ended with exit status 7\n"
    assert launch_ranks('os.kill(os.getpid(), 9) if os.environ["RANK"] == "0" else None') == 2
    assert capfd.readouterr().err == (
        "rank 0 was killed by signal 9 (the machine may lack memory); the same command continues "
        "the run\n"
    )


def test_ctrl_c_saves_and_one_result_is_printed(root: Path, pro: Path, tmp_path: Path) -> None:
    """The signal reaches every rank, even if only the launcher got it. Standard output is the main
    rank's JSON object, and no other program writes to standard error."""
    run = tmp_path / "run"
    command = [sys.executable, str(root / "train.py"), "--json", "--processes", "2"]
    command += ["--model.path", str(pro), "--data.train", os.__file__, "--data.seq-len", "32"]
    command += ["--data.cache-dir", str(tmp_path / "cache"), "--run-dir", str(run)]
    command += ["--train.batch-size", "2", "--train.device", "cpu", "--train.steps", "100000"]
    command += ["--eval.every", "100000", "--save.every", "100000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as done:
        assert done.stderr is not None and done.stdout is not None
        told = []
        for line in done.stderr:
            told.append(line)
            if line.strip().startswith("1/100000 "):
                break
        done.send_signal(signal.SIGINT)
        rest = done.stderr.read()
        result = json.loads(done.stdout.read())
    assert done.returncode == 0, rest
    assert result["stopped"] and result["step"] >= 1
    assert rest.count("SIGINT: saving and stopping") == rest.count("  saved ") == 1
    assert "OMP_NUM_THREADS" not in "".join(told) and "***" not in "".join(told)
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    (path,) = training_checkpoints(run)
    assert path.name == f"step-{result['step']:08d}"


def test_a_rank_writes_its_message_where_torchrun_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank does, because torchrun ends the others as soon as the first one has failed."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def fail() -> None:
        raise DataError("corpus: no such file")

    with pytest.raises(SystemExit) as caught:
        cli.run(fail)
    assert caught.value.code == 2
    failure = ProcessFailure(1, 0, 2, str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "DataError: corpus: no such file"
    assert failure.timestamp > 0
