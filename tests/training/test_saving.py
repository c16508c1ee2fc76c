"""A training checkpoint is complete or invisible, whoever writes it and whatever fails meanwhile.

Processes that are killed while they save, or that fill the disk, are forked (see forking.py).
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from llamapro.checkpoints.new_blocks import BlocksInfo, read_blocks
from llamapro.checkpoints.run import newest_intact, read_state, training_checkpoints
from llamapro.errors import CheckpointError, ConfigError
from llamapro.training import checkpoint as train_state
from llamapro.training.checkpoint import Saver
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.resume import RunLock, find_resume_point, load_optimizer, locked

INFO = BlocksInfo("new_blocks", "ab" * 32, (1,), 0)
SHAPES = {"model.layers.1.a.weight": (5, 3), "model.layers.1.b.weight": (7,)}
Trained = tuple[dict[str, nn.Parameter], torch.optim.AdamW]


def trained(step: int, ranks: Ranks | None = None) -> Trained:
    """What trains, and AdamW after one step of it; the values depend on the step. Sharded over
    the ranks, unevenly, if there are any."""
    generator = torch.Generator().manual_seed(step)
    parameters = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator)
        whole = value if ranks is None else distribute_tensor(value, ranks.mesh, [Shard(0)])
        parameters[name] = nn.Parameter(whole)
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return parameters, optimizer


def state_at(step: int) -> dict[str, Any]:
    state = {"step": step, "tokens": 10 * step, "elapsed_s": 1.0, "loss": 2.5}
    return state | {"eval": {"code": 1.0}, "settings": {}}


def save_with(saver: Saver, step: int, of: Trained) -> Path:
    saver.start(step, *of, INFO, state_at(step))
    saved = saver.finish()
    assert saved is not None and saved["step"] == step
    return Path(saved["path"])


def save_step(
    run_dir: Path, step: int, ranks: Ranks, of: Trained | None = None, in_background: bool = False
) -> Path:
    """Saves what is trained at the step; only the latest stays."""
    with Saver(run_dir, 1, 0, ranks, in_background) as saver:
        return save_with(saver, step, of or trained(step, ranks))


def assert_loads(path: Path, step: int) -> None:
    """The files are what was saved, and a fresh optimizer takes the moments."""
    assert read_state(path)["step"] == step
    parameters, optimizer = trained(step)
    tensors, info = read_blocks(path / "trainable.safetensors")
    assert info == INFO and list(tensors) == list(parameters)
    again, fresh = trained(0)
    load_optimizer(path, again, fresh, step)
    for name, parameter in parameters.items():
        assert torch.equal(tensors[name].read(), parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            found = fresh.state[again[name]][moment]
            assert torch.equal(found, optimizer.state[parameter][moment])


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A group of one process, this one."""
    with process_group("cpu") as ranks:
        yield ranks


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """The steps of everything in checkpoints/, which must hold nothing else."""
    found = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert found == [path.name for path in training_checkpoints(run_dir)]
    return [int(name.removeprefix("step-")) for name in found]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


# ---- Processes that are killed while they write ------------------------------------------------


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
                arm(run_dir, number, folder / "points")
                save_step(run_dir, 2, ranks, of, in_background=way == "background")
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
        assert_loads(save_step(run_dir, 3, alone), 3)
        assert steps(run_dir) == [3]  # and nothing hidden
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    assert steps(through) == [2]


# ---- Several processes: one's failure is everyone's, and training could go on -------------------


