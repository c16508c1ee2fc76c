"""Tokenizers: text comes back as it was, streamed or not, with the libraries' ids."""

import base64
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from transformers import AutoTokenizer

from llamapro.conversion.add_tokens import check_tokens
from llamapro.errors import ConfigError, DataError
from llamapro.text.streaming import StreamingDecoder
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import LLAMA_3_PATTERN, LLAMA_3_RANKS

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  leading spaces and  double ones ",
    "def f(x):\n\treturn {\n        'a': x,\n    }\n\n\n",
    "CRLF\r\nlines\r\n\rand a lone one",
    "é 日本語 😀👩‍👩‍👧 ﷽ \x00 \u200b end",
    "<s> </s> <unk> <0x0A> 1234567890",
    "<|begin_of_text|> I'LL don't <|eot_id|>",
    b"\xff broken \xf0\x9f bytes".decode(errors="replace"),
    " " * 700 + "x" + "\n" * 300,
]
LLAMA_3 = "tokenizers/llama-3/tokenizer.model in LLAMAPRO_SHARED"
NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, train_tokenizer: Callable[..., bytes]
) -> Tokenizer:
    """A tokenizer of our own making, from this file's text."""
    file = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    file.write_bytes(train_tokenizer([Path(__file__).read_text(encoding="utf-8")], 400))
    return Tokenizer.load(file)


