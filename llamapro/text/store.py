"""Token stores: the token stream of a corpus on disk, memory-mapped, complete or not there."""

import bisect
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.errors import DataError

INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 1 << 28  # it names every file of the corpus: two million of them, and no more
SHARD_TOKENS = 1 << 28
Int64s = NDArray[np.int64]


class TokenStore:
    """The token stream of a corpus, memory-mapped.

    A directory of `shard-00000.bin`, ... (uint16, or uint32 for vocabularies past 65,536, so that
    none can wrap) and `index.json`, which says what the tokens were made of, and each shard's
    SHA-256. To open one compares sizes only, because every rank does; `check` compares the bytes.

    Attributes:
        path: the directory.
        tokens: length of the stream, BOS and EOS included.
        documents: how many documents it was made of.
        bytes: UTF-8 length of their text.
        fingerprint: SHA-256 of the tokenizer's file.
        sha256: of the tokens, as they were written; that of files moved or touched is the same.
        index: all of `index.json`.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        """Opens a store made with the tokenizer of this fingerprint.

        Raises:
            DataError: naming the file, if one is missing, of another size than `index.json` says,
                or made with another tokenizer.
        """
        self.path = Path(path)
        file = self.path / INDEX_FILE
        again = f"remove {self.path} and run again"
        try:
            if (size := file.stat().st_size) > MAX_INDEX_BYTES:
                raise ValueError(f"{size:,} bytes, over {MAX_INDEX_BYTES:,}")
            self.index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            self.fingerprint: str = self.index["tokenizer_sha256"]
            self.tokens: int = self.index["tokens"]
            self.documents: int = self.index["counts"]["documents"]
            self.bytes: int = self.index["counts"]["bytes"]
            dtype = np.dtype({"uint16": "uint16", "uint32": "uint32"}[self.index["dtype"]])
            shards = [_shard_of(self.path, entry) for entry in self.index["shards"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file}: not an index of tokens ({error!r}); {again}") from None
        if self.fingerprint != fingerprint:
            raise DataError(
                f"{file}: tokens of another tokenizer ({self.fingerprint[:16]}..., this one is "
                f"{fingerprint[:16]}...); {again}"
            )
        for shard, tokens, _ in shards:
            size = shard.stat().st_size if shard.exists() else -1
            if size != tokens * dtype.itemsize:
                found = "missing" if size < 0 else f"{size:,} bytes"
                raise DataError(f"{shard}: {found}, {INDEX_FILE} says {tokens:,} tokens; {again}")
        self._shards = [np.memmap(shard, dtype=dtype, mode="r") for shard, _, _ in shards]
        self._ends = list(itertools.accumulate(tokens for _, tokens, _ in shards))
        self._hashes = {shard: sha256 for shard, _, sha256 in shards}
        text = " ".join([dtype.name, *self._hashes.values()])
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        if self._ends[-1:] != [self.tokens]:
            raise DataError(f"{file}: {self.tokens:,} tokens, but its shards differ; {again}")

    def check(self, label: str) -> None:
        """Reads all shards, with a progress bar of this label, and compares them with the index.

        Raises:
            DataError: naming the shard that has other bytes than were written.
        """
        total = sum(tokens.nbytes for tokens in self._shards)
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
            for shard, sha256 in self._hashes.items():
                digest = hashlib.sha256()
                with open(shard, "rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
                        bar.update(len(piece))
                if digest.hexdigest() != sha256:
                    raise DataError(
                        f"{shard}: damaged: other bytes than were written; remove {self.path} and "
                        "run again"
                    )

    def read(self, start: int, stop: int) -> Int64s:
        """Returns the tokens [start, stop), a copy; raises IndexError outside the stream."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        at, shard = start, bisect.bisect_right(self._ends, start)
        while at < stop:
            end, tokens = self._ends[shard], self._shards[shard]
            upto = min(stop, end)
            first = at - (end - tokens.size)
            out[at - start : upto - start] = tokens[first : first + upto - at]
            at, shard = upto, shard + 1
        return out

    @cached_property
    def _starts(self) -> Int64s | None:
        """Where documents start; None if no token marks it. Found when first asked for."""
        bos, eos = self.index.get("bos_id"), self.index.get("eos_id")
        mark = eos if bos is None else bos
        if mark is None:
            return None
        found = [
            np.flatnonzero(tokens == mark) + (end - tokens.size)
            for tokens, end in zip(self._shards, self._ends, strict=True)
        ]
        starts = np.concatenate(found)
        return starts if bos is not None else np.concatenate(([0], starts[:-1] + 1))

    def document_of(self, position: int) -> int | None:
        """Returns the number of the document a token belongs to, in the order of the files.

        The first call reads all tokens, for BOS or EOS. None if the tokenizer has neither.
        """
        if self._starts is None:
            return None
        return int(np.searchsorted(self._starts, position, side="right")) - 1


