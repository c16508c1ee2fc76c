"""What stands around a text: BOS and EOS as the model's own tokenizer has them, in every place."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llamapro.errors import DataError
from llamapro.text.corpus import tokenize
from llamapro.text.mixture import PackedSequences
from llamapro.text.tokenizer import Tokenizer

TEXT = "def f(x): return x"
Make = Callable[..., Path]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTE_LEVEL |= {"use_regex": True}


def template(before: list[str], after: list[str], ids: dict[str, int]) -> dict[str, Any]:
    """A post-processor of a tokenizer.json that puts these tokens around a text."""
    first, last = (
        [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        for names in (before, after)
    )
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {n: {"id": n, "ids": [ids[n]], "tokens": [n]} for n in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, other, *last],
        "special_tokens": special,
    }


IDS = {"<b>": 256, "<e>": 257, "<x>": 258}
POST_PROCESSORS = {
    "none": None,
    "byte level": BYTE_LEVEL,
    "bos": template(["<b>"], [], IDS),
    "bos and eos": template(["<b>"], ["<e>"], IDS),
    "eos": template([], ["<e>"], IDS),
    "two tokens": template(["<x>", "<b>"], [], IDS),
    "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL, template(["<b>"], [], IDS)]},
    "roberta": {
        "type": "RobertaProcessing",
        "cls": ["<b>", 256],
        "sep": ["<e>", 257],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
}
FLAGS: dict[str, dict[str, Any]] = {
    "not said": {},
    "bos": {"add_bos_token": True},
    "no bos": {"add_bos_token": False},
    "eos": {"add_eos_token": True},
    "both": {"add_bos_token": True, "add_eos_token": True},
}


@pytest.fixture
def make(tmp_path: Path, byte_level: Callable[..., dict[str, Any]]) -> Make:
    """`make(post_processor=None, bos="<b>", eos="<e>", **config) -> directory`."""

    def write(
        post_processor: dict[str, Any] | None = None,
        bos: str | None = "<b>",
        eos: str | None = "<e>",
        **config: Any,
    ) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        raw = byte_level(*IDS) | {"post_processor": post_processor}
        config |= {"bos_token": bos, "eos_token": eos}
        files = {"tokenizer": raw, "tokenizer_config": config, "config": LLAMA}
        for name, content in files.items():
            (path / f"{name}.json").write_text(json.dumps(content))
        return path

    return write


# ---- The model's own tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_a_prompt_has_the_ids_of_transformers(
    make: Make, post_processor: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every tokenizer.json, whatever the flags beside it say; an EOS is left off, and said."""
    for kind in ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"):
        path = make(POST_PROCESSORS[post_processor], tokenizer_class=kind, **FLAGS[flags])
        ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
        ids, expected = ours.encode(TEXT, bos=True), theirs.encode(TEXT)
        assert ids == expected[: len(ids)]
        assert expected[len(ids) :] in ([], [ours.eos_id])
        is_said = "puts <e> behind every text, a prompt too" in capsys.readouterr().err
        assert is_said == (expected != ids)
        assert ids[len(ours.prefix) :] == ours.encode(TEXT)
        assert ours.encode(TEXT, bos=True, eos=True) == [*ids, 257]


