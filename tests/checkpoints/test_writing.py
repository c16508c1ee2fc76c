"""A written directory is complete or not there; what it replaces survives until the very end."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro import filesystem
from llamapro.checkpoints.directory import SINGLE_FILE
from llamapro.checkpoints.writing import in_memory, write_checkpoint
from llamapro.errors import CheckpointError, ConfigError
from llamapro.files import make_directory, output_directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, hidden ones included: nothing may be left beside the result."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*.*")}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint directory that is in the way."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"old weights")
    return directory


def write_something(directory: Path) -> None:
    (directory / "config.json").write_text('{"new": 1}')


@pytest.mark.parametrize("name", ["out", "a/b/out", "out [1]*"])
def test_the_directory_appears_when_the_body_has_ended(tmp_path: Path, name: str) -> None:
    """Parents are made; until the end nothing is at the path, afterwards nothing is beside it."""
    path = tmp_path / name
    with output_directory(path) as aside:
        assert aside.parent.parent == path.parent and not path.exists()
        write_something(aside)
    assert contents(path) == {"config.json": b'{"new": 1}'}
    assert list(path.parent.iterdir()) == [path]


def test_every_new_directory_is_on_the_disk_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parents are flushed too, whether they are new or not."""
    synced: list[tuple[Path, bool]] = []
    fsync, target = os.fsync, tmp_path / "run" / "checkpoints" / "step"

    def noted(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")), target.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    with output_directory(target) as aside:
        assert synced == [(tmp_path / "run", False), (tmp_path, False)]
        write_something(aside)
    files = [(aside / "config.json", False), (aside, False), (target.parent, True)]
    assert synced[2:] == files
    synced.clear()
    make_directory(target)
    assert synced == []


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    """Made beforehand by the user, it needs no --force."""
    (tmp_path / "out").mkdir()
    with output_directory(tmp_path / "out") as aside:
        write_something(aside)
    assert contents(tmp_path) == {"out/config.json": b'{"new": 1}'}


def test_a_full_directory_is_refused_without_force(old: Path) -> None:
    """It is left as it was."""
    before = contents(old.parent)
    with (
        pytest.raises(ConfigError, match=r"out: exists and is not empty.*--force"),
        output_directory(old),
    ):
        pytest.fail("the body must not run")
    assert contents(old.parent) == before


def test_force_replaces_only_at_the_end(old: Path) -> None:
    """Inside the body the old files are all there; afterwards only the new ones."""
    before = contents(old)
    with output_directory(old, force=True) as aside:
        write_something(aside)
        assert contents(old) == before
    assert contents(old.parent) == {"out/config.json": b'{"new": 1}'}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_leaves_the_old_bytes_and_no_partial(old: Path, error: BaseException) -> None:
    """An error, Ctrl-C and SIGTERM's SystemExit pass through and change nothing."""
    before = contents(old.parent)
    with pytest.raises(type(error)), output_directory(old, force=True) as aside:
        write_something(aside)
        raise error
    assert contents(old.parent) == before
    assert list(old.parent.iterdir()) == [old]


def test_force_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    """A home directory given by mistake is not deleted."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with (
        pytest.raises(ConfigError, match="holds no checkpoint"),
        output_directory(tmp_path / "out", force=True),
    ):
        pytest.fail("the body must not run")
    assert contents(tmp_path) == {"out/thesis.txt": b"years"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    """At the path itself, force or not, and where a parent should be."""
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with (
            pytest.raises(ConfigError, match="out is a file, not a directory; choose"),
            output_directory(tmp_path / "out", force=force),
        ):
            pytest.fail("the body must not run")
    with (
        pytest.raises(ConfigError, match="out is a file, not a directory"),
        output_directory(tmp_path / "out" / "below"),
    ):
        pytest.fail("the body must not run")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_is_followed(old: Path, tmp_path: Path) -> None:
    """The target of the link is replaced on its own disk; the link stays a link."""
    link = tmp_path / "link"
    link.symlink_to(old)
    with output_directory(link, force=True) as aside:
        write_something(aside)
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, old]
    assert contents(old) == {"config.json": b'{"new": 1}'}


def no_swap(*_: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def test_a_failed_rename_puts_the_old_directory_back(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged: after moving the old away, an error moves it back."""
    before = contents(old.parent)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.parent.name and self.name == old.name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(filesystem, "swap", no_swap)
    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(CheckpointError, match="Input/output error"),
        output_directory(old, force=True) as aside,
    ):
        write_something(aside)
    assert contents(old.parent) == before


