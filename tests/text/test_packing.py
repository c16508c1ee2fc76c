"""Packed conversations: only answers are trained, and packing changes nothing but the speed."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamapro.config import ModelConfig
from llamapro.errors import DataError
from llamapro.model import build_on_meta, load_tensors
from llamapro.ops import IGNORE_INDEX
from llamapro.text import packing
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.messages import Message
from llamapro.text.packing import PackedConversations, mark_trained, tokenize_conversations
from llamapro.text.store import CACHE_TAG, Int64s, TokenStore, write_store
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.objective import NextToken

FINGERPRINT = "ab" * 32
BOS, END = 1, 2
HEADERS = {"system": 300, "user": 301, "assistant": 302}
Read = Callable[..., dict[str, TokenStore]]


class CharacterTemplate:
    """A token for each character, one before each turn and one after; BOS first."""

    source, prints_date, date = "one", False, None
    plain_names = ("<end>",)

    def encode(
        self, messages: list[Message], variables: dict[str, Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("no assistant turn")
        ids, trained = [BOS], [False]
        for message in messages:
            if message["content"] == "fail":
                raise DataError("the template failed: no such filter")
            is_answer = message["role"] == "assistant"
            ids += [HEADERS[message["role"]], *map(ord, message["content"]), END]
            trained += [False] + [is_answer] * (len(message["content"]) + 1)
        return ids, trained

    def samples(
        self, messages: list[Message], variables: dict[str, Any] | None = None
    ) -> list[tuple[list[int], list[bool]]]:
        return [self.encode(messages, variables)]

    def hidden(self, messages: list[Message], variables: dict[str, Any]) -> set[str]:
        return {key for message in messages for key in message} - {"role", "content"}


def write(path: Path, *conversations: list[tuple[str, str]]) -> Path:
    """Writes conversations given as (role, content)."""
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read(*paths, template=...)`: the stores of paths, each a source."""

    def tokenized(*paths: Path, template: Any = None) -> dict[str, TokenStore]:
        sources = {path.name: [str(path)] for path in paths}
        template = template or CharacterTemplate()
        return tokenize_conversations(sources, template, FINGERPRINT, tmp_path / "cache")

    return tokenized


def make_store(path: Path, sizes: list[int], trained_from: int = 0) -> TokenStore:
    """Stores conversations of these lengths, all ids different, trained from a token on."""
    ids = np.arange(sum(sizes), dtype=np.uint32)
    inside = np.concatenate([np.arange(size) for size in sizes])
    ids[inside >= trained_from] |= packing.TRAINED
    counts = {"documents": len(sizes), "bytes": 0}
    index = {"tokenizer_sha256": FINGERPRINT, "dtype": "uint32", "counts": counts}
    write_store(path, index, [ids, np.array(sizes, dtype=np.uint32)])
    return TokenStore(path, FINGERPRINT)


def samples(packed: PackedConversations) -> list[tuple[Int64s, Int64s, Int64s]]:
    return [packed[i] for i in range(len(packed))]


def pieces(packed: PackedConversations) -> list[tuple[int, int]]:
    """Returns the first id and the number of positions of all that is packed."""
    found = []
    for inputs, _, documents in samples(packed):
        for number in range(int(documents[-1]) + 1):
            ids = inputs[documents == number]
            if ids.any() or number == 0:  # not the padding
                assert (np.diff(ids) == 1).all()  # whole and in order
                found.append((int(ids[0]), len(ids)))
    return sorted(found)


def test_only_answers_and_their_ends_are_targets(tmp_path: Path, read: Read) -> None:
    """Token by token: headers, questions, the first token of all and padding have no target."""
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "f")]
    store = read(write(tmp_path / "a.jsonl", turns))["a.jsonl"]
    inputs, targets, documents = PackedConversations(store, 16)[0]
    a, b, c, d, e, f = map(ord, "abcdef")
    U, A, no = HEADERS["user"], HEADERS["assistant"], IGNORE_INDEX
    assert inputs.tolist() == [BOS, U, a, b, END, A, c, d, END, U, e, END, A, f, 0, 0]
    assert targets.tolist() == [no] * 5 + [c, d, END] + [no] * 4 + [f, END, no, no]
    assert documents.tolist() == [0] * 14 + [1] * 2


