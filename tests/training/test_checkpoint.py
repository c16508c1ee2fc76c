"""A training checkpoint is whole or refused by name; the last good one is never deleted; what is
saved in the background is what was when the save started.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llamapro.checkpoints.new_blocks import BlocksInfo, read_blocks
from llamapro.checkpoints.run import (
    MAX_STATE_BYTES,
    file_sha256,
    newest_intact,
    read_state,
    training_checkpoints,
)
from llamapro.errors import CheckpointError
from llamapro.training import checkpoint as train_state
from llamapro.training.checkpoint import Saver, remove_old
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.resume import load_optimizer

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]
INFO = BlocksInfo("new_blocks", "ab" * 32, (1,), 0)
SHAPES = {"model.layers.1.a.weight": (5, 3), "model.layers.1.b.weight": (7,)}


def trained(step: int) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """What trains, and AdamW after one step of it; the values depend on the step."""
    generator = torch.Generator().manual_seed(step)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return parameters, optimizer


def state_at(step: int) -> dict[str, Any]:
    state = {"step": step, "tokens": 10 * step, "elapsed_s": 1.0, "loss": 2.5}
    return state | {"eval": {"code": 1.0}, "settings": {}}


def save_step(run_dir: Path, step: int, ranks: Ranks, in_background: bool = False) -> Path:
    """Saves what is trained at the step; nothing old is removed."""
    with Saver(run_dir, 99, 0, ranks, in_background) as saver:
        saver.start(step, *trained(step), INFO, state_at(step))
        saved = saver.finish()
    assert saved is not None
    return Path(saved["path"])


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
    event, make_way = threading.Event(), train_state._make_way

    def wait(target: Path) -> None:
        assert event.wait(60)
        make_way(target)

    monkeypatch.setattr(train_state, "_make_way", wait)
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
    with Saver(tmp_path, 1, 0, alone, in_background=True) as saver:
        saver.start(5, parameters, optimizer, INFO, state)
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
    with Saver(tmp_path, 1, 0, alone, in_background=True) as saver:
        assert not saver.is_done and saver.finish() is None
        saver.start(5, *trained(5), INFO, state_at(5))
        assert not saver.is_done and not step_dir(tmp_path, 5).exists()
        let_go.set()
        assert saver._writing is not None
        saver._writing.result()
        assert saver.is_done and steps(tmp_path) == [5]
        assert saver.finish() is not None
        assert not saver.is_done and saver.finish() is None
    with Saver(tmp_path, 1, 0, alone, in_background=False) as saver:
        saver.start(6, *trained(6), INFO, state_at(6))
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

    def remove_for_4_s(*_: object) -> None:
        assert not in_background or is_waited_for.wait(60)
        now[0] += 4

    gather = train_state._gather
    monkeypatch.setattr(train_state, "_gather", gather_for_3_s)
    monkeypatch.setattr(train_state, "remove_old", remove_for_4_s)
    with Saver(tmp_path, 1, 0, alone, in_background) as saver:
        saver.start(5, *trained(5), INFO, state_at(5))
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
        Saver(tmp_path, 1, 0, alone, in_background=True) as saver,
    ):
        saver.start(5, *trained(5), INFO, state_at(5))
        let_go.set()
        raise KeyError("elsewhere")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]
    assert_loads(step_dir(tmp_path, 5), 5)
