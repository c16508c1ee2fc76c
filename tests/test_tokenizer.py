"""Tokenizers: text comes back as it was, streamed or not, and wrong files are refused by name."""

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llamapro.config import DataError
from llamapro.tokenizer import LLAMA_3_PATTERN, LLAMA_3_RANKS, StreamingDecoder, Tokenizer
from llamapro.train_tokenizer import train

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
NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


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


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """Llama 3's kind of tokenizer, small: byte-level BPE, cut by its pattern, control tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_PATTERN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    made.add_special_tokens(NAMES)
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


@pytest.fixture(scope="module", params=["sentencepiece", "trained", "ranks", "json", "llama-3"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each kind, real ones where they are at hand."""
    if request.param == "llama-3":
        file = request.getfixturevalue("shared") / "tokenizers" / "llama-3" / "tokenizer.model"
        if not file.exists():
            pytest.skip("Llama 3's tokenizer is not here; the small one of its kind is tested")
        return Tokenizer.load(file)
    fixture = {"ranks": "ranks_file", "json": "json_directory", "sentencepiece": "real"}
    made = request.getfixturevalue(fixture.get(request.param, request.param))
    return made if isinstance(made, Tokenizer) else Tokenizer.load(made)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(each: Tokenizer, text: str) -> None:
    """Encoding loses nothing, and BOS and EOS add no text."""
    assert each.decode(each.encode(text)) == text
    assert each.decode(each.encode(text, bos=True, eos=True)) == text


def test_bos_and_eos_frame_the_tokens(each: Tokenizer) -> None:
    """`bos` and `eos` add exactly the model's ids, and names of control tokens are only text."""
    plain = each.encode("hello")
    assert each.encode("hello", bos=True, eos=True) == [each.bos_id, *plain, each.eos_id]
    controls = set(each.special_tokens.values())
    assert {each.bos_id, each.eos_id} <= controls
    assert not controls & set(each.encode("hello".join(each.special_tokens)))


def test_names_of_control_tokens_stand_for_them_if_asked(each: Tokenizer) -> None:
    """`special=True` gives their ids wherever they stand, the same text between them."""
    names = list(each.special_tokens)
    ids = each.encode(names[0] + names[-1] + "a b" + names[1] + "c\n", special=True)
    found = [i for i in ids if i in each.special_tokens.values()]
    assert found == [each.token_id(name) for name in (names[0], names[-1], names[1])]
    assert ids[:2] == found[:2]
    assert each.decode(ids).lstrip() == "a bc\n"


def test_unknown_control_token_is_told_with_the_nearest(real: Tokenizer) -> None:
    """A name that the tokenizer does not have is an error, not an id."""
    with pytest.raises(DataError, match=r"no special token '<s'.*did you mean '<s>'"):
        real.token_id("<s")


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
    for at in range(len(ids) + 1):
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


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_reference_library_s(
    real: Tokenizer, ranks_file: Path, json_directory: Path, text: str
) -> None:
    """Those of sentencepiece, of transformers for tokenizer.json, and for ranks of both."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(real.path))
    assert real.encode(text) == reference.encode(text)
    hf = AutoTokenizer.from_pretrained(json_directory)
    of_json, of_ranks = Tokenizer.load(json_directory), Tokenizer.load(ranks_file)
    plain = hf.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert of_json.encode(text) == of_ranks.encode(text) == plain
    special = hf.encode(text, add_special_tokens=False)
    assert of_json.encode(text, special=True) == special


def test_llama_3_is_as_meta_released_it(shared: Path) -> None:
    """Control tokens have the published ids, and text those of tiktoken with Meta's settings."""
    file = shared / "tokenizers" / "llama-3" / "tokenizer.model"
    if not file.exists():
        pytest.skip("Llama 3's tokenizer is not here")
    tokenizer = Tokenizer.load(file.parent)
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
    lines = [line.split() for line in file.read_bytes().splitlines()]
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
    """A million spaces, of which tiktoken dies; cut every 25,000 characters, as Meta does."""
    tokenizer = Tokenizer.load(ranks_file)
    for character in (" ", "a"):
        text = character * 1_000_000
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text[:25_000]) * 40