def test_a_directory_is_replaced_in_one_step(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rename moves the old one away first, so a kill at any point leaves one of the two."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_swap)
        with output_directory(old, force=True) as aside:
            write_something(aside)
    assert contents(old) == {"config.json": b'{"new": 1}'} and list(old.parent.iterdir()) == [old]


def test_what_a_kill_between_two_renames_hid_is_put_back(old: Path) -> None:
    """Where names cannot be exchanged; the next command that writes beside it finds the old one."""
    before = contents(old)
    holder = old.with_name(f".{old.name}.partial-abc")
    holder.mkdir()
    old.rename(holder / f"replaced-{old.name}")
    with pytest.raises(ConfigError, match="is not empty"), output_directory(old):
        pass
    assert contents(old) == before and list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize(
    "code, expected", [(errno.ENOSPC, "disk full"), (errno.EIO, "Input/output error")]
)
def test_a_full_disk_removes_the_partial_output(
    code: int, expected: str, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC halfway through a tensor: one CheckpointError with the file's name, old bytes kept."""
    before = contents(old.parent)
    write, calls = os.pwrite, 0

    def failing(fd: int, data: Any, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:  # the header, a piece of the tensor, and no more
            raise OSError(code, os.strerror(code))
        return write(fd, data[:1000], at)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(CheckpointError) as caught, output_directory(old, force=True) as aside:
        write_checkpoint(aside, in_memory({"w": torch.ones(1000)}))
    assert calls == 3
    assert str(caught.value).startswith(f"{old / SINGLE_FILE}: {expected} while writing {old}; ")
    assert str(caught.value).endswith("partial output was removed, nothing else was changed")
    assert contents(old.parent) == before
    assert list(old.parent.iterdir()) == [old]


def test_a_file_size_limit_removes_the_partial_output(
    tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    """The kernel's own refusal (EFBIG), and the command's exit status 2 without a traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def main(_: list[str]) -> None:
        with output_directory(tmp_path / "out") as aside:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            try:
                write_checkpoint(aside, in_memory({"w": torch.ones(9999)}))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    status, out, said = run_command(main)
    assert status == 2 and out == ""
    assert "CheckpointError" in said and "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_sigterm_in_the_middle_of_writing_leaves_nothing(old: Path) -> None:
    """Exit status 143, the old directory as it was, no partial one."""
    before = contents(old.parent)
    script = f"""
import time
from llamapro import cli
from llamapro.files import output_directory
def main():
    with output_directory({str(old)!r}, force=True) as aside:
        (aside / "model.safetensors").write_bytes(b"half")
        print("writing", flush=True)
        while True:  # signal.pause() waits for ever if the signal came just before it
            time.sleep(0.05)
cli.run(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(list(old.parent.iterdir())) == 2, "the partial directory is there now"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr == "terminated\n"
    assert contents(old.parent) == before
    assert list(old.parent.iterdir()) == [old]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Not what is being written, whoever writes it: process numbers repeat among containers."""
    for name in ("one", "two"):
        (tmp_path / f".out.partial-{name}").mkdir()
        (tmp_path / f".out.partial-{name}" / "model.safetensors").write_bytes(b"half")
    with output_directory(tmp_path / "out") as first:
        write_something(first)
        with pytest.raises(KeyError), output_directory(tmp_path / "other") as second:
            assert first.exists() and second.exists()
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyError
    assert contents(tmp_path) == {"out/config.json": b'{"new": 1}'}
