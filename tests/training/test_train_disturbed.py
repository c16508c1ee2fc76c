"""A run that is disturbed: by signals, lost files, a full disk, and losses that leap or end."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoints.run import training_checkpoints
from llamapro.errors import DataError, DivergedError, UserError
from llamapro.scripts import train
from llamapro.training import validation
from llamapro.training.data import Data
from llamapro.training.job import Job
from llamapro.training.metrics import MetricsLog
from llamapro.training.progress import Progress
from llamapro.training.state import RunState

STEPS = 6


def test_an_interrupted_run_continues_as_if_nothing_happened(
    run: Callable[..., Path],
    straight: Path,
    tmp_path: Path,
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """N steps straight and N/2, stop, N/2 more: weights, moments and log are equal to the bit."""
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(training_checkpoints(resumed)[-1])  # as if killed after step 5
    run("resumed")
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = (training_checkpoints(r)[-1] / file for r in (straight, resumed))
        assert first.read_bytes() == second.read_bytes(), file
    for kind in ("train", "eval"):
        assert metrics(straight, kind, "loss") == metrics(resumed, kind, "loss")
        assert metrics(straight, kind, "step") == metrics(resumed, kind, "step")


def test_a_finished_run_is_left_alone(
    run: Callable[..., Path],
    straight: Path,
    tmp_path: Path,
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """The same command after the last step trains nothing and writes nothing new."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    before = {f: f.stat().st_mtime_ns for f in run_dir.rglob("*.safetensors")}
    run()
    assert {f: f.stat().st_mtime_ns for f in run_dir.rglob("*.safetensors")} == before
    assert metrics(run_dir, "train", "step") == list(range(1, STEPS + 1))
    assert metrics(run_dir, "eval", "step") == [0, 3, 6]


