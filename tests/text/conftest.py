"""Fixtures of the tests of text: real and small tokenizers, corpora, and parquet files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llamapro.text.corpus import tokenize
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import LLAMA_3_PATTERN


@pytest.fixture(scope="session")
def write_parquet() -> Callable[..., Path]:
    """`write_parquet(path, columns or rows, **options) -> path`; skips without pyarrow."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(path: Path, data: dict[str, Any] | list[dict[str, Any]], **options: Any) -> Path:
        table = pyarrow.table(data) if isinstance(data, dict) else pyarrow.Table.from_pylist(data)
        parquet.write_table(table, path, **options)
        return path

    return write


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The small tokenizer."""
    return Tokenizer.load(tokenizer_file)


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., TokenStore]:
    """`make(*patterns, **options)`: tokenize with a cache in tmp_path."""

    def tokenized(*patterns: Path, **options: object) -> TokenStore:
        names = [str(pattern) for pattern in patterns]
        return tokenize(names, tokenizer, tmp_path / "cache", **options)  # type: ignore[arg-type]

    return tokenized


@pytest.fixture(scope="session")
def real(shared: Path, tokenizer_file: Path) -> Tokenizer:
    """Llama 2's tokenizer where it is at hand, else the small one."""
    file = shared / "tokenizers" / "llama-2" / "tokenizer.model"
    return Tokenizer.load(file if file.exists() else tokenizer_file)


@pytest.fixture(scope="session")
def llama_3(shared: Path) -> Tokenizer | None:
    """Llama 3's tokenizer where it is at hand."""
    file = shared / "tokenizers" / "llama-3" / "tokenizer.model"
    return Tokenizer.load(file) if file.exists() else None


@pytest.fixture(scope="session")
def train_byte_level() -> Callable[[Path, int, list[str]], tokenizers.Tokenizer]:
    """`train_byte_level(file, vocab_size, names)`: Llama 3's kind of tokenizer, small.

    Byte-level BPE of the file's text, cut by Llama 3's pattern, with control tokens of these names.
    """

    def train(file: Path, vocab_size: int, names: list[str]) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer(models.BPE())
        cut = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_PATTERN), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, False)])
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator([file.read_text(encoding="utf-8")], trainer)
        made.add_special_tokens(names)
        return made

    return train


# ---- Tokenizers with the control tokens of chat templates ----------------------------------------

NAMES = [
    *("<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|im_start|>", "<|im_end|>"),
]


@pytest.fixture(scope="module")
def directory(
    tmp_path_factory: pytest.TempPathFactory, train_byte_level: Callable[..., tokenizers.Tokenizer]
) -> Path:
    """A byte-level tokenizer with the control tokens of all formats, as Hugging Face's files."""
    path = tmp_path_factory.mktemp("chat")
    text = Path(__file__).with_name("test_chat_template.py")
    train_byte_level(text, 500, NAMES).save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory, shared: Path, tokenizer_file: Path) -> Path:
    """A sentencepiece tokenizer, which puts spaces before texts, with the same control tokens."""
    path = tmp_path_factory.mktemp("spaced")
    file = shared / "tokenizers" / "llama-2" / "tokenizer.model"
    shutil.copy(file if file.exists() else tokenizer_file, path)
    size = Tokenizer.load(path).vocab_size
    added = {str(size + i): {"content": n, "special": True} for i, n in enumerate(NAMES[2:])}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "legacy": False}
    (path / "tokenizer_config.json").write_text(
        json.dumps(config | {"added_tokens_decoder": added})
    )
    return path
