"""A save is complete or invisible, also in the background and whenever its process is killed.

Processes that are killed while they save are forked (see forking.py).
"""

import os
import runpy
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamapro import filesystem
from llamapro.checkpoints.run import newest_intact, read_state, training_checkpoints
from llamapro.training import checkpoint as train_state
from llamapro.training.checkpoint import Saver
from llamapro.training.distributed import Ranks, process_group

SAVES = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("saves.py"))))
INFO = SAVES.INFO
assert_loads = SAVES.assert_loads
save_step = SAVES.save_step
saving = SAVES.saving
state_at = SAVES.state_at
step_dir = SAVES.step_dir
steps = SAVES.steps
trained = SAVES.trained


# ---- In the background: the same files, of the moment at which the save started ------------------


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Whoever writes is held before the first change of a file until this is set."""
    event, make_way = threading.Event(), train_state.make_way

    def wait(target: Path) -> None:
        assert event.wait(60)
        make_way(target)

    monkeypatch.setattr(train_state, "make_way", wait)
    return event


def test_both_ways_write_the_same_bits(tmp_path: Path, alone: Ranks) -> None:
    """Every file, the manifest included."""
    one = save_step(tmp_path / "one", 5, alone)
    two = save_step(tmp_path / "two", 5, alone, in_background=True)
    assert len(list(one.iterdir())) == 4
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_what_training_changes_meanwhile_is_not_saved(
    tmp_path: Path, alone: Ranks, let_go: threading.Event
) -> None:
    """Parameters, moments and the state go on; the files hold the values of the start."""
    parameters, optimizer = trained(5)
    state = state_at(5)
    with Saver(tmp_path, saving(True), alone) as saver:
        saver.save(5, parameters, optimizer, INFO, state)
        assert not saver.is_done
        optimizer.step()
        state["eval"]["code"] = 0.5
        let_go.set()
        saved = saver.finish()
    assert saved is not None
    path = Path(saved["path"])
    assert_loads(path, 5)
    assert read_state(path) == state_at(5)


def test_the_end_of_writing_is_seen_without_waiting(
    tmp_path: Path, alone: Ranks, let_go: threading.Event
) -> None:
    """Then it is finished once; in the foreground nothing is ever left to wait for."""
    with Saver(tmp_path, saving(True), alone) as saver:
        assert not saver.is_done and saver.finish() is None
        saver.save(5, *trained(5), INFO, state_at(5))
        assert not saver.is_done and not step_dir(tmp_path, 5).exists()
        let_go.set()
        assert saver._writing is not None
        saver._writing.result()
        assert saver.is_done and steps(tmp_path) == [5]
        assert saver.finish() is not None
        assert not saver.is_done and saver.finish() is None
    with Saver(tmp_path, saving(False), alone) as saver:
        saver.save(6, *trained(6), INFO, state_at(6))
        assert not saver.is_done and steps(tmp_path) == [6]


@pytest.mark.parametrize("in_background", [True, False])
def test_the_time_it_blocks_is_reported(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """Gathering and waiting for the end block; training on meanwhile does not."""
    now, is_waited_for = [100.0], threading.Event()
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(train_state, "time", clock)

    def gather_for_3_s(*args: Any) -> Iterator[torch.Tensor]:
        now[0] += 3
        yield from gather(*args)

    def remove_for_4_s(*_: object) -> list[str]:
        assert not in_background or is_waited_for.wait(60)
        now[0] += 4
        return []

    gather = train_state._gather
    monkeypatch.setattr(train_state, "_gather", gather_for_3_s)
    monkeypatch.setattr(train_state, "remove_old", remove_for_4_s)
    with Saver(tmp_path, saving(in_background), alone) as saver:
        saved = saver.save(5, *trained(5), INFO, state_at(5))
        now[0] += 50  # of training
        if saver._writing is not None:
            wait = saver._writing.result
            saver._writing.result = lambda: (is_waited_for.set(), wait())[1]
            saved = saver.finish()
    expected = {"path": str(step_dir(tmp_path, 5)), "step": 5}
    assert saved == expected | {"blocked_s": 7, "total_s": 57 if in_background else 7}


def test_an_error_elsewhere_waits_for_the_writing(
    tmp_path: Path, alone: Ranks, let_go: threading.Event
) -> None:
    """The save is whole, and no thread is left that could write when the run is no more locked."""
    with pytest.raises(KeyError, match="elsewhere"), Saver(tmp_path, saving(True), alone) as saver:
        saver.save(5, *trained(5), INFO, state_at(5))
        let_go.set()
        raise KeyError("elsewhere")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]
    assert_loads(step_dir(tmp_path, 5), 5)


# ---- Processes that are killed while they write --------------------------------------------------


def arm(run_dir: Path, number: int, log: Path) -> None:
    """Kills this process at its number-th change of a file in the run directory, or read of one."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    write, pwrite, left = os.write, os.pwrite, number

    def point(kind: str) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            write(out, f"{kind}\n".encode())
        return left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        is_ours = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and str(args[0]).startswith(str(run_dir))
        )
        if is_ours and point(event):
            die()

    def torn_pwrite(fd: int, data: memoryview, at: int) -> int:
        if point("pwrite"):
            pwrite(fd, data[: len(data) // 2], at)
            die()
        return pwrite(fd, data, at)

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            if point(name):
                die()
            return real(*args)

        return call

    os.pwrite = torn_pwrite  # type: ignore[assignment]
    os.fsync, os.posix_fallocate = dying("fsync"), dying("posix_fallocate")
    sys.addaudithook(audit)


def kill_at_points(out: str, way: str) -> None:
    """For n = 1, 2, ...: copies the run and lets a fork save step 2 in it and remove the old one,
    killed at its n-th point, until one gets through. In the background: at every third."""
    folder, of = Path(out), trained(2)
    for number in range(1, 200, 3 if way == "background" else 1):
        run_dir = folder / f"killed-{number:03d}"
        shutil.copytree(folder / "run", run_dir)
        if not (child := os.fork()):
            with process_group("cpu") as ranks:
                filesystem.lacks(run_dir)  # tried only once in a process
                arm(run_dir, number, folder / "points")
                save_step(run_dir, 2, ranks, of, way == "background", keep=1)
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("way", ["foreground", "background"])
def test_a_kill_at_any_point_of_saving_loses_nothing(
    tmp_path: Path, alone: Ranks, fork_ranks: Callable[..., Any], way: str
) -> None:
    """The one before or the new one is there, whole; the next save cleans up and succeeds."""
    save_step(tmp_path / "run", 1, alone)
    done = fork_ranks(1, __file__, "kill_at_points", str(tmp_path), way)
    assert done.statuses == [0], done.stderr
    *killed, through = sorted(tmp_path.glob("killed-*"))
    points = (tmp_path / "points").read_text().split()
    assert len(points) == len(killed)
    if way == "foreground":
        changes = {"open", "pwrite", "posix_fallocate", "fsync"}
        assert set(points) == changes | {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
        at = points.index("os.rename")  # four files and their directory before it, the parent after
        assert points[at - 10 : at] == ["open", "fsync"] * 5
        assert points[at + 1 : at + 3] == ["open", "fsync"]
    outcomes = []
    for run_dir in killed:
        found, damaged = newest_intact(run_dir)
        assert found is not None and not damaged
        for path in training_checkpoints(run_dir):  # the one being removed is hidden first
            read_state(path)
        outcomes.append(int(found.name.removeprefix("step-")))
        assert_loads(found, outcomes[-1])
        assert_loads(save_step(run_dir, 3, alone, keep=1), 3)
        assert steps(run_dir) == [3]  # and nothing hidden
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    assert steps(through) == [2]
