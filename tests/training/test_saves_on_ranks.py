"""Several processes save together: one's failure is everyone's, and training could go on.

The processes, which fill the disk among others, are forked (see forking.py).
"""

import errno
import json
import os
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamapro.checkpoints.run import newest_intact
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.training import checkpoint as train_state
from llamapro.training.checkpoint import Saver
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.lock import locked, run_lock

SAVES = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("saves.py"))))
cut = SAVES.cut
flip = SAVES.flip
save_step = SAVES.save_step
save_with = SAVES.save_with
saving = SAVES.saving
step_dir = SAVES.step_dir
trained = SAVES.trained


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
        ranks.on_main(lambda: None)  # nobody looks or goes on before all have ended
        seen[f"{name}: left"] = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        ranks.on_main(lambda: None)

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
            with Saver(run_dir, saving(way == "background", keep=3), ranks) as saver:
                attempt_saves(way, saver)
            if way == "foreground":
                ranks.on_main(lambda: run_dir.rename(folder / "kept"))
        attempt("no memory to copy", copy_without_memory)

        if ranks.is_main:
            flip(step_dir(run_dir, 4) / "optimizer.safetensors")
        attempt("fallen back", lambda: ranks.on_main(lambda: newest_intact(run_dir)))
        if ranks.is_main:
            for step in (1, 2, 3):
                cut(step_dir(run_dir, step) / "optimizer.safetensors")
        attempt("nothing left", lambda: ranks.on_main(lambda: newest_intact(run_dir)))

        def enter() -> None:
            with locked(run_dir, ranks):
                raise AssertionError("entered")

        with run_lock(run_dir) if ranks.is_main else nullcontext():
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


def test_an_error_of_the_main_rank_s_files_reaches_all(alone: Ranks) -> None:
    """As a message, because the others wait for it."""
    with pytest.raises(DataError, match=r"^/nowhere/x: No such file or directory$"):
        alone.on_main(lambda: Path("/nowhere/x").read_text())


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
def test_an_old_one_that_cannot_be_removed_stays_and_training_goes_on(
    seen: dict[str, Any], two_ranks: Path, way: str
) -> None:
    """The new one is saved on every rank, and standard error says what stays."""
    assert seen[f"{way}: not removed"] == str(step_dir(two_ranks / "run", 4))
    assert "step-00000004" in seen[f"{way}: not removed: left"]


def test_no_memory_for_the_copy_ends_the_save_on_every_rank(seen: dict[str, Any]) -> None:
    """The main rank alone copies; the others hear of it."""
    assert "rank 0: no memory to copy what is saved" in seen["no memory to copy"]
    assert "step-00000005" not in seen["no memory to copy: left"]


def test_every_rank_resumes_from_the_same(seen: dict[str, Any]) -> None:
    """The main rank looks; the others hear where, or why not."""
    assert "step-00000003'), [" in seen["fallen back"]
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
