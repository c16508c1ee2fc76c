"""Replay: what the base inside writes, and what it writes from."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError
from llamapro.inference.sampling import generate
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.replay import (
    Opening,
    read_openings,
    rows_at_a_time,
    write_documents,
    written_by_base,
)
from llamapro.training.settings import ReplaySettings

LENGTH, TOKENS = 24, 201
CPU = torch.device("cpu")
SETTINGS = ReplaySettings(share=0.25, tokens=TOKENS, batch_size=4)


@pytest.fixture(scope="module")
def home(replay_home: Path) -> Path:
    """Two bases, their expansions, the first also with an added token; a corpus."""
    return replay_home


@pytest.fixture
def write(home: Path, tmp_path: Path) -> Callable[..., TokenStore]:
    """`write(name="pro0", cache=..., **settings)`: the store of what its base writes."""

    def write(name: str = "pro0", cache: str = "cache", **changes: Any) -> TokenStore:
        checkpoint, settings = Checkpoint.open(home / name), replace(SETTINGS, **changes)
        where = (tmp_path / cache, torch.float32, CPU)
        return written_by_base(checkpoint, Tokenizer.load(home / name), settings, LENGTH, *where)

    return write


def contents(store: TokenStore) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.path.iterdir()}


def documents(store: TokenStore, bos: int = 1) -> list[list[int]]:
    ids = store.read(0, store.tokens)
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == bos)) if part.size]


# ---- What the base writes ------------------------------------------------------------------------


def test_the_same_base_and_seed_write_the_same_bytes(write: Callable[..., TokenStore]) -> None:
    """Each time it is written; another seed or temperature writes something else."""
    first, again = write(cache="a"), write(cache="b")
    assert contents(first) == contents(again) and first.tokens == TOKENS
    for changes in ({"seed": 1}, {"temperature": 0.5}, {"batch_size": 3}):
        other = write(cache="a", **changes)
        assert other.path != first.path and other.sha256 != first.sha256


def test_another_base_has_text_of_its_own(
    write: Callable[..., TokenStore], home: Path, tmp_path: Path
) -> None:
    """The key follows the base's weights; what is trained on top of them makes no difference."""
    first, other = write(), write("pro1")
    assert first.path != other.path and first.sha256 != other.sha256
    grown = write("grown", cache="grown")
    assert grown.sha256 == first.sha256


