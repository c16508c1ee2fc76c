"""Conversations as training sequences: stored with what is trained, packed whole into windows.

Tokens of the assistant's turns are trained, all others are only seen. Conversations share a window
of T positions without seeing each other: a sequence comes with the number of the conversation at
each position, from which `ops.attention_bounds` makes the mask.

Shapes: T sequence length.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.errors import DataError
from llamapro.ops import IGNORE_INDEX
from llamapro.text.conversations import ConversationCounts, Message, Problems, read_conversations
from llamapro.text.documents import find_files
from llamapro.text.store import Int64s, TokenStore, write_store

FORMAT_VERSION = 1
TRAINED = 1 << 31  # set in a stored token of an assistant's turn; ids are far below it
CHUNK_TOKENS = 1 << 20  # gathered before they are written


class Template(Protocol):
    """What is needed of a chat template (`chat.ChatTemplate`)."""

    source: str

    def encode(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Returns token ids, and which the assistant wrote; raises DataError if it cannot be."""


def tokenize_conversations(
    sources: Mapping[str, Sequence[str]],
    template: Template,
    tokenizer_sha256: str,
    cache_dir: str | Path,
) -> dict[str, TokenStore]:
    """Returns the tokens of conversations, from the cache if files and template are the same.

    A store holds, as uint32, the tokens of all conversations with `TRAINED` added to the trained
    ones, and after them the conversations' lengths. Says on standard error what was read.

    Args:
        sources: label -> patterns as for `find_files`; each becomes a store.
        template: checks, renders and tokenises; its source is part of the cache's key.
        tokenizer_sha256: the tokenizer's fingerprint, part of the key as well.
        cache_dir: where stores are kept.

    Returns:
        label -> store, in which `documents` is the number of conversations.

    Raises:
        DataError: one for the problems of all sources, each with its file and row; or the disk is
            full. No store of a source with a problem is kept.
    """
    stores: dict[str, TokenStore] = {}
    problems = Problems()
    for label, patterns in sources.items():
        earlier = problems.count
        try:
            stores[label] = _stored(
                label, patterns, template, tokenizer_sha256, Path(cache_dir), problems
            )
        except DataError:
            if problems.count == earlier:  # not in the data: the disk is full
                raise
    problems.check()
    return stores


def _stored(
    label: str,
    patterns: Sequence[str],
    template: Template,
    tokenizer_sha256: str,
    cache_dir: Path,
    problems: Problems,
) -> TokenStore:
    """Returns the store of one source; raises DataError after noting problems that it has."""
    files = find_files(patterns)
    made_of: list[list[Any]] = []
    for file in files:
        status, absolute = file.path.stat(), os.path.abspath(file.path)
        made_of.append([absolute, file.is_named, status.st_size, status.st_mtime_ns])
    template_sha256 = hashlib.sha256(template.source.encode()).hexdigest()
    key = ["conversations", FORMAT_VERSION, tokenizer_sha256, template_sha256, made_of]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    directory = cache_dir.expanduser() / name
    earlier, counts = problems.count, ConversationCounts()

    def describe() -> dict[str, Any]:
        if not counts.documents and problems.count == earlier:
            problems.add(", ".join(patterns), f"nothing to train on: {counts.describe()}")
        if problems.count > earlier:
            problems.check()
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer_sha256": tokenizer_sha256,
            "template_sha256": template_sha256,
            "dtype": "uint32",
            "counts": asdict(counts),
            "files": made_of,  # absolute path, is_named, size, time of change in ns
        }

    if not (is_cached := directory.exists()):
        read = read_conversations(files, problems, counts)
        write_store(directory, _encode_all(read, template, problems, counts, label), describe)
    store = TokenStore(directory, tokenizer_sha256)
    if is_cached:
        store.check(f"check {label}")
    stored = ConversationCounts(**store.index["counts"])
    origin = f", from the cache {directory}" if is_cached else ""
    print(f"{label}: {stored.describe()}{origin}", file=sys.stderr)
    return store