def copy_of(source: Path, target: Path, **files: Any) -> Path:
    """Copies a tokenizer into a directory, beside JSON files (`name=content`, .json left out)."""
    target.mkdir(exist_ok=True)
    shutil.copy(source, target / source.name)
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


def test_added_tokens_and_frame_are_the_checkpoint_s(tmp_path: Path, tokenizer_file: Path) -> None:
    """Tokens, BOS and EOS that the files beside the vocabulary name; each changes fingerprints."""
    plain = Tokenizer.load(tokenizer_file)
    assert plain.fingerprint == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    config = {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "400": {"content": "<|im_end|>", "special": True},
            "402": {"content": "<tool>", "special": False},
        },
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>"},
    }
    added = {"<pad>": 401, "word": 403}
    path = copy_of(
        tokenizer_file,
        tmp_path / "a",
        tokenizer_config=config,
        added_tokens=added,
        special_tokens_map={"pad_token": "<pad>"},
    )
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 400, 404)
    assert tokenizer.token_id("<pad>") == 401 and "word" not in tokenizer.special_tokens
    # Words are found in any text, control tokens where they are asked for.
    for special in (False, True):
        ids = tokenizer.encode("a word<pad> b<tool>", special=special)
        assert (401 in ids) == special and {402, 403} <= set(ids)
    assert tokenizer.decode(ids) == "a word b<tool>"
    assert [file.name for file in tokenizer.files] == [
        "tokenizer.model",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ]
    others = [
        {"tokenizer_config": {"eos_token": "<s>"}},
        {"tokenizer_config": {"bos_token": None}},
        {"added_tokens": {"<pad>": 400}},
        {"added_tokens": {"<pad>": 401}},
    ]
    prints = [
        Tokenizer.load(copy_of(tokenizer_file, tmp_path / f"f{i}", **files)).fingerprint
        for i, files in enumerate(others)
    ]
    assert len({*prints, tokenizer.fingerprint, plain.fingerprint}) == 6
    # What says nothing new changes nothing: stores of tokens stay valid.
    same = {"bos_token": "<s>", "chat_template": "x", "added_tokens_decoder": {}}
    same["added_tokens_decoder"] = {str(i): config["added_tokens_decoder"]["1"] for i in (1,)}
    path = copy_of(tokenizer_file, tmp_path / "same", tokenizer_config=same)
    assert Tokenizer.load(path).fingerprint == plain.fingerprint


def test_added_tokens_are_found_as_their_files_say(tmp_path: Path, tokenizer_file: Path) -> None:
    """The longest first, with the white space they take; a reserved one goes by its new name."""
    listed = {
        "1": {"content": "<bos>", "special": True},
        "400": {"content": "<x>", "special": True, "lstrip": True, "rstrip": True},
        "401": {"content": "<x>y", "special": True},
    }
    config = {"added_tokens_decoder": listed, "bos_token": "<bos>"}
    tokenizer = Tokenizer.load(copy_of(tokenizer_file, tmp_path, tokenizer_config=config))
    assert tokenizer.bos_id == 1 and "<s>" not in tokenizer.special_tokens
    ids = tokenizer.encode("a <x>\n b<x>y <bos>", special=True)
    space = tokenizer.encode(" ", continues=True)
    b = tokenizer.encode("b", continues=True)
    assert ids == [*tokenizer.encode("a"), 400, *b, 401, *space, 1]


def test_space_after_control_tokens_is_the_checkpoint_s(tmp_path: Path, real: Tokenizer) -> None:
    """None unless "legacy" says so: the same ids as transformers', whose switch it is."""
    text = "<s>[INST] hi</s>a b</s>\n c"
    for legacy in (False, True):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        path = copy_of(real.path, tmp_path / str(legacy), tokenizer_config=config)
        expected = AutoTokenizer.from_pretrained(path).encode(text, add_special_tokens=False)
        assert Tokenizer.load(path).encode(text, special=True) == expected


