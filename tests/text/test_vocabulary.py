"""Vocabulary files and what lies beside them: their tokens count, and wrong files are refused."""

import base64
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from llamapro.conversion import companions
from llamapro.conversion.companions import tokenizer_files
from llamapro.errors import DataError
from llamapro.text import vocabulary
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import JSON_NAME


@pytest.fixture(scope="module")
def small(tokenizer_file: Path) -> Tokenizer:
    """A sentencepiece tokenizer of 400 tokens."""
    return Tokenizer.load(tokenizer_file)


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
            "401": {"content": "<pad>", "special": True},
            "402": {"content": "<tool>", "special": False},
            "403": {"content": "word"},
        },
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>"},
    }
    path = copy_of(tokenizer_file, tmp_path / "a", tokenizer_config=config)
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 400, 404)
    assert tokenizer.special_tokens["<pad>"] == 401 and "word" not in tokenizer.special_tokens
    # Words are found in any text, control tokens where they are asked for.
    for special in (False, True):
        ids = tokenizer.encode("a word<pad> b<tool>", special=special)
        assert (401 in ids) == special and {402, 403} <= set(ids)
    assert tokenizer.decode(ids) == "a word b<tool>"
    assert [file.name for file in tokenizer.files] == ["tokenizer.model", "tokenizer_config.json"]
    others = [
        {"tokenizer_config": {"eos_token": "<s>"}},
        {"tokenizer_config": {"bos_token": None}},
        {"added_tokens": {"<pad>": 400}},
        {"added_tokens": {"<pad>": 400, "<pad2>": 401}},
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


def test_space_after_control_tokens_is_the_checkpoint_s(tmp_path: Path, small: Tokenizer) -> None:
    """None unless "legacy" says so: the same ids as transformers', whose switch it is."""
    text = "<s>[INST] hi</s>a b</s>\n c"
    for legacy in (False, True):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        path = copy_of(small.path, tmp_path / str(legacy), tokenizer_config=config)
        expected = AutoTokenizer.from_pretrained(path).encode(text, add_special_tokens=False)
        assert Tokenizer.load(path).encode(text, special=True) == expected


FLAGS = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)


@pytest.mark.parametrize("has_bytes", [True, False])
def test_no_space_is_put_after_control_tokens_whatever_newlines_are(
    tmp_path: Path, small: Tokenizer, has_bytes: bool
) -> None:
    """Two newlines may be a token, or a newline `<unk>`, which takes the next one in."""
    files = tokenizer_files(small.path)
    if has_bytes:
        files["tokenizer.json"]["added_tokens"] += [{"id": 400, "content": "\n\n", **FLAGS}]
    files["tokenizer.json"]["model"]["byte_fallback"] = has_bytes
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    text = "a</s>\n b</s>\n\nc</s>d</s> e\n"
    expected = AutoTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False)
    assert Tokenizer.load(tmp_path).encode(text, special=True) == expected


def test_added_words_are_text_as_the_library_decodes_it(
    tmp_path: Path, byte_level: Callable[..., dict[str, Any]]
) -> None:
    """Their names, and those of pieces, may be of the characters that stand for bytes, or text."""
    raw = byte_level()
    raw["model"]["vocab"] |= {"工": 256}
    names = ["Ġtool", "<tool>", "ÃŁ", "工具"]
    raw["added_tokens"] = [{"id": 257 + i, "content": n, **FLAGS} for i, n in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer, ids = Tokenizer.load(tmp_path), [257, 258, 259, 260, 256]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(ids) == library.decode(ids) == " tool<tool>ß工具工"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw).replace("\\u0120tool", "éé"))
    assert Tokenizer.load(tmp_path).decode([257]) == "éé"  # which would be no characters


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


