"""A run is resumed only as the run that it was, and by one process group at a time."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest

from llamapro import filesystem
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.text.corpus import tokenize
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.lock import check_holder, run_lock
from llamapro.training.resume import check_identity, make_identity

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
    found = make_identity(
        checkpoint, trainable, tokenizer.fingerprint, {"train corpus": store}, checkpoint.config
    )
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "is_base"),
    [
        ("model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.2.mlp.up_proj.weight", False),  # new, it may hold anything
        ("lm_head.weight", True),
    ],
)
def test_a_base_that_is_not_the_recorded_one_does_not_train(
    expand: Callable[..., tuple[Path, Path]], tmp_path: Path, name: str, is_base: bool
) -> None:
    """One bit, in a model with added tokens: found when a run starts, not when it is merged."""
    expand()
    change_tensor(tmp_path, name, "grown")
    checkpoint = Checkpoint.open(tmp_path / "grown")
    trainable = [name for name in checkpoint.tensors if name.startswith("model.layers.2.")]
    refused = pytest.raises(
        CheckpointError, match=r"grown: the base inside .* weights were changed"
    )
    with refused if is_base else nullcontext():
        make_identity(checkpoint, trainable, "", {}, checkpoint.config)


def change_tensor(parts: Path, name: str, model: str = "base") -> None:
    tensor = Checkpoint.open(parts / model).tensors[name]
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.offset)
        first = file.read(1)[0]
        file.seek(tensor.offset)
        file.write(bytes([first ^ 1]))


def test_the_same_parts_go_on_wherever_they_lie(parts: Path, tmp_path: Path) -> None:
    """Moved and touched files, and other values of what trains, are no difference."""
    saved = identity(parts)
    moved = shutil.copytree(parts, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))
    change_tensor(moved, "model.layers.3.mlp.up_proj.weight")
    os.utime(moved / "corpus.txt", (1, 1))
    check_identity(saved, identity(moved), tmp_path)


def test_every_other_part_is_refused_by_name(parts: Path, tokenizer_file: Path) -> None:
    """One bit of a frozen weight, the same lines in another order, another tokenizer: each named,
    with both values, and only those that differ."""
    before = identity(parts)
    change_tensor(parts, "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match="the frozen base model was sha256 ") as caught:
        check_identity(before, identity(parts), parts)
    assert "data" not in str(caught.value) and "tokenizer" not in str(caught.value)
    change_tensor(parts, "model.layers.2.mlp.up_proj.weight")
    (parts / "corpus.txt").write_text("".join(f"line {i}\n" for i in reversed(range(100))))
    now = identity(parts)
    assert now["data"]["train corpus"]["tokens"] == before["data"]["train corpus"]["tokens"]
    with pytest.raises(ConfigError, match=r"data 'train corpus' was .* tokens .*, is ") as caught:
        check_identity(before, now, parts)
    assert "base model" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"the tokenizer was sha256 .*, is sha256 cdcdcdcd"):
        check_identity(before, before | {"tokenizer": "cd" * 32}, parts)
    with pytest.raises(ConfigError, match=r"data 'train corpus' was .*, is not there"):
        check_identity(before, before | {"data": {}}, parts)
    theta = {"computation": before["computation"] | {"rope_theta": 5e5}}
    with pytest.raises(ConfigError, match=r"rope_theta of config.json was 10000.0, is 500000.0"):
        check_identity(before, before | theta, parts)
    # What its setting allows may differ, and nothing else.
    check_identity(before, now, parts, ["data.train"])
    with pytest.raises(ConfigError, match=r"allow them: --resume\.allow data\.train$"):
        check_identity(before, now, parts, ["data.val", "model.path", "model.tokenizer"])


def test_a_run_of_an_older_version_goes_on_and_says_what_is_not_compared(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It did not save the fields of config.json that decide the computation."""
    now = identity(parts)
    before = {key: value for key, value in now.items() if key != "computation"}
    check_identity(before, now, parts)
    assert "older version, which did not save rope_theta" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [{}, None, {"base": "", "data": []}])
def test_a_state_that_names_no_parts_is_refused(tmp_path: Path, saved: Any) -> None:
    """Without a record nothing can be compared."""
    now = {"base": "ab" * 32, "tokenizer": "cd" * 32, "data": {}}
    with pytest.raises(CheckpointError, match="do not say which base, tokenizer and data"):
        check_identity(saved, now, tmp_path)


# ---- The lock -----------------------------------------------------------------------------------


def hold_lock(run_dir: Path, ready: int) -> NoReturn:
    """Holds the lock until this process, a fork of the test's, is killed."""
    try:
        with run_lock(run_dir):
            os.write(ready, b"held")
            signal.pause()
    finally:
        os._exit(1)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    """It hears who holds the directory; a killed holder holds nothing."""
    held, ready = os.pipe()
    if not (other := os.fork()):
        hold_lock(tmp_path / "run", ready)
    os.close(ready)
    try:
        assert os.read(held, 4) == b"held"
        with pytest.raises(ConfigError) as caught, run_lock(tmp_path / "run"):
            pass
        assert f"pid {other} on {socket.gethostname()}" in str(caught.value)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(held)
    assert (tmp_path / "run" / ".lock").exists()
    with run_lock(tmp_path / "run"):
        assert f"pid {os.getpid()} " in (tmp_path / "run" / ".lock").read_text()


def test_the_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    """A run directory stays if it was there before, or holds something now."""
    with run_lock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / ".lock").exists()
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "there").mkdir()
    with run_lock(tmp_path / "there"):
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with run_lock(tmp_path / "used"):
        (tmp_path / "used" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["run.json"]


def test_a_lock_file_that_is_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening it and locking it, its holder may end: the lock is taken on a new file."""
    filesystem.lacks(tmp_path)  # locks a file of its own
    flock, calls = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="another run"), run_lock(tmp_path):
            pass


def test_a_place_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    """A file in the way of the run directory, for one."""
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot be locked: File exists"),
        run_lock(tmp_path / "run"),
    ):
        pass


def test_a_directory_that_another_run_put_in_place_is_not_written_to(tmp_path: Path) -> None:
    """Whether that run goes on or has ended. A directory that was removed is made again."""
    run_dir = tmp_path / "run"
    with run_lock(run_dir):
        run_dir.rename(tmp_path / "moved")
        check_holder(run_dir)
        assert f"pid {os.getpid()} " in (run_dir / ".lock").read_text()
        run_dir.rename(tmp_path / "moved-again")
        held, ready = os.pipe()
        if not (other := os.fork()):
            hold_lock(run_dir, ready)
        os.close(ready)
        try:
            assert os.read(held, 4) == b"held"
            with pytest.raises(DataError, match=f"was replaced .* now \\(pid {other} on "):
                check_holder(run_dir)
        finally:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
            os.close(held)
        assert f"pid {other} " in (run_dir / ".lock").read_text()
        check_holder(run_dir)  # nothing is in it but the lock of a process that is dead
        assert f"pid {os.getpid()} " in (run_dir / ".lock").read_text()
        shutil.rmtree(run_dir)
        run_dir.mkdir()
        (run_dir / "run.json").write_text("{}")
        with pytest.raises(DataError, match=r"was replaced .* and another run is there now"):
            check_holder(run_dir)
        assert not (run_dir / ".lock").exists()


def test_checkpoints_that_cannot_be_listed_are_no_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that took them for none would begin anew, over its own log."""

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    assert training_checkpoints(tmp_path) == []
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be listed: Permission denied"):
        training_checkpoints(tmp_path)
