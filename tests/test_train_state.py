"""A training checkpoint is complete or invisible, whole or refused, and goes on as what it was.

Run as a script, this file is the processes that are killed, that fill the disk, or that hold the
lock.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from llamapro import train_state
from llamapro.blocks import BlocksInfo, read_blocks, training_checkpoints
from llamapro.checkpoint import Checkpoint
from llamapro.config import CheckpointError, ConfigError
from llamapro.corpus import tokenize
from llamapro.distributed import Ranks, process_group
from llamapro.resume import (
    MAX_JSON_BYTES,
    RunLock,
    check_identity,
    file_sha256,
    find_resume_point,
    locked,
    make_identity,
    newest_intact,
    read_state,
)
from llamapro.tokenizer import Tokenizer
from llamapro.train_state import load_optimizer, remove_old, save

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


def save_step(run_dir: Path, step: int, ranks: Ranks, of: Trained | None = None) -> Path:
    state = {"step": step, "tokens": 10 * step, "elapsed_s": 1.0, "loss": 2.5, "eval": {}}
    parameters, optimizer = of or trained(step, ranks)
    return save(run_dir, step, parameters, optimizer, INFO, state | {"settings": {}}, ranks)


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
        os.truncate(file, MAX_JSON_BYTES + 1)  # sparse: it takes no room
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


# ---- Identity -----------------------------------------------------------------------------------


@pytest.fixture
def parts(
    tmp_path: Path, tiny_config: Callable[..., Any], write_random_checkpoint: Callable[..., Path]
) -> Path:
    """A folder with what a run is made of: base/ and corpus.txt."""
    write_random_checkpoint(tmp_path / "base", tiny_config())
    (tmp_path / "corpus.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    return tmp_path


def identity(parts: Path) -> dict[str, Any]:
    """As train.py makes it, through JSON as `state.json` keeps it."""
    checkpoint = Checkpoint.open(parts / "base")
    trainable = [name for name in checkpoint.tensors if name.startswith("model.layers.3.")]
    tokenizer = Tokenizer.load(parts / "base")
    store = tokenize([str(parts / "corpus.txt")], tokenizer, parts / "cache")
    found = make_identity(checkpoint, trainable, tokenizer.fingerprint, {"train corpus": store})
    return json.loads(json.dumps(found))


def change_tensor(parts: Path, name: str) -> None:
    tensor = Checkpoint.open(parts / "base").tensors[name]
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.offset)
        first = file.read(1)[0]
        file.seek(tensor.offset)
        file.write(bytes([first ^ 1]))


def test_the_same_parts_go_on_wherever_they_lie(parts: Path, tmp_path: Path) -> None:
    """Moved and touched files, and other values of what trains, are no difference."""
    state = {"identity": identity(parts)}
    moved = shutil.copytree(parts, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))
    change_tensor(moved, "model.layers.3.mlp.up_proj.weight")
    os.utime(moved / "corpus.txt", (1, 1))
    check_identity(state, identity(moved), tmp_path)


def test_every_other_part_is_refused_by_name(parts: Path, tokenizer_file: Path) -> None:
    """One bit of a frozen weight, the same lines in another order, another tokenizer: each named,
    with both values, and only those that differ."""
    before = identity(parts)
    state = {"identity": before}
    change_tensor(parts, "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match="the frozen base model was sha256 ") as caught:
        check_identity(state, identity(parts), parts)
    assert "data" not in str(caught.value) and "tokenizer" not in str(caught.value)
    change_tensor(parts, "model.layers.2.mlp.up_proj.weight")
    (parts / "corpus.txt").write_text("".join(f"line {i}\n" for i in reversed(range(100))))
    now = identity(parts)
    assert now["data"]["train corpus"]["tokens"] == before["data"]["train corpus"]["tokens"]
    with pytest.raises(ConfigError, match=r"data 'train corpus' was .* tokens .*, is ") as caught:
        check_identity(state, now, parts)
    assert "base model" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"the tokenizer was sha256 .*, is sha256 cdcdcdcd"):
        check_identity(state, before | {"tokenizer": "cd" * 32}, parts)
    with pytest.raises(ConfigError, match=r"data 'train corpus' was .*, is not there"):
        check_identity(state, before | {"data": {}}, parts)


@pytest.mark.parametrize("state", [{}, {"identity": None}, {"identity": {"base": "", "data": []}}])
def test_a_state_that_names_no_parts_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    """Without a record nothing can be compared."""
    now = {"base": "ab" * 32, "tokenizer": "cd" * 32, "data": {}}
    with pytest.raises(CheckpointError, match="do not say which base, tokenizer and data"):
        check_identity(state, now, tmp_path)


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


def kill_at_every_point(folder: Path) -> None:
    """For n = 1, 2, ...: copies the run and lets a fork save step 2 in it and remove the old one,
    killed at its n-th point, until one gets through."""
    of = trained(2)
    for number in range(1, 200):
        run_dir = folder / f"killed-{number:03d}"
        shutil.copytree(folder / "run", run_dir)
        if not (child := os.fork()):
            with process_group("cpu") as ranks:
                arm(run_dir, number, folder / "points")
                save_step(run_dir, 2, ranks, of)
                remove_old(run_dir, 1)
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
        assert os.WTERMSIG(status) == signal.SIGKILL


def this_file(*words: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [__file__, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_kill_at_any_point_of_saving_loses_nothing(tmp_path: Path, alone: Ranks) -> None:
    """The one before or the new one is there, whole; the next save cleans up and succeeds."""
    save_step(tmp_path / "run", 1, alone)
    done = this_file("kill", tmp_path)
    assert done.returncode == 0, done.stderr
    *killed, through = sorted(tmp_path.glob("killed-*"))
    points = (tmp_path / "points").read_text().split()
    assert len(points) == len(killed)
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
        assert steps(run_dir)[-1] == 3  # and nothing hidden
        remove_old(run_dir, 1)
        assert steps(run_dir) == [3]
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    assert steps(through) == [2]


# ---- Several processes: one's failure is everyone's, and training could go on -------------------


def save_with_failures(folder: Path) -> None:
    """What each of several ranks sees; written to rank-N.json."""
    seen: dict[str, Any] = {}
    run_dir = folder / "run"

    with process_group("cpu") as ranks:

        def attempt(name: str, act: Callable[[], object]) -> None:
            try:
                seen[name] = str(act())
            except (CheckpointError, ConfigError) as error:
                seen[name] = f"{type(error).__name__}: {error}"
            ranks.from_main(None)  # nobody looks or goes on before all have ended
            checkpoints = run_dir / "checkpoints"
            seen[f"{name}: left"] = sorted(p.name for p in checkpoints.iterdir())
            ranks.from_main(None)

        attempt("first", lambda: save_step(run_dir, 1, ranks))

        pwrite, calls = os.pwrite, []

        def full(fd: int, data: bytes, at: int) -> int:
            calls.append(at)
            if len(calls) == 5:  # at the first moment, with four tensors to gather
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(fd, data, at)

        os.pwrite = full  # type: ignore[assignment]
        attempt("disk full", lambda: save_step(run_dir, 2, ranks))
        os.pwrite = pwrite
        attempt("room again", lambda: save_step(run_dir, 2, ranks))

        make_room, tensors = train_state._make_room, []

        def no_room(tensor: torch.Tensor) -> None:
            tensors.append(tensor)
            if ranks.rank == 1 and len(tensors) == 3:
                raise torch.OutOfMemoryError("tried to allocate 1.00 GiB")
            make_room(tensor)

        train_state._make_room = no_room
        attempt("out of memory", lambda: save_step(run_dir, 3, ranks))
        train_state._make_room = make_room
        attempt("memory again", lambda: save_step(run_dir, 3, ranks))

        if ranks.is_main:
            flip(step_dir(run_dir, 3) / "optimizer.safetensors")
        attempt("fallen back", lambda: find_resume_point(run_dir, ranks))
        if ranks.is_main:
            for step in (1, 2):
                cut(step_dir(run_dir, step) / "optimizer.safetensors")
        attempt("nothing left", lambda: find_resume_point(run_dir, ranks))

        def enter() -> None:
            with locked(run_dir, ranks):
                raise AssertionError("entered")

        with RunLock(run_dir) if ranks.is_main else nullcontext():
            attempt("locked", enter)
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two real processes that met every failure."""
    folder = tmp_path_factory.mktemp("ranks")
    done = this_file("ranks", folder, processes=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def seen(two_ranks: Path) -> dict[str, Any]:
    """What both ranks saw: the same."""
    first, second = (json.loads((two_ranks / f"rank-{n}.json").read_text()) for n in (0, 1))
    assert first == second
    return first


def test_a_full_disk_ends_the_save_on_every_rank(seen: dict[str, Any], two_ranks: Path) -> None:
    """The main rank's message; nothing is left, and the same save succeeds when there is room."""
    assert seen["disk full"].startswith("CheckpointError: ")
    assert "optimizer.safetensors: disk full" in seen["disk full"]
    assert seen["disk full: left"] == ["step-00000001"]
    assert seen["room again"] == str(step_dir(two_ranks / "run", 2))


def test_a_rank_without_memory_ends_the_save_on_every_rank(
    seen: dict[str, Any], two_ranks: Path
) -> None:
    """Nobody waits for it in a collective; its message is everyone's."""
    assert "rank 1: no memory to gather 'model.layers.1.a.weight.exp_avg'" in seen["out of memory"]
    assert seen["out of memory: left"] == ["step-00000001", "step-00000002"]
    assert seen["memory again"] == str(step_dir(two_ranks / "run", 3))


def test_every_rank_resumes_from_the_same(seen: dict[str, Any]) -> None:
    """The main rank looks; the others hear where, or why not."""
    assert "step-00000002'), {'step': 2" in seen["fallen back"]
    assert "step-00000003/optimizer.safetensors: damaged" in seen["fallen back"]
    assert "no training checkpoint is intact" in seen["nothing left"]


def test_a_held_lock_stops_every_rank(seen: dict[str, Any]) -> None:
    """The others do not wait for a main rank that was refused."""
    assert seen["locked"].startswith("ConfigError: ") and "another run is writing" in seen["locked"]


def test_the_files_do_not_depend_on_the_number_of_processes(
    two_ranks: Path, tmp_path: Path, alone: Ranks, seen: dict[str, Any]
) -> None:
    """Shards of uneven length are put together as one process has them."""
    one = save_step(tmp_path / "run", 3, alone)
    two = step_dir(two_ranks / "run", 3)
    for name in ("trainable.safetensors", "state.json", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


# ---- The lock -----------------------------------------------------------------------------------


def hold_lock(run_dir: Path) -> None:
    with RunLock(run_dir):
        print("held", flush=True)
        sys.stdin.read()


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    """It hears who holds the directory; a killed holder holds nothing."""
    command = [sys.executable, __file__, "lock", str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as caught, RunLock(tmp_path / "run"):
            pass
        assert f"pid {other.pid} on {socket.gethostname()}" in str(caught.value)
        other.kill()
        other.wait()
    assert (tmp_path / "run" / "lock").exists()
    with RunLock(tmp_path / "run"):
        assert f"pid {os.getpid()} " in (tmp_path / "run" / "lock").read_text()


def test_the_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    """A run directory stays if it was there before, or holds something now."""
    with RunLock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / "lock").exists()
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "there").mkdir()
    with RunLock(tmp_path / "there"):
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with RunLock(tmp_path / "used"):
        (tmp_path / "used" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["run.json"]


def test_a_lock_file_that_is_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening it and locking it, its holder may end: the lock is taken on a new file."""
    flock, calls = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunLock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="another run"), RunLock(tmp_path):
            pass


def test_a_place_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    """A file in the way of the run directory, for one."""
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot be locked: File exists"),
        RunLock(tmp_path / "run"),
    ):
        pass


if __name__ == "__main__":
    modes = {"kill": kill_at_every_point, "ranks": save_with_failures, "lock": hold_lock}
    modes[sys.argv[1]](Path(sys.argv[2]))