@pytest.mark.parametrize("bos", [None, "<b>"])
@pytest.mark.parametrize("post_processor", ["none", "bos"])
def test_a_named_bos_alone_adds_none(make: Make, bos: str | None, post_processor: str) -> None:
    """The post-processor decides, even where no BOS is named."""
    path = make(POST_PROCESSORS[post_processor], bos=bos, add_bos_token=True)
    ours = Tokenizer.load(path)
    assert ours.bos_id == (None if bos is None else 256)
    assert ours.encode(TEXT, bos=True) == AutoTokenizer.from_pretrained(path).encode(TEXT)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_sentencepiece_model_alone_begins_with_bos_unless_told_otherwise(
    tmp_path: Path, tokenizer_file: Path, flags: str
) -> None:
    """As LLaMA was trained and transformers 4 does; 5 agrees wherever add_bos_token is there."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = names | FLAGS[flags] | {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    ours = Tokenizer.load(tmp_path)
    assert ours.prefix == ([] if flags == "no bos" else [1]) and ours.suffix == [2]
    if "add_bos_token" in config:
        theirs = AutoTokenizer.from_pretrained(tmp_path).encode(TEXT)
        assert [i for i in theirs if i < 3] == ours.prefix + [2] * (flags == "both")


def test_llama_3s_ranks_begin_with_bos(tmp_path: Path) -> None:
    """As Meta's code puts it there."""
    lines = [base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    assert Tokenizer.load(tmp_path).prefix == [256]


def test_a_tokenizer_json_decides_beside_a_sentencepiece_model(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """transformers reads it alone; one whose post-processor is damaged is named."""
    from llamapro.conversion.companions import tokenizer_files

    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    made = tokenizer_files(tokenizer_file)["tokenizer.json"]
    for post_processor, prefix in ((made["post_processor"], [1]), (None, [])):
        raw = made | {"post_processor": post_processor}
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert Tokenizer.load(tmp_path).prefix == prefix
    for damaged in ({"type": "TemplateProcessing"}, {"type": "BertProcessing", "cls": []}, [1]):
        (tmp_path / "tokenizer.json").write_text(json.dumps(made | {"post_processor": damaged}))
        with pytest.raises(DataError, match=r"tokenizer\.json: its post_processor"):
            Tokenizer.load(tmp_path)


# ---- Documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "bos", "eos"),
    [
        ([], "<b>", "<e>"),
        ([], "<b>", "<b>"),
        ([], None, "<e>"),
        (["<b>"], "<b>", "<e>"),
        (["<b>"], "<b>", "<b>"),
        (["<b>"], "<b>", None),
        (["<x>", "<b>"], "<b>", "<e>"),
    ],
)
def test_documents_are_separated_once_and_counted(
    make: Make, tmp_path: Path, before: list[str], bos: str | None, eos: str | None
) -> None:
    """Twenty documents have the numbers 0 to 19; one separator stands between two of them."""
    tokenizer = Tokenizer.load(make(template(before, [], IDS), bos=bos, eos=eos))
    texts = [f"document number {n}" for n in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "docs.jsonl").write_text(lines)
    store = tokenize([str(tmp_path / "docs.jsonl")], tokenizer, tmp_path / "cache")
    ids = store.read(0, store.tokens).tolist()
    bodies = [tokenizer.encode(text) for text in texts]
    first = [IDS[name] for name in before]
    last = [] if eos is None or IDS[eos] in first else [IDS[eos]]
    assert ids == [i for body in bodies for i in (*first, *body, *last)]
    position = 0
    for number, body in enumerate(bodies):
        size = len(first) + len(body) + len(last)
        for place in (position, position + size - 1):
            assert store.document_of(place) == number
        position += size
    packed = PackedSequences(store, 32)
    assert packed.documents(len(packed) - 1)[1] == 19


def test_documents_that_nothing_separates_have_no_numbers(make: Make, tmp_path: Path) -> None:
    """Neither BOS nor EOS is named: there is no start for an empty text either."""
    tokenizer = Tokenizer.load(make(bos=None, eos=None))
    (tmp_path / "a.txt").write_text("text")
    store = tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "cache")
    assert store.tokens == 4 and store.document_of(0) is None
    assert tokenizer.document_start() == []
    with pytest.raises(DataError, match="neither BOS nor EOS"):
        tokenizer.encode_prompt("")


def test_an_empty_prompt_starts_from_bos_or_eos(make: Make) -> None:
    """A document that is written starts from what stands before one in training instead."""
    bos_first = template(["<x>", "<b>"], [], IDS)
    for path, prompt, document in (
        (make(), [256], [257]),
        (make(bos=None), [257], [257]),
        (make(eos=None), [256], [256]),
        (make(bos_first), [258, 256], [258, 256]),
    ):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.encode_prompt("") == prompt
        assert tokenizer.document_start() == document
        assert tokenizer.encode_prompt("a") == tokenizer.encode("a", bos=True)


def test_a_name_of_a_control_token_in_a_prompt_is_said(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is plain characters here, and the token in transformers."""
    path = make()
    ids = Tokenizer.load(path).encode_prompt("a<e>\nb")
    assert 257 not in ids and 257 in AutoTokenizer.from_pretrained(path)("a<e>\nb").input_ids
    assert "warning: '<e>' in the prompt is plain characters here" in capsys.readouterr().err
    Tokenizer.load(path).encode_prompt("a < e >")
    assert capsys.readouterr().err == ""


def test_the_fingerprint_follows_what_stands_around_a_document(make: Make) -> None:
    """It changes with the ids, and is the file's hash where BOS comes first and EOS last."""
    bos, both = POST_PROCESSORS["bos"], POST_PROCESSORS["bos and eos"]

    def expected(path: Path, eos_id: int) -> str:
        changes = {"added": {}, "bos": [256], "eos": [eos_id], "spaces_all": False}
        content = (path / "tokenizer.json").read_bytes() + json.dumps(changes).encode()
        return hashlib.sha256(content).hexdigest()

    for path in (make(bos), make(both), make(bos, add_bos_token=False)):
        assert Tokenizer.load(path).fingerprint == expected(path, 257)
    for path, eos_id in ((make(), 257), (make(bos, eos="<b>"), 256)):
        assert Tokenizer.load(path).fingerprint != expected(path, eos_id)


def test_the_fingerprint_of_a_sentencepiece_model_follows_add_bos_token(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """One that is not said, or true, leaves the model's own hash."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    own = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    for value, is_own in ((True, True), (False, False), (None, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": value}))
        assert (Tokenizer.load(tmp_path).fingerprint == own) == is_own
