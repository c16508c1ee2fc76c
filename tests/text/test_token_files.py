"""Files beside a vocabulary that answer one question: ids are those of transformers, or it is said.

`CASES` has files that differ in names, ids and flags of tokens. Each is loaded by `AutoTokenizer`.
"""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from llamapro.conversion.companions import tokenizer_files
from llamapro.errors import DataError
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import JSON_NAME

TEXT = "a <x> b<w> <w>  <e> <y>c<z>"


def token(i: int, content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of a tokenizer.json's added_tokens."""
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": i, "content": content, "special": special} | dict.fromkeys(names, False) | flags


def table(*tokens: dict[str, Any]) -> dict[str, Any]:
    """An added_tokens_decoder."""
    entries = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens}
    return {"added_tokens_decoder": entries}


BASE = [token(256, "<b>"), token(257, "<e>"), token(258, "<x>"), token(259, "<w>", False)]
STRIPS = token(258, "<x>", lstrip=True, rstrip=True)
NEW = {"__type": "AddedToken", "content": "<y>", "lstrip": True, "rstrip": False}
NEW |= {"normalized": False, "single_word": False}
# name: (added_tokens, tokenizer_config.json, special_tokens_map.json, added_tokens.json, said)
CASES: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], dict[str, int], str]] = {
    "nothing twice": (BASE, {}, {}, {}, ""),
    "all the same": (BASE, table(*BASE), {"eos_token": "<e>"}, {"<x>": 258}, ""),
    "the table strips": (BASE, table(STRIPS), {}, {}, "'<x>' is special in tokenizer.json and"),
    "the file strips": ([*BASE[:2], STRIPS], table(*BASE[:3]), {}, {}, "special in tokenizer_con"),
    "the table has a word": (
        BASE,
        table(token(258, "<x>", False)),
        {},
        {},
        "an ordinary word in t",
    ),
    "the table has no word": (BASE, table(token(259, "<w>")), {}, {}, "'<w>' is an ordinary word"),
    "more in the table": (BASE, table(*BASE, token(260, "<y>")), {}, {}, ""),
    "another EOS": (BASE, {}, {"eos_token": "<x>"}, {}, "special_tokens_map.json counts"),
    "EOS null": (BASE, {}, {"eos_token": None}, {}, "special_tokens_map.json counts"),
    "EOS not null": (BASE, {"eos_token": None}, {"eos_token": "<e>"}, {}, "and '<e>' in special_"),
    "EOS not read": (BASE, table(*BASE), {"eos_token": "<x>"}, {}, "tokenizer_config.json counts"),
    "EOS is a word": (BASE, {"eos_token": "<w>"}, {}, {}, ""),
    "EOS is a piece": (BASE, {"eos_token": "a"}, {}, {}, ""),
    "a role of its own": (BASE, {"word_token": "<w>"}, {}, {}, ""),
    "a role of any name": (BASE, {"extra_special_tokens": {"word": "<w>"}}, {}, {}, ""),
    "no role": (BASE, {"additional_special_tokens": ["<w>"], "x_token": 5}, {}, {}, ""),
    "no such padding": (BASE, {"pad_token": "<pad>"}, {}, {}, "pad_token '<pad>' is in no list"),
    "one more": (BASE, {"extra_special_tokens": ["<y>"]}, {}, {}, "'<y>' is in no list: token 260"),
    "one more that strips": (
        BASE,
        {"extra_special_tokens": [NEW | {"special": True}]},
        {},
        {},
        "'<y>' is in no list: token 260",
    ),
    "padding that strips": (BASE, {"pad_token": NEW}, {}, {}, "'<y>' is in no list: token 260"),
    "one more role": (
        BASE,
        {"model_specific_special_tokens": {"y_token": "<y>"}},
        {},
        {},
        "'<y>' is in no list: token 260",
    ),
    "added": (BASE, {}, {}, {"<y>": 260}, ""),
    "no name": (BASE, table(*BASE, token(260, "")), {}, {}, ""),
    "whole words": ([*BASE[:2], token(258, "<x>", single_word=True), BASE[3]], {}, {}, {}, ""),
    "added and not read": (BASE, table(*BASE), {}, {"<y>": 260}, "added_tokens.json: '<y>' is not"),
}
REFUSED = {
    "another id": (table(token(300, "<x>")), {}, "'<x>' is token 300, but another file there s"),
    "another name": (table(token(258, "<z>")), {}, "token 258 is '<z>', but another file there s"),
    "added with another id": ({}, {"<x>": 300}, "added_tokens.json: '<x>' is token 300, but"),
    "no such EOS": ({"eos_token": "<new>"}, {}, "eos_token is '<new>', which is no token"),
    "an id as EOS": ({"eos_token": 259}, {}, "eos_token is 259, which is no token"),
}