def test_what_is_in_the_cache_is_not_written_again(
    write: Callable[..., TokenStore],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is compared with its hashes; damage is told."""
    store = write()
    monkeypatch.setattr(Checkpoint, "load", None)
    assert write().sha256 == store.sha256 and "from the cache" in capsys.readouterr().err
    file = store.path / "shard-00000.bin"
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="damaged"):
        write()


def test_the_text_is_a_sample_of_the_bases_distribution(
    write: Callable[..., TokenStore], home: Path
) -> None:
    """Its loss under the base is the base's entropy there, up to noise; another base's is not."""
    batch = np.stack([d for d in documents(write(tokens=2400)) if len(d) == LENGTH])
    ids = torch.from_numpy(batch)  # (N, T)
    found = {}
    for name in ("base0", "base1"):
        with torch.inference_mode():
            log_p = Checkpoint.open(home / name).load()(ids)[:, :-1].double().log_softmax(-1)
        surprise = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        excess = surprise - entropy
        # Each draw's surprise has the entropy as its mean: four standard deviations of the mean.
        found[name] = excess.mean() / (4 * excess.std() / excess.numel() ** 0.5)
    assert found["base0"].abs() < 1 < found["base1"]


def test_documents_begin_with_bos_and_end_where_the_base_ends_them(home: Path) -> None:
    """With the first of the ends, or at the length; nothing after an end is kept."""
    base = Checkpoint.open(home / "base0").load()
    ends = set(range(100, 150))
    written: Iterator[list[int]] = write_documents(base, [Opening([1])], ends, LENGTH, SETTINGS)
    some = [next(written) for _ in range(40)]
    for ids in some:
        assert ids[0] == 1 and not ends & set(ids[:-1])
        assert len(ids) == LENGTH or ids[-1] in ends
    whole = [tuple(ids) for ids in some if len(ids) == LENGTH]
    assert 0 < len(whole) < 40 and len(set(whole)) == len(whole)


def test_a_document_is_what_the_base_writes_alone(home: Path) -> None:
    """Though its row of the batch, and of the cache, held others before it; they come in order."""
    base = Checkpoint.open(home / "base0").load()
    openings = [Opening([1, i]) for i in range(150, 160)]
    ends = set(range(0, 400, 9))  # so that documents have very different lengths
    settings = replace(SETTINGS, temperature=0.0)
    draw = random.Random(settings.seed)
    lengths = set()
    for ids in islice(write_documents(base, openings, ends, LENGTH, settings), 60):
        expected = [*draw.choice(openings).ids]
        for (token,) in generate(base, torch.tensor([expected]), LENGTH - 2):
            expected.append(int(token))
            if expected[-1] in ends:
                break
        assert ids == expected
        lengths.add(len(ids))
    assert len(lengths) > 3


def test_a_chat_has_the_message_and_the_answer_of_the_base(home: Path, tmp_path: Path) -> None:
    """The first end closes the user's message; the header of the answer follows, and a second."""
    shutil.copytree(home / "pro0", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer, ends = Tokenizer.load(tmp_path / "chat"), {2}
    text, chat = read_openings("", tmp_path / "chat", tokenizer, ends, LENGTH)
    assert text == Opening([1])
    assert chat.ids == tokenizer.encode("<s>user: ", special=True)
    assert chat.then == tokenizer.encode("</s>assistant: ", special=True) and chat.then[0] == 2
    base = Checkpoint.open(home / "base0").load()
    base.lm_head.weight.data[2] *= 20  # ends come soon
    header, then, ended = list(chat.ids), list(chat.then), 0
    for ids in islice(write_documents(base, [chat], ends, 60, SETTINGS), 20):
        assert ids[: len(header)] == header
        at = ids.index(2) if 2 in ids else len(ids)
        assert ids[at : at + len(then)] == then[: len(ids) - at]
        rest = ids[at + len(then) :]
        assert 2 not in rest[:-1]
        ended += rest[-1:] == [2]
    assert ended > 5
    assert read_openings("", tmp_path / "chat", tokenizer, ends, len(header) + len(then)) == [text]
    (tmp_path / "prompts.txt").write_text("What is it?\n")
    (asked,) = read_openings(str(tmp_path / "prompts.txt"), tmp_path / "chat", tokenizer, ends, 60)
    assert tokenizer.decode(asked.ids).endswith("user: What is it?assistant: ")


@pytest.mark.parametrize(
    ("template", "header"),
    [
        ("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}", "2024-07-26 "),
        ("no message", "no message"),
    ],
)
def test_any_template_opens_a_chat(template: str, header: str, home: Path, tmp_path: Path) -> None:
    """One with today's date opens it alike on every day, or a resumed run would be refused."""
    shutil.copytree(home / "pro0", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(tmp_path / "chat")
    _, chat = read_openings("", tmp_path / "chat", tokenizer, {2}, 60)
    assert chat == Opening(tokenizer.encode(header, special=True))


def test_writing_stops_when_all_documents_together_are_enough(home: Path) -> None:
    """No row goes on for the sake of another's document; the last ones are as far as they came."""
    base, steps = Checkpoint.open(home / "base0").load(), list[int]()
    base.model.register_forward_pre_hook(lambda *_: steps.append(1))
    ends = set(range(100, 120))
    some = list(write_documents(base, [Opening([1])], ends, LENGTH, SETTINGS, TOKENS))
    assert TOKENS <= sum(map(len, some)) < TOKENS + SETTINGS.batch_size
    assert len(steps) * SETTINGS.batch_size - sum(map(len, some)) <= SETTINGS.batch_size
    unfinished = [ids for ids in some if len(ids) < LENGTH and ids[-1] not in ends]
    assert 0 < len(unfinished) <= SETTINGS.batch_size and min(map(len, some)) > 1
    whole = write_documents(base, [Opening([1])], ends, LENGTH, SETTINGS)
    assert all(ids == next(whole)[: len(ids)] for ids in some)


def test_documents_at_a_time_follow_from_memory_and_need(
    tiny_config: Callable[..., ModelConfig], write: Callable[..., TokenStore]
) -> None:
    """64 at most; for LLaMA-2-7B at 4,096 tokens 4, whose keys and values are 16 GiB."""
    small = tiny_config(num_hidden_layers=2)
    assert [rows_at_a_time(small, 256, n) for n in (100, 256, 5000, 10**6)] == [1, 1, 19, 64]
    llama = tiny_config(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    assert rows_at_a_time(llama, 4096, 10**6) == 4
    assert write(batch_size=0).sha256 == write(batch_size=TOKENS // LENGTH).sha256


def test_no_added_token_is_written(write: Callable[..., TokenStore]) -> None:
    """The base has 400: of 5,000 draws none is past them."""
    ids = write("grown", tokens=5000, batch_size=50).read(0, 5000)
    assert ids.max() < 400 and ids.min() >= 0


def test_without_bos_and_eos_there_is_nothing_to_write_from(home: Path, tmp_path: Path) -> None:
    """The fix is text of the user's."""
    tokenizer = Tokenizer.load(home / "pro0")
    tokenizer.bos_id = tokenizer.eos_id = None
    tokenizer.prefix = []
    with pytest.raises(ConfigError, match=r"no BOS or EOS that.*replay\.data"):
        where = (LENGTH, tmp_path, torch.float32, CPU)
        written_by_base(Checkpoint.open(home / "pro0"), tokenizer, SETTINGS, *where)


# ---- Prompts -------------------------------------------------------------------------------------


def test_documents_begin_with_the_prompts(
    write: Callable[..., TokenStore], home: Path, tmp_path: Path
) -> None:
    """Each with BOS and a line of the file, of any length; all of them come, in any order."""
    file = tmp_path / "prompts.txt"
    file.write_text("The\n\nIt was the best of\ndef usage(\n")
    tokenizer = Tokenizer.load(home / "pro0")
    openings = read_openings(str(file), home / "pro0", tokenizer, {2}, LENGTH)
    prompts = [
        tokenizer.encode(line, bos=True) for line in ("The", "It was the best of", "def usage(")
    ]
    assert openings == [Opening(ids) for ids in prompts]
    base = Checkpoint.open(home / "base0").load()
    written = islice(write_documents(base, openings, set(), LENGTH, SETTINGS), 40)
    begun = [[p for p in prompts if document[: len(p)] == p] for document in written]
    assert all(begun) and {str(found) for found in begun} == {str([p]) for p in prompts}
    first, again = (write(prompts=str(file), cache=cache) for cache in ("a", "b"))
    assert first.sha256 == again.sha256
    file.write_text("Other\n")
    assert write(prompts=str(file), cache="a").path != first.path  # not the old one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"prompts\.txt: cannot be read as text"),
        (b"\n \n", r"prompts\.txt: has no line of text to use as a prompt"),
        (
            b"The\n" + b"word " * 40,
            rf"prompts\.txt:2: a prompt of \d+ tokens, not under data.seq_len {LENGTH}",
        ),
        (b"\xff\xfe", r"prompts\.txt: cannot be read as text"),
    ],
)
def test_prompts_that_cannot_be_used_are_told(
    text: bytes | None, message: str, write: Callable[..., TokenStore], tmp_path: Path
) -> None:
    """By file and line; nothing is written."""
    if text is not None:
        (tmp_path / "prompts.txt").write_bytes(text)
    with pytest.raises(DataError, match=message):
        write(prompts=str(tmp_path / "prompts.txt"))
    assert not (tmp_path / "cache").exists()