def _shard_of(directory: Path, entry: dict[str, Any]) -> tuple[Path, int, str]:
    """Returns file, tokens and SHA-256 of an entry of the index; raises ValueError if it is odd."""
    name, tokens, sha256 = entry["file"], entry["tokens"], entry["sha256"]
    if not re.fullmatch(r"shard-\d+\.bin", name) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"shard {str(entry)[:200]}")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"{name} of {tokens!r} tokens")
    return directory / name, tokens, sha256


def write_store(
    directory: Path, arrays: Iterable[NDArray[Any]], describe: Callable[[], dict[str, Any]]
) -> None:
    """Writes a store beside `directory` and renames it when it is complete.

    Whoever is second, if two processes write the same store, uses the one that is there.

    Args:
        directory: the store's name in its cache.
        arrays: the tokens, in order, all of the dtype that they are stored in.
        describe: called after the last array; returns what `index.json` says beside the shards.

    Raises:
        DataError: the disk is full or cannot be written; nothing is left behind.
    """
    prefix = f".partial-{socket.gethostname()}-"
    aside = directory.parent / f"{prefix}{os.getpid()}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory.parent, prefix)
        aside.mkdir()
        shards = _write_shards(aside, arrays)
        index = describe() | {"tokens": sum(s["tokens"] for s in shards), "shards": shards}
        (aside / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for file in aside.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        try:
            aside.rename(directory)
        except OSError:
            if not directory.exists():  # else another process was first, with the same content
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{directory.parent}: {'disk full' if full else error.strerror} while writing tokens; "
            "the partial output was removed: make room or choose another --data.cache-dir"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shards(directory: Path, arrays: Iterable[NDArray[Any]]) -> list[dict[str, Any]]:
    """Writes shards of `SHARD_TOKENS` tokens, the last one shorter; returns their entries."""
    shards: list[dict[str, Any]] = []
    hashes = []
    for array in arrays:
        while array.size:
            if not shards or shards[-1]["tokens"] == SHARD_TOKENS:
                shards.append({"file": f"shard-{len(shards):05d}.bin", "tokens": 0})
                hashes.append(hashlib.sha256())
            part = array[: SHARD_TOKENS - shards[-1]["tokens"]]
            with open(directory / shards[-1]["file"], "ab") as file:
                file.write(data := part.tobytes())
            hashes[-1].update(data)
            shards[-1]["tokens"] += part.size
            array = array[part.size :]
    return [s | {"sha256": h.hexdigest()} for s, h in zip(shards, hashes, strict=True)]


def _remove_stale(cache_dir: Path, prefix: str) -> None:
    """Removes what killed processes of this machine left behind."""
    for stale in cache_dir.glob(glob.escape(prefix) + "*"):
        try:
            # A restarted container gives the same ids again: what has ours is not ours yet.
            if (pid := int(stale.name.removeprefix(prefix))) != os.getpid():
                os.kill(pid, 0)
                continue
        except ProcessLookupError:
            pass
        except (PermissionError, ValueError):  # a living process of another user; not one of ours
            continue
        shutil.rmtree(stale, ignore_errors=True)
