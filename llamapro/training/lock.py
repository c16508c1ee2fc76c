"""The lock of a run directory: one run writes there, and notices if the directory is taken away."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llamapro import filesystem
from llamapro.checkpoints.run import RUN_FILE
from llamapro.errors import ConfigError, DataError
from llamapro.files import make_directory
from llamapro.training.distributed import Ranks

LOCK_FILE = ".lock"  # hidden: a folder of texts may hold the run directory
_directories: dict[Path, os.stat_result] = {}  # as they were when they were locked


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keeps a second run out of a run directory while the body runs, in one process.

    The kernel holds the lock and releases it when the process ends, however it ends. The file
    `.lock` names the holder. A run directory that this made is removed if it is still empty. Raises
    ConfigError if another run holds the lock, or the directory cannot be locked.
    """
    file, is_new, fd = run_dir / LOCK_FILE, False, None
    try:
        while fd is None:
            is_new = not run_dir.exists()
            fd = _take(file)
        filesystem.lacks(run_dir)
        _directories[run_dir] = run_dir.stat()
    except BlockingIOError:
        holder = _holder(file) or "it has just ended"
        raise ConfigError(
            f"{run_dir}: another run is writing here ({holder}); wait, or choose another --run-dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be locked: {error.strerror}; choose another --run-dir"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            if _holder(file) == _me():  # not the lock of another run, in a directory put in place
                file.unlink()
            if is_new:
                run_dir.rmdir()  # fails, as it should, if anything was written
        os.close(fd)


def check_holder(run_dir: Path) -> None:
    """Raises DataError if the run directory was replaced by that of another run.

    A directory that was removed is made again, and locked until this process ends.
    """
    file, before = run_dir / LOCK_FILE, _directories.get(run_dir)
    if before is None or (holder := _holder(file)) == _me():
        return
    now = "another run is there now"
    try:
        is_other = run_dir.exists() and not os.path.samestat(before, run_dir.stat())
        if not (is_other and (run_dir / RUN_FILE).exists()):
            _take(file)
            return
    except BlockingIOError:
        now = f"another run is writing there now ({holder})"
    raise DataError(
        f"{run_dir}: was replaced while the run was writing to it, and {now}; it was left alone"
    )


def _take(file: Path) -> int | None:
    """Opens and locks; returns None if the holder before removed the file in between."""
    make_directory(file.parent)
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        filesystem.lock(fd)  # where there are no locks, nothing keeps a second run out
        if not os.path.samestat(os.fstat(fd), os.stat(file)):
            raise FileNotFoundError
        if os.fstat(fd).st_size:
            os.ftruncate(fd, 0)
        os.write(fd, f"{_me()}\n".encode())
    except OSError as error:
        os.close(fd)
        if isinstance(error, FileNotFoundError):
            return None
        raise
    return fd


def _me() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _holder(file: Path) -> str:
    """Returns what a lock says about its holder; "" if there is none."""
    with suppress(OSError, ValueError):
        return file.read_text(encoding="utf-8")[:200].strip() or "it has just started"
    return ""


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """`run_lock` on the main rank while the body runs; every rank must enter, and raises alike."""
    with ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(run_lock(run_dir)))
        yield
