"""Token stores: the token stream of a corpus on disk, memory-mapped, and the cache of them."""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.errors import DataError, note
from llamapro.files import directory_aside, parse_json, reason, refuse_large, user_path, write_file
from llamapro.known_hashes import WHOLE, known_hashes

INDEX_FILE = "index.json"
CACHE_TAG = "CACHEDIR.TAG"  # by which backups, and corpora, leave a cache out
MAX_INDEX_BYTES = 1 << 28  # enough to name two million files of a corpus
SHARD_TOKENS = 1 << 28
_COPIED_BYTES = 1 << 24
MAPPED_SHARDS = 128  # at a time, because each has an open file, and a process may have 1,024
Int64s = NDArray[np.int64]


class TokenStore:
    """The token stream of a corpus, memory-mapped.

    A directory of `shard-00000.bin`, ... (uint16, or uint32 for vocabularies over 65,536) and
    `index.json`, which says what the tokens were made of, and each shard's SHA-256. Opening
    compares only sizes, because every rank does it; `check` compares the bytes. A shard is mapped
    when it is first read.

    Attributes:
        tokens: length of the stream, with what stands before and after documents.
        sha256: hash of the tokens as they were written.
        hashes: shard -> SHA-256 of its bytes as they were written.
        index: all of `index.json`.
    """

    def __init__(self, path: str | Path, fingerprint: str | None) -> None:
        """Opens a store made with the tokenizer of this fingerprint, or with any if it is None.

        Raises DataError if a file is missing, damaged or of another tokenizer.
        """
        self.path = Path(path)
        file = self.path / INDEX_FILE
        fix = f"remove {self.path} and run again"
        refuse_large(file, MAX_INDEX_BYTES, DataError)
        try:
            self.index = parse_json(file.read_bytes())
            own: str = self.index["tokenizer_sha256"]
            self.tokens: int = self.index["tokens"]
            self.documents: int = self.index["counts"]["documents"]
            dtype = np.dtype({"uint16": "uint16", "uint32": "uint32"}[self.index["dtype"]])
            shards = [
                (self.path / Path(entry["file"]).name, int(entry["tokens"]), str(entry["sha256"]))
                for entry in self.index["shards"]
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file}: not an index of tokens ({error!r}); {fix}") from None
        if fingerprint not in (None, own):
            raise DataError(
                f"{file}: tokens of another tokenizer ({own[:16]}..., this one is "
                f"{str(fingerprint)[:16]}...); {fix}"
            )
        for shard, tokens, _ in shards:
            size = shard.stat().st_size if shard.exists() else 0
            if not size or size != tokens * dtype.itemsize:
                actual = f"{size:,} bytes" if size else "missing or empty"
                raise DataError(f"{shard}: {actual}, {INDEX_FILE} says {tokens:,} tokens; {fix}")
        self.dtype = dtype
        self._map = functools.lru_cache(MAPPED_SHARDS)(self._map_shard)
        self._ends = list(itertools.accumulate(tokens for _, tokens, _ in shards))
        self.hashes = {shard: sha256 for shard, _, sha256 in shards}
        self._files = [shard for shard, _, _ in shards]
        text = " ".join([dtype.name, *self.hashes.values()])
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        if [0, *self._ends][-1] != self.tokens:
            raise DataError(f"{file}: {self.tokens:,} tokens, but its shards differ; {fix}")

    def check(self, label: str, cache_dir: str | Path | None = None) -> None:
        """Reads the shards, with a progress bar; raises DataError for one that was changed.

        With `cache_dir`, shards that have not changed since they were hashed are not read.
        """
        total = self.tokens * self.dtype.itemsize
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
            for shard in self.hashes:
                with known_hashes(shard, cache_dir) as known:
                    if WHOLE not in known:
                        with open(shard, "rb") as file:
                            known[WHOLE] = hashlib.file_digest(file, "sha256").hexdigest()
                    self._compare(shard, known[WHOLE])
                bar.update(shard.stat().st_size)

    def arrays(self) -> Iterator[NDArray[Any]]:
        """Yields all tokens, (n,) each; raises DataError at the end of a shard that was changed."""
        for shard in self.hashes:
            digest = hashlib.sha256()
            with open(shard, "rb") as file:
                while chunk := file.read(_COPIED_BYTES):
                    digest.update(chunk)
                    yield np.frombuffer(chunk, self.dtype)
            self._compare(shard, digest.hexdigest())

    def _compare(self, shard: Path, sha256: str) -> None:
        if self.hashes[shard] != sha256:
            raise DataError(
                f"{shard}: damaged: other bytes than were written; remove {self.path} and run again"
            )

    def _map_shard(self, number: int) -> NDArray[Any]:
        return np.asarray(np.memmap(self._files[number], dtype=self.dtype, mode="r"))

    def read(self, start: int, stop: int) -> Int64s:
        """Returns the tokens [start, stop), a copy; raises IndexError outside the stream."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        parts = [np.empty(0, self.dtype)]
        for number in range(bisect.bisect_right(self._ends, start), len(self._ends)):
            tokens = self._map(number)
            first = self._ends[number] - tokens.size
            if first >= stop:
                break
            parts.append(tokens[max(0, start - first) : stop - first])
        return np.concatenate(parts, dtype=np.int64)

    @functools.cached_property
    def _starts(self) -> Int64s | None:
        """The positions where documents start, or None if no token marks them."""
        bos, eos = self.index.get("bos_id"), self.index.get("eos_id")
        mark = eos if bos is None else bos
        if mark is None:
            return None
        places = []
        for number, end in enumerate(self._ends):
            tokens = self._map(number)
            places.append(np.flatnonzero(tokens == mark) + end - tokens.size)
        starts = np.concatenate(places)
        return starts if bos is not None else np.concatenate(([0], starts[:-1] + 1))

    def document_of(self, position: int) -> int | None:
        """Returns the number of a token's document, None if neither BOS nor EOS marks documents.

        The first call reads all tokens.
        """
        if self._starts is None:
            return None
        return int(np.searchsorted(self._starts, position, side="right")) - 1


def place_of(cache_dir: str | Path, key: list[Any], suffix: str = "") -> Path:
    """Returns the directory of the store that `cached` finds under this key."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return user_path(cache_dir) / (name + suffix)


