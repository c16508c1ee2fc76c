"""A corpus's tokens: documents tokenised once, in parallel, into a cache of token stores.

A store is named after a hash of what it was made of, so it is never out of date.
"""

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamapro.errors import DataError
from llamapro.text import documents
from llamapro.text.documents import Counts, Piece, find_files, read_pieces
from llamapro.text.store import TokenStore, write_store
from llamapro.text.tokenizer import Tokenizer

FORMAT_VERSION = 4


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of pieces, each document between BOS and EOS."""
    ids: list[int] = []
    for piece in pieces:
        first, last = piece.is_first, piece.is_last
        ids += tokenizer.encode(piece.text, bos=first, eos=last, continues=not first)
    return ids


def _encode_all(
    pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: str, workers: int
) -> Iterator[NDArray[Any]]:
    """Yields the token ids in the order of the pieces, whatever the number of threads."""

    def encode(batch: list[Piece]) -> NDArray[Any]:
        return np.array(encode_pieces(batch, tokenizer), dtype=dtype)

    pending: deque[Future[NDArray[Any]]] = deque()
    batch: list[Piece] = []
    # Threads, because sentencepiece releases the interpreter lock while it encodes.
    with ThreadPoolExecutor(workers) as pool:
        characters = 0
        for piece in pieces:
            batch.append(piece)
            characters += len(piece.text)
            if characters >= documents.PIECE_CHARACTERS:
                pending.append(pool.submit(encode, batch))
                batch, characters = [], 0
            if len(pending) > 2 * workers:  # bounds what is held in memory
                yield pending.popleft().result()
        pending.append(pool.submit(encode, batch))
        while pending:
            yield pending.popleft().result()


def tokenize(
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    text_key: str = "text",
    workers: int = 0,
    label: str = "train",
) -> TokenStore:
    """Returns the tokens of a corpus, from the cache if files and tokenizer are the same.

    What comes from the cache is read and compared with the hashes it was written with, because a
    run goes on from tokens and not from the text: a byte that changed on the disk would change the
    run in silence. That takes a second for each GB or two; a store just written is not read again.

    Each document is BOS, its tokens, EOS, where the tokenizer has them. Says on standard error what
    was read, and what was left out.

    Args:
        patterns: as for `find_files`.
        tokenizer: its fingerprint is part of the cache's key, as are sizes and times of the files.
        cache_dir: where stores are kept.
        text_key: key of the text in a JSON line, or name of its column.
        workers: threads; 0 is one per core. The tokens do not depend on it.
        label: names the corpus in progress and messages.

    Raises:
        DataError: a file is missing or cannot be used, there is no text, the disk is full, or the
            store in the cache is damaged.
    """
    files = find_files(patterns)
    made_of: list[list[Any]] = []
    for file in files:
        status = file.path.stat()
        absolute = os.path.abspath(file.path)
        made_of.append([absolute, file.is_named, status.st_size, status.st_mtime_ns])
    key = json.dumps([FORMAT_VERSION, tokenizer.fingerprint, text_key, made_of])
    directory = Path(cache_dir).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:24]
    counts = Counts()
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    def describe() -> dict[str, Any]:
        if not counts.bytes:
            raise DataError(f"{', '.join(patterns)}: no text in it: {counts.describe()}")
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer_sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "text_key": text_key,
            "counts": asdict(counts),
            "files": made_of,  # absolute path, is_named, size, time of change in ns
        }

    if not (is_cached := directory.exists()):
        pieces = read_pieces(files, text_key, counts, label)
        arrays = _encode_all(pieces, tokenizer, dtype, workers or os.cpu_count() or 1)
        write_store(directory, arrays, describe)
    store = TokenStore(directory, tokenizer.fingerprint)
    if is_cached:
        store.check(f"check {label}")
    stored = Counts(**store.index["counts"])
    origin = f", from the cache {directory}" if is_cached else ""
    print(f"{label}: {store.tokens:,} tokens of {stored.describe()}{origin}", file=sys.stderr)
    return store
