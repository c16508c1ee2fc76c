"""Training data: stored tokens, cut into full sequences, in an order that depends on seed and step.

`store.TokenStore` is the token stream of a corpus, `PackedSequences` cuts it, `Mixture` orders
several of them, and `batch` gives each rank its share. Nothing here has a position to save: sample
n is the same whoever asks for it, on however many ranks, before or after a restart.

Shapes: T sequence length.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llamapro.errors import ConfigError, DataError
from llamapro.ops import IGNORE_INDEX
from llamapro.text.store import Int64s, TokenStore


class PackedSequences:
    """A token stream cut into consecutive windows of T tokens.

    Every token but the first is predicted exactly once: the target of a window's last token is the
    first of the next. Documents share windows, between BOS and EOS. The last window is padded, with
    targets `IGNORE_INDEX`.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        """Raises DataError if the store holds no two tokens."""
        if store.tokens < 2:
            raise DataError(f"{store.path}: {store.tokens} token: nothing to predict")
        self.store = store
        self.seq_len = seq_len

    def __len__(self) -> int:
        return math.ceil((self.store.tokens - 1) / self.seq_len)

    def __getitem__(self, index: int) -> tuple[Int64s, Int64s]:
        """Returns inputs (T,) and targets (T,): the input at t + 1 is the target at t."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.seq_len
        stop = min(start + self.seq_len + 1, self.store.tokens)
        tokens = self.store.read(start, stop)  # one more than inputs
        inputs = np.zeros(self.seq_len, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        inputs[: tokens.size - 1] = tokens[:-1]
        targets[: tokens.size - 1] = tokens[1:]
        return inputs, targets

    def documents(self, index: int) -> list[int | None]:
        """Returns the first and the last document that a sequence holds a part of."""
        start = index * self.seq_len
        last = min(start + self.seq_len, self.store.tokens) - 1
        return [self.store.document_of(start), self.store.document_of(last)]


class Source(Protocol):
    """What a mixture is made of: sequences of T tokens, by number."""

    seq_len: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Int64s, ...]:
        """Returns inputs (T,), targets (T,) and, if not all see each other, documents (T,)."""

    def documents(self, index: int) -> list[int | None]:
        """Returns the numbers of a sequence's documents, of consecutive ones first and last."""


class Mixture:
    """Several sources in one endless, shuffled order that is a pure function of the seed.

    A source's weight is how often one epoch passes over it, relative to the others (the paper: 1.0
    for mathematics, 1.5 for code). Each pass is a fresh permutation, so no sequence repeats
    within it; an epoch that ends in the middle of a pass is continued by the next one.

    A replay is a last source that is not shuffled among the others but dealt out evenly: with a
    share of 0.1 it has every tenth sample, so each batch has as much of it.

    Attributes:
        sources: as they were given; the replay is the last.
        seq_len: T, the same for all sources.
        samples_per_epoch: sequences in one epoch, over all sources.
        samples_per_source: how many of them each source gives.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int,
        replay: Source | None = None,
        share: float = 0.0,
    ) -> None:
        """Raises ConfigError if there is not one positive weight per source.

        Args:
            sources, weights: an epoch has as many samples of them as it has without a replay.
            seed: of the order.
            replay: is passed over as often as it takes, each time in a fresh order.
            share: of all samples, above 0 and below 1, are of the replay.
        """
        if not sources or len(weights) != len(sources):
            raise ConfigError(
                f"data.weights has {len(weights)} values for {len(sources)} sources; give one each"
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"data.weights is {list(weights)}, expected positive numbers")
        if seed < 0:
            raise ConfigError(f"train.seed is {seed}, expected 0 or more")
        self.sources = sources
        self._seed = seed
        self.seq_len = sources[0].seq_len
        self.samples_per_source = [
            max(1, round(weight * len(source)))
            for source, weight in zip(sources, weights, strict=True)
        ]
        self._ends = list(itertools.accumulate(self.samples_per_source))
        self.samples_per_epoch = self._ends[-1]
        self._share = 0.0
        if replay is not None:
            self.sources, self._share = [*sources, replay], share
            self.samples_per_epoch = round(self._ends[-1] / (1 - share))
            self.samples_per_source.append(self.samples_per_epoch - self._ends[-1])
        self._epoch = -1
        self._orders: dict[tuple[int, ...], Int64s] = {}  # those of one epoch

    def sample(self, index: int) -> tuple[Int64s, ...]:
        """Returns what its source gives for a sample of the endless order, (T,) each."""
        number, sequence = self.locate(index)
        return self.sources[number][sequence]

    def locate(self, index: int) -> tuple[int, int]:
        """Returns of which source, and there which sequence, a sample of the endless order is."""
        replayed = int(index * self._share)  # of the samples before
        if int((index + 1) * self._share) > replayed:
            turn, place = divmod(replayed, len(self.sources[-1]))
            return len(self.sources) - 1, int(self._order(len(self.sources[-1]), 2, turn)[place])
        epoch, at = divmod(index - replayed, self._ends[-1])
        if epoch != self._epoch:
            self._epoch = epoch
            self._orders.clear()
        slot = self._order(self._ends[-1], 0, epoch)[at]
        number = bisect.bisect_right(self._ends, slot)
        source, count = self.sources[number], self.samples_per_source[number]
        # The source's own stream goes on through the epochs.
        turn, place = divmod(epoch * count + int(slot) - (self._ends[number] - count), len(source))
        return number, int(self._order(len(source), 1, number, turn)[place])

    def _order(self, length: int, *key: int) -> Int64s:
        """Returns the permutation of `length` that belongs to the seed and this key."""
        if key not in self._orders:
            # Sorted raw bits, because numpy promises them to stay as they are through its versions,
            # unlike `Generator.permutation`.
            bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=key))
            self._orders[key] = np.argsort(bits.random_raw(length), kind="stable")
        return self._orders[key]


def batch(
    mixture: Mixture, start: int, count: int, rank: int, world_size: int, last: int | None = None
) -> tuple[tuple[Tensor, ...], int]:
    """Returns a rank's share of the samples [start, start + count): every `world_size`-th.

    The union over the ranks is the same for any world size.

    Args:
        mixture: of all samples.
        start, count: which of them, over all ranks.
        rank, world_size: whose share.
        last: a source whose samples come after all others, before they are dealt out. So ranks
            differ by one of them at most.

    Returns:
        inputs, targets and, where the sources have them, documents: (n, T) int64; n is
        `count / world_size`, rounded up on the first ranks. And how many of all `count` samples
        come before those of the source `last`.
    """
    places = [mixture.locate(i) for i in range(start, start + count)]
    places.sort(key=lambda place: place[0] == last)  # stable
    samples = [mixture.sources[number][i] for number, i in places[rank::world_size]]
    others = sum(number != last for number, _ in places)
    if not samples:  # more ranks than samples
        return tuple(column[:0] for column in stack([mixture.sample(start)])), others
    return stack(samples), others


def stack(samples: Sequence[tuple[Int64s, ...]]) -> tuple[Tensor, ...]:
    """Returns each column of n samples, (T,), as one tensor (n, T)."""
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True))


def parse_named(values: Sequence[str], key: str = "data.val") -> dict[str, list[str]]:
    """Reads sets given as `NAME=PATH` by the option `key`; a name that repeats has several paths.

    Raises:
        ConfigError: a value lacks the name, the path or the sign between them.
    """
    named: dict[str, list[str]] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name.strip() or not path.strip():
            raise ConfigError(f"{key}: {value!r} is not NAME=PATH, such as code=data/val/*.py")
        named.setdefault(name.strip(), []).append(path.strip())
    return named
