"""Hashes of large files, kept while the files stay as they are, so that no start reads them whole.

A record is found by the file's path, inode, size, mtime and ctime. Every write moves the ctime, and
no program can set it back. The record also holds a checksum of a few blocks of the file, for file
systems whose times say little. What no write has done, such as a bit that decays on the disk, is
found by `llamapro verify`, which takes nothing from here.
"""

import hashlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamapro.files import parse_json, user_path

FORMAT_VERSION = 1
WHOLE = "all"  # the name of the whole file among its parts
# A file that changed just now may change again without another time, which has steps of a few ms.
SETTLED_NS = 2_000_000_000
_BLOCKS, _BLOCK_BYTES = 4, 4096


@contextmanager
def known_hashes(file: Path, cache_dir: str | Path | None) -> Iterator[dict[str, str]]:
    """Gives the hashes that are known of a file, part -> SHA-256; what the body adds is kept.

    Nothing is kept if the file changes meanwhile or has changed in the last seconds, if the body
    fails, or if the directory cannot be written.

    Args:
        cache_dir: the records lie in its folder `hashes`; None knows and keeps nothing.
    """
    if cache_dir is None:
        yield {}
        return
    state = _state(file)
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]
    record = user_path(cache_dir) / "hashes" / f"{name}.json"
    known = _read(record, state, file)
    hashes = dict(known)
    yield hashes
    if hashes == known or _state(file) != state or time.time_ns() - state[-1] < SETTLED_NS:
        return
    found = {"state": state, "blocks": _checksum(file), "hashes": hashes}
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        # Not flushed to the disk: a thousand of them would take half a minute, and what a power
        # failure leaves of a record is no record.
        aside = record.with_name(f".{record.name}.{secrets.token_hex(8)}")
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(record)


def _state(file: Path) -> list[Any]:
    with open(file, "rb") as content:  # for which a network file system asks its server
        status = os.fstat(content.fileno())
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [FORMAT_VERSION, os.path.abspath(file), status.st_ino, status.st_size, *times]


def _checksum(file: Path) -> int:
    """Returns a CRC of blocks that lie evenly over the file, the first and the last among them."""
    found = 0
    with open(file, "rb", buffering=0) as content:
        last = max(0, os.fstat(content.fileno()).st_size - _BLOCK_BYTES)
        for number in range(_BLOCKS):
            content.seek(last * number // (_BLOCKS - 1))
            found = zlib.crc32(content.read(_BLOCK_BYTES), found)
    return found


def _read(record: Path, state: list[Any], file: Path) -> dict[str, str]:
    """Returns the hashes of a record, {} if there is none of this file as it is."""
    with suppress(OSError, ValueError, RecursionError):
        found = parse_json(record.read_bytes())
        hashes = found.get("hashes")
        is_same = found.get("state") == state and found.get("blocks") == _checksum(file)
        if is_same and isinstance(hashes, dict) and all(type(h) is str for h in hashes.values()):
            return hashes
    return {}
