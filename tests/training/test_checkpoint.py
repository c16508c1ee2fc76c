"""A training checkpoint is complete or invisible, whoever writes it and whatever fails meanwhile.

A damaged one is refused by name, and the last good one is never deleted. Processes that are killed
while they save, or that fill the disk, are forked (see forking.py).
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from llamapro import filesystem
from llamapro.checkpoints.new_blocks import BlocksInfo, read_blocks
from llamapro.checkpoints.run import (
    MAX_STATE_BYTES,
    file_sha256,
    newest_intact,
    read_state,
    training_checkpoints,
)
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.training import checkpoint as train_state
from llamapro.training.checkpoint import Saver
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.lock import locked, run_lock
from llamapro.training.resume import load_optimizer
from llamapro.training.retention import remove_old
from llamapro.training.settings import SaveSettings

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]
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


def saving(in_background: bool, keep: int = 1) -> SaveSettings:
    return SaveSettings(keep=keep, background="yes" if in_background else "no")


def save_with(saver: Saver, step: int, of: Trained) -> Path:
    saved = saver.save(step, *of, INFO, state_at(step)) or saver.finish()
    assert saved is not None and saved["step"] == step
    return Path(saved["path"])


def save_step(
    run_dir: Path,
    step: int,
    ranks: Ranks,
    of: Trained | None = None,
    in_background: bool = False,
    keep: int = 99,
) -> Path:
    """Saves what is trained at the step."""
    with Saver(run_dir, saving(in_background, keep), ranks) as saver:
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


@pytest.fixture
def run_dir(tmp_path: Path, alone: Ranks) -> Path:
    """A run with training checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_step(tmp_path / "run", step, alone)
    return tmp_path / "run"


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """The steps of everything in checkpoints/, which must hold nothing else."""
    found = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert found == [path.name for path in training_checkpoints(run_dir)]
    return [int(name.removeprefix("step-")) for name in found]


# ---- Damage: found by name, never resumed, never the reason that something good is deleted ------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_resume_falls_back_to_the_newest_intact(
    run_dir: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """One flipped byte, one byte less or no file, in any of the four: named, and passed over."""
    if name == "manifest.json" and damage is cut:
        damage = flip  # without its last newline it says the same
    damage(step_dir(run_dir, 3) / name)
    found, damaged = newest_intact(run_dir)
    assert found == step_dir(run_dir, 2)
    assert len(damaged) == 1 and str(step_dir(run_dir, 3)) in damaged[0]
    assert name in damaged[0] or name == "manifest.json"  # a flipped hash accuses its file
    assert_loads(found, 2)


def test_without_damage_the_newest_is_taken_and_nothing_said(run_dir: Path) -> None:
    """A fresh run has none."""
    assert newest_intact(run_dir) == (step_dir(run_dir, 3), [])
    assert newest_intact(run_dir / "none") == (None, [])
    assert sorted(path.name for path in step_dir(run_dir, 3).iterdir()) == FILES


def test_a_run_with_only_damaged_checkpoints_is_never_started_anew(run_dir: Path) -> None:
    """Each is named; nothing is deleted, not even the old ones."""
    for step in (1, 2, 3):
        flip(step_dir(run_dir, step) / "trainable.safetensors")
    with pytest.raises(CheckpointError) as caught:
        newest_intact(run_dir)
    assert all(str(step_dir(run_dir, step)) in str(caught.value) for step in (1, 2, 3))
    with pytest.raises(CheckpointError, match="no training checkpoint is intact"):
        remove_old(run_dir, 1)
    assert steps(run_dir) == [1, 2, 3]


def test_the_damaged_step_is_reached_and_saved_again(run_dir: Path, alone: Ranks) -> None:
    """An intact one in the way is never replaced."""
    flip(step_dir(run_dir, 3) / "optimizer.safetensors")
    assert_loads(save_step(run_dir, 3, alone), 3)
    assert steps(run_dir) == [1, 2, 3]
    before = step_dir(run_dir, 2).stat().st_ino
    with pytest.raises(CheckpointError, match="exists and is intact"):
        save_step(run_dir, 2, alone)
    assert step_dir(run_dir, 2).stat().st_ino == before


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, 0, [6]), (2, 0, [5, 6]), (9, 0, [1, 2, 3, 4, 5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6])],
)
def test_the_latest_and_every_nth_stay(
    run_dir: Path, alone: Ranks, keep: int, keep_every: int, left: list[int]
) -> None:
    """`keep` counts the latest, `keep_every` divides the step."""
    for step in (4, 5, 6):
        save_step(run_dir, step, alone)
    remove_old(run_dir, keep, keep_every)
    assert steps(run_dir) == left


