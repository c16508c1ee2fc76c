"""Tokens of a corpus: documents are tokenised once, in parallel, into a cached token store."""

import os
import re
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamapro.errors import DataError, note, warn
from llamapro.text import documents
from llamapro.text.documents import Counts, Piece, read_pieces
from llamapro.text.parts import Part, find_parts, join, remove_parts
from llamapro.text.source_files import SourceFile, find_files
from llamapro.text.store import TokenStore, cached, place_of
from llamapro.text.tokenizer import Tokenizer

FORMAT_VERSION = 10  # raised with every change in how a file is read
END_OF_TEXT = "<|endoftext|>"  # which many corpora have between documents, for any tokenizer


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of pieces, each document between its tokenizer's prefix and suffix."""
    ids: list[int] = []
    for piece in pieces:
        first = piece.is_first
        ids += tokenizer.encode(piece.text, bos=first, eos=piece.is_last, continues=not first)
    return ids


def _encode_all(
    pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: str, workers: int
) -> Iterator[NDArray[Any]]:
    """Yields the token ids in the order of the pieces, for any number of threads."""

    def encode(batch: list[Piece]) -> NDArray[Any]:
        # An array takes a list of numbers in a third of NumPy's time.
        ids = array(np.dtype(dtype).char, encode_pieces(batch, tokenizer))
        return np.frombuffer(ids, dtype)

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
            if len(pending) > 2 * workers:  # bounds the memory
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
    marker: str = "",
    part: Part | None = None,
) -> TokenStore:
    """Returns the tokens of a corpus, from the cache if files and tokenizer are the same.

    If they were prepared in parts, these are put together. The store is the same, to the byte.

    Each document is the tokenizer's prefix (BOS or nothing), its tokens, and EOS. A line on
    standard error says what was read and what was left out. Raises DataError if a file cannot be
    used or there is no text, or as `cached` and `find_parts`.

    Args:
        patterns: as for `find_files`; sizes and times of the files are part of the cache's key.
        tokenizer: its fingerprint is part of the cache's key.
        text_key: key of the text in a JSON line, or name of its column.
        workers: number of threads, 0 for one per core; the tokens do not depend on it.
        label: names the corpus in progress and messages.
        marker: text at which documents are split; "" splits none.
        part: tokenise only this one, unless the whole is in the cache; it may hold no text.
    """
    files = find_files(patterns)
    counts = Counts()
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    def encode(files: Sequence[SourceFile]) -> Iterator[NDArray[Any]]:
        pieces = read_counted(files, tokenizer, text_key, counts, label, marker)
        yield from _encode_all(pieces, tokenizer, dtype, workers or os.cpu_count() or 1)

    def encode_whole() -> Iterator[NDArray[Any]]:
        if parts := find_parts(directory, key, label):
            yield from join(parts, tokenizer.fingerprint, counts, label)
        else:
            yield from encode(files)
        counts.check(patterns)

    def summarize(store: TokenStore) -> str:
        return f"{store.tokens:,} tokens of {Counts(**store.index['counts']).describe()}"

    made_of = [tokenizer.fingerprint, text_key, marker, [file.state() for file in files]]
    key = [FORMAT_VERSION, *made_of]
    index = {
        "tokenizer_sha256": tokenizer.fingerprint,
        "dtype": dtype,
        "bos_id": next(iter(tokenizer.prefix), None),
        "eos_id": next(iter(tokenizer.suffix), None),
        "counts": counts,
    }
    directory = place_of(cache_dir, key)
    if part is not None and not directory.exists():
        label = f"{label}, part {part}"
        arrays = encode(part.select(files))
        return cached(cache_dir, key, index, arrays, label, summarize, part.suffix)
    store = cached(cache_dir, key, index, encode_whole(), label, summarize)
    remove_parts(directory)
    return store


def check_texts(
    corpora: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    text_key: str,
    markers: Mapping[str, str],
) -> None:
    """Reads every corpus, label -> patterns, and prints on standard error what was left out.

    Documents are split at the marker of their label, as by `tokenize`. Raises DataError if files or
    rows cannot be used; the message names those of all corpora.
    """
    problems = []
    for label, patterns in corpora.items():
        counts = Counts()
        try:
            files, marker = find_files(patterns), markers[label]
            deque(read_counted(files, tokenizer, text_key, counts, label, marker), maxlen=0)
            counts.check(patterns)
            note(f"{label}: {counts.describe()}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def split_at(pieces: Iterator[Piece], marker: str, counts: Counts, label: str) -> Iterator[Piece]:
    """Begins a document wherever a text has `marker`, which is left out, as are empty documents.

    Warns if no text of the corpus with this label has it.
    """
    is_found = False
    held = ""  # the end of a piece where the marker may begin
    is_first = True
    for piece in pieces:
        first, *others = (held + piece.text).split(marker)
        parts = [first, *others]
        ends = (n for n in range(len(marker) - 1, 0, -1) if parts[-1].endswith(marker[:n]))
        held = "" if piece.is_last else marker[: next(ends, 0)]
        parts[-1] = parts[-1].removesuffix(held)
        counts.documents += len(others)
        is_found = is_found or bool(others)
        for number, text in enumerate(parts, 1):
            is_last = number < len(parts) or piece.is_last
            if not text and not is_last:  # the document begins, or goes on, with the next piece
                continue
            if text.strip() or not (is_first and is_last):
                yield Piece(text, is_first, is_last)
            else:
                counts.documents -= 1
                counts.empty_documents += 1
            is_first = is_last
    if not is_found:
        warn(f'{label}: no text has data.split_at {marker!r}; a preset says a line break as "\\n"')


def read_counted(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    text_key: str,
    counts: Counts,
    label: str,
    marker: str = "",
) -> Iterator[Piece]:
    """Reads files, splits them at the marker, and counts the names of control tokens in them."""
    pieces = read_pieces(files, text_key, counts, label)
    if marker:
        pieces = split_at(pieces, marker, counts, label)
    ends = [name for name, i in tokenizer.special_tokens.items() if i == tokenizer.eos_id]
    names = [*dict.fromkeys([*ends, END_OF_TEXT, *tokenizer.special_tokens])]
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    for piece in pieces:
        if found := Counter(pattern.findall(piece.text)):
            for name in filter(found.get, names):
                counts.markers[name] = counts.markers.get(name, 0) + found[name]
            counts.end = counts.end or next(filter(found.get, (*ends, END_OF_TEXT)), "")
        yield piece
