"""Tokenizers in GGUF files: llama.cpp's own ids on hard text, in transformers and in ours.

    python -m pytest -m ecosystem tests/conversion/test_gguf_tokenizer.py    # pip install xllamacpp

`gguf_ids.json` holds ids that llama.cpp (xllamacpp 2026.10) gave for the tokenizer of that file.
"""

import importlib
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from torch import Tensor

from llamapro.config import ModelConfig
from llamapro.conversion.gguf import from_gguf
from llamapro.conversion.gguf_tokenizer import PATTERNS
from llamapro.errors import DataError
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import byte_characters

pytest.importorskip("gguf", reason="needs the extra gguf")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra gguf")

RECORDED = json.loads((Path(__file__).parent / "gguf_ids.json").read_text("utf-8"))
TEXTS, CONTROL = RECORDED["texts"], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 500}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer with the recorded merges."""
    merges = RECORDED["merges"]
    tokens = [*CONTROL, *byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    values = {
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | more).items()}


def pieces(model_file: Path, **more: Any) -> dict[str, Any]:
    """The metadata of a sentencepiece tokenizer, as llama.cpp's converter writes them."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = range(model.vocab_size())
    types = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in ids
    ]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": types,
        "merges": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | more).items()}


@pytest.fixture(scope="module")
def convert(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, Tensor]],
    write_gguf: Callable[..., Path],
) -> Callable[[dict[str, Any]], Path]:
    """`convert(metadata) -> directory`; the GGUF file lies beside it."""
    config = tiny_config(**SHAPE)
    tensors = random_tensors(config)

    def make(values: dict[str, Any]) -> Path:
        home = tmp_path_factory.mktemp("gguf")
        from_gguf(write_gguf(home / "m.gguf", config, tensors, values=values), home / "out")
        return home / "out"

    return make