def test_conversations_share_a_window_and_keep_to_themselves(tmp_path: Path, read: Read) -> None:
    """No target leads from one conversation into the next; each has its number."""
    path = write(tmp_path / "a.jsonl", *[[("user", q), ("assistant", q.upper())] for q in "abc"])
    packed = PackedConversations(read(path)["a.jsonl"], 19)
    assert len(packed) == 1
    inputs, targets, documents = packed[0]
    assert documents.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3]
    for number, letter in enumerate("abc"):
        where = documents == number
        upper = ord(letter.upper())
        user, assistant = HEADERS["user"], HEADERS["assistant"]
        assert inputs[where].tolist() == [BOS, user, ord(letter), END, assistant, upper]
        assert targets[where].tolist() == [IGNORE_INDEX] * 4 + [upper, END]


def test_every_conversation_is_packed_once_and_windows_are_full(tmp_path: Path) -> None:
    """Random lengths: none is lost, repeated or cut, and over 95 % of the positions are used."""
    random = np.random.default_rng(0)
    for name, sizes in {
        "uniform": random.integers(2, 513, 1000),
        "short": np.clip(random.lognormal(4, 1, 1000).astype(int), 2, 513),
    }.items():
        store = make_store(tmp_path / name, sizes.tolist())
        packed = PackedConversations(store, 512)
        starts = np.cumsum(sizes) - sizes
        assert pieces(packed) == list(zip(starts.tolist(), (sizes - 1).tolist(), strict=True))
        assert packed.fill > 0.95
        used = sum(size for _, size in pieces(packed)) / (512 * len(packed))
        assert packed.fill == pytest.approx(used)
        again = PackedConversations(store, 512)
        for one, other in zip(samples(packed), samples(again), strict=True):
            assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_best_fit_takes_the_fullest_window_with_room(tmp_path: Path) -> None:
    """Sizes 6, 5, 4, 3, 2 fill two windows of 10; the emptiest or the last would need three."""
    packed = PackedConversations(make_store(tmp_path / "s", [3, 5, 7, 4, 6]), 10)
    assert len(packed) == 2
    assert packed.fill == 1.0
    assert [sorted(Counter(d.tolist()).values()) for _, _, d in samples(packed)] == [
        [4, 6],
        [2, 3, 5],
    ]


def test_long_conversations_are_dropped_truncated_or_split_and_counted(tmp_path: Path) -> None:
    """One of T + 1 tokens fits; of longer ones, each policy keeps what it says."""
    store = make_store(tmp_path / "s", [5, 6, 12, 3])  # T = 4: 4, 5, 11 and 2 positions
    fitting = [(0, 4), (23, 2)]
    dropped = PackedConversations(store, 4)
    assert pieces(dropped) == fitting
    assert "2 longer conversations dropped" in dropped.describe()
    truncated = PackedConversations(store, 4, "truncate")
    assert pieces(truncated) == sorted([*fitting, (5, 4), (11, 4)])
    assert "2 longer conversations truncated" in truncated.describe()
    split = PackedConversations(store, 4, "split")
    parts = [(5, 4), (9, 1), (11, 4), (15, 4), (19, 3)]
    assert pieces(split) == sorted(fitting + parts)
    assert "2 longer conversations split" in split.describe()
    # Every token but each conversation's first is still predicted, once.
    predicted = sorted(t for _, targets, _ in samples(split) for t in targets[targets >= 0])
    assert predicted == [i for i in range(26) if i not in (0, 5, 11, 23)]
    for packed in (dropped, truncated, split):
        assert packed.too_long == 2 and packed.left_out == 0