def test_a_step_that_is_not_finite_ends_the_run_and_is_not_applied(
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    metrics: Callable[[Path, str, str], list[float]],
    trained: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """Nor is a later one, before that is noticed; its data is told; what was saved stays."""
    wild = {"optim__lr": 1e30, "optim__warmup_ratio": 0.0, "optim__clip": 1e30}
    with pytest.raises(UserError, match="the gradient is not finite"):
        run(save__every=1, log_every=5, eval__every=5, **wild)
    run_dir = tmp_path / "run"
    assert [path.name for path in training_checkpoints(run_dir)] == ["step-00000001"]
    for tensor in trained(run_dir).values():
        assert tensor.isfinite().all()
    (sequences,) = metrics(run_dir, "bad_step", "sequences")
    assert len(sequences) == 4
    for read in sequences:
        assert read["source"] == str(home / "train.py") and read["documents"] == [0, 0]
    assert metrics(run_dir, "bad_step", "step") == [2]


def test_a_bad_step_can_be_skipped(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """With `optim.skip_bad_steps` its update is left out, moments and all, and training goes on."""
    clip, calls = train.clip_gradients, []

    def spoilt(parameters: Any, max_norm: float) -> torch.Tensor:
        calls.append(1)
        norm = clip(parameters, max_norm)
        return norm if len(calls) not in (2, 3) else torch.full_like(norm, float("nan"))

    monkeypatch.setattr(train, "clip_gradients", spoilt)
    run_dir = run(optim__skip_bad_steps=2, log_every=2)
    assert len(calls) == STEPS and metrics(run_dir, "train", "step")[-1] == STEPS
    assert metrics(run_dir, "bad_step", "skipped") == [1, 2]
    assert metrics(run_dir, "bad_step", "step") == [2, 3]
    state = json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())
    assert state["skipped"] == 2
    calls.clear()
    with pytest.raises(UserError, match="the gradient is not finite"):
        run("stuck", optim__skip_bad_steps=1, log_every=2)
    assert metrics(tmp_path / "stuck", "bad_step", "step") == [2, 3]


def test_skipped_steps_in_a_row_count_over_resumes(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped after every bad step ends as one that is not."""

    def not_finite(*_: Any) -> torch.Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(train, "clip_gradients", not_finite)
    options = {"optim__skip_bad_steps": 2, "eval__every": 99, "save__every": 99}
    for steps in (1, 2):
        run(train__steps=steps, **options)
    with pytest.raises(DivergedError, match="the gradient is not finite"):
        run(train__steps=3, **options)


def test_a_final_evaluation_that_is_not_finite_is_no_success(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the end nor when the same command finds the run complete; all is saved."""
    mean_loss = validation.mean_loss
    calls: list[int] = []

    def diverged(*args: Any) -> tuple[float, int]:
        calls.append(1)
        loss, tokens = mean_loss(*args)
        return (float("nan") if len(calls) > 1 else loss), tokens

    monkeypatch.setattr(validation, "mean_loss", diverged)
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"at step 2, is not finite: code nan"):
            run(train__steps=2, eval__every=99)
    assert len(calls) == 2


def test_a_run_directory_that_is_removed_ends_the_run_and_loses_nothing(
    run: Callable[..., Path],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics: Callable[[Path, str, str], list[float]],
    trained: Callable[[Path], dict[str, torch.Tensor]],
    assert_same_losses: Callable[..., None],
) -> None:
    """What is in memory is put back and saved, and the same command goes on.

    The first time it is removed again a moment after it was put back, as by `rm -r` on a slow disk.
    """
    saved, removals = Progress.saved, []

    def removed_last(self: Progress, report: Any) -> None:
        if report and report["step"] == STEPS and len(removals) < 2:
            removals.append(threading.Timer(0.1, shutil.rmtree, [tmp_path / "run"]))
            removals[-1].start()
            if len(removals) == 1:
                removals[-1].join()
        saved(self, report)

    monkeypatch.setattr("llamapro.training.preemption.SETTLE_S", 0.5)
    monkeypatch.setattr(Progress, "saved", removed_last)
    with pytest.raises(DataError, match=rf"was removed while .* saved .* step {STEPS}"):
        run()
    monkeypatch.undo()
    removals[-1].join()
    assert [path.name for path in training_checkpoints(tmp_path / "run")] == ["step-00000006"]
    shutil.rmtree(tmp_path / "run")
    batch, calls = Data.batch, []

    def removed(self: Data, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            shutil.rmtree(tmp_path / "run")
        return batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Data, "batch", removed)
        match = r"metrics\.jsonl: was removed while the run was writing it; saved .* step 5"
        with pytest.raises(DataError, match=match):
            run()
    run_dir = run()
    assert metrics(run_dir, "train", "step") == [1, 2, 3, 4, 5, 6]
    assert_same_losses(run_dir, straight)
    for name, tensor in trained(straight).items():
        assert torch.equal(tensor, trained(run_dir)[name])


def test_a_signal_before_the_first_step_stops_a_run_that_has_nothing_to_save(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no moments yet; the same command begins anew."""

    def signalled(self: Data, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, *args)

    batch = Data.batch
    monkeypatch.setattr(Data, "batch", signalled)
    assert training_checkpoints(run()) == []


def test_a_spike_is_logged_with_its_documents(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """Whatever the logging interval, with the numbers of the documents that its batch read."""
    train_step, calls = train.train_step, []

    def jumping(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        loss, norm = train_step(*args)
        return (loss + 5 if len(calls) == 18 else loss), norm

    monkeypatch.setattr(train, "train_step", jumping)
    options = {"log_every": 50, "save__every": 7, "data__val": None, "optim__lr": 1e-4}
    options |= {"train__batch_size": 2, "data__seq_len": 16}
    run_dir = run(train__steps=18, **options)
    assert metrics(run_dir, "spike", "step") == [18]
    (loss,), (usual,) = (metrics(run_dir, "spike", key) for key in ("loss", "median"))
    assert usual + 4 < loss < usual + 6
    (sequences,) = metrics(run_dir, "spike", "sequences")
    assert [set(read) for read in sequences] == [{"source", "sequence", "documents"}] * 2


def test_a_full_disk_under_the_log_stops_the_run_in_order(
    run: Callable[..., Path],
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """What is earned is saved, the message names the log, and the same command goes on."""
    log = MetricsLog.log

    def full(self: MetricsLog, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        log(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", full)
        with pytest.raises(DataError, match=r"metrics\.jsonl: .*No space left.*step 4"):
            run()
    run_dir = run()
    assert trained(straight).keys() == trained(run_dir).keys()
    for name, tensor in trained(straight).items():
        assert torch.equal(tensor, trained(run_dir)[name])


@pytest.mark.parametrize(
    ("place", "call", "saved"),
    [
        ("batch", 2, 1),  # noticed before the step is computed
        ("clip_gradients", 3, 3),  # inside a step, which is finished
        ("mean_loss", 2, 3),
        ("to_json", 1, 3),
        ("tokenize", 1, 0),  # nothing is earned yet
    ],
)
def test_a_signal_saves_all_and_the_run_continues_to_the_same_bits(
    place: str,
    call: int,
    saved: int,
    run: Callable[..., Path],
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """Wherever it comes: in a step, an evaluation, while saving, or while data are tokenised."""
    owners = {"tokenize": Job, "batch": Data, "mean_loss": validation, "to_json": RunState}
    owner: Any = owners.get(place, train)
    original, calls = getattr(owner, place), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, signalled)
        run_dir = run()
    assert f"{saved} steps done, stopped by a signal" in capsys.readouterr().out
    found = [path.name for path in training_checkpoints(run_dir)]
    assert found[-1:] == ([f"step-{saved:08d}"] if saved else [])
    run()
    assert "6 steps done; " in capsys.readouterr().out
    assert metrics(run_dir, "eval", "step") == [0, 3, 6]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = (training_checkpoints(r)[-1] / name for r in (straight, run_dir))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_missing_validation_file_is_named_and_the_run_can_go_on(
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    os_source: Callable[[], str],
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """Before anything is computed or written; put back, the run resumes."""
    val = tmp_path / "val.txt"
    val.write_text(os_source())
    run_dir = run(data__val=f"text={val}", train__steps=3)
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
    moved = val.rename(tmp_path / "moved.txt")
    with pytest.raises(DataError, match=r"val\.txt: no such file; give files, folders or globs"):
        run(data__val=f"text={val}")
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before
    moved.rename(val)
    assert metrics(run(data__val=f"text={val}"), "eval", "step") == [0, 3, 6]


def test_a_clock_that_is_set_back_changes_nothing(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """Times are taken from a clock that nobody can set; the run's time only grows."""
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    elapsed = metrics(run(train__steps=2, data__val=None), "train", "elapsed_s")
    assert elapsed == sorted(elapsed) and 0 < elapsed[-1] < 600
