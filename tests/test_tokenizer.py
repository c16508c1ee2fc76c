"""Tokenizers: text comes back as it was, streamed or not, and wrong files are refused by name."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro.config import DataError
from llamapro.tokenizer import StreamingDecoder, Tokenizer, train

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  leading spaces and  double ones ",
    "def f(x):\n\treturn {\n        'a': x,\n    }\n\n\n",
    "CRLF\r\nlines\r\n\rand a lone one",
    "é 日本語 😀👩‍👩‍👧 ﷽ \x00 \u200b end",
    "<s> </s> <unk> <0x0A> 1234567890",
]
LLAMA_3_RANKS = b"IQ== 0\nIg== 1\nIw== 2\n"


@pytest.fixture(scope="module")
def real(shared: Path, tokenizer_file: Path) -> Tokenizer:
    """Llama 2's tokenizer where it is at hand, else the small one."""
    file = shared / "tokenizers" / "llama-2" / "tokenizer.model"
    return Tokenizer.load(file if file.exists() else tokenizer_file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of our own making, from this file's text."""
    file = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    file.write_bytes(train([Path(__file__).read_text(encoding="utf-8")], 400))
    return Tokenizer.load(file)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(real: Tokenizer, trained: Tokenizer, text: str) -> None:
    """Encoding loses nothing, and BOS and EOS add no text."""
    for tokenizer in (real, trained):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_bos_and_eos_frame_the_tokens(real: Tokenizer) -> None:
    """`bos` and `eos` add exactly the model's ids, and their names in text are only text."""
    plain = real.encode("hello")
    assert real.encode("hello", bos=True, eos=True) == [real.bos_id, *plain, real.eos_id]
    assert not {real.bos_id, real.eos_id} & set(real.encode("<s>hello</s>"))


def test_ids_past_the_vocabulary_give_no_text(real: Tokenizer) -> None:
    """A padded model's extra ids are ignored instead of failing in the middle of a generation."""
    ids = real.encode("hello")
    assert real.decode([*ids, real.vocab_size, -1]) == "hello"
    assert StreamingDecoder(real, ids).feed(real.vocab_size + 3) == ""


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_continues_the_prompt(real: Tokenizer, trained: Tokenizer, text: str) -> None:
    """Any split of a text into prompt and continuation gives the same characters, none broken."""
    for tokenizer in (real, trained):
        ids = tokenizer.encode(text, bos=True, eos=True)
        for at in range(len(ids) + 1):
            whole, decoder = StreamingDecoder(tokenizer), StreamingDecoder(tokenizer, ids[:at])
            of_prompt = "".join(whole.feed(i) for i in ids[:at])
            texts = [decoder.feed(i) for i in ids[at:]]
            assert of_prompt + "".join(texts) == text
            assert decoder.flush() == ""
            assert not any("\ufffd" in part for part in texts)


def test_streamed_text_is_the_decoded_text_of_any_ids(real: Tokenizer) -> None:
    """Broken characters, control and unknown ids included: streaming equals decoding everything."""
    rng = random.Random(0)
    of_bytes = {real.byte_of(i): i for i in range(real.vocab_size)}
    parts = [of_bytes[b] for b in "é😀\ufffd".encode()]
    spaces = [*real.encode(" "), *real.encode("  "), *real.encode("   a")]
    pools = [parts, spaces, [0, 1, 2], range(real.vocab_size)]
    for _ in range(2000):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(12))]
        decoder = StreamingDecoder(real)
        assert "".join([*map(decoder.feed, ids), decoder.flush()]) == real.decode(ids), ids


def test_broken_bytes_are_told_at_the_end(real: Tokenizer) -> None:
    """An unfinished character is held back until it is certain that it stays unfinished."""
    ids = [next(i for i in range(real.vocab_size) if real.byte_of(i) == b) for b in b"\xf0\x9f"]
    decoder = StreamingDecoder(real, real.encode("a"))
    assert [decoder.feed(i) for i in ids] == ["", ""]
    assert decoder.flush() == "\ufffd\ufffd"


def test_half_a_surrogate_pair_is_refused(real: Tokenizer) -> None:
    """Text that UTF-8 cannot encode is the user's mistake, not a crash."""
    with pytest.raises(DataError, match="not valid Unicode"):
        real.encode("a\udcff")


def test_directory_and_file_load_the_same(tokenizer_file: Path) -> None:
    """A checkpoint directory stands for the tokenizer.model in it."""
    by_file, by_directory = Tokenizer.load(tokenizer_file), Tokenizer.load(tokenizer_file.parent)
    assert by_file.fingerprint == by_directory.fingerprint
    assert by_directory.path == tokenizer_file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", LLAMA_3_RANKS, r"BPE ranks \(Llama 3\), not sentencepiece"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("tokenizer.model", b"version https://git-lfs", "not a sentencepiece model"),
        ("tokenizer.json", b"{}", "no tokenizer.model .*tokenizer.json, which is not read"),
        ("other", b"", "no tokenizer.model"),
    ],
)
def test_wrong_tokenizer_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """Each kind of wrong file has a message that says what it is."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """A path that is not there is told as such."""
    with pytest.raises(DataError, match=r"nowhere: no such tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")


def test_tokenizer_larger_than_the_model_is_refused(real: Tokenizer) -> None:
    """More tokens than the model has rows is an error; fewer is a padded model."""
    real.check_fits(real.vocab_size, "model")
    real.check_fits(real.vocab_size + 64, "model")
    with pytest.raises(DataError, match="another vocabulary") as error:
        real.check_fits(105, "some/model")
    for part in (str(real.path), "some/model", f"{real.vocab_size:,}", "105"):
        assert part in str(error.value)


def test_training_is_deterministic_and_of_the_size_asked(trained: Tokenizer) -> None:
    """The same text gives the same bytes, with Llama 2's special tokens."""
    assert train([Path(__file__).read_text(encoding="utf-8")], 400) == trained.path.read_bytes()
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (400, 1, 2)


def test_training_drops_no_long_lines(tmp_path: Path) -> None:
    """Lines longer than sentencepiece's limits, or with U+2585, shape the vocabulary too."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(train(["ox " * 60_000 + "zebra" * 60_000, "\u2585 giraffe" * 20], 285))
    tokenizer = Tokenizer.load(file)
    assert len(tokenizer.encode("zebra" * 100)) < 200
    assert len(tokenizer.encode("giraffe")) < 7


@pytest.mark.parametrize(
    ("texts", "size"), [([], 300), (["\n\n"], 300), (["abc"], 9), (["a"], 999)]
)
def test_impossible_training_is_refused(texts: list[str], size: int) -> None:
    """No text, or a vocabulary too small or too large for it, is told in one message."""
    with pytest.raises(DataError, match=r"no text|too high|smaller"):
        train(texts, size)


def test_command_writes_a_tokenizer_once(tmp_path: Path) -> None:
    """The command writes, prints one JSON object, and refuses to replace without --force."""
    words = [sys.executable, "-m", "llamapro.tokenizer", __file__, "--vocab-size", "400"]
    words += ["--out", str(tmp_path / "new"), "--json"]
    first = subprocess.run(words, capture_output=True, text=True, check=True)
    result = json.loads(first.stdout)
    assert (result["vocab_size"], result["documents"]) == (400, 1)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["tokenizer.model"]
    assert Tokenizer.load(tmp_path / "new").fingerprint == result["fingerprint"]
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 2 and "--force" in second.stderr and not second.stdout
    assert subprocess.run([*words, "--force"], capture_output=True, check=False).returncode == 0