def backend(directory: Path) -> Any:
    """Returns the tokenizer of the library, for which control tokens' names are plain text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("pre", RECORDED["ids"])
def test_ids_are_those_of_llama_cpp(convert: Callable[[dict[str, Any]], Path], pre: str) -> None:
    """Contractions, digits, white space, scripts, emoji, names of tokens; BOS where it adds one."""
    directory = convert(byte_level(pre))
    theirs, ours = backend(directory), Tokenizer.load(directory)
    for text, ids in zip(TEXTS, RECORDED["ids"][pre], strict=True):
        if ids is not None:  # llama.cpp's "tekken" cuts before a combining mark, Mistral's does not
            assert theirs.encode(text).ids == ids, text
            assert ours.encode(text, bos=True) == ids, text
            assert ours.decode(ids) == text


def test_transformers_reads_what_is_written(convert: Callable[[dict[str, Any]], Path]) -> None:
    """Its AutoTokenizer has these ids, BOS and EOS, pad and template; so has ours."""
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    values = byte_level("gpt-2", padding_token_id=2, eos_token_id=2, eot_token_id=1)
    values |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    values |= {"tokenizer.chat_template": template, "tokenizer.chat_template.tool_use": "tools"}
    directory = convert(values)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == tuple(
        CONTROL[i] for i in (0, 2, 2)
    )
    for text, ids in zip(TEXTS, RECORDED["ids"]["gpt-2"], strict=True):
        if "<|im" not in text:
            assert theirs(text).input_ids == [0, *ids, 2] == ours.encode(text, bos=True, eos=True)
    ids = [1, *theirs.encode("Hi", add_special_tokens=False), 2]
    assert theirs.encode("<|im_start|>Hi<|im_end|>", add_special_tokens=False) == ids
    message = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(message, tokenize=False) == "<|im_start|>Hi<|im_end|>"
    assert ChatTemplate.load(directory, ours).render(message) == "<|im_start|>Hi<|im_end|>"
    assert ChatTemplate.load(directory, ours).has_other
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [2, 1], "pad_token_id": 2}


def test_sentencepiece_comes_back_as_a_model(
    convert: Callable[[dict[str, Any]], Path], tokenizer_file: Path
) -> None:
    """A tokenizer.model and a tokenizer.json, both with the ids of the model it was made from."""
    source = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    directory = convert(pieces(tokenizer_file))
    again = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ours, theirs = Tokenizer.load(directory), backend(directory)
    assert (ours.bos_id, ours.eos_id, ours.adds_space) == (1, 2, True)
    for text in TEXTS:
        ids = source.encode(text)
        assert again.encode(text) == ids
        assert ours.encode(text) == ids
        assert theirs.encode(text).ids == [1, *ids]


def test_sentencepiece_without_its_space_and_with_added_tokens(
    convert: Callable[[dict[str, Any]], Path], tokenizer_file: Path
) -> None:
    """User-defined tokens are found in plain text, control tokens only where names count."""
    values = pieces(tokenizer_file, add_space_prefix=False, add_bos_token=False)
    for key, new in (
        ("tokens", ["<tool>", "<|end|>", ""]),
        ("scores", [-1000.0] * 3),
        ("token_type", [4, 3, 5]),
    ):
        values[f"tokenizer.ggml.{key}"] = values[f"tokenizer.ggml.{key}"] + new
    directory = convert(values)
    ours, theirs = Tokenizer.load(directory), backend(directory)
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(tokenizer_file.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    source = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert not ours.adds_space and not (directory / "tokenizer.model").exists()
    plain = [source.encode(text) for text in ("def f", " x")]
    assert ours.encode("def f<tool> x") == [*plain[0], 400, *plain[1]]
    assert theirs.encode("def f<tool> x").ids == [*plain[0], 400, *plain[1]]
    assert ours.special_tokens["<|end|>"] == 401
    assert 401 not in ours.encode("<|end|>") and 401 in ours.encode("<|end|>", special=True)
    assert ours.decode(ours.encode("def f<tool> x")) == "def f<tool> x"


def test_a_model_without_a_tokenizer_is_converted_with_a_note(
    convert: Callable[[dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = convert({"tokenizer.ggml.model": None})
    assert "holds no tokenizer; copy the model's into the result" in capsys.readouterr().err
    assert not list(directory.glob("tokenizer*"))


def test_a_cut_that_is_not_named_is_the_default_with_a_note(
    convert: Callable[[dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = convert(byte_level("default") | {"tokenizer.ggml.pre": None})
    assert "does not name the way text is cut (tokenizer.ggml.pre)" in capsys.readouterr().err
    assert backend(directory).encode(TEXTS[0]).ids == RECORDED["ids"]["default"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', not supported"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5', not supported"),
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv', not supported"),
        ({"pre": "smolm"}, "tokenizer.ggml.pre is 'smolm' (did you mean 'smollm'?), which is not"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2', which is not supported; there are"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a"] * 501}, "has 501 tokens, but the embedding has 500 rows"),
        ({"token_type": [1, 1]}, "token_type must list a type for each of 459 tokens"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a zz"]}, "its tokenizer is damaged"),
        ({"bos_token_id": 5000}, "bos_token_id is 5000, expected below 459"),
        ({"model": "llama", "scores": None}, "scores must list a score for each of 459 tokens"),
        ({"model": "llama", "scores": [i / 2 for i in range(459)]}, "not those of sentencepiece's"),
        ({"model": "llama", "scores": [-1000.0] * 459}, "are -1000.0 for every piece"),
        ({"model": "llama", "remove_extra_whitespaces": True}, "whitespaces is true, not supp"),
    ],
)
def test_a_tokenizer_that_cannot_be_written_is_refused(
    convert: Callable[[dict[str, Any]], Path], change: dict[str, Any], message: str
) -> None:
    """One message that names the file and the key."""
    with pytest.raises(DataError) as caught:
        convert(byte_level(**{"pre": "gpt-2"} | change))
    assert "m.gguf: " in str(caught.value) and message in str(caught.value)


def test_damaged_tokens_are_named(convert: Callable[[dict[str, Any]], Path]) -> None:
    """A token that comes twice, and one of characters that stand for no byte."""
    for token, message in (("a", "has 'a' twice"), ("你", "'你', is not written in bytes'")):
        values = byte_level("gpt-2")
        tokens = values["tokenizer.ggml.tokens"]
        values["tokenizer.ggml.tokens"] = [*tokens[:-1], token]
        with pytest.raises(DataError, match=message):
            convert(values)


@pytest.mark.ecosystem
@pytest.mark.parametrize("pre", PATTERNS)
def test_llama_cpp_itself_gives_these_ids(
    convert: Callable[[dict[str, Any]], Path], pre: str
) -> None:
    """Every name of `tokenizer.ggml.pre` that is supported, with the llama.cpp installed here."""
    xllamacpp = pytest.importorskip("xllamacpp")
    values = byte_level(pre)
    count = SHAPE["vocab_size"] - len(values["tokenizer.ggml.tokens"])
    values["tokenizer.ggml.tokens"] += [f"[PAD{i}]" for i in range(count)]
    values["tokenizer.ggml.token_type"] += [5] * count
    directory = convert(values)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(directory.parent / "m.gguf")
    parameters.n_ctx, parameters.warmup = 64, False
    server = xllamacpp.Server(parameters)
    ours = backend(directory)
    for text in TEXTS:
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            ids = json.load(answer)["tokens"]
        if pre != "tekken" or text != TEXTS[-1]:
            assert ours.encode(text).ids == ids, text
