"""Data order: full sequences, every token predicted once, a pure function of seed and step."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamapro.errors import ConfigError, DataError
from llamapro.ops import IGNORE_INDEX
from llamapro.text import store as stores
from llamapro.text.mixture import Mixture, PackedSequences, micro_batches, parse_named
from llamapro.text.store import TokenStore, write_store

FINGERPRINT = "ab" * 32


def make_store(path: Path, tokens: int, first: int = 0, arrays: int = 3) -> TokenStore:
    """Stores first, first + 1, ... from several arrays."""
    stream = np.arange(first, first + tokens, dtype=np.uint16)
    counts = {"documents": 1, "bytes": tokens}
    index = {"tokenizer_sha256": FINGERPRINT, "dtype": "uint16", "counts": counts}
    write_store(path, index, np.array_split(stream, arrays))
    return TokenStore(path, FINGERPRINT)


def make_mixture(
    path: Path, lengths: list[int], weights: list[float], seed: int = 0
) -> tuple[Mixture, list[PackedSequences]]:
    """Mixes sources of `lengths` sequences of 4 tokens each; source k counts from 1000 k."""
    sources = [
        PackedSequences(make_store(path / str(k), 4 * length + 1, 1000 * k), 4)
        for k, length in enumerate(lengths)
    ]
    return Mixture(sources, weights, seed), sources


def sample(mixture: Mixture, index: int) -> Any:
    """Returns a sample as its source gives it."""
    number, sequence = mixture.locate(index)
    return mixture.sources[number][sequence]


def first_tokens(mixture: Mixture, start: int, stop: int) -> list[int]:
    """Returns the first token of each sequence, which identifies it."""
    return [int(sample(mixture, i)[0][0]) for i in range(start, stop)]


@pytest.mark.parametrize("tokens", [2, 4, 5, 8, 9, 11])
def test_every_token_but_the_first_is_predicted_once(tmp_path: Path, tokens: int) -> None:
    """Windows join without gap or overlap, targets are the next inputs, the rest is padding."""
    packed = PackedSequences(make_store(tmp_path / "s", tokens, first=7), 4)
    windows = [packed[i] for i in range(len(packed))]
    inputs = np.concatenate([i for i, _ in windows])
    targets = np.concatenate([t for _, t in windows])
    assert inputs.dtype == targets.dtype == np.int64 and inputs.size == 4 * len(packed)
    assert targets[: tokens - 1].tolist() == list(range(8, 7 + tokens))
    assert inputs[: tokens - 1].tolist() == list(range(7, 6 + tokens))
    assert (targets[tokens - 1 :] == IGNORE_INDEX).all() and (inputs[tokens - 1 :] == 0).all()
    assert targets.size - (tokens - 1) < 4
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_one_token_is_refused(tmp_path: Path) -> None:
    """There is nothing to predict in it."""
    with pytest.raises(DataError, match="nothing to predict"):
        PackedSequences(make_store(tmp_path / "s", 1), 4)


def test_reads_cross_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any range of the stream is the same whether or not a shard ends in it."""
    monkeypatch.setattr(stores, "SHARD_TOKENS", 4)
    store = make_store(tmp_path / "s", 13)
    assert len(list((tmp_path / "s").glob("shard-*.bin"))) == 4
    for start in range(14):
        for stop in range(start, 14):
            assert store.read(start, stop).tolist() == list(range(start, stop))
    with pytest.raises(IndexError):
        store.read(0, 14)


def test_damaged_store_is_refused_by_name(tmp_path: Path) -> None:
    """Another tokenizer, a shortened or missing shard, a broken or missing index: each is named."""
    path = make_store(tmp_path / "s", 10).path
    shard, index = path / "shard-00000.bin", path / "index.json"
    with pytest.raises(DataError, match=r"index\.json: tokens of another tokenizer"):
        TokenStore(path, "cd" * 32)
    good = index.read_text()
    index.write_text(json.dumps(json.loads(good) | {"tokens": 11}))
    with pytest.raises(DataError, match=r"index\.json: 11 tokens"):
        TokenStore(path, FINGERPRINT)
    index.write_text(good)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"shard-00000\.bin: 18 bytes"):
        TokenStore(path, FINGERPRINT)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.bin: missing"):
        TokenStore(path, FINGERPRINT)
    for text in ("{}", "{", "[]"):
        index.write_text(text)
        with pytest.raises(DataError, match="not an index"):
            TokenStore(path, FINGERPRINT)


