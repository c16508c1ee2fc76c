"""`--processes N` starts the ranks: one message for a mistake, and a signal ends it in order."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro import cli, expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import DataError


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """An expanded model."""
    home = tmp_path_factory.mktemp("launcher")
    base = write_random_checkpoint(home / "base", tiny_config(num_hidden_layers=2))
    expand_checkpoint(Checkpoint.open(base), home / "pro", expansion.interleave(2, 1))
    return home


@pytest.fixture
def start(home: Path, root: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start(**changes)`: a run on two processes, as the user starts it."""

    def start(**changes: Any) -> subprocess.Popen[str]:
        options = {
            "processes": 2,
            "model.path": home / "pro",
            "data.train": os.__file__,
            "data.seq-len": 32,
            "data.cache-dir": home / "cache",
            "train.steps": 2,
            "train.batch-size": 2,
            "train.device": "cpu",
            "run-dir": tmp_path / "run",
        } | {key.replace("__", "."): value for key, value in changes.items()}
        command = [sys.executable, str(root / "train.py"), "--json"]
        for key, value in options.items():
            command += [f"--{key}", str(value)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    return start


def test_a_run_on_two_processes_prints_one_result(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Standard output is the main rank's JSON object, and nothing else speaks than the run."""
    with start() as done:
        out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert json.loads(out)["step"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
    assert "OMP_NUM_THREADS" not in err and "***" not in err
    assert err.count(" 2/2  saved ") == 1


def test_a_mistake_is_one_message_and_exit_status_2(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Also one that only the ranks find; there is no traceback and no report."""
    (tmp_path / "empty.txt").write_text("")
    with start(data__train=tmp_path / "empty.txt") as done:
        out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and not out
    assert err.splitlines()[-1].startswith(f"DataError: {tmp_path}/empty.txt: ")
    assert err.count("DataError") == 1 and "Traceback" not in err and "exitcode" not in err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_exits_0(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The signal reaches every rank, even if only the launcher got it."""
    with start(train__steps=100_000, eval__every=100_000, save__every=100_000) as done:
        assert done.stderr is not None and done.stdout is not None
        for line in done.stderr:
            if line.strip().startswith("1/100000 "):
                break
        done.send_signal(signal.SIGINT)
        rest = done.stderr.read()
        result = json.loads(done.stdout.read())
    assert done.returncode == 0, rest
    assert result["stopped"] and result["step"] >= 1
    assert rest.count("SIGINT: stopping in order") == 1
    (path,) = training_checkpoints(tmp_path / "run")
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