@pytest.fixture
def raw_json(byte_level: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes."""
    return byte_level()


@pytest.fixture
def write(tmp_path: Path, raw_json: dict[str, Any]) -> Callable[..., Path]:
    """`write(added, config, special_tokens_map={}, added_tokens={}) -> directory`."""

    def to(added: list[Any], config: dict[str, Any], *others: dict[str, Any]) -> Path:
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<b>"}
        files = {"tokenizer": raw_json | {"added_tokens": added}, "config": {}}
        files["tokenizer_config"] = names | {"eos_token": "<e>"} | config
        files |= zip(("special_tokens_map", "added_tokens"), others, strict=False)
        for name, content in files.items():
            if content or name == "config":
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return tmp_path

    return to


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers_and_differences_are_said(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Ids, BOS, EOS, and which tokens are control tokens; files that agree say nothing."""
    *files, said = CASES[case]
    path = write(*files)
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    shown = capsys.readouterr().err
    assert said in shown if said else "warning" not in shown
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.encode(TEXT, special=True) == theirs.encode(TEXT, add_special_tokens=False)
    flags = {t.content: (i, t.special) for i, t in theirs.added_tokens_decoder.items()}
    assert {name: (t.id, t.special) for name, t in ours.added.items()} == flags
    # Names of control tokens in a text of strangers are plain characters.
    found = set(ours.encode(TEXT)) & set(ours.special_tokens.values())
    assert found == ({ours.eos_id} if case == "EOS is a piece" else set())


@pytest.mark.parametrize("name", ["\n<x>", "<x> ", " <x> ", "\n\n"])
def test_a_name_with_white_space_of_its_own_takes_more_around_it(
    write: Callable[..., Path], name: str
) -> None:
    """What strips is the token's white space; "\\x1c" is none there, though it is in Python."""
    path = write([*BASE[:2], token(258, name, lstrip=True, rstrip=True)], {})
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for text in (f"a{name}b", f"a \n{name}\t\u3000 b{name}", f"a\x1c {name} \x1fb"):
        ids = ours.encode(text, special=True)
        assert ids == theirs.encode(text, add_special_tokens=False) and 258 in ids


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_a_token_leaves_white_space_that_is_a_token_itself(
    write: Callable[..., Path], normalized: bool, special: bool
) -> None:
    """Unless that is looked for later, in what was normalised; whatever is in front or behind."""
    added = [
        token(259, "\n\n", special, normalized=normalized),
        token(260, " <y>", False, rstrip=True),
    ]
    path = write([*BASE[:2], STRIPS, *added], {})
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for text in ("a\n\n<x>b", " \n\n<x>\n\n b", "<x> <y> ", "\n\n\n<x>\n\n\n", "<x> \n\n<x>"):
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(("special", "normalized"), [(True, True), (True, False), (False, False)])
def test_the_longest_name_is_found_whatever_its_kind(
    write: Callable[..., Path], normalized: bool, special: bool
) -> None:
    """A token's name inside that of another is part of it, unless that is looked for later."""
    longer = token(259, "<a<x>b>", not special, normalized=normalized)
    path = write([*BASE[:2], token(258, "<x>", special), longer], {})
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for text in ("<x> <a<x>b><x>", "<a<x>", "<a<x>b><a<x>b"):
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)