def test_pieces_without_a_trained_token_are_left_out_and_counted(tmp_path: Path) -> None:
    """The untrained beginning of a long conversation teaches nothing and takes no place."""
    store = make_store(tmp_path / "s", [12, 8], trained_from=6)
    split = PackedConversations(store, 4, "split")
    assert pieces(split) == [(4, 4), (8, 3), (16, 3)]
    assert split.left_out == 2
    assert "2 pieces without a trained token left out" in split.describe()
    late = PackedConversations(make_store(tmp_path / "late", [12], trained_from=8), 4, "split")
    assert pieces(late) == [(4, 4), (8, 3)]  # the second piece predicts token 8, its last target
    with pytest.raises(DataError, match=r"2 are longer than 4 tokens and nothing is left"):
        PackedConversations(store, 4, "truncate")
    with pytest.raises(DataError, match="nothing is left"):
        PackedConversations(store, 4)


def test_store_is_cached_by_files_and_template(
    tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same files and template give the same store again; another of either a new one."""
    path = write(tmp_path / "a.jsonl", [("user", "ab"), ("assistant", "cd")])
    first = read(path)["a.jsonl"]
    described = "1 conversations, 2 turns, 9 tokens, 3 of them trained (33%)"
    assert described in capsys.readouterr().err
    assert read(path)["a.jsonl"].path == first.path
    again = capsys.readouterr().err
    assert described in again and "from the cache" in again
    other = CharacterTemplate()
    other.source = "two"
    assert read(path, template=other)["a.jsonl"].path != first.path
    write(path, [("user", "ab"), ("assistant", "cde")])
    assert read(path)["a.jsonl"].path != first.path


def test_what_the_template_does_not_take_up_is_said(
    tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of turns, and names of control tokens, which are plain characters in a message."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "cot": "c"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns, "id": 5}))
    read(path)
    said = capsys.readouterr().err
    assert "keys not read: 'id', 'cot'; '<end>' stands in 1 of them as plain characters" in said


def test_problems_of_all_sources_are_in_one_error(tmp_path: Path, read: Read) -> None:
    """Reading, checking and rendering mistakes come together; good sources are kept, bad not."""
    good, answer = [("user", "a"), ("assistant", "b")], ("assistant", "b")
    one = write(tmp_path / "one.jsonl", good, [("user", "a")], [("user", "fail"), answer])
    two = write(tmp_path / "two.jsonl", good)
    three = write(tmp_path / "three.jsonl", good, [("user", "fail"), answer])
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(DataError) as raised:
        read(one, two, three, empty)
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert lines[0] == "4 problems in the conversations:"
    assert lines[1:4] == [
        f"{one}:2: no assistant turn",
        f"{one}:3: the template failed: no such filter",
        f"{three}:2: the template failed: no such filter",
    ]
    assert lines[4].startswith(f"{empty}: nothing to train on")
    assert len(lines) == 5
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {read(two)[two.name].path.name, CACHE_TAG}


def test_long_lists_of_problems_are_cut_and_counted(tmp_path: Path, read: Read) -> None:
    """The message names the first twenty problems and the number of the others."""
    path = write(tmp_path / "a.jsonl", *[[("user", "a")]] * 33)
    with pytest.raises(DataError, match=r"^33 problems") as raised:
        read(path)
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == 21
    assert f"{path}:20:" in lines[19]
    assert lines[20].strip() == "and 13 more"


def test_unwritable_cache_is_told_at_once(tmp_path: Path, read: Read) -> None:
    """A store that cannot be written is not taken for a problem of the data."""
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(DataError, match="cache"):
        read(write(tmp_path / "a.jsonl", [("user", "a"), ("assistant", "b")]))


def test_conversation_without_a_trained_token_is_left_out_and_counted(
    tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversation of which the template trains nothing is counted and not stored."""

    class Silent(CharacterTemplate):
        def encode(
            self, messages: list[Message], variables: dict[str, Any] | None = None
        ) -> tuple[list[int], list[bool]]:
            ids, trained = super().encode(messages)
            return ids, [t and messages[0]["content"] != "silent" for t in trained]

    path = write(
        tmp_path / "a.jsonl",
        [("user", "silent"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b")],
    )
    assert read(path, template=Silent())["a.jsonl"].documents == 1
    assert "1 conversations without a trained token left out" in capsys.readouterr().err


def test_sample_shows_what_is_trained() -> None:
    """The text of the first conversation, answers between marks, cut where it is too long."""
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "f")]
    ids, trained = CharacterTemplate().encode([{"role": r, "content": c} for r, c in turns])
    inputs = np.array([*ids[:-1], 7, 7])
    targets = np.where(trained[1:], ids[1:], IGNORE_INDEX)
    targets = np.concatenate([targets, [7, IGNORE_INDEX]])
    documents = np.array([0] * (len(ids) - 1) + [1] * 2)
    names = {BOS: "^", END: "$", 300: "S", 301: "U", 302: "A", 7: "other"}

    def decode(ids: list[int]) -> str:
        return "".join(names.get(i) or chr(i) for i in ids)

    sample = inputs, targets, documents
    assert mark_trained(sample, decode, False) == "^Uab$A⟦cd$⟧Ue$A⟦f$⟧"
    assert mark_trained(sample, decode, True).count("\033[32m") == 2
    assert mark_trained(sample, decode, False, limit=7) == "^Uab$A⟦cd⟧ [... 7 more tokens]"


def test_packed_loss_is_the_loss_of_each_conversation_alone(
    tmp_path: Path,
    read: Read,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, torch.Tensor]],
) -> None:
    """Conversations that share a window get the loss that they get one at a time."""
    random = np.random.default_rng(1)

    def text() -> str:
        return "".join(map(chr, random.integers(97, 123, int(random.integers(1, 9)))))

    turns = [
        [("user", text()), ("assistant", text())] * int(random.integers(1, 4)) for _ in range(12)
    ]
    store = read(write(tmp_path / "a.jsonl", *turns))["a.jsonl"]
    model = build_on_meta(tiny_config())
    load_tensors(model, random_tensors(tiny_config()))
    alone_sum, alone_count = 0.0, 0
    with torch.no_grad():
        for conversation in turns:
            messages = [{"role": role, "content": content} for role, content in conversation]
            ids, trained = CharacterTemplate().encode(messages)
            following = [i if t else IGNORE_INDEX for i, t in zip(ids, trained, strict=True)]
            loss, count = NextToken(model)(torch.tensor([ids[:-1]]), torch.tensor([following[1:]]))
            alone_sum, alone_count = alone_sum + float(loss), alone_count + int(count)
        packed = PackedConversations(store, 64)
        assert max(int(documents[-1]) for _, _, documents in samples(packed)) > 1
        inputs, targets, documents = (
            torch.from_numpy(np.stack(column)) for column in zip(*samples(packed), strict=True)
        )
        loss, count = NextToken(model)(inputs, targets, documents)
    assert int(count) == alone_count
    # Each addend in fp32 is rounded by half a unit; seeing one another would change about 1 %.
    assert float(loss) == pytest.approx(alone_sum, rel=alone_count * 2.0**-24)


def test_chat_template_tokens_reach_the_targets_as_they_are(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """A real template and tokenizer train the text of the answers."""
    pytest.importorskip("jinja2")
    tokenizer = Tokenizer.load(tokenizer_file)
    template = ChatTemplate.load(tmp_path, tokenizer, "llama2")
    turns = [("user", "How many?"), ("assistant", "Two of them.")]
    turns += [("user", "?"), ("assistant", "2")]
    path = write(tmp_path / "a.jsonl", turns)
    (store,) = tokenize_conversations(
        {"chat": [str(path)]}, template, tokenizer.fingerprint, tmp_path / "cache"
    ).values()
    sample = PackedConversations(store, 256)[0]
    answers = [int(i) for i in sample[1] if i != IGNORE_INDEX]
    assert tokenizer.decode(answers).split() == ["Two", "of", "them.", "2"]
    assert sum(i == tokenizer.eos_id for i in answers) == 2
    shown = mark_trained(sample, tokenizer.decode, False)
    assert shown.startswith("[INST] How many? [/INST]")
    marked = [part.partition("⟧")[0].strip() for part in shown.split("⟦")[1:]]
    assert marked == ["Two of them.", "2"]