def test_deletion_spares_the_last_good_one(run_dir: Path) -> None:
    """With the newest two damaged, the one before them is not old."""
    for step in (2, 3):
        flip(step_dir(run_dir, step) / "trainable.safetensors")
    remove_old(run_dir, 1)
    assert steps(run_dir) == [1, 3]
    assert newest_intact(run_dir)[0] == step_dir(run_dir, 1)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a JSON file; what the manifest says of it stays true."""
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))
    sign(file)


def sign(file: Path) -> None:
    if file.name != "manifest.json":
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        (file.parent / "manifest.json").write_text(json.dumps(manifest))


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({new: content.pop(old)})


def entry(name: str, **changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[name].update(changes)


MANIFESTS = {
    "a path": renamed("state.json", "../step-00000002/state.json"),
    "another name": renamed("state.json", "state.pickle"),
    "one more": lambda m: m.update({"more.bin": m["state.json"]}),
    "one less": lambda m: m.pop("state.json") and None,
    "size as text": lambda m: m["state.json"].update(bytes=str(m["state.json"]["bytes"])),
    "size as float": lambda m: m["state.json"].update(bytes=float(m["state.json"]["bytes"])),
    "size as bool": entry("state.json", bytes=True),
    "no hash": entry("state.json", sha256=None),
    "short hash": entry("state.json", sha256="ab"),
    "entry of another type": lambda m: m.update({"state.json": [1]}),
    "another type": lambda m: list(m),
}
STATES = {
    "step as text": lambda s: s.update(step="3"),
    "step as bool": lambda s: s.update(step=True),
    "step of another": lambda s: s.update(step=2),
    "tokens as bool": lambda s: s.update(tokens=True),
    "no tokens": lambda s: s.pop("tokens") and None,
    "eval as list": lambda s: s.update(eval=[]),
    "settings as text": lambda s: s.update(settings=""),
    "loss as text": lambda s: s.update(loss="low"),
    "another type": lambda s: list(s),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [("manifest.json", MANIFESTS[key]) for key in MANIFESTS]
    + [("state.json", STATES[key]) for key in STATES],
    ids=[f"manifest-{key}" for key in MANIFESTS] + [f"state-{key}" for key in STATES],
)
def test_a_manifest_or_state_of_wrong_types_is_named(
    run_dir: Path, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    """Files are exactly the expected ones, by plain names; a state holds what training reads."""
    file = step_dir(run_dir, 3) / name
    edit(file, change)
    with pytest.raises(CheckpointError) as caught:
        read_state(step_dir(run_dir, 3))
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[" * 200_000, b'{"step": 3', None])
def test_what_is_not_json_or_absurdly_large_is_named(
    run_dir: Path, name: str, content: bytes | None
) -> None:
    """Nothing of it is parsed but JSON, no recursion ends the process, no memory is filled."""
    file = step_dir(run_dir, 3) / name
    if content is None:
        os.truncate(file, MAX_STATE_BYTES + 1)  # sparse: it takes no room
    else:
        file.write_bytes(content)
    sign(file)
    with pytest.raises(CheckpointError) as caught:
        read_state(step_dir(run_dir, 3))
    assert str(caught.value).startswith(f"{file}: damaged: ") and len(str(caught.value)) < 500
    assert content is not None or "67,108,865 bytes, over 67,108,864" in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_plain_file_is_not_opened(run_dir: Path, name: str) -> None:
    """Opening a named pipe would wait for ever."""
    (step_dir(run_dir, 3) / name).unlink()
    os.mkfifo(step_dir(run_dir, 3) / name)
    with pytest.raises(CheckpointError, match=name):
        read_state(step_dir(run_dir, 3))


# ---- In the background: the same files, of the moment at which the save started -----------------


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


@pytest.mark.parametrize("in_background", [False, True])
def test_a_directory_removed_during_a_save_is_written_again(
    run_dir: Path, alone: Ranks, in_background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is still in memory. Removed again and again, it ends in a message."""
    write, removals = train_state.write_safetensors, [1]

    def removed(*args: Any) -> None:
        if removals and removals.pop():
            shutil.rmtree(run_dir)
        write(*args)

    monkeypatch.setattr(train_state, "write_safetensors", removed)
    with Saver(run_dir, saving(in_background), alone, step=1) as saver:
        path = save_with(saver, 9, trained(9))
        assert_loads(path, 9)
        assert saver.has(9) and not saver.has(8)
        shutil.rmtree(path)
        assert not saver.has(9)
        removals[:] = [1, 1]
        with pytest.raises(CheckpointError, match="No such file or directory while writing"):
            save_with(saver, 10, trained(10))


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
    with (
        pytest.raises(KeyError, match="elsewhere"),
        Saver(tmp_path, saving(True), alone) as saver,
    ):
        saver.save(5, *trained(5), INFO, state_at(5))
        let_go.set()
        raise KeyError("elsewhere")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]
    assert_loads(step_dir(tmp_path, 5), 5)


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


def test_checkpoints_that_cannot_be_listed_do_not_end_a_run(
    tmp_path: Path,
    alone: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The new one is saved; old ones and leftovers wait for the next save."""
    save_step(tmp_path, 1, alone)

    def broken(path: Any) -> Any:
        if str(path).endswith("checkpoints"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    scandir = os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", broken)
        saved = save_step(tmp_path, 2, alone, keep=1)
    assert_loads(saved, 2)
    assert "checkpoints: cannot be listed: Input/output error" in capsys.readouterr().err
    assert steps(tmp_path) == [1, 2]


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
