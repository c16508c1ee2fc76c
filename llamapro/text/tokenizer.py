"""Tokenizers of every LLaMA-shaped model: loaded with every check, decoded as a stream.

sentencepiece `tokenizer.model`, Llama 3's `tokenizer.model` of BPE ranks, `tokenizer.json`.

    python -m llamapro.text.tokenizer FILES... --vocab-size N --out DIR
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from llamapro import cli
from llamapro.errors import DataError, suggest
from llamapro.text.vocabulary import (
    COMPANIONS,
    JSON_NAME,
    RANKS_NAME,
    AddedToken,
    Vocabulary,
    added_tokens,
    has_space_everywhere,
    json_pieces,
    name_of,
    read_object,
    read_vocabulary,
)

FILE_NAME = "tokenizer.model"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        path: the vocabulary's file.
        files: all files that decide the ids; `path` is the first.
        vocab_size: the highest id + 1, added tokens included.
        bos_id: id put before a document, or None if there is none.
        eos_id: id put after a document, or None.
        special_tokens: control tokens, name to id.
        adds_space: a space is put before every text (sentencepiece does, Llama 3's does not).
        fingerprint: SHA-256 of what decides the ids, in hexadecimal: of the vocabulary's file, and
            of added tokens, BOS and EOS where other files change them.
    """

    def __init__(
        self,
        directory: Path,
        files: Sequence[Path],
        content: bytes,
        vocabulary: Vocabulary,
        raw: dict[str, Any],
    ) -> None:
        self.path, self.files = files[0], tuple(files)
        self._directory = directory
        config = read_object(directory / "tokenizer_config.json")
        names = read_object(directory / "special_tokens_map.json") | config
        added = dict(vocabulary.added)
        own = added_tokens(directory, names, raw)
        for name, token in own.items():
            # Reserved tokens get names: two for one id would be ambiguous.
            added = {n: t for n, t in added.items() if n == name or t.id != token.id}
            added[name] = token
        self._encode_text = vocabulary.encode
        self._pieces = vocabulary.pieces | {
            token.id: b"" if token.special else name.encode() for name, token in added.items()
        }
        self.vocab_size = max(self._pieces) + 1
        self.special_tokens = {name: token.id for name, token in added.items() if token.special}
        # The libraries find those they know.
        others = {
            name: token
            for name, token in own.items()
            if not token.special and name not in vocabulary.added
        }
        controls = {name: token for name, token in added.items() if token.special}
        self._tokens = added
        self._patterns = {False: _pattern(others), True: _pattern(others | controls)}
        self.bos_id = self._frame(names, "bos_token", vocabulary.bos_id)
        self.eos_id = self._frame(names, "eos_token", vocabulary.eos_id)
        self.adds_space = self._bytes(self._encode_text("a")) == b" a"
        # Whether that space is also put after each control token: "legacy" in transformers.
        self._spaces_all = has_space_everywhere(raw) if raw else config.get("legacy") is True
        digest = hashlib.sha256(content)
        changes: dict[str, Any] = {
            "added": {n: asdict(t) for n, t in sorted(own.items()) if vocabulary.added.get(n) != t},
            "bos": None if self.bos_id == vocabulary.bos_id else [self.bos_id],
            "eos": None if self.eos_id == vocabulary.eos_id else [self.eos_id],
            "spaces_all": self.adds_space and self._spaces_all,
        }
        if any(changes.values()):
            digest.update(json.dumps(changes).encode())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a vocabulary file, or the one in a directory, with what the files beside it say.

        In a directory, `tokenizer.model`, then Llama 3's in `original`, comes before
        `tokenizer.json`: it is what the model was trained with; the other was made from it. They
        must agree. Added tokens, BOS and EOS are those of the directory's Hugging Face files.

        Raises:
            DataError: naming the file, if it is missing, damaged, of another kind, in contradiction
                to one beside it, or if the library that reads it is not installed.
        """
        path = Path(path)
        directory = path if path.is_dir() else path.parent
        if path.is_dir():
            names = (FILE_NAME, RANKS_NAME, JSON_NAME)
            present = [directory / name for name in names if (directory / name).exists()]
            if not present:
                raise DataError(
                    f"{directory}: no {FILE_NAME} or {JSON_NAME} in this directory; put the "
                    f"model's own there"
                )
            path = present[0]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: no such tokenizer file or directory") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        # Also beside a tokenizer.model, whose added tokens it may name.
        json_path = path if path.suffix == ".json" else directory / JSON_NAME
        raw = read_object(json_path)
        vocabulary = read_vocabulary(path, content, raw)
        files = [path, *(directory / n for n in COMPANIONS if (directory / n).exists())]
        if raw and path is not json_path:
            files.append(json_path)
            # User-defined pieces are added tokens there.
            listed = {t.get("id"): name_of(t) for t in raw.get("added_tokens", [])}
            texts = {i: str(name).replace("\u2581", " ").encode() for i, name in listed.items()}
            rest = {i: p for i, p in vocabulary.pieces.items() if texts.get(i) != p}
            if json_pieces(json_path, raw) != rest:
                raise DataError(
                    f"{path} and {json_path.name} are of different vocabularies; remove the one "
                    f"that is not the model's"
                )
        return cls(directory, files, content, vocabulary, raw)

    def check_fits(self, vocab_size: int, where: str) -> None:
        """Raises DataError if a model of `vocab_size`, from `where`, lacks some of the tokens."""
        if self.vocab_size > vocab_size:
            raise DataError(
                f"{self.path}: {self.vocab_size:,} tokens, but {where} has a vocabulary of "
                f"{vocab_size:,}: a tokenizer of another vocabulary; use the model's own"
            )

    def token_id(self, name: str) -> int:
        """Returns the id of a control token, such as "<|eot_id|>"; raises DataError if unknown."""
        if name not in self.special_tokens:
            hint = suggest(name, list(self.special_tokens))
            raise DataError(f"{self.path}: no special token {name!r}{hint}")
        return self.special_tokens[name]

    def encode(
        self,
        text: str,
        bos: bool = False,
        eos: bool = False,
        *,
        special: bool = False,
        continues: bool = False,
    ) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: any text; the names of control tokens in it ("<s>") are plain characters.
            bos: put `bos_id` first, if there is one.
            eos: put `eos_id` last, if there is one.
            special: names of control tokens stand for them: for text that no stranger wrote.
            continues: the text goes on within a document: no space is put before it.

        Raises:
            DataError: the text holds half a surrogate pair, which UTF-8 cannot encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not valid Unicode: {error}") from None
        ids: list[int] = [self.bos_id] if bos and self.bos_id is not None else []
        for _, more in self._encode_parts(text, special, continues):
            ids += more
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_parts(self, text: str, mark: str) -> Iterator[tuple[str, list[int]]]:
        """Yields the parts of a text with control tokens, as with `special`, and their ids.

        Args:
            text: names of control tokens stand for them, unless a mark is in them.
            mark: a character that is left out.

        Yields:
            A token's name and its id; or text between them, without marks, and its ids.
        """
        return self._encode_parts(text, True, False, mark)

    def _encode_parts(
        self, text: str, special: bool, continues: bool, mark: str = ""
    ) -> Iterator[tuple[str, list[int]]]:
        for part, token in self._split(text, special):
            if token is not None:
                yield part, [token.id]
                continues = not self._spaces_all
            else:
                plain = part.replace(mark, "") if mark else part
                yield plain, self._encode_part(plain, continues)
                continues = True

    def _split(self, text: str, special: bool) -> Iterator[tuple[str, AddedToken | None]]:
        """Yields the tokens that are named in a text, and the text between them."""
        at = 0
        for match in self._patterns[special].finditer(text):
            if match.start() > at:
                yield text[at : match.start()], None
            name = match.group()
            yield name, self._tokens[name if name in self._tokens else name.strip()]
            at = match.end()
        if at < len(text):
            yield text[at:], None

    @cached_property
    def _newline(self) -> list[int]:
        return self._encode_text("\n")

    def _encode_part(self, text: str, continues: bool) -> list[int]:
        """Returns the ids of text without tokens to be split off."""
        if continues and self.adds_space:
            # The space goes before a newline that is taken away again.
            ids = self._encode_text("\n" + text)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        # Else a vocabulary whose tokens hold newlines: one space more.
        return self._encode_text(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids.

        Control tokens give no text, nor do ids past the vocabulary: models are often padded with
        rows that no token has. Bytes that are not UTF-8 become U+FFFD.
        """
        decoder = StreamingDecoder(self)
        return "".join([decoder.feed_all(ids), decoder.flush()])

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the bytes of text a token stands for: part of a character, or many of them.

        Nothing for control tokens and ids past the vocabulary.
        """
        return self._pieces.get(token_id, b"")

    def _bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.bytes_of, ids))

    def _frame(self, names: dict[str, Any], key: str, fallback: int | None) -> int | None:
        """Returns the id of the token that the files beside the vocabulary name, if they do."""
        if key not in names:
            return fallback
        name = name_of(names[key])
        if name is None:
            return None
        if name not in self._tokens:
            raise DataError(f"{self._directory}: {key} is {name!r}, which is no token of it")
        return self._tokens[name].id


class StreamingDecoder:
    """Turns ids into text one at a time, as they are generated.

    The texts returned by `feed`, and by `flush` at the end, continue the prompt's: joined to it
    they are `tokenizer.decode` of all ids. Tokens may end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._strips_space = tokenizer.adds_space  # before the very first text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.feed_all(prompt_ids)

    def feed(self, token_id: int) -> str:
        """Takes the next id; returns the text that became final, often "" inside a character."""
        piece = self._tokenizer.bytes_of(token_id)
        if piece and self._strips_space:
            piece, self._strips_space = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def feed_all(self, ids: Iterable[int]) -> str:
        """Takes some ids; returns the text that became final."""
        return "".join(self.feed(int(i)) for i in ids)

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for a broken character."""
        return self._decoder.decode(b"", final=True)


def _pattern(tokens: dict[str, AddedToken]) -> re.Pattern[str]:
    """Returns what finds tokens in a text, the longest first, or nothing."""
    ordered = sorted(tokens.items(), key=lambda item: len(item[0]), reverse=True)
    parts = (
        r"\s*" * token.lstrip + re.escape(name) + r"\s*" * token.rstrip for name, token in ordered
    )
    return re.compile("|".join(parts) or r"(?!)")


def main() -> None:
    """The command, which trains a tokenizer; see `llamapro.train_tokenizer`."""
    from llamapro import train_tokenizer

    train_tokenizer.main()


if __name__ == "__main__":
    cli.run(main)