def _encode_all(
    conversations: Iterator[tuple[str, list[Message]]],
    template: Template,
    problems: Problems,
    counts: ConversationCounts,
    label: str,
) -> Iterator[NDArray[np.uint32]]:
    """Yields what a store holds: the marked tokens of all conversations, then their lengths."""
    lengths: list[int] = []
    chunk: list[NDArray[np.uint32]] = []
    gathered = 0
    for where, messages in tqdm(conversations, label, unit=" conversations", disable=None):
        try:
            ids, trained = template.encode(messages)
        except DataError as error:
            problems.add(where, str(error))
            continue
        if not any(trained[1:]):  # nothing predicts the first token
            counts.untrained_conversations += 1
            continue
        counts.documents += 1
        counts.turns += len(messages)
        counts.bytes += sum(len(message["content"].encode()) for message in messages)
        counts.tokens += len(ids)
        counts.trained_tokens += sum(trained)
        lengths.append(len(ids))
        marks = np.where(trained, TRAINED, 0).astype(np.uint32)
        chunk.append(np.array(ids, dtype=np.uint32) | marks)
        gathered += len(ids)
        if gathered >= CHUNK_TOKENS:
            yield np.concatenate(chunk)
            chunk, gathered = [], 0
    yield np.concatenate([*chunk, np.array(lengths, dtype=np.uint32)])


