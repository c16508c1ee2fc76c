"""Sentencepiece tokenizers: loaded with every check, decoded as a stream, trained from a corpus.

python -m llamapro.tokenizer FILES... --vocab-size N --out DIR
"""

import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from llamapro import cli
from llamapro.config import ConfigError, DataError

FILE_NAME = "tokenizer.model"
# A line of Llama 3's vocabulary: a token's bytes in base64 and its rank.
_BPE_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# Sentencepiece drops training lines that hold U+2585, its own mark for unknown characters.
_NOT_TRAINED_ON = re.compile("[\n\u2585]")
# Characters of one training line; at four bytes each, far below `max_sentence_length`.
_LINE_CHARACTERS = 1 << 14


class Tokenizer:
    """A sentencepiece model: text to token ids and back.

    Attributes:
        path: the `tokenizer.model` file.
        vocab_size: number of tokens.
        bos_id: id put before a document, or None if the model has none.
        eos_id: id put after a document, or None.
        fingerprint: SHA-256 of the file, in hexadecimal.
    """

    def __init__(self, path: Path, model: bytes, processor: Any) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = processor
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id: int | None = processor.eos_id() if processor.eos_id() >= 0 else None

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a `tokenizer.model`, or the one in a directory.

        Raises:
            DataError: naming the file, if it is missing or not a sentencepiece model.
        """
        import sentencepiece

        path = Path(path)
        if path.is_dir():
            directory, path = path, path / FILE_NAME
            if not path.exists():
                other = (directory / "tokenizer.json").exists()
                found = "it has a tokenizer.json, which is not read; " if other else ""
                raise DataError(
                    f"{directory}: no {FILE_NAME} in this directory; {found}put the sentencepiece "
                    f"{FILE_NAME} of the model there"
                )
        try:
            model = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: no such tokenizer file or directory") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if _BPE_RANK_LINE.match(model):
            raise DataError(f"{path}: BPE ranks (Llama 3), not sentencepiece; not supported")
        try:
            if not model:
                raise RuntimeError("the file is empty")
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{path}: not a sentencepiece model ({error})") from None
        return cls(path, model, processor)

    def check_fits(self, vocab_size: int, where: str) -> None:
        """Raises DataError if a model of `vocab_size`, from `where`, lacks some of the tokens."""
        if self.vocab_size > vocab_size:
            raise DataError(
                f"{self.path}: {self.vocab_size:,} tokens, but {where} has a vocabulary of "
                f"{vocab_size:,}: a tokenizer of another vocabulary; use the model's own"
            )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: any text; the names of control tokens in it ("<s>") are plain characters.
            bos: put `bos_id` first, if there is one.
            eos: put `eos_id` last, if there is one.

        Raises:
            DataError: the text holds half a surrogate pair, which UTF-8 cannot encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not valid Unicode: {error}") from None
        ids: list[int] = self._processor.encode(text)
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids.

        Control tokens give no text, nor do ids past the vocabulary: models are often padded with
        rows that no token has. Bytes that are not UTF-8 become U+FFFD.
        """
        known = [int(i) for i in ids]
        text: str = self._processor.decode([i for i in known if 0 <= i < self.vocab_size])
        return text

    def byte_of(self, token_id: int) -> int | None:
        """Returns the byte that a byte-fallback token stands for, None for any other token."""
        if not 0 <= token_id < self.vocab_size or not self._processor.is_byte(token_id):
            return None
        return int(self._processor.id_to_piece(token_id)[1:-1], 16)  # "<0x0A>"


class StreamingDecoder:
    """Turns ids into text one at a time, as they are generated.

    The texts returned by `feed`, and by `flush` at the end, continue the prompt's: joined to it
    they are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # A token's text depends on what is before it in two ways: the very first text loses its
        # leading space, and bytes make up characters. So texts are differences between decodings
        # of a window of recent ids, not of all of them: that would cost time quadratic in length.
        self._window = [i for i in prompt_ids if 0 <= i < tokenizer.vocab_size]
        text = tokenizer.decode(self._window)
        self._emitted = len(text) - self._pending_bytes()  # characters of the window's text

    def feed(self, token_id: int) -> str:
        """Takes the next id; returns the text that became final, often "" inside a character."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        pending = self._pending_bytes()  # each is one U+FFFD at the end of the text
        new = text[self._emitted : len(text) - pending]
        self._emitted += len(new)
        last = self._tokenizer.decode([token_id])
        # A window that has text of its own no longer strips a leading space.
        if not pending and last:
            self._window, self._emitted = [token_id], len(last)
        return new

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for each byte of a broken character."""
        text = self._tokenizer.decode(self._window)[self._emitted :]
        self._emitted += len(text)
        return text

    def _pending_bytes(self) -> int:
        """Counts the bytes at the window's end that further bytes may complete to a character."""
        tail: list[int] = []
        for token_id in reversed(self._window[-3:]):
            byte = self._tokenizer.byte_of(token_id)
            if byte is None:
                break
            tail.insert(0, byte)
        for start in range(len(tail)):
            try:
                bytes(tail[start:]).decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and error.start == 0:
                    return len(tail) - start
        return 0


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines cut to a length at which sentencepiece drops none; empty ones are left out."""
    for text in texts:
        for line in _NOT_TRAINED_ON.split(text):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a BPE model with byte fallback and Llama 2's settings; the same input, the same model.

    Nothing is normalised, so every text comes back from its tokens as it was, except that U+2581,
    sentencepiece's mark for a space, comes back as a space. All texts are held in memory.

    Args:
        texts: the corpus.
        vocab_size: number of tokens, of which 259 are special tokens and bytes.

    Returns:
        The bytes of a `tokenizer.model`.

    Raises:
        DataError: there is no text, or the vocabulary is too small or too large for it.
    """
    import sentencepiece

    lines = _training_lines(texts)
    first = next(lines, None)
    if first is None:
        raise DataError("no text to train a tokenizer on: all documents are empty")

    def all_lines() -> Iterator[str]:
        yield first
        yield from lines

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_lines(),
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
        reason = str(error).rpartition("] ")[2]
        raise DataError(f"vocabulary of {vocab_size:,} for this text: {reason}") from None
    return model.getvalue()


@dataclass(frozen=True)
class Args:
    """Trains a sentencepiece tokenizer (BPE with byte fallback, Llama 2's settings)."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Text files, .jsonl or .jsonl.gz files, folders or globs."""
    vocab_size: int
    """Number of tokens."""
    out: Path
    """Directory to write tokenizer.model to."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file."""
    force: bool = False
    """Replace an existing tokenizer.model."""
    json: bool = False
    """Print one JSON object instead of text."""


def main() -> None:
    """The command; see `Args`."""
    from llamapro import corpus

    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    target = args.out / FILE_NAME
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists; choose another directory or pass --force")
    counts = corpus.Counts()
    pieces = corpus.read_pieces(corpus.find_files(args.files), args.text_key, counts, "train")
    model = train((piece.text for piece in pieces), args.vocab_size)
    print(f"tokenizer: trained on {counts.describe()}", file=sys.stderr)
    aside = target.with_name(f".{FILE_NAME}.partial-{os.getpid()}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(model)
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
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