def test_a_byte_changed_after_writing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` finds it and names the shard; opening reads no tokens."""
    monkeypatch.setattr(stores, "SHARD_TOKENS", 4)
    store = make_store(tmp_path / "s", 13)
    store.check("check")
    shard = store.path / "shard-00002.bin"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    damaged = TokenStore(store.path, FINGERPRINT)
    assert damaged.sha256 == store.sha256, "what was written, not what is there"
    with pytest.raises(
        DataError, match=r"shard-00002\.bin: damaged: .*; remove .*/s and run again"
    ):
        damaged.check("check")


def test_the_hash_is_of_the_tokens_alone(tmp_path: Path) -> None:
    """Where a store lies and in which pieces it was written changes nothing; a token does."""
    one = make_store(tmp_path / "a", 10, arrays=1)
    same = make_store(tmp_path / "elsewhere" / "b", 10, arrays=4)
    other = make_store(tmp_path / "other", 11, arrays=4)
    assert one.sha256 == same.sha256 != other.sha256


SHARD = {"file": "shard-00000.bin", "tokens": 10, "sha256": "ab" * 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "object"}, "not an index of tokens"),
        ({"shards": [SHARD | {"file": "/etc/hostname"}]}, "s/hostname: missing"),
        ({"shards": [SHARD | {"tokens": -10}]}, "20 bytes, index.json says -10 tokens"),
        ({"shards": [{"file": "shard-00000.bin", "tokens": 10}]}, "not an index of tokens"),
        ({"shards": "shard"}, "not an index of tokens"),
        ({"shards": []}, "10 tokens, but its shards differ"),
        ({"counts": None}, "not an index of tokens"),
    ],
    ids=str,
)
def test_an_index_of_odd_things_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """An index may name other types, files elsewhere, impossible sizes or no hash."""
    file = make_store(tmp_path / "s", 10).path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        TokenStore(file.parent, FINGERPRINT)


def test_an_absurdly_large_or_deep_index_is_refused(tmp_path: Path) -> None:
    """A large file is not read, and deep nesting raises no RecursionError."""
    file = make_store(tmp_path / "s", 10).path / "index.json"
    os.truncate(file, stores.MAX_INDEX_BYTES + 1)  # sparse: it takes no room
    with pytest.raises(DataError, match="268,435,457 bytes, over 268,435,456"):
        TokenStore(file.parent, FINGERPRINT)
    file.write_text("[" * 200_000)
    with pytest.raises(DataError, match="not an index of tokens"):
        TokenStore(file.parent, FINGERPRINT)


def test_second_writer_uses_the_first_one_s_store(tmp_path: Path) -> None:
    """The later of two processes that write one store leaves the earlier's as it is."""
    path = make_store(tmp_path / "s", 5).path
    assert make_store(path, 5, first=50).read(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert {p.name for p in tmp_path.iterdir()} == {"s", stores.CACHE_TAG}


def test_failure_leaves_nothing_and_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    """Incomplete stores are removed, ours and those of killed processes."""
    (tmp_path / ".s.partial-dead").mkdir()

    def stop() -> Iterator[stores.Int64s]:
        yield np.arange(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", {}, stop())
    assert list(tmp_path.iterdir()) == []


def test_samples_do_not_depend_on_the_order_of_access(tmp_path: Path) -> None:
    """Sample n is the same forwards, backwards, and asked for alone."""
    mixture, sources = make_mixture(tmp_path, [7, 5], [1.0, 1.5])
    stop = 3 * mixture.samples_per_epoch
    forwards = first_tokens(mixture, 0, stop)
    backwards = [int(sample(mixture, i)[0][0]) for i in reversed(range(stop))]
    alone = [int(sample(Mixture(sources, [1.0, 1.5], 0), i)[0][0]) for i in range(stop)]
    assert forwards == backwards[::-1] == alone
    assert len(mixture._orders) <= 5  # one epoch's, or memory would grow with every pass


def test_order_stays_what_it_was(tmp_path: Path) -> None:
    """A run resumed with newer libraries must see the same samples."""
    mixture, _ = make_mixture(tmp_path, [5, 3], [1.0, 1.0], seed=1234)
    assert first_tokens(mixture, 0, 10) == [12, 16, 8, 0, 1008, 4, 1004, 1000, 4, 8]


def test_epoch_of_weight_one_shows_every_sequence_once(tmp_path: Path) -> None:
    """Nothing is repeated and nothing is missed, in each of several epochs, in another order."""
    mixture, sources = make_mixture(tmp_path, [9, 4], [1.0, 1.0])
    assert mixture.samples_per_epoch == 13
    everything = sorted(int(source[i][0][0]) for source in sources for i in range(len(source)))
    epochs = [first_tokens(mixture, 13 * e, 13 * (e + 1)) for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != everything


def test_weights_are_passes_per_epoch(tmp_path: Path) -> None:
    """The paper's 1.0 and 1.5: two epochs pass over the second source three times."""
    mixture, _ = make_mixture(tmp_path, [10, 6], [1.0, 1.5])
    assert mixture.samples_per_source == [10, 9]
    seen = Counter(first_tokens(mixture, 0, 2 * mixture.samples_per_epoch))
    assert Counter(seen.values()) == {2: 10, 3: 6}
    assert all((count == 3) == (token >= 1000) for token, count in seen.items())


def test_fractional_weight_continues_its_pass_in_the_next_epoch(tmp_path: Path) -> None:
    """At weight 1/4, four epochs make one pass: no sequence repeats before all have been seen."""
    mixture, _ = make_mixture(tmp_path, [8, 8], [1.0, 0.25])
    assert mixture.samples_per_source == [8, 2]
    tokens = [t for t in first_tokens(mixture, 0, 40) if t >= 1000]
    assert len(tokens) == 8 and len(set(tokens)) == 8


def test_small_weight_still_gives_one_sample(tmp_path: Path) -> None:
    """No source disappears because its share rounds to zero."""
    mixture, _ = make_mixture(tmp_path, [8, 3], [1.0, 0.01])
    assert mixture.samples_per_source == [8, 1]


def test_seeds_and_sources_are_shuffled_differently(tmp_path: Path) -> None:
    """Another seed is another order; two sources of one length do not share a permutation."""
    mixture, sources = make_mixture(tmp_path, [20, 20], [1.0, 1.0])
    order = first_tokens(mixture, 0, 40)
    assert first_tokens(Mixture(sources, [1.0, 1.0], 1), 0, 40) != order
    orders = [
        [t % 1000 for t in first_tokens(Mixture([sources[0], sources[1]], weights, 0), 0, 20)]
        for weights in ([1.0, 0.01], [0.01, 1.0])
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("count", [12, 4])
def test_ranks_share_the_same_samples_for_any_world_size(tmp_path: Path, count: int) -> None:
    """1, 2 and 4 ranks together see the same samples of a step, each once."""
    mixture, _ = make_mixture(tmp_path, [7, 5], [1.0, 1.5])
    expected = [sample(mixture, i)[1].tolist() for i in range(9, 9 + count)]
    for world_size in (1, 2, 4):
        dealt = (micro_batches(mixture, 9, count, count, r, world_size) for r in range(world_size))
        shares = [share.columns for (share,) in dealt]
        for inputs, targets in shares:
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape == (targets.shape[0], 4)
        union = [row for _, targets in shares for row in targets.tolist()]
        assert sorted(union) == sorted(expected)
        assert shares[0][1][0].tolist() == expected[0]
        for inputs, targets in shares:
            assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_named_sets_collect_their_paths() -> None:
    """A name that repeats has several paths; a path may hold '='."""
    named = parse_named(["code=a.py", "text=b.txt", "code=c=d.py"])
    assert named == {"code": ["a.py", "c=d.py"], "text": ["b.txt"]}


@pytest.mark.parametrize("value", ["a.py", "=a.py", "code=", " =x"])
def test_unnamed_set_is_refused(value: str) -> None:
    """The message shows the value and an example."""
    with pytest.raises(ConfigError, match="NAME=PATH") as error:
        parse_named([value])
    assert repr(value) in str(error.value)