def test_sentencepiece_comes_before_tokenizer_json(tmp_path: Path, small: Tokenizer) -> None:
    """Its ids count, with the added tokens and spaces of the tokenizer.json that agrees."""
    written = json.dumps(tokenizer_files(small.path)["tokenizer.json"])
    assert '"first"' in written  # the space stands before the text alone; here before each part
    raw = json.loads(written.replace('"first"', '"always"'))
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": small.vocab_size, "content": "<x>"})
    tokenizer = Tokenizer.load(copy_of(small.path, tmp_path, tokenizer=raw))
    assert tokenizer.path.name == "tokenizer.model"
    assert tokenizer.encode("x  y") == small.encode("x  y")
    assert tokenizer.special_tokens["<x>"] == small.vocab_size
    assert tokenizer.encode("<s>[", special=True)[1:] == small.encode("[")
    # Alone it is read with its library.
    (tmp_path / "tokenizer.model").unlink()
    alone = Tokenizer.load(tmp_path)
    assert alone.path.name == "tokenizer.json" and alone.adds_space
    assert (alone.bos_id, alone.eos_id) == (1, 2)
    assert alone.decode(alone.encode(" a é😀")) == " a é😀"


def test_files_that_split_texts_differently_are_said(
    tmp_path: Path, small: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tokens without merges give other ids: those of tokenizer.json, as in transformers 5.

    A file that is named counts itself. With the model's own tokenizer.json nothing is said.
    """
    file = copy_of(small.path, tmp_path, tokenizer=sentencepiece_json(small)) / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(file))
    expected = theirs.encode("Hello world", add_special_tokens=False).ids
    assert Tokenizer.load(tmp_path).encode("Hello world") == expected
    assert expected != small.encode("Hello world")
    said = capsys.readouterr().err
    assert "tokenizer.model and tokenizer.json split 'Hello world' into different tokens" in said
    assert "tokenizer.json is read" in said
    named = Tokenizer.load(tmp_path / "tokenizer.model")
    assert named.encode("Hello world") == small.encode("Hello world")
    assert "tokenizer.model is read" in capsys.readouterr().err
    file.write_text(json.dumps(tokenizer_files(small.path)["tokenizer.json"]))
    Tokenizer.load(tmp_path)
    assert not capsys.readouterr().err


def test_pieces_of_one_score_have_no_tokenizer_json(
    tmp_path: Path,
    small: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_config: Callable[..., Any],
) -> None:
    """Sentencepiece merges the left of two pairs; a tokenizer.json that says otherwise is told.

    Vocabularies that were extended for another language give all new pieces the score 0.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(small.path.read_bytes())
    for piece in ("jz", "zj", "zjzj"):
        proto.pieces.add(piece=piece, score=0.0)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    assert JSON_NAME not in tokenizer_files(file)
    Tokenizer.load(tmp_path)
    assert not capsys.readouterr().err
    (tmp_path / "out").mkdir()
    companions.write_companions(tmp_path / "out", tiny_config(), [file])
    assert "transformers may split some texts differently" in capsys.readouterr().err
    monkeypatch.setattr(companions, "_has_ties", lambda *_: False)
    made = tokenizer_files(file)[JSON_NAME]
    assert len(Tokenizer.load(file).encode("zjzj")) < len(
        tokenizers.Tokenizer.from_str(json.dumps(made)).encode("zjzj").ids
    )
    (tmp_path / JSON_NAME).write_text(json.dumps(made))
    assert Tokenizer.load(tmp_path).path.name == JSON_NAME
    assert "split" in capsys.readouterr().err


def test_files_that_contradict_each_other_are_refused(tmp_path: Path, small: Tokenizer) -> None:
    """Two vocabularies, two ids for a name, a BOS that does not exist: the files are named."""
    raw = sentencepiece_json(small)
    vocab = raw["model"]["vocab"]
    names = list(vocab)
    vocab[names[300]], vocab[names[301]] = vocab[names[301]], vocab[names[300]]
    two_ids = {"added_tokens": {"<x>": 9}, "tokenizer_config": {"added_tokens_decoder": {}}}
    two_ids["tokenizer_config"]["added_tokens_decoder"] = {"8": {"content": "<x>"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": raw}, r"tokenizer\.json are of different vocabularies"),
        (two_ids, r"added_tokens\.json: '<x>' is token 9, but .* says 8"),
        ({"tokenizer_config": {"bos_token": "<bos>"}}, "bos_token is '<bos>', which is no token"),
        ({"tokenizer_config": [1]}, r"tokenizer_config\.json: .*holds no JSON object"),
        ({"added_tokens": {"<x>": "one"}}, r"added_tokens\.json: added token .*'one'"),
    ]
    for number, (files, message) in enumerate(cases):
        path = copy_of(small.path, tmp_path / str(number), **files)
        with pytest.raises(DataError, match=message) as error:
            Tokenizer.load(path)
        assert str(path) in str(error.value)


def rank_lines(count: int, skip: int = -1) -> bytes:
    """Ranks of all bytes but one, then of pairs."""
    tokens = [bytes([b]) for b in range(256) if b != skip]
    tokens += [bytes(divmod(i, 256)) for i in range(count - len(tokens))]
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


# The library cuts two characters off "b", and panics.
PANIC = (
    b'{"decoder": {"type": "ByteFallback"}, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, '
    b'"ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "##"}}'
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", rank_lines(300, skip=65), "lack 1 of the 256 bytes"),
        ("tokenizer.model", rank_lines(300) + b"QUJD 1000\n", "or some ranks; damaged"),
        ("tokenizer.model", rank_lines(300) + b"QUJD", r"tokenizer.model:301: not a token and"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("tokenizer.model", b"version https://git-lfs", "a git-lfs pointer"),
        ("tokenizer.json", b"{}", "not a tokenizer of the tokenizers library"),
        ("tokenizer.json", PANIC, "tokenizer files are damaged .PanicException: slice index"),
        ("tokenizer.json", b"{", r"tokenizer\.json: damaged: JSONDecodeError"),
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


def test_ranks_of_another_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with more ranks than Llama 3 cuts text by a pattern that is not in the file."""
    assert vocabulary.LLAMA_3_RANKS == 128_000
    monkeypatch.setattr(vocabulary, "LLAMA_3_RANKS", 300)
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(301))
    with pytest.raises(DataError, match="301 BPE ranks, Llama 3 has 300: another model's"):
        Tokenizer.load(tmp_path)


def test_user_defined_pieces_may_be_added_tokens_beside(tmp_path: Path) -> None:
    """The files as transformers saves them agree; those of another vocabulary are refused."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(io.__file__).read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<|im_start|>"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    alone = Tokenizer.load(tmp_path)
    added = alone.encode("a<|im_start|>")[-1]
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {processor.id_to_piece(i): i for i in range(400)}
    control = [{"id": i, "content": processor.id_to_piece(i), "special": True} for i in range(3)]
    raw: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "decoder": {"type": "ByteFallback"},
        "added_tokens": [*control, {"id": added, "content": "<|im_start|>", "special": False}],
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(raw))
    assert Tokenizer.load(tmp_path).encode("a<|im_start|>b")[-2] == added
    raw["added_tokens"][-1]["content"] = "<|other|>"
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="different vocabularies"):
        Tokenizer.load(tmp_path)
    del raw["model"]
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="has no vocabulary"):
        Tokenizer.load(tmp_path)


ODD: list[Any] = [None, True, -1, 1e300, "", "x", [], [[]], {}, {"content": 7}]


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_files_with_values_of_any_kind_end_in_one_message(
    tmp_path: Path, small: Tokenizer, count: int
) -> None:
    """Each value of each file is replaced by one of another kind; a tokenizer or a DataError."""
    files: dict[str, Any] = {
        **tokenizer_files(small.path),
        "added_tokens.json": {"<x>": small.vocab_size},
        "special_tokens_map.json": {"eos_token": {"content": "</s>"}, "extra_special_tokens": []},
    }
    files["tokenizer.json"]["model"] |= {"vocab": {"a": 0}, "merges": []}
    copy_of(small.path, tmp_path)
    draw = random.Random(0)
    for name, content in files.items():
        for path in _places(content):
            for odd in draw.sample(ODD, count):
                changed = json.loads(json.dumps(content))
                inner = changed
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = odd
                (tmp_path / name).write_text(json.dumps(changed))
                try:
                    Tokenizer.load(tmp_path)
                except DataError as error:
                    assert str(tmp_path) in str(error) and len(str(error)) < 1000
        (tmp_path / name).unlink()


def _places(value: Any) -> list[tuple[Any, ...]]:
    """Where values stand in a JSON document, as keys from the outside."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [(key, *rest) for key in keys for rest in [(), *_places(value[key])]]
