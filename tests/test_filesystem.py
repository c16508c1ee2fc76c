"""A file system that lacks what is optional is written to; what is needed is checked at once."""

import argparse
import errno
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamapro import filesystem
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.checkpoints.writing import in_memory, write_safetensors
from llamapro.errors import ConfigError
from llamapro.files import output_directory, user_path
from llamapro.scripts import convert, train

FAILING = {"posix_fallocate": errno.EOPNOTSUPP, "pwrite": errno.EINVAL, "lseek": errno.ESPIPE}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system for writing from start to end alone: no fallocate, flock or directory fsync."""
    import fcntl

    fsync = os.fsync

    def no_directories(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    def failing(code: int) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            raise OSError(code, os.strerror(code))

        return call

    for name, code in FAILING.items():
        monkeypatch.setattr(os, name, failing(code))
    monkeypatch.setattr(os, "fsync", no_directories)
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS))
    monkeypatch.setattr(filesystem, "_lacking", {})
    yield


def test_what_is_missing_is_said_once(
    bare: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it in one line, and nothing is left of the trial."""
    for _ in range(2):
        assert len(filesystem.lacks(tmp_path)) == 4
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "its file system has no flushing of directories" in said
    assert "locks, reserving space, writing out of order: going on without" in said
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_system_lacks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is said."""
    monkeypatch.setattr(filesystem, "_lacking", {})
    assert filesystem.lacks(tmp_path) == set()
    assert capsys.readouterr().err == ""


def test_files_are_the_same_on_a_bare_one(bare: None, tmp_path: Path) -> None:
    """Also with the two threads that write large checkpoints."""
    tensors = {name: torch.randn(50, 7) for name in "abcdef"}
    for threads in (1, 2):
        file = tmp_path / str(threads)
        write_safetensors(file, in_memory(tensors), threads=threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    found = load_file(tmp_path / "1")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_directory_where_nothing_can_be_renamed_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing could appear complete there."""

    def no_rename(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(filesystem, "_lacking", {})
    monkeypatch.setattr(os, "rename", no_rename)
    with (
        pytest.raises(Exception, match="cannot be created: Function not implemented"),
        output_directory(tmp_path / "out"),
    ):
        raise AssertionError("entered")


def test_a_bare_file_system_takes_a_run_and_an_expansion(
    bare: None,
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
    run_command: Callable[..., Any],
) -> None:
    """From expanding over training, a resume and merging to the same bits as elsewhere."""
    base = write_random_checkpoint(tmp_path / "base", tiny_config(num_hidden_layers=2))
    pro, run_dir = tmp_path / "pro", tmp_path / "run"
    words = ["--model.path", pro, "--data.train", argparse.__file__, "--data.seq-len", 32]
    words += ["--data.cache-dir", tmp_path / "cache", "--train.batch-size", 2, "--run-dir"]
    for command in (
        (convert.main, "expand", base, pro, "--num-new-blocks", 1),
        (train.main, *words, run_dir, "--train.steps", 2, "--dry-run"),
        (train.main, *words, run_dir, "--train.steps", 2),
        (train.main, *words, run_dir, "--train.steps", 3),
        (convert.main, "merge", pro, run_dir, tmp_path / "merged"),
    ):
        status, _, said = run_command(*command)
        assert status == 0, said
    assert [p.name for p in training_checkpoints(run_dir)] == ["step-00000002", "step-00000003"]
    merged = Checkpoint.open(tmp_path / "merged").sha256()
    assert merged != Checkpoint.open(pro).sha256()
    hidden = [p.name for p in tmp_path.rglob(".*") if ".partial-" not in p.name]
    assert hidden == []


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_the_system_s_own_answers_are_understood(root: Path, tmp_path: Path) -> None:
    """The C library fails below Python: the probe finds what the preloaded shim takes away."""
    shim = tmp_path / "shim.so"
    source = root / "benchmarks" / "shim.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    fails = f"pwrite:{errno.EINVAL},lseek:{errno.ESPIPE},fallocate:{errno.EOPNOTSUPP},"
    fails += f"fsyncdir:{errno.EINVAL},flock:{errno.ENOSYS}"
    environment = os.environ | {"SHIM_UNDER": str(tmp_path), "SHIM_FAIL": fails}
    code = "import sys; from pathlib import Path; from llamapro import filesystem as f\n"
    code += "print(sorted(f.lacks(Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment |= {"LD_PRELOAD": str(shim)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == (
        "['flushing of directories', 'locks', 'reserving space', 'writing out of order']\n"
    ), done.stderr


def test_a_home_that_is_not_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have neither HOME nor an entry in passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(ConfigError, match=r"~/.cache/llamapro: there is no home directory"):
        user_path("~/.cache/llamapro")
    assert user_path("~nobody-here/x") == Path("~nobody-here/x")


def test_a_variable_in_a_path_is_refused_and_makes_no_directory_of_that_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A preset is no shell; a name that exists, or has its $ elsewhere, is taken as it is."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^\$SCRATCH/x: variables are not .*write {tmp_path}/x"):
        user_path("$SCRATCH/x")
    with pytest.raises(ConfigError, match=r"'a\\x00b': a path cannot have a zero byte"):
        user_path("a\0b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$SCRATCH").mkdir()
    for name in ("$nothing/x", "runs/${nothing}"):
        with pytest.raises(ConfigError, match=r"variables are not .*write what it stands for"):
            user_path(name)
    for name in ("$SCRATCH", "at-5$/x", "price$usd", "$5"):
        assert user_path(name) == Path(name)
