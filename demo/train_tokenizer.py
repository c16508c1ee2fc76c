"""Trains a sentencepiece tokenizer (BPE with byte fallback, Llama 2's settings) on your text.

python demo/train_tokenizer.py FILES... --vocab-size N --out DIR
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import sentencepiece
import tyro

from llamapro import cli
from llamapro.errors import ConfigError, DataError
from llamapro.files import make_directory, reason, write_file
from llamapro.text.documents import Counts, read_pieces
from llamapro.text.source_files import find_files
from llamapro.text.tokenizer import FILE_NAME, Tokenizer

# Sentencepiece skips training lines that hold U+2585, its own mark for unknown characters.
_LINE_END = re.compile("[\n\u2585]")
# Characters of one training line. At four bytes each, they stay far below `max_sentence_length`.
_LINE_CHARACTERS = 1 << 14


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines short enough for sentencepiece to keep all of them, without empty ones."""
    for text in texts:
        for line in _LINE_END.split(text):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Returns the bytes of a `tokenizer.model`. The same texts give the same model.

    Tokens decode to the text as it was, except that U+2581, sentencepiece's mark for a space,
    becomes a space. All texts are held in memory.

    Args:
        texts: the corpus.
        vocab_size: number of tokens, of which 259 are special tokens and bytes.

    Raises:
        DataError: there is no text, or the vocabulary is too small or too large for it.
    """
    lines = training_lines(texts)
    if (first := next(lines, None)) is None:
        raise DataError("no text to train a tokenizer on: all documents are empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            character_coverage=0.99995,
            max_sentence_length=8 * _LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        cause = str(error).rpartition("] ")[2]
        raise DataError(f"vocabulary of {vocab_size:,} for this text: {cause}") from None
    return model.getvalue()


@dataclass(frozen=True)
class Args:
    """Trains a sentencepiece tokenizer (BPE with byte fallback, Llama 2's settings)."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Text, .jsonl, .jsonl.gz or .parquet files; folders or globs."""
    vocab_size: int
    """Number of tokens, for example 32000. 259 of them are special tokens and bytes."""
    out: Path
    """Directory to write tokenizer.model to."""
    text_key: str = "text"
    """Key of the text in .jsonl files, or its column in .parquet files."""
    force: bool = False
    """Replace an existing tokenizer.model."""
    json: bool = False
    """Print one JSON object instead of text."""


def main() -> None:
    """The command; see `Args`."""
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    target = args.out / FILE_NAME
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists; choose another directory or pass --force")
    counts = Counts()
    pieces = read_pieces(find_files(args.files), args.text_key, counts, "train")
    model = train((piece.text for piece in pieces), args.vocab_size)
    print(f"tokenizer: trained on {counts.describe()}", file=sys.stderr)
    try:
        make_directory(args.out)
        write_file(target, model)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {reason(error)}") from None
    tokenizer = Tokenizer.load(target)
    result = {
        "path": str(target),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "documents": counts.documents,
        "bytes": counts.bytes,
    }
    cli.print_result(result, args.json, f"{target}: {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    cli.run(main)
