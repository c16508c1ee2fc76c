"""Tokenizers: text to ids, and ids to text.

`vocabulary` reads their files; the Hugging Face files beside these add tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, UserError, warn
from llamapro.files import refuse_stand_in, user_path
from llamapro.text.comparison import say_differences, say_unread_files, takes_json, what_is_missing
from llamapro.text.token_files import (
    COMPANIONS,
    added_tokens,
    join_tokens,
    name_of,
    names_pattern,
    read_object,
    read_roles,
    roles_of,
)
from llamapro.text.vocabulary import (
    JSON_NAME,
    RANKS_NAME,
    Vocabulary,
    frame_of,
    has_space_everywhere,
    read_beside,
    read_vocabulary,
)

FILE_NAME = "tokenizer.model"


class Tokenizer:
    """Text to token ids and back; `Tokenizer.load` makes one.

    Attributes:
        files: all files that decide the ids; `path` is the first.
        vocab_size: the highest id + 1, added tokens included.
        bos_id: the token named BOS, or None. Chat templates write it; whether a text begins with it
            is up to `prefix`.
        eos_id: the token named EOS, or None.
        prefix: ids put before every text: BOS, nothing, or what else the model's tokenizer has.
        suffix: ids put after a document: EOS, or nothing if there is no EOS or it begins the next
            document anyway.
        special_tokens: control tokens, name to id.
        added: control tokens and others that were not trained with the vocabulary, by name.
        named_tokens: names of tokens by the role that the files give them, such as "pad_token".
        adds_space: whether a space is put before every text, as sentencepiece does.
        fingerprint: SHA-256, in hexadecimal, of what decides the ids: the vocabulary's file, and
            added tokens, BOS and EOS where other files change them, and where they are put.
    """

    def __init__(
        self,
        directory: Path,
        files: Sequence[Path],
        content: bytes,
        vocabulary: Vocabulary,
        raw_json: dict[str, Any],
    ) -> None:
        self.path, self.files = files[0], tuple(files)
        names = read_roles(directory)
        own = added_tokens(directory, names, raw_json)
        tokens = join_tokens(directory, names, own, vocabulary)
        self.added = tokens
        self.named_tokens = {key: str(name_of(token)) for key, token in roles_of(names).items()}
        self._encode_text, self._ends = vocabulary.encode, vocabulary.ends
        self._pieces = vocabulary.pieces | {
            t.id: b"" if t.special else vocabulary.words.get(t.id, name.encode())
            for name, t in tokens.items()
        }
        self.vocab_size = self._rows = max(self._pieces) + 1
        control = {name: token for name, token in tokens.items() if token.special}
        self.special_tokens = {name: token.id for name, token in control.items()}
        # Words to split off; the library finds those of the vocabulary itself.
        words = {n: t for n, t in own.items() if not t.special and vocabulary.added.get(n) != t}
        self._split_off = words | control
        plain = {name: token for name, token in tokens.items() if not token.special}
        splits = {False: words, True: self._split_off}
        self._patterns = {key: names_pattern(part, plain) for key, part in splits.items()}
        # Control tokens that the library would find in plain text too: their names are broken.
        found = [n for n in control if not vocabulary.added.get(n, control[n]).special]
        found += [n for n in control if control[n].id in vocabulary.pieces]
        breaks = (f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in found if len(n) > 1)
        self._break = re.compile(places) if (places := "|".join(breaks)) else None

        # A role that is null has no token; one that no file names has the vocabulary's.
        ids = {key: tokens[name].id for key, name in self.named_tokens.items()}
        own_ids = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
        self.bos_id, self.eos_id = (
            ids.get(key, None if key in names else own_id) for key, own_id in own_ids.items()
        )
        self.prefix, behind = frame_of(directory, raw_json, names, self.bos_id, self.eos_id)
        ends = [] if self.eos_id is None else [self.eos_id]
        self.suffix = [] if ends and ends == self.prefix[:1] else ends
        if behind:
            shown = ", ".join(n for i in behind for n, token in tokens.items() if token.id == i)
            warn(
                f"{directory}: the tokenizer puts {shown} behind every text, a prompt too, which "
                "nothing could follow: left out; a document of training ends with EOS"
            )
        self.adds_space = b"".join(map(self.bytes_of, self._encode_text("a"))) == b" a"
        if self.adds_space and not raw_json and names.get("add_prefix_space") is False:
            raise DataError(
                f"{directory}: add_prefix_space is false, but {self.path.name} puts a space before "
                "every text; AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes a "
                f"{JSON_NAME} that does not"
            )
        # What stands before a text that gets no space: the marks that are tokens of their own.
        marks = ((mark, self._encode_text(mark)) for mark in "\n\0.a")
        self._marks = [(mark, ids) for mark, ids in marks if self.decode(ids) == mark]
        # Whether the space is also put after each control token: "legacy" in transformers.
        self._spaces_all = (
            has_space_everywhere(raw_json) if raw_json else names.get("legacy") is True
        )
        changes: dict[str, Any] = {
            "added": {n: t.flags() for n, t in sorted(own.items()) if vocabulary.added.get(n) != t},
            "bos": None if self.bos_id == vocabulary.bos_id else [self.bos_id],
            "eos": None if self.eos_id == vocabulary.eos_id else [self.eos_id],
            "spaces_all": self.adds_space and self._spaces_all,
        }
        usual = ([] if self.bos_id is None else [self.bos_id], ends)
        if (self.prefix, self.suffix) != usual:
            changes["frame"] = [self.prefix, self.suffix]
        changed = json.dumps(changes).encode() if any(changes.values()) else b""
        self.fingerprint = hashlib.sha256(content + changed).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a vocabulary file, or the one in a directory, and the files beside it.

        `tokenizer.model`, here or in `original`, comes before `tokenizer.json`, which is made from
        it. They must have the same tokens. If they split texts differently, the directory stands
        for its `tokenizer.json`, as in transformers 5, and that is said. Raises DataError if a file
        is missing, damaged, of another kind or contradicts one beside it, or the library that reads
        it is not installed.
        """
        try:
            return cls._load(user_path(path))
        except (UserError, ImportError, OSError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # files hold values of any kind; a panic is no Exception
            raise DataError(
                f"{path}: its tokenizer files are damaged ({type(e).__name__}: {str(e)[:200]}); "
                f"fetch them again"
            ) from None

    @classmethod
    def _load(cls, path: Path) -> "Tokenizer":
        is_named, directory = not path.is_dir(), path if path.is_dir() else path.parent
        if not is_named:
            candidates = [directory / name for name in (FILE_NAME, RANKS_NAME, JSON_NAME)]
            path = next((file for file in candidates if file.exists()), path)
            if path == directory:
                raise DataError(f"{directory}: {what_is_missing(directory)}")
            say_unread_files(candidates, directory)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: no such tokenizer file or directory") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        refuse_stand_in(path, DataError)
        # A tokenizer.json beside a tokenizer.model is read too: it may name added tokens.
        json_path = path if path.suffix == ".json" else directory / JSON_NAME
        raw_json = read_object(json_path)
        vocabulary = read_vocabulary(path, content, raw_json)
        beside = vocabulary if path is json_path else read_beside(json_path, raw_json)
        files = [path, *(directory / n for n in COMPANIONS if (directory / n).exists())]
        if raw_json and path is not json_path:
            files.append(json_path)
            if takes_json(path, is_named, vocabulary, json_path, raw_json, beside):
                return cls._load(json_path)
        tokenizer = cls(directory, files, content, vocabulary, raw_json)
        if beside:
            say_differences(tokenizer.encode, tokenizer.added, beside, json_path, raw_json)
        return tokenizer

    def check_fits(self, vocab_size: int, model: str) -> None:
        """Raises DataError if a model of this `vocab_size`, named `model`, lacks tokens it needs.

        Added tokens without a row, often one for padding, are only named, and refused in a text.
        """
        rowless = {name: t.id for name, t in self._split_off.items() if t.id >= vocab_size}
        named = [i for i in (self.bos_id, self.eos_id) if i is not None]
        used = (self._pieces.keys() - rowless.values()) | {*self.prefix, *self.suffix, *named}
        if rowless and max(used) < vocab_size:
            self._rows = vocab_size
            names = ", ".join(f"{name} ({i})" for name, i in list(rowless.items())[:3])
            warn(f"{self.path}: {names}: no row in {model}, whose vocab_size is {vocab_size:,}")
        elif self.vocab_size > vocab_size:
            raise DataError(
                f"{self.path}: {self.vocab_size:,} tokens, but {model} has a vocabulary of "
                f"{vocab_size:,}: a tokenizer of another vocabulary, or with added tokens that "
                "have no row; use the model's own, or add rows"
            )

    def encode(
        self,
        text: str,
        bos: bool = False,
        eos: bool = False,
        *,
        special: bool = False,
        continues: bool = False,
    ) -> list[int]:
        """Returns the token ids of a text. Raises DataError if UTF-8 cannot encode it.

        Args:
            bos: put `prefix` first, as the model's own tokenizer does.
            eos: put `suffix` last. With both, the text is a document of a training stream, in
                which exactly one EOS, or a BOS that is the same token, ends each document.
            special: names of control tokens ("<s>") stand for them instead of being plain
                characters; for trusted text only.
            continues: the text continues a document, so no space is put before it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not valid Unicode: {error}") from None
        ids = list(self.prefix) if bos else []
        for _, part_ids in self.encode_parts(text, special=special, continues=continues):
            ids += part_ids
        return ids + self.suffix if eos else ids

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids that a model continues; an empty text starts from BOS, else from EOS.

        Raises DataError as `encode`, or if the text is empty and the tokenizer names neither.
        """
        if found := [name for name in self.special_tokens if name in text]:
            warn(
                f"{found[0]!r} in the prompt is plain characters here, in transformers the token; "
                "'llamapro chat' puts tokens around turns"
            )
        named = [i for i in (self.bos_id, self.eos_id) if i is not None]
        ids = self.encode(text, bos=True) or named[:1]
        if not ids:
            raise DataError(
                f"{self.path}: names neither BOS nor EOS, so an empty text has no beginning; "
                "give a prompt"
            )
        return ids

    def document_start(self) -> list[int]:
        """Returns what stands before a document in training: `prefix`, else EOS, else BOS.

        It is [] if the tokenizer names none of them.
        """
        named = [i for i in (self.eos_id, self.bos_id) if i is not None]
        return self.prefix or named[:1]

    def encode_parts(
        self, text: str, mark: str = "", *, special: bool = True, continues: bool = False
    ) -> Iterator[tuple[str, list[int]]]:
        """Yields the parts of a text with their ids: a token's name, or the text between tokens.

        The character `mark` is left out of the text; a name with it inside is plain text.
        """
        for number, part in enumerate(_split(self._patterns[special], text)):
            if number % 2:  # the name of a token
                token = self.added.get(part) or self.added[self._without_space(part)]
                if token.id >= self._rows:
                    raise DataError(
                        f"{self.path}: a text names {part!r}, token {token.id}, for which the "
                        f"model has no row (vocab_size {self._rows:,})"
                    )
                yield part, [token.id]
                continues = not self._spaces_all
            elif part:
                plain = part.replace(mark, "") if mark else part
                yield plain, self._encode_plain(plain, continues)
                continues = True

    def _without_space(self, part: str) -> str:
        """Returns the name in a part of a text that has the white space around it, too."""
        found = (n for n in self.added if n in part and not part.replace(n, "", 1).strip())
        return max(found, key=len)

    def ends_of(self, text: str, ids: list[int]) -> list[int] | None:
        """Returns where each token of a text from `encode_parts` ends, in characters of the text.

        It is for texts that the tokenizer changes, such as by NFC or `<unk>`; None if unknown.
        """
        for before in ("", *(mark for mark, _ in self._marks)):
            found, ends = self._ends(before + text) if self._ends else ([], [])
            if self._ends and found[len(found) - len(ids) :] == ids:
                return [max(0, end - len(before)) for end in ends[len(ends) - len(ids) :]]
        return None

    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        """Returns the ids of text in which names of control tokens are plain characters."""
        parts = enumerate(_split(self._break, text))
        return [i for n, part in parts for i in self._encode_part(part, continues or n > 0)]

    def _encode_part(self, text: str, continues: bool) -> list[int]:
        # The space goes before a mark and is removed with it, unless that merged with the text.
        for mark, own in self._marks if continues and self.adds_space else ():
            ids = self._encode_text(mark + text)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        return self._encode_text(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Control tokens and ids past the vocabulary, the rows of a padded model, give no text.
        """
        text = b"".join(self.bytes_of(int(i)) for i in ids)
        return text.removeprefix(b" " if self.adds_space else b"").decode(errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the bytes of text that a token stands for, b"" for a control token."""
        return self._pieces.get(token_id, b"")


def _split(pattern: re.Pattern[str] | None, text: str) -> list[str]:
    """Splits a text; a pattern that matches nowhere would take a tenth of the time of encoding."""
    return pattern.split(text) if pattern else [text]
