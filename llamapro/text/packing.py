"""Conversations as training sequences: stored with marks on what is trained, packed into windows.

Only the assistant's turns are trained. Conversations share a window of T positions without seeing
each other: a sequence comes with the number of the conversation at each position, from which
`ops.attention_bounds` makes the mask.

Shapes: T sequence length.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.errors import DataError, Problems
from llamapro.ops import IGNORE_INDEX
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.conversations import Conversation, ConversationCounts, read_conversations
from llamapro.text.source_files import find_files
from llamapro.text.store import Int64s, TokenStore, cached

FORMAT_VERSION = 10  # raised with every change in how a conversation is read
TRAINED = 1 << 31  # set in a stored token of an assistant's turn; ids are far below it


def tokenize_conversations(
    sources: Mapping[str, Sequence[str]],
    template: ChatTemplate,
    tokenizer_sha256: str,
    cache_dir: str | Path,
) -> dict[str, TokenStore]:
    """Returns the tokens of conversations, from the cache if files and template are the same.

    A store holds, as uint32, the tokens of all conversations, with `TRAINED` added to the trained
    ones, and then the conversations' lengths. A line on standard error says what was read.

    Each source, label -> patterns as for `find_files`, becomes a store. Raises DataError that names
    the problems of all sources with file and row, or if the disk is full. No store of a source with
    a problem is kept.
    """
    stores: dict[str, TokenStore] = {}
    problems = Problems(limit=20)

    def summarize(store: TokenStore) -> str:
        return ConversationCounts(**store.index["counts"]).describe()

    template_sha256 = hashlib.sha256(template.source.encode()).hexdigest()
    for label, patterns in sources.items():
        files = find_files(patterns)
        counts = ConversationCounts()
        index = {"tokenizer_sha256": tokenizer_sha256, "dtype": "uint32", "counts": counts}
        day = str(template.date) if template.prints_date else ""
        made_of = [tokenizer_sha256, template_sha256, day, [file.state() for file in files]]
        key = ["conversations", FORMAT_VERSION, *made_of]
        earlier = len(problems)
        conversations = read_conversations(files, problems, counts)
        arrays = _encode_all(conversations, template, problems, counts, label, ", ".join(patterns))
        try:
            stores[label] = cached(cache_dir, key, index, arrays, label, summarize)
        except DataError:
            if len(problems) == earlier:  # not in the data: the disk is full
                raise
    head = f"{len(problems):,} problem{'s' * (len(problems) > 1)} in the conversations"
    problems.check(DataError, head, one_per_line=True)
    return stores


def _encode_all(
    conversations: Iterable[tuple[str, Conversation]],
    template: ChatTemplate,
    problems: Problems,
    counts: ConversationCounts,
    label: str,
    source: str,
) -> Iterator[NDArray[np.uint32]]:
    """Yields the content of a store: the marked tokens of all conversations, then their lengths.

    Raises DataError in the end if this source had problems, or nothing to train on.
    """
    earlier = len(problems)
    lengths: list[int] = []
    for location, conversation in tqdm(conversations, label, unit=" conversations", disable=None):
        messages, variables, _ = conversation
        try:
            samples = template.samples(messages, variables)
        except DataError as error:
            problems.add(f"{location}: {error}")
            continue
        # The first token is never predicted.
        samples = [(ids, trained) for ids, trained in samples if any(trained[1:])]
        if not samples:
            counts.untrained_conversations += 1
            continue
        hidden = sorted(template.hidden(messages, variables))
        counts.unread += (key for key in hidden if key not in counts.unread)
        for name in template.plain_names:
            counts.markers[name] = counts.markers.get(name, 0) + 1
        counts.documents += len(samples)
        counts.more_samples += len(samples) - 1
        counts.turns += len(messages)
        counts.bytes += sum(len(message["content"].encode()) for message in messages)
        for ids, trained in samples:
            counts.tokens += len(ids)
            counts.trained_tokens += sum(trained)
            lengths.append(len(ids))
            marks = np.where(trained, TRAINED, 0).astype(np.uint32)
            yield np.array(ids, dtype=np.uint32) | marks
    yield np.array(lengths, dtype=np.uint32)
    if not counts.documents and len(problems) == earlier:
        problems.add(f"{source}: nothing to train on: {counts.describe()}")
    if len(problems) > earlier:
        raise DataError(f"{source}: has conversations that cannot be used")


class PackedConversations:
    """Conversations packed into windows of T tokens, each whole and in one window.

    Packing is best fit, longest first: a conversation goes into the fullest window that has room
    for it. A conversation of n tokens takes n - 1 positions, because nothing follows its last
    token. The windows are a function of the store, T and the policy.

    Attributes:
        too_long: number of conversations longer than a window (T + 1 tokens).
        left_out: number of pieces of long conversations that have no trained token.
        fill: share of the positions that hold tokens, 0 to 1.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, policy: Literal["drop", "truncate", "split"] = "drop"
    ) -> None:
        """Packs the conversations of a store from `tokenize_conversations`.

        The policy is for conversations longer than a window: "drop" leaves them out, "truncate"
        keeps the beginning, "split" makes pieces of T positions that do not see each other. Raises
        DataError if nothing is left to train on.
        """
        self.store = store
        self.seq_len = seq_len
        self._policy = policy
        self.left_out = 0
        count = store.documents
        lengths = store.read(store.tokens - count, store.tokens)
        self._starts = np.cumsum(lengths) - lengths
        # (conversations, 2): where each starts in the store, and how many positions it takes
        spans = np.stack([self._starts, lengths - 1], axis=1)
        fits = lengths - 1 <= seq_len
        self.too_long = count - int(fits.sum())
        parts: list[list[int]] = []
        for start, size in spans[~fits].tolist() if policy != "drop" else ():
            stop = start + (size if policy == "split" else seq_len)
            for first in range(start, stop, seq_len):
                part = [first, min(seq_len, stop - first)]
                if (store.read(first + 1, first + 1 + part[1]) & TRAINED).any():
                    parts.append(part)
                else:
                    self.left_out += 1
        pieces = np.concatenate([spans[fits], np.array(parts, dtype=np.int64).reshape(-1, 2)])
        if not len(pieces):
            raise DataError(
                f"of {count:,} conversations {self.too_long:,} are longer than {seq_len:,} tokens "
                "and nothing is left; raise data.seq_len, or set data.too_long to 'split'"
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

        The target at t is the input at t + 1 where that is trained, else `IGNORE_INDEX`. Documents
        numbers the conversations from 0; the padding has the next number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        inputs = np.zeros(self.seq_len, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        pieces = self._pieces_of(index)
        documents = np.full(self.seq_len, len(pieces), dtype=np.int64)
        begin = 0
        for number, (start, size) in enumerate(pieces.tolist()):
            stored = self.store.read(start, start + size + 1)  # the last is a target only
            ids, trained = stored & (TRAINED - 1), stored >= TRAINED
            window = slice(begin, begin + size)
            inputs[window] = ids[:-1]
            targets[window] = np.where(trained[1:], ids[1:], IGNORE_INDEX)
            documents[window] = number
            begin += size
        return inputs, targets, documents

    def documents(self, index: int) -> list[int | None]:
        """Returns the numbers of a window's conversations, in the order of the files."""
        starts = self._pieces_of(index)[:, 0]
        return (np.searchsorted(self._starts, starts, side="right") - 1).tolist()

    def _pieces_of(self, index: int) -> Int64s:
        """Returns the pieces of a window, (pieces, 2): start in the store and positions."""
        first = self._ends[index - 1] if index else 0
        return self._pieces[self._order[first : self._ends[index]]]

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
    """Returns the window number of each piece; the sizes must not increase."""
    windows = np.empty(len(sizes), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # windows by positions left
    has_any = 0  # bit r is set where by_room[r] is not empty, so that a lookup is one shift
    count = 0
    for piece, size in enumerate(sizes.tolist()):
        if enough := has_any >> size:
            room = size + (enough & -enough).bit_length() - 1  # the lowest bit that is set
            windows[piece] = by_room[room].pop()
            if not by_room[room]:
                has_any ^= 1 << room
        else:
            room = seq_len
            windows[piece] = count
            count += 1
        if left := room - size:
            by_room[left].append(int(windows[piece]))
            has_any |= 1 << left
    return windows


def mark_trained(
    sample: tuple[Int64s, Int64s, Int64s],
    decode: Callable[[list[int]], str],
    is_terminal: bool,
    limit: int = 400,
) -> str:
    """Returns a window's first conversation as text, with ⟦ ⟧ or a colour around what is trained.

    Args:
        sample: inputs, targets and documents of a window, (T,) each.
        is_terminal: marks with a colour.
        limit: tokens after which the text ends.
    """
    inputs, targets, documents = sample
    whole_size = int(np.searchsorted(documents, 0, side="right"))
    size = min(limit, whole_size)
    ids = [*inputs[:size].tolist(), int(targets[size - 1])]
    trained = [False, *(targets[:size] != IGNORE_INDEX).tolist()]
    if not trained[-1]:  # its id is unknown
        del ids[-1], trained[-1]
    begin, end = ("\033[32m", "\033[39m") if is_terminal else ("⟦", "⟧")
    text, shown, last = "", 0, 0
    for is_trained, run in itertools.groupby(trained):
        last += len(list(run))
        # A token's text depends on those before it, so each part is a difference of whole texts.
        whole = decode(ids[:last])
        part, shown = whole[shown:], len(whole)
        text += f"{begin}{part}{end}" if is_trained else part
    return text if size == whole_size else f"{text} [... {whole_size - size:,} more tokens]"