def cached(
    cache_dir: str | Path,
    key: list[Any],
    index: dict[str, Any],
    arrays: Iterable[NDArray[Any]],
    label: str,
    summarize: Callable[[TokenStore], str],
    suffix: str = "",
) -> TokenStore:
    """Returns a store from the cache, where it is first written if it is not there.

    A store in the cache is compared with the hashes it was written with, because a byte that was
    changed would silently change the run. Shards that have not changed since are not read again.
    Raises DataError if the store in the cache is damaged, or a new one cannot be written.

    Args:
        key: everything that decides the tokens, as JSON; its hash is the store's name, and the
            index holds it as `made_of`.
        index, arrays: as for `write_store`; consumed only if the store is not in the cache.
        label: names the store in the progress bar and in a line on standard error.
        summarize: returns the rest of that line.
    """
    directory = place_of(cache_dir, key, suffix)
    is_cached = directory.exists()
    if not is_cached:
        try:
            write_store(directory, index | {"made_of": key}, arrays)
        except DataError:
            if not directory.exists():  # or else another process was first
                raise
    store = TokenStore(directory, index["tokenizer_sha256"])
    if is_cached:
        store.check(f"check {label}", cache_dir)
    else:
        for shard, sha256 in store.hashes.items():
            with known_hashes(shard, cache_dir) as known:
                known[WHOLE] = sha256
    origin = f", from the cache {directory}" if is_cached else ""
    note(f"{label}: {summarize(store)}{origin}")
    return store


def write_store(directory: Path, index: dict[str, Any], arrays: Iterable[NDArray[Any]]) -> None:
    """Writes a store, complete or not at all; if another process was first, its store stays.

    `index` is what `index.json` holds beside the shards. Its counts, a dataclass or a dict, may
    grow while the arrays are made. The arrays hold the tokens in the dtype of the store. Raises
    DataError if the disk is full or cannot be written.
    """
    try:
        with directory_aside(directory, keep_existing=True) as aside:
            shards = _write_shards(aside, arrays)
            index = index | {"tokens": sum(s["tokens"] for s in shards), "shards": shards}
            text = json.dumps(index, indent=1, default=asdict) + "\n"
            (aside / INDEX_FILE).write_text(text, encoding="utf-8")
        if not (tag := directory.parent / CACHE_TAG).exists():
            write_file(tag, "Signature: 8a477f597d28d172789f06886806bc55\n")
    except OSError as error:
        raise DataError(
            f"{directory.parent}: {reason(error)} while writing tokens; the partial output was "
            "removed: make room or choose another --data.cache-dir"
        ) from None


def _write_shards(directory: Path, arrays: Iterable[NDArray[Any]]) -> list[dict[str, Any]]:
    """Writes shards of `SHARD_TOKENS` tokens, the last one shorter; returns their entries."""
    shards: list[dict[str, Any]] = []
    hashes = []
    with ExitStack() as files:
        for array in arrays:
            while array.size:
                if not shards or shards[-1]["tokens"] == SHARD_TOKENS:
                    shards.append({"file": f"shard-{len(shards):05d}.bin", "tokens": 0})
                    hashes.append(hashlib.sha256())
                    files.close()  # the one before
                    file = files.enter_context(open(directory / shards[-1]["file"], "xb"))
                part = array[: SHARD_TOKENS - shards[-1]["tokens"]]
                file.write(data := part.tobytes())
                hashes[-1].update(data)
                shards[-1]["tokens"] += part.size
                array = array[part.size :]
    return [s | {"sha256": h.hexdigest()} for s, h in zip(shards, hashes, strict=True)]
