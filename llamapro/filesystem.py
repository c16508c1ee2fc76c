"""Finds what a file system lacks: mounts of object stores, and some network ones, lack parts.

A file must be written from its start to its end, renamed and removed. What else makes writing safer
or faster is found out by trying, and done without where it is missing.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

from llamapro.errors import ConfigError, warn

# The answers of a file system that cannot do something at all.
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.ENOLCK}
UNSUPPORTED |= {errno.EBADF, errno.EISDIR, errno.ENOTTY}
RANDOM_WRITES = "writing out of order"
RESERVING = "reserving space"
LOCK = ".lock"  # in a hidden directory, locked by the process that writes there
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_lacking: dict[int, set[str]] = {}  # device -> what it cannot do


def lacks(directory: Path) -> set[str]:
    """Returns what the file system of a directory cannot do; tries once, and then says so.

    Raises OSError if nothing can be written there, or files cannot be renamed.
    """
    device = directory.stat().st_dev
    if device not in _lacking:
        folder, held = hold(directory, "probe")
        try:
            _lacking[device] = _try(folder)
        finally:
            os.close(held)
            shutil.rmtree(folder, ignore_errors=True)
        if _lacking[device]:
            missing = ", ".join(sorted(_lacking[device]))
            warn(f"{directory}: its file system has no {missing}: going on without")
    return _lacking[device]


def _try(folder: Path) -> set[str]:
    """Tries everything in an empty folder."""

    def write_out_of_order(fd: int) -> None:
        os.pwrite(fd, b"b", 1 << 16)
        os.pwrite(fd, b"a", 0)

    tries: dict[str, Callable[[int], object]] = {
        RANDOM_WRITES: write_out_of_order,
        RESERVING: lambda fd: os.posix_fallocate(fd, 0, 1 << 16),
        "locks": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "flushing of files": os.fsync,
        "flushing of directories": lambda _: _fsync(folder),
    }
    missing = set()
    for number, (name, attempt) in enumerate(tries.items()):
        file = folder / str(number)
        file.write_bytes(b"content")
        try:
            with open(file, "r+b", buffering=0) as out:
                attempt(out.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            missing.add(name)
    (folder / "directory").mkdir()
    (folder / "directory").rename(folder / "renamed")
    (folder / "0").replace(folder / "1")
    return missing


def existing(path: Path, place: str = "") -> Path:
    """Returns the path, or else the nearest folder above it that exists.

    Raises ConfigError, which begins with `place`, if a file or a link to nothing is in the way.
    """
    found = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not found.is_dir():
        kind = "a file, not a directory" if found.exists() else "a link to nothing"
        raise ConfigError(f"{place}{found} is {kind}; choose another, or remove it")
    return found


def sync(path: Path) -> None:
    """Flushes a file or directory to the disk, where the file system has that."""
    try:
        _fsync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int) -> bool:
    """Locks an open file for this process; raises BlockingIOError if another has the lock.

    Returns:
        False if the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of which BlockingIOError is one
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def hold(directory: Path, name: str) -> tuple[Path, int]:
    """Makes a hidden directory for what is incomplete; `files.remove_abandoned` knows it.

    Returns:
        The directory, and an open file in it that is locked until it is closed.
    """
    while True:
        # Process numbers and host names repeat among containers, and this name does not.
        holder = Path(mkdtemp(prefix=f".{name}.partial-", dir=directory))
        try:
            fd = os.open(holder / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # taken for an abandoned one before it had a lock
            continue
        try:
            lock(fd)
        except BlockingIOError:  # the same
            os.close(fd)
            continue
        return holder, fd


def swap(first: Path, second: Path) -> None:
    """Exchanges two names in one step; raises OSError where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(second))
    names = os.fsencode(first), os.fsencode(second)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