def test_a_token_in_place_of_a_piece_is_said(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers gives it the next id; the piece's own name, in either spelling, is no change."""
    assert Tokenizer.load(write(BASE, table(*BASE, token(5, "<y>")))).added["<y>"].id == 5
    said = "'<y>' is token 5, as its files say; transformers, which leaves no gap and renames"
    assert said in capsys.readouterr().err
    found = tokenizers.Tokenizer.from_file(str(write(BASE, {}) / JSON_NAME)).token_to_id("Ġ")
    Tokenizer.load(write(BASE, table(*BASE, token(found, "Ġ"))))
    assert "warning" not in capsys.readouterr().err


def test_a_word_of_a_sentencepiece_model_is_not_found_inside_another(
    spaced: Path, tmp_path: Path
) -> None:
    """As in transformers, which reads single_word; the library of the model knows no such token."""
    spaced = Path(shutil.copytree(spaced, tmp_path, dirs_exist_ok=True))
    config = json.loads((spaced / "tokenizer_config.json").read_text())
    size = Tokenizer.load(spaced).vocab_size
    word = {"content": "covid", "single_word": True, "special": False}
    config["added_tokens_decoder"][str(size)] = word
    (spaced / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(spaced), AutoTokenizer.from_pretrained(spaced)
    for text, count in (("a covid test", 1), ("covidian anticovid covid_a", 0)):
        assert ours.encode(text).count(size) == count
        assert theirs(text).input_ids.count(size) == count


def test_a_word_that_a_normaliser_puts_a_space_before_keeps_it(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """`add_tokens` makes such words for Llama 2: found after a space only, which is in the text."""
    raw = tokenizer_files(tokenizer_file)["tokenizer.json"]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [prepend, raw["normalizer"]]}
    raw["pre_tokenizer"] = None
    size = len(raw["model"]["vocab"])
    raw["added_tokens"].append(token(size, "<tok>", special=False, normalized=True))
    (tmp_path / JSON_NAME).write_text(json.dumps(raw))
    ours, theirs = (
        Tokenizer.load(tmp_path),
        tokenizers.Tokenizer.from_file(f"{tmp_path}/{JSON_NAME}"),
    )
    text = "a <tok> b<tok>"
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids and ids.count(size) == 1
    assert ours.decode(ids) == theirs.decode(ids) == text


def test_a_space_that_the_files_do_not_want_is_refused(spaced: Path, tmp_path: Path) -> None:
    """The command in the message writes a tokenizer.json without it, which is then read."""
    shutil.copytree(spaced, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"add_prefix_space is false, but tokenizer\.model puts"):
        Tokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    ids = theirs.encode("Hello", add_special_tokens=False)
    assert Tokenizer.load(tmp_path).encode("Hello") == ids != Tokenizer.load(spaced).encode("Hello")


def test_a_tokenizer_that_draws_its_tokens_is_refused(
    tmp_path: Path, raw_json: dict[str, Any]
) -> None:
    """With dropout a text has other ids each time, in the cache and on other ranks too."""
    raw_json["model"]["dropout"] = 0.5
    (tmp_path / JSON_NAME).write_text(json.dumps(raw_json))
    with pytest.raises(
        DataError, match=r"tokenizer\.json: model\.dropout is 0\.5, .*; set it to 0"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_two_ids_or_names_are_refused(write: Callable[..., Path], case: str) -> None:
    """The file, both values and the fix are named."""
    config, added, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        Tokenizer.load(write(BASE, config, {}, added))


def test_a_gap_in_the_ids_is_said(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of the model were trained by these ids; transformers numbers without a gap."""
    path = write(BASE, table(*BASE, token(270, "<y>")))
    assert Tokenizer.load(path).special_tokens["<y>"] == 270
    assert AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("<y>") == 260
    assert "'<y>' is token 270, as its files say; transformers" in capsys.readouterr().err


@pytest.mark.parametrize("special", [True, False])
def test_user_defined_pieces_with_a_role_are_plain_text_in_texts(
    tmp_path: Path, special: bool
) -> None:
    """sentencepiece finds them in any text; a stranger's text must not end a turn."""
    lines, model = Path(__file__).read_text(encoding="utf-8").splitlines(), io.BytesIO()
    options: dict[str, Any] = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True}
    options |= {"normalization_rule_name": "identity", "user_defined_symbols": ["<|im_end|>"]}
    options |= {"sentence_iterator": iter(lines), "model_writer": model, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**options)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    config = {"eos_token": "<|im_end|>"} if special else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("is <|im_end|> it")
    end = tokenizer.encode("<|im_end|>", special=True)[-1]
    assert (end in ids) != special
    assert tokenizer.decode(ids) == "is <|im_end|> it"
    assert (tokenizer.eos_id == end) == special


def test_rules_of_a_class_that_differ_from_the_file_are_said(
    tmp_path: Path, tokenizer_file: Path, raw_json: dict[str, Any], capsys: Any
) -> None:
    """transformers 5 replaces normaliser and cuts for most of its classes; the file counts here."""
    digits = {"type": "Digits", "individual_digits": True}
    cut = {"type": "Sequence", "pretokenizers": [digits, raw_json["pre_tokenizer"]]}
    raw_json["model"]["vocab"]["12"], raw_json["model"]["merges"] = 256, [["1", "2"]]
    llama = tokenizer_files(tokenizer_file)["tokenizer.json"]
    files = {
        "GPT2Tokenizer": raw_json | {"pre_tokenizer": cut},
        "Qwen2Tokenizer": raw_json | {"pre_tokenizer": cut},
        "GPTNeoXTokenizer": raw_json | {"pre_tokenizer": cut},
        "LlamaTokenizer": llama,
        "CodeLlamaTokenizer": llama,
    }
    for kind, raw in files.items():
        for name in (kind, "PreTrainedTokenizerFast"):
            (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
            config = {"tokenizer_class": name}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
            ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
            is_same = name != kind
            said = capsys.readouterr().err
            assert (f"takes those of tokenizer_class '{kind}'" in said) != is_same
            text = " leading 12 e\u0301"
            ids = theirs.encode(text, add_special_tokens=False)
            assert (ours.encode(text) == ids) == is_same
            assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["", "PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
def test_the_class_is_the_one_that_transformers_takes_for_the_model(
    tmp_path: Path, raw_json: dict[str, Any], capsys: Any, kind: str, name: str, file: str
) -> None:
    """Mistral's and Qwen2's have their own, and config.json may name one, too."""
    raw_json["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
    raw_json["pre_tokenizer"] |= {"trim_offsets": True, "use_regex": False}
    raw_json["model"]["vocab"]["3."], raw_json["model"]["merges"] = 256, [["3", "."]]
    files = {"tokenizer": raw_json, "config": {"model_type": kind}, "tokenizer_config": {}}
    files[file] = files[file] | ({"tokenizer_class": name} if name else {})
    for part, content in files.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "1234567 3.14"
    is_same = ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    said = capsys.readouterr().err
    assert ("its rules count here" in said) != is_same
    assert ("makes it read the file" in said) == (not is_same and kind != "qwen2")


@pytest.mark.parametrize("has_table", [True, False])
def test_tokens_that_a_class_does_not_take_from_the_file_are_said(
    tmp_path: Path, tokenizer_file: Path, capsys: Any, has_table: bool
) -> None:
    """With an added_tokens_decoder in tokenizer_config.json, LlamaTokenizer reads no other list."""
    raw = tokenizer_files(tokenizer_file)["tokenizer.json"]
    raw |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}
    raw["pre_tokenizer"] |= {"prepend_scheme": "first", "split": False}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= table(*raw["added_tokens"]) if has_table else {}
    raw["added_tokens"].append(token(400, "<tool>", False))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a <tool> b"
    assert (theirs.encode(text, add_special_tokens=False) == ours.encode(text)) != has_table
    assert ("which split '<tool>' into different tokens" in capsys.readouterr().err) == has_table


def test_names_that_transformers_splits_are_said(write: Callable[..., Path], capsys: Any) -> None:
    """It takes names of tokens for plain text if tokenizer_config.json says so."""
    path = write(BASE, {"split_special_tokens": True})
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    assert ours.encode("<e>", special=True) != theirs.encode("<e>")
    assert "into other tokens than are read here" in capsys.readouterr().err


def test_a_class_that_cannot_encode_is_not_compared(write: Callable[..., Path]) -> None:
    """transformers loads such a tokenizer, and fails at the first text; the file is read."""
    path = write(BASE, {"tokenizer_class": "BertTokenizer"})
    with pytest.raises(Exception, match="WordPiece"):
        AutoTokenizer.from_pretrained(path)("xy")
    assert Tokenizer.load(path).decode(Tokenizer.load(path).encode("xy")) == "xy"


def test_a_file_that_is_not_read_is_named(
    write: Callable[..., Path], tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vocab.json beside tokenizer.json, and a second tokenizer.model, if they differ."""
    path = write(BASE, {})
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "vocab.json").write_text(json.dumps(vocab | {"<x>": 258}))
    Tokenizer.load(path)
    assert not capsys.readouterr().err
    (path / "vocab.json").write_text(json.dumps(vocab | {"ab": 256}))
    Tokenizer.load(path)
    assert "vocab.json: not read, as in transformers" in capsys.readouterr().err
    (path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"save_pretrained\(DIR\) makes one of vocab\.json"):
        Tokenizer.load(path)
    for name in ("special_tokens_map.json", "tokenizer_config.json", "vocab.json"):
        (path / name).unlink(missing_ok=True)
    (path / "original").mkdir()
    content = tokenizer_file.read_bytes()
    (path / "tokenizer.model").write_bytes(content)
    for other, is_said in ((content, False), (content + b"\n", True)):
        (path / "original" / "tokenizer.model").write_bytes(other)
        Tokenizer.load(path)
        assert ("not read; it is another file" in capsys.readouterr().err) == is_said
    (path / "tokenizer.4.json").write_text("{}")
    config: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["x.T", None]}}
    config["fast_tokenizer_files"] = [JSON_NAME, "tokenizer.4.json"]
    config["fix_mistral_regex"] = True
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(path)
    said = capsys.readouterr().err
    assert "own code (auto_map) is not run" in said
    assert "tokenizer.4.json: not read; transformers may take it" in said
    assert "fix_mistral_regex is not applied" in said