@pytest.fixture(scope="module")
def byte_level(train_byte_level: Callable[..., tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    """Llama 3's kind of tokenizer, with a word that is added too."""
    made = train_byte_level(Path(__file__), 600, NAMES)
    made.add_tokens(["<tool>"])
    made.enable_truncation(5)  # of the library's own making: must not reach a corpus
    return made


@pytest.fixture(scope="module")
def json_directory(
    tmp_path_factory: pytest.TempPathFactory, byte_level: tokenizers.Tokenizer
) -> Path:
    """The small byte-level tokenizer as Hugging Face's files."""
    path = tmp_path_factory.mktemp("json")
    byte_level.save(str(path / "tokenizer.json"))
    config = {"bos_token": {"content": NAMES[0], "__type": "AddedToken"}, "eos_token": NAMES[2]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_ranks(path: Path, byte_level: tokenizers.Tokenizer) -> Path:
    """Writes the vocabulary of a byte-level tokenizer the way Meta does."""
    to_bytes = Tokenizer.load(path).bytes_of
    count = byte_level.get_vocab_size(with_added_tokens=False)
    lines = [base64.b64encode(to_bytes(i)) + b" %d\n" % i for i in range(count)]
    target = path.parent / "ranks" / "tokenizer.model"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(b"".join(lines))
    return target


@pytest.fixture(scope="module")
def ranks_file(json_directory: Path, byte_level: tokenizers.Tokenizer) -> Path:
    """The small byte-level tokenizer as BPE ranks."""
    return write_ranks(json_directory, byte_level)


@pytest.fixture(scope="module", params=["sentencepiece", "trained", "ranks", "json", "llama_3"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each kind, real ones where they are at hand."""
    fixture = {"ranks": "ranks_file", "json": "json_directory", "sentencepiece": "real"}
    made = request.getfixturevalue(fixture.get(request.param, request.param))
    if made is None:
        pytest.skip(f"needs {LLAMA_3}; the small tokenizer of its kind is tested")
    return made if isinstance(made, Tokenizer) else Tokenizer.load(made)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(each: Tokenizer, text: str) -> None:
    """Encoding loses nothing, and BOS and EOS add no text."""
    assert each.decode(each.encode(text)) == text
    assert each.decode(each.encode(text, bos=True, eos=True)) == text


def test_bos_and_eos_frame_the_tokens(each: Tokenizer) -> None:
    """`bos` and `eos` add exactly the model's ids, and names of control tokens are only text."""
    plain = each.encode("hello")
    prefix = [] if each.path.suffix == ".json" else [each.bos_id]  # that file adds none
    assert each.encode("hello", bos=True, eos=True) == [*prefix, *plain, each.eos_id]
    controls = set(each.special_tokens.values())
    assert {each.bos_id, each.eos_id} <= controls
    assert not controls & set(each.encode("hello".join(each.special_tokens)))


def test_names_of_control_tokens_stand_for_them_if_asked(each: Tokenizer) -> None:
    """`special=True` gives their ids wherever they stand, the same text between them."""
    names = list(each.special_tokens)
    ids = each.encode(names[0] + names[-1] + "a b" + names[1] + "c\n", special=True)
    found = [i for i in ids if i in each.special_tokens.values()]
    assert found == [each.special_tokens[name] for name in (names[0], names[-1], names[1])]
    assert ids[:2] == found[:2]
    assert each.decode(ids).lstrip() == "a bc\n"


def test_a_continuation_has_no_space_before_it(each: Tokenizer) -> None:
    """The pieces of a document, cut before a line's first character, have the document's ids."""
    lines = ["def f(x):\n", "    return x\n", "日本語\n", "\t# tab, and <s>\n", "end"]
    ids = each.encode(lines[0])
    for line in lines[1:]:
        ids += each.encode(line, continues=True)
    assert ids == each.encode("".join(lines))
    assert each.encode("", continues=True) == []


def test_ids_past_the_vocabulary_give_no_text(real: Tokenizer) -> None:
    """A padded model's extra ids are ignored instead of failing in the middle of a generation."""
    ids = real.encode("hello")
    assert real.decode([*ids, real.vocab_size, -1]) == "hello"
    assert StreamingDecoder(real, ids).feed(real.vocab_size + 3) == ""


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_continues_the_prompt(each: Tokenizer, text: str) -> None:
    """Any split of a text into prompt and continuation gives the same characters, none broken."""
    ids = each.encode(text, bos=True, eos=True)
    for at in range(0, len(ids) + 1, 1 + len(ids) // 50):
        whole, decoder = StreamingDecoder(each), StreamingDecoder(each, ids[:at])
        of_prompt = "".join(whole.feed(i) for i in ids[:at])
        texts = [decoder.feed(i) for i in ids[at:]]
        assert of_prompt + "".join(texts) == text
        assert decoder.flush() == ""
        assert "\ufffd" in text or not any("\ufffd" in part for part in texts)


def test_decoded_text_of_any_ids_is_the_library_s(real: Tokenizer) -> None:
    """Control ids and characters in bytes included; streaming equals decoding everything."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(real.path))
    rng = random.Random(0)
    parts = [byte_id(real, b) for b in "é😀\ufffd".encode()]
    spaces = [*real.encode(" "), *real.encode("  "), *real.encode("   a")]
    # Of a text's first space, encoding makes no byte: there it is not taken for one put before.
    every = set(range(1, real.vocab_size)) - {byte_id(real, 0x20)}
    pools = [parts, spaces, [1, 2], sorted(every)]
    for _ in range(2000):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(12))]
        decoder = StreamingDecoder(real)
        assert "".join([*map(decoder.feed, ids), decoder.flush()]) == real.decode(ids), ids
        # Broken characters are counted differently: there U+FFFD is for a byte.
        text, expected = real.decode(ids), reference.decode(ids)
        assert text == expected or "\ufffd" in expected, ids


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """The byte-fallback token of a byte."""
    name = f"<0x{byte:02X}>"
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).piece_to_id(name)


def test_broken_bytes_are_told_at_the_end(real: Tokenizer) -> None:
    """An unfinished character is held back until it is certain that it stays unfinished."""
    ids = [byte_id(real, b) for b in b"\xf0\x9f"]
    decoder = StreamingDecoder(real, real.encode("a"))
    assert [decoder.feed(i) for i in ids] == ["", ""]
    assert decoder.flush() == "\ufffd"


def test_half_a_surrogate_pair_is_refused(real: Tokenizer) -> None:
    """Text that UTF-8 cannot encode is the user's mistake, not a crash."""
    with pytest.raises(DataError, match="not valid Unicode"):
        real.encode("a\udcff")


def test_directory_and_file_load_the_same(tokenizer_file: Path) -> None:
    """A checkpoint directory stands for the tokenizer.model in it."""
    by_file, by_directory = Tokenizer.load(tokenizer_file), Tokenizer.load(tokenizer_file.parent)
    assert by_file.fingerprint == by_directory.fingerprint
    assert by_directory.path == tokenizer_file


def test_ids_are_the_reference_library_s(
    real: Tokenizer, ranks_file: Path, json_directory: Path
) -> None:
    """The reference is sentencepiece, or transformers for tokenizer.json and ranks."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(real.path))
    hf = AutoTokenizer.from_pretrained(json_directory)
    of_json, of_ranks = Tokenizer.load(json_directory), Tokenizer.load(ranks_file)
    for text in TEXTS:
        assert real.encode(text) == reference.encode(text)
        plain = hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert of_json.encode(text) == of_ranks.encode(text) == plain
        special = hf.encode(text, add_special_tokens=False)
        assert of_json.encode(text, special=True) == special


def test_llama_3_is_as_meta_released_it(llama_3: Tokenizer | None) -> None:
    """Control tokens have the published ids, and text those of tiktoken with Meta's settings."""
    if llama_3 is None:
        pytest.skip(f"needs {LLAMA_3}")
    tokenizer = llama_3
    published = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_247|>": 128255,
    }
    assert published.items() <= tokenizer.special_tokens.items()
    assert (tokenizer.vocab_size, len(tokenizer.special_tokens)) == (128256, 256)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128000, 128001)
    lines = [line.split() for line in tokenizer.path.read_bytes().splitlines()]
    meta = tiktoken.Encoding(
        "llama-3",
        pat_str=LLAMA_3_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=tokenizer.special_tokens,
    )
    assert len(lines) == LLAMA_3_RANKS
    for text in [*TEXTS, "".join(TEXTS)]:
        assert tokenizer.encode(text) == meta.encode_ordinary(text)
        assert tokenizer.encode(text, special=True) == meta.encode(text, allowed_special="all")


def test_runs_of_any_length_are_encoded(ranks_file: Path) -> None:
    """A million spaces would crash tiktoken; text is cut every 25,000 characters, as Meta does."""
    tokenizer = Tokenizer.load(ranks_file)
    for character, runs in ((" ", 40), ("a", 3)):
        run = character * 25_000
        ids = tokenizer.encode(run)
        assert tokenizer.decode(ids) == run
        assert tokenizer.encode(run * runs) == ids * runs
    word = "return" * 4168  # 8 letters more; the cut is inside the word
    for start in (0, 1, 12_499, 12_500, 12_501, 24_999):
        before = "x\n" * start + word[:25_000]
        whole = tokenizer.encode("x\n" * start + word + " y")
        assert whole == tokenizer.encode(before) + tokenizer.encode(word[25_000:] + " y")


def test_word_piece_is_refused(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    """A tokenizer.json whose tokens are not bytes of text is of no LLaMA."""
    raw = json.loads(byte_level.to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##"}}
    raw["decoder"]["cleanup"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"its decoder is \['WordPiece'\]"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("fixture", "library"), [("ranks_file", "tiktoken"), ("json_directory", "tokenizers")]
)
def test_missing_library_is_told_with_its_extra(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixture: str, library: str
) -> None:
    """sentencepiece is enough for most; for the others the message says what to install."""
    path = request.getfixturevalue(fixture)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=rf"{library}: pip install -e '\.\[tokenizers\]'"):
        Tokenizer.load(path)


def test_a_missing_library_is_not_called_damaged_files(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every installation has sentencepiece; a broken one has to say so itself."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="sentencepiece"):
        Tokenizer.load(tokenizer_file)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """The message says that the path does not exist."""
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


def test_a_pad_token_without_a_row_is_named_and_refused_only_where_it_is_used(
    trained: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files often add a token for padding that the model never sees; a frame token needs a row."""
    rows = trained.vocab_size
    shutil.copyfile(trained.path, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": rows}))
    config = {"pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.check_fits(rows, "the model")
    assert f"<pad> ({rows}): no row in the model" in capsys.readouterr().err
    assert tokenizer.encode("a <pad>") == trained.encode("a <pad>")
    with pytest.raises(
        DataError, match=rf"names '<pad>', token {rows}, for which the model has no"
    ):
        tokenizer.encode("a <pad>", special=True)
    with pytest.raises(ConfigError, match=rf"token {rows} without a row"):
        check_tokens(tmp_path, ["<new>"], rows)
    (tmp_path / "tokenizer_config.json").unlink()  # now it is an ordinary word
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.check_fits(rows, "the model")
    with pytest.raises(
        DataError, match=rf"names '<pad>', token {rows}, for which the model has no"
    ):
        tokenizer.encode("a <pad>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    with pytest.raises(
        DataError, match="another vocabulary, or with added tokens that have no row"
    ):
        Tokenizer.load(tmp_path).check_fits(rows, "the model")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_a_tokenizer_s_place_is_named(
    name: str, trained: Tokenizer, tmp_path: Path
) -> None:
    """A clone without git-lfs."""
    shutil.copyfile(trained.path, tmp_path / "tokenizer.model")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    with pytest.raises(DataError, match=rf"{name}: a git-lfs pointer, not the file"):
        Tokenizer.load(tmp_path)