class PackedConversations:
    """Conversations packed into windows of T tokens, each whole and in one window.

    Best fit, longest first: a conversation goes into the fullest window that has room for it. A
    conversation of n tokens takes n - 1 positions, because nothing follows its last one. The
    windows are a function of the store, T and the policy.

    Attributes:
        store: from `tokenize_conversations`.
        seq_len: T.
        too_long: how many conversations are longer than a window (T + 1 tokens).
        left_out: how many of these, or of their pieces, have no trained token in what is kept.
        fill: share of the positions that hold tokens, of 1.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        policy: Literal["drop", "truncate", "split"] = "drop",
    ) -> None:
        """Packs the conversations.

        Args:
            store: from `tokenize_conversations`.
            seq_len: T, in tokens.
            policy: what is done with a conversation longer than a window: it is left out, or its
                beginning is used, or it is split into pieces of T positions, each of which sees
                only itself. Pieces in which nothing is trained are left out.

        Raises:
            DataError: nothing is left to train on.
        """
        self.store = store
        self.seq_len = seq_len
        self._policy = policy
        self.left_out = 0
        count = store.documents
        sizes = store.read(store.tokens - count, store.tokens)
        self._starts = np.cumsum(sizes) - sizes
        # (conversations, 2): where each starts in the store, and how many positions it takes
        spans = np.stack([self._starts, sizes - 1], axis=1)
        fits = sizes - 1 <= seq_len
        self.too_long = count - int(fits.sum())
        parts: list[list[int]] = []
        for start, size in spans[~fits].tolist() if policy != "drop" else ():
            stop = start + (size if policy == "split" else seq_len)
            for at in range(start, stop, seq_len):
                part = [at, min(seq_len, stop - at)]
                if (store.read(at + 1, at + 1 + part[1]) & TRAINED).any():
                    parts.append(part)
                else:
                    self.left_out += 1
        pieces = np.concatenate([spans[fits], np.array(parts, dtype=np.int64).reshape(-1, 2)])
        if not len(pieces):
            raise DataError(
                f"{store.path}: of {count:,} conversations {self.too_long:,} are longer than "
                f"{seq_len:,} tokens and nothing is left; raise data.seq_len, or split them"
            )
        self._pieces = pieces[np.lexsort((pieces[:, 0], -pieces[:, 1]))]  # longest first
        window = _best_fit(self._pieces[:, 1], seq_len)
        self._order = np.argsort(window, kind="stable")  # the pieces, window by window
        self._ends = np.cumsum(np.bincount(window))
        self.fill = float(self._pieces[:, 1].sum() / (len(self) * seq_len))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[Int64s, Int64s, Int64s]:
        """Returns inputs, targets and documents, each (T,).

        The input at t + 1 is the target at t where it is trained, `IGNORE_INDEX` elsewhere and in
        the padding. Documents counts the conversations from 0, and the padding as one more.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        inputs = np.zeros(self.seq_len, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        first = self._ends[index - 1] if index else 0
        chosen = self._order[first : self._ends[index]]
        documents = np.full(self.seq_len, len(chosen), dtype=np.int64)
        at = 0
        for number, (start, size) in enumerate(self._pieces[chosen].tolist()):
            stored = self.store.read(start, start + size + 1)  # one more than inputs
            ids, trained = stored & (TRAINED - 1), stored >= TRAINED
            inputs[at : at + size] = ids[:-1]
            targets[at : at + size] = np.where(trained[1:], ids[1:], IGNORE_INDEX)
            documents[at : at + size] = number
            at += size
        return inputs, targets, documents

    def documents(self, index: int) -> list[int | None]:
        """Returns the numbers of a window's conversations, in the order of the files."""
        first = self._ends[index - 1] if index else 0
        starts = self._pieces[self._order[first : self._ends[index]], 0]
        return (np.searchsorted(self._starts, starts, side="right") - 1).tolist()

    def describe(self) -> str:
        """Returns the number of windows, how full they are and what was done to long ones."""
        text = f"{len(self):,} sequences of {self.seq_len:,} tokens, {self.fill:.1%} full"
        if self.too_long:
            done = {"drop": "dropped", "truncate": "truncated", "split": "split"}[self._policy]
            text += f", {self.too_long:,} longer conversations {done}"
        if self.left_out:
            text += f", {self.left_out:,} pieces without a trained token left out"
        return text


def _best_fit(sizes: Int64s, seq_len: int) -> Int64s:
    """Returns the number of the window of each piece; the sizes are non-increasing."""
    windows = np.empty(len(sizes), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by positions left
    has_any = 0  # bit r is set where with_room[r] has windows: a lookup is one shift
    count = 0
    for piece, size in enumerate(sizes.tolist()):
        if enough := has_any >> size:
            room = size + (enough & -enough).bit_length() - 1  # the lowest bit that is set
            windows[piece] = with_room[room].pop()
            if not with_room[room]:
                has_any ^= 1 << room
        else:
            room = seq_len
            windows[piece] = count
            count += 1
        if left := room - size:
            with_room[left].append(int(windows[piece]))
            has_any |= 1 << left
    return windows


def mark_trained(
    sample: tuple[Int64s, Int64s, Int64s],
    decode: Callable[[list[int]], str],
    is_terminal: bool,
    limit: int = 400,
) -> str:
    """Returns the text of a window's first conversation with what is trained marked.

    Args:
        sample: inputs, targets and documents of a `PackedConversations`.
        decode: token ids to text.
        is_terminal: mark by colour instead of ⟦ ⟧.
        limit: tokens that are shown, at most.
    """
    whole_size = int(np.searchsorted(sample[2], 0, side="right"))
    size = min(limit, whole_size)
    inputs, targets = sample[0][:size].tolist(), sample[1][:size].tolist()
    trained = [False] + [target != IGNORE_INDEX for target in targets[:-1]]
    if targets[-1] != IGNORE_INDEX:  # the last token is no input
        inputs.append(targets[-1])
        trained.append(True)
    begin, end = ("\033[32m", "\033[39m") if is_terminal else ("⟦", "⟧")
    text, shown = "", 0
    for at, is_trained in enumerate(trained):
        if at + 1 < len(trained) and trained[at + 1] == is_trained:
            continue
        # A token's text depends on those before it, so parts are differences of the whole.
        whole = decode(inputs[: at + 1])
        part, shown = whole[shown:], len(whole)
        text += f"{begin}{part}{end}" if is_trained else part
    return text if size == whole_size else f"{text} [... {whole_size - size:,} more tokens]"