def save_with_failures(out: str) -> None:
    """What each of several ranks sees; written to rank-N.json."""
    folder = Path(out)
    seen: dict[str, Any] = {}
    run_dir = folder / "run"

    def attempt(name: str, act: Callable[[], object]) -> None:
        try:
            seen[name] = str(act())
        except (CheckpointError, ConfigError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
        ranks.from_main(None)  # nobody looks or goes on before all have ended
        seen[f"{name}: left"] = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        ranks.from_main(None)

    def attempt_saves(way: str, saver: Saver) -> None:
        def save(step: int) -> Path:
            return save_with(saver, step, trained(step, ranks))

        attempt(f"{way}: first", lambda: save(1))

        pwrite, calls = os.pwrite, []

        def full(fd: int, data: bytes, at: int) -> int:
            calls.append(at)
            if len(calls) == 5:  # at the first moment, with four tensors to gather
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(fd, data, at)

        os.pwrite = full  # type: ignore[assignment]
        attempt(f"{way}: disk full", lambda: save(2))
        os.pwrite = pwrite
        attempt(f"{way}: room again", lambda: save(2))

        make_room, tensors = train_state._make_room, []

        def no_room(tensor: torch.Tensor) -> None:
            tensors.append(tensor)
            if ranks.rank == 1 and len(tensors) == 3:
                raise torch.OutOfMemoryError("tried to allocate 1.00 GiB")
            make_room(tensor)

        train_state._make_room = no_room
        attempt(f"{way}: out of memory", lambda: save(3))
        train_state._make_room = make_room
        attempt(f"{way}: memory again", lambda: save(3))

        in_the_way = run_dir / "checkpoints" / ".step-00000001.removed"
        if ranks.is_main:
            in_the_way.write_text("")  # no directory can be renamed to a file
        attempt(f"{way}: not removed", lambda: save(4))
        if ranks.is_main:
            in_the_way.unlink()

    def copy_without_memory() -> Path:
        to = torch.Tensor.to

        def no_memory(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if options.get("copy"):
                raise RuntimeError("can't allocate memory")
            return to(tensor, *args, **options)

        torch.Tensor.to = no_memory  # type: ignore[method-assign, assignment]
        try:
            return save_step(run_dir, 5, ranks, in_background=True)
        finally:
            torch.Tensor.to = to  # type: ignore[method-assign]

    with process_group("cpu") as ranks:
        for way in ("foreground", "background"):
            with Saver(run_dir, 3, 0, ranks, way == "background") as saver:
                attempt_saves(way, saver)
            if way == "foreground":
                ranks.from_main(run_dir.rename(folder / "kept") if ranks.is_main else None)
        attempt("no memory to copy", copy_without_memory)

        if ranks.is_main:
            flip(step_dir(run_dir, 4) / "optimizer.safetensors")
        attempt("fallen back", lambda: find_resume_point(run_dir, ranks))
        if ranks.is_main:
            for step in (1, 2, 3):
                cut(step_dir(run_dir, step) / "optimizer.safetensors")
        attempt("nothing left", lambda: find_resume_point(run_dir, ranks))

        def enter() -> None:
            with locked(run_dir, ranks):
                raise AssertionError("entered")

        with RunLock(run_dir) if ranks.is_main else nullcontext():
            attempt("locked", enter)
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, fork_ranks: Callable[..., Any]) -> Path:
    """The folder of two real processes that met every failure."""
    folder = tmp_path_factory.mktemp("ranks")
    done = fork_ranks(2, __file__, "save_with_failures", str(folder))
    assert done.statuses == [0, 0], done.stderr
    return folder


@pytest.fixture
def seen(two_ranks: Path) -> dict[str, Any]:
    """What both ranks saw: the same."""
    first, second = (json.loads((two_ranks / f"rank-{n}.json").read_text()) for n in (0, 1))
    assert first == second
    return first


WAYS = pytest.mark.parametrize("way", ["foreground", "background"])


@WAYS
def test_a_full_disk_ends_the_save_on_every_rank(
    seen: dict[str, Any], two_ranks: Path, way: str
) -> None:
    """The main rank's message; nothing is left, and the same save succeeds when there is room."""
    assert seen[f"{way}: disk full"].startswith("CheckpointError: ")
    assert "optimizer.safetensors: disk full" in seen[f"{way}: disk full"]
    assert seen[f"{way}: disk full: left"] == ["step-00000001"]
    assert seen[f"{way}: room again"] == str(step_dir(two_ranks / "run", 2))


@WAYS
def test_a_rank_without_memory_ends_the_save_on_every_rank(
    seen: dict[str, Any], two_ranks: Path, way: str
) -> None:
    """Nobody waits for it in a collective; its message is everyone's."""
    message = "rank 1: no memory to gather 'model.layers.1.a.weight.exp_avg'"
    assert message in seen[f"{way}: out of memory"]
    assert seen[f"{way}: out of memory: left"] == ["step-00000001", "step-00000002"]
    assert seen[f"{way}: memory again"] == str(step_dir(two_ranks / "run", 3))


@WAYS
def test_an_old_one_that_cannot_be_removed_is_told_on_every_rank(
    seen: dict[str, Any], way: str
) -> None:
    """Nobody goes on without the main rank; what was saved stays."""
    assert "step-00000001: cannot be removed: Not a directory" in seen[f"{way}: not removed"]
    assert "step-00000004" in seen[f"{way}: not removed: left"]


def test_no_memory_for_the_copy_ends_the_save_on_every_rank(seen: dict[str, Any]) -> None:
    """The main rank alone copies; the others hear of it."""
    assert "rank 0: no memory to copy what is saved" in seen["no memory to copy"]
    assert "step-00000005" not in seen["no memory to copy: left"]


def test_every_rank_resumes_from_the_same(seen: dict[str, Any]) -> None:
    """The main rank looks; the others hear where, or why not."""
    assert "step-00000003'), {'step': 3" in seen["fallen back"]
    assert "step-00000004/optimizer.safetensors: damaged" in seen["fallen back"]
    assert "no training checkpoint is intact" in seen["nothing left"]


def test_a_held_lock_stops_every_rank(seen: dict[str, Any]) -> None:
    """The others do not wait for a main rank that was refused."""
    assert seen["locked"].startswith("ConfigError: ") and "another run is writing" in seen["locked"]


def test_the_weights_do_not_depend_on_the_number_of_processes(
    two_ranks: Path, tmp_path: Path, alone: Ranks, seen: dict[str, Any]
) -> None:
    """Shards of uneven length are put together as one process has them."""
    one = save_step(tmp_path / "run", 3, alone)
    two = step_dir(two_ranks / "kept", 3)
    for name in ("trainable.safetensors", "optimizer.safetensors", "state.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