def sentencepiece_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json of a sentencepiece model's tokens, with Llama 2's components."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(made.to_str())


def test_sentencepiece_comes_before_tokenizer_json(tmp_path: Path, real: Tokenizer) -> None:
    """Of both, if they agree: its ids; the other's added tokens and its spaces."""
    raw = sentencepiece_json(real)
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": real.vocab_size, "content": "<x>"})
    tokenizer = Tokenizer.load(copy_of(real.path, tmp_path, tokenizer=raw))
    assert tokenizer.path.name == "tokenizer.model"
    assert tokenizer.encode("x  y") == real.encode("x  y")
    assert tokenizer.token_id("<x>") == real.vocab_size
    assert tokenizer.encode("<s>[", special=True)[1:] == real.encode("[")
    # Alone it is read with its library, which has no merges here: characters.
    (tmp_path / "tokenizer.model").unlink()
    alone = Tokenizer.load(tmp_path)
    assert alone.path.name == "tokenizer.json" and alone.adds_space
    assert (alone.bos_id, alone.eos_id) == (1, 2)
    assert alone.decode(alone.encode(" a é😀")) == " a é😀"


def test_files_that_contradict_each_other_are_refused(tmp_path: Path, real: Tokenizer) -> None:
    """Two vocabularies, two ids for a name, a BOS that does not exist: the files are named."""
    raw = sentencepiece_json(real)
    vocab = raw["model"]["vocab"]
    names = list(vocab)
    vocab[names[300]], vocab[names[301]] = vocab[names[301]], vocab[names[300]]
    two_ids = {"added_tokens": {"<x>": 9}, "tokenizer_config": {"added_tokens_decoder": {}}}
    two_ids["tokenizer_config"]["added_tokens_decoder"] = {"8": {"content": "<x>"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": raw}, r"tokenizer\.json are of different vocabularies"),
        (two_ids, r"added_tokens\.json: '<x>' is token 9, but .* says 8"),
        ({"tokenizer_config": {"bos_token": "<bos>"}}, "bos_token is '<bos>', which is no token"),
        ({"tokenizer_config": [1]}, "tokenizer_config.json: expected a JSON object, found list"),
        ({"added_tokens": {"<x>": "one"}}, r"added_tokens\.json: added token .*'one'"),
    ]
    for number, (files, message) in enumerate(cases):
        path = copy_of(real.path, tmp_path / str(number), **files)
        with pytest.raises(DataError, match=message) as error:
            Tokenizer.load(path)
        assert str(path) in str(error.value)


def rank_lines(count: int, skip: int = -1) -> bytes:
    """Ranks of all bytes but one, then of pairs."""
    tokens = [bytes([b]) for b in range(256) if b != skip]
    tokens += [bytes(divmod(i, 256)) for i in range(count - len(tokens))]
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", rank_lines(300, skip=65), "lack 1 of the 256 bytes"),
        ("tokenizer.model", rank_lines(300) + b"QUJD 1000\n", "or some ranks; damaged"),
        ("tokenizer.model", rank_lines(300) + b"QUJD", r"tokenizer.model:301: not a token and"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("tokenizer.model", b"version https://git-lfs", "not a sentencepiece model"),
        ("tokenizer.json", b"{}", "not a tokenizer of the tokenizers library"),
        ("tokenizer.json", b"{", "not a JSON file"),
        ("other", b"", "no tokenizer.model or tokenizer.json"),
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


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    """More than Llama 3's are cut by another pattern, which the file does not hold."""
    tokens = [i.to_bytes(3, "big").lstrip(b"\0") or b"\0" for i in range(LLAMA_3_RANKS + 1)]
    lines = (base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(DataError, match="128,001 BPE ranks, Llama 3 has 128,000"):
        Tokenizer.load(tmp_path)


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
    with pytest.raises(DataError, match=rf"{library}: pip install 'llamapro\[tokenizers\]'"):
        Tokenizer.load(path)


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
