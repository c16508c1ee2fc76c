"""A damaged checkpoint is refused by name, and the last good one is never deleted."""

import errno
import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamapro.checkpoints.run import MAX_STATE_BYTES, file_sha256, newest_intact, read_state
from llamapro.errors import CheckpointError
from llamapro.training import checkpoint as train_state
from llamapro.training.checkpoint import Saver, remove_old
from llamapro.training.distributed import Ranks

SAVES = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("saves.py"))))
FILES = SAVES.FILES
assert_loads = SAVES.assert_loads
cut = SAVES.cut
flip = SAVES.flip
save_step = SAVES.save_step
save_with = SAVES.save_with
saving = SAVES.saving
step_dir = SAVES.step_dir
steps = SAVES.steps
trained = SAVES.trained


@pytest.fixture
def run_dir(tmp_path: Path, alone: Ranks) -> Path:
    """A run with training checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_step(tmp_path / "run", step, alone)
    return tmp_path / "run"


# ---- Damage: found by name, never resumed, never the reason that something good is deleted -------


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


def test_a_link_to_an_old_one_is_removed_and_not_what_it_leads_to(
    run_dir: Path, alone: Ranks, tmp_path: Path
) -> None:
    """A user moved it to another disk."""
    step_dir(run_dir, 1).rename(tmp_path / "moved")
    step_dir(run_dir, 1).symlink_to(tmp_path / "moved")
    save_step(run_dir, 4, alone, keep=2)
    names = sorted(path.name for path in step_dir(run_dir, 4).parent.iterdir())
    assert names == ["step-00000003", "step-00000004"]
    assert (tmp_path / "moved" / "trainable.safetensors").exists()


def test_deletion_spares_the_last_good_one(run_dir: Path) -> None:
    """With the newest two damaged, the one before them is not old."""
    for step in (2, 3):
        flip(step_dir(run_dir, step) / "trainable.safetensors")
    remove_old(run_dir, 1)
    assert steps(run_dir) == [1, 3]
    assert newest_intact(run_dir)[0] == step_dir(run_dir, 1)


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


# ---- What a file may hold ------------------------------------------------------------------------


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
