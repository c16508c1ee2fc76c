"""Training samples: stored tokens cut into sequences, in an order that depends on seed and step.

`PackedSequences` cuts the token stream of a corpus, `Mixture` orders several of them, and
`micro_batches` gives each rank its share. Nothing here has a position to save: sample n is the same
for every rank and world size, before and after a restart.

Shapes: T sequence length.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamapro.errors import ConfigError, DataError
from llamapro.ops import IGNORE_INDEX
from llamapro.text.packing import PackedConversations
from llamapro.text.store import Int64s, TokenStore


class PackedSequences:
    """A token stream cut into consecutive windows of T tokens.

    Every token but the first is predicted exactly once: the target of a window's last token is the
    first token of the next window. Documents share windows, one after another. The last window is
    padded; the targets there are `IGNORE_INDEX`.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        """Cuts a store; raises DataError if it holds fewer than two tokens."""
        if store.tokens < 2:
            raise DataError(f"{store.tokens} token: nothing to predict")
        self.store = store
        self.seq_len = seq_len

    def __len__(self) -> int:
        return math.ceil((self.store.tokens - 1) / self.seq_len)

    def __getitem__(self, index: int) -> tuple[Int64s, Int64s]:
        """Returns inputs (T,) and targets (T,): the target at t is the input at t + 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.seq_len
        stop = min(start + self.seq_len + 1, self.store.tokens)
        tokens = self.store.read(start, stop)  # the last is a target only
        padding = (0, self.seq_len + 1 - tokens.size)
        targets = np.pad(tokens[1:], padding, constant_values=IGNORE_INDEX)
        return np.pad(tokens[:-1], padding), targets

    def documents(self, index: int) -> list[int | None]:
        """Returns the first and the last document of which a sequence holds a part."""
        start = index * self.seq_len
        last = min(start + self.seq_len, self.store.tokens) - 1
        return [self.store.document_of(start), self.store.document_of(last)]


# Numbered sequences of inputs, targets and, if documents must not see each other, these: (T,) each.
Source = PackedSequences | PackedConversations


class Mixture:
    """Several sources in one endless, shuffled order that is a pure function of the seed.

    A source's weight is the number of passes over it in one epoch (the paper: 1.0 for mathematics,
    1.5 for code). Each pass is a new permutation, so no sequence repeats within it; a pass that the
    end of an epoch interrupts continues in the next epoch.

    A replayed source is not shuffled among the others but dealt out evenly: with a share of 0.1 it
    gives every tenth sample, so that each batch has the same amount of it. It is repeated as often
    as that needs, each time in a new order. The samples of the other sources stay the same.

    Attributes:
        sources: as given; the replayed one is the last.
        samples_per_epoch: number of sequences in one epoch, over all sources.
        samples_per_source: number of them from each source.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int,
        replay: Source | None = None,
        share: float = 0.0,
    ) -> None:
        """Makes the order of at least one source, each with a positive weight.

        Args:
            replay: the source that gives a share of all samples, above 0 and below 1.
        """
        self.sources = sources
        self._seed = seed
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

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the numbers of the source, and of the sequence in it, of a sample."""
        replayed = int(index * self._share)  # number among the samples before this one
        if int((index + 1) * self._share) > replayed:
            turn, place = divmod(replayed, len(self.sources[-1]))
            return len(self.sources) - 1, int(self._order(len(self.sources[-1]), 2, turn)[place])
        epoch, position = divmod(index - replayed, self._ends[-1])
        if epoch != self._epoch:
            self._epoch = epoch
            self._orders.clear()
        slot = int(self._order(self._ends[-1], 0, epoch)[position])
        number = bisect.bisect_right(self._ends, slot)
        source, count = self.sources[number], self.samples_per_source[number]
        # A source's own passes continue through the epochs.
        turn, place = divmod(epoch * count + slot - (self._ends[number] - count), len(source))
        return number, int(self._order(len(source), 1, number, turn)[place])

    def _order(self, length: int, *key: int) -> Int64s:
        """Returns the permutation of `length` numbers for the seed and this key."""
        if key not in self._orders:
            # Raw bits are sorted because numpy keeps them the same in all versions, which it does
            # not promise for `Generator.permutation`.
            bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=key))
            self._orders[key] = np.argsort(bits.random_raw(length), kind="stable")
        return self._orders[key]


class MicroBatch(NamedTuple):
    """The sequences that a rank computes in one forward pass."""

    # Inputs, targets and, where the sources have them, documents, each (rows, T) int64.
    columns: tuple[Tensor, ...]
    # The number of last rows from the source that is dealt out last; None if no rank has any. The
    # base inside runs on all ranks or on none, because they gather sharded weights together.
    replayed: int | None

    @property
    def targets(self) -> tuple[int, int]:
        """The numbers of targets of all rows, and of those that are not of that source."""
        counts = (self.columns[1] != IGNORE_INDEX).sum(1)
        return int(counts.sum()), int(counts[: len(counts) - (self.replayed or 0)].sum())


def micro_batches(
    mixture: Mixture,
    first: int,
    size: int,
    rows: int,
    rank: int,
    world_size: int,
    last_source: int | None = None,
) -> list[MicroBatch]:
    """Returns a rank's share of the samples [first, first + size): every `world_size`-th of them.

    The union over the ranks is the same for any world size and number of rows. The samples of
    source number `last_source` are dealt out last, so that the ranks' numbers of them differ by at
    most one.
    """
    places = [mixture.locate(index) for index in range(first, first + size)]
    places.sort(key=lambda place: place[0] == last_source)  # stable
    dealt = []
    for start in range(0, size, rows * world_size):
        of_all = places[start : start + rows * world_size]
        mine = of_all[rank::world_size]
        has_any = any(number == last_source for number, _ in of_all)
        replayed = sum(number == last_source for number, _ in mine) if has_any else None
        samples = [mixture.sources[number][sequence] for number, sequence in mine]
        dealt.append(MicroBatch(stack(samples), replayed))
    return dealt


def stack(samples: Sequence[tuple[Int64s, ...]]) -> tuple[Tensor, ...]:
    """Returns each column of n samples, (T,), as one tensor (n, T)."""
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True))


def parse_named(values: Sequence[str], key: str = "data.val") -> dict[str, list[str]]:
    """Parses values `NAME=PATH` of the option `key`; a repeated name has several paths.

    Raises ConfigError if a value lacks the name, the path or the sign between them.
    """
    named: dict[str, list[str]] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name.strip() or not path.strip():
            raise ConfigError(f"{key}: {value!r} is not NAME=PATH, such as code=data/val/*.py")
        named.setdefault(name.strip(), []).append(path.strip())
    return named
