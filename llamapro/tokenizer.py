"""Tokenizers of every LLaMA-shaped model: loaded with every check, decoded as a stream.

sentencepiece `tokenizer.model`, Llama 3's `tokenizer.model` of BPE ranks, `tokenizer.json`.

python -m llamapro.tokenizer FILES... --vocab-size N --out DIR   (see `llamapro.train_tokenizer`)
"""

import base64
import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llamapro import cli
from llamapro.config import DataError, suggest

FILE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
# Files beside the vocabulary that name tokens; they count where they exist.
COMPANIONS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
# A line of Llama 3's vocabulary: a token's bytes in base64 and its rank.
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# Meta's llama3 `tokenizer.py`: how text is cut before the merges, and how many ranks there are.
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_RANKS = 128_000
# That file also cuts longer runs with or without white space: tiktoken dies of 10^6 spaces.
_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_RUN + 1},}}|(?<!\S)\S{{{_RUN + 1},}}")
# The names of Llama 3.1 and later; 3.0 has reserved ones where these have a use.
_LLAMA_3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]
# Where no file says which tokens begin and end a document: the first of these that there is.
_BOS_NAMES = ("<s>", "<|begin_of_text|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>")


@dataclass(frozen=True)
class _Added:
    """A token that is not of the vocabulary's own making; the names are tokenizer.json's."""

    id: int
    special: bool  # a control token: gives no text, and its name in a text is plain characters
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False


@dataclass(frozen=True)
class _Vocabulary:
    """What a vocabulary file says, whichever library reads it.

    Attributes:
        encode: text to ids; names of control tokens are plain characters.
        pieces: id to the bytes of text it stands for; control tokens have none.
        added: control tokens, and others that `encode` finds by itself.
        bos_id, eos_id: of the file itself, or None.
    """

    encode: Callable[[str], list[int]]
    pieces: dict[int, bytes]
    added: dict[str, _Added]
    bos_id: int | None
    eos_id: int | None


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
        self, files: Sequence[Path], content: bytes, vocabulary: _Vocabulary, raw: dict[str, Any]
    ) -> None:
        self.path, self.files = files[0], tuple(files)
        directory = self.path.parent
        config = _read_object(directory / "tokenizer_config.json")
        names = _read_object(directory / "special_tokens_map.json") | config
        added = dict(vocabulary.added)
        own = _added_tokens(directory, names, raw)
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
        self._spaces_all = _has_space_everywhere(raw) if raw else config.get("legacy") is True
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

        In a directory, `tokenizer.model` comes before `tokenizer.json`: it is what the model was
        trained with and needs no extra; the other was made from it. They must agree. Added tokens,
        BOS and EOS are those of the Hugging Face files beside it.

        Raises:
            DataError: naming the file, if it is missing, damaged, of another kind, in contradiction
                to one beside it, or if the library that reads it is not installed.
        """
        path = Path(path)
        if path.is_dir():
            directory = path
            present = [directory / n for n in (FILE_NAME, JSON_NAME) if (directory / n).exists()]
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
        json_path = path if path.suffix == ".json" else path.with_name(JSON_NAME)
        raw = _read_object(json_path)
        if path is json_path:
            vocabulary = _read_json(path, content, raw)
        elif _RANK_LINE.match(content):
            vocabulary = _read_ranks(path, content)
        else:
            vocabulary = _read_sentencepiece(path, content)
        files = [path, *(path.with_name(n) for n in COMPANIONS if path.with_name(n).exists())]
        if raw and path is not json_path:
            files.append(json_path)
            if _json_pieces(json_path, raw) != vocabulary.pieces:
                raise DataError(
                    f"{path} and {json_path.name} are of different vocabularies; remove the one "
                    f"that is not the model's"
                )
        return cls(files, content, vocabulary, raw)

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

    def _split(self, text: str, special: bool) -> Iterator[tuple[str, _Added | None]]:
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
        name = _name_of(names[key])
        if name is None:
            return None
        if name not in self._tokens:
            raise DataError(f"{self.path.parent}: {key} is {name!r}, which is no token of it")
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


# ---- The three kinds of vocabulary file --------------------------------------------------------


def _read_sentencepiece(path: Path, content: bytes) -> _Vocabulary:
    import sentencepiece

    try:
        if not content:
            raise RuntimeError("the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(f"{path}: not a sentencepiece model ({error})") from None
    pieces: dict[int, bytes] = {}
    added: dict[str, _Added] = {}
    for i in range(model.vocab_size()):
        piece: str = model.id_to_piece(i)
        if model.is_control(i) or model.is_unknown(i):
            added[piece] = _Added(i, special=True)
        elif model.is_byte(i):
            pieces[i] = bytes.fromhex(piece[3:5])  # "<0x0A>"
        else:
            pieces[i] = piece.replace("\u2581", " ").encode()
    bos, eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
    return _Vocabulary(model.encode, pieces, added, bos, eos)


def _read_ranks(path: Path, content: bytes) -> _Vocabulary:
    try:
        import tiktoken
    except ImportError:
        raise DataError(_needs(path, "BPE ranks (Llama 3)", "tiktoken")) from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f"{path}:{number + 1}: not a token and its rank; damaged") from None
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(
            f"{path}: BPE ranks that lack {missing} of the 256 bytes or some ranks; damaged"
        )
    if len(ranks) > LLAMA_3_RANKS:
        raise DataError(
            f"{path}: {len(ranks):,} BPE ranks, Llama 3 has {LLAMA_3_RANKS:,}: another model's, "
            f"whose way of cutting text is not in the file; use its {JSON_NAME}"
        )
    special = {name: len(ranks) + i for i, name in enumerate(_LLAMA_3_SPECIAL)}
    encoding = tiktoken.Encoding(
        path.name, pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )

    def encode(text: str) -> list[int]:
        ids, at = [], 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + _RUN, run.end(), _RUN):
                ids += encoding.encode_ordinary(text[at:cut])
                at = cut
        return ids + encoding.encode_ordinary(text[at:])

    return _Vocabulary(
        encode,
        {rank: token for token, rank in ranks.items()},
        {name: _Added(i, special=True) for name, i in special.items()},
        special[_BOS_NAMES[1]],
        special[_EOS_NAMES[1]],
    )


def _read_json(path: Path, content: bytes, raw: dict[str, Any]) -> _Vocabulary:
    try:
        import tokenizers
    except ImportError:
        raise DataError(_needs(path, JSON_NAME, "tokenizers")) from None
    try:
        model = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:
        if type(error) is not ValueError and type(error) is not Exception:
            raise
        # The library has no class of its own for what it raises.
        raise DataError(f"{path}: not a tokenizer of the tokenizers library ({error})") from None
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # their names are plain characters
    added = {
        token.content: _Added(i, token.special, token.lstrip, token.rstrip)
        for i, token in model.get_added_tokens_decoder().items()
    }

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    bos, eos = (
        next((added[name].id for name in names if name in added), None)
        for names in (_BOS_NAMES, _EOS_NAMES)
    )
    return _Vocabulary(encode, _json_pieces(path, raw), added, bos, eos)


def _json_pieces(path: Path, raw: dict[str, Any]) -> dict[int, bytes]:
    """Returns the bytes of the tokens in a tokenizer.json, without the added ones."""
    kinds = {part.get("type") for part in _parts(raw.get("decoder"), "decoders")}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise DataError(
            f"{path}: its decoder is {sorted(map(str, kinds))}, expected ByteLevel, ByteFallback "
            f"or Metaspace: not the tokenizer of a LLaMA-shaped model"
        )
    listed = raw["model"]["vocab"]  # of BPE a mapping to ids, of Unigram a list with scores
    tokens = (
        listed.items() if isinstance(listed, dict) else ((t[0], i) for i, t in enumerate(listed))
    )
    to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
    added = {token["id"] for token in raw.get("added_tokens", [])}
    pieces: dict[int, bytes] = {}
    for token, i in tokens:
        if i in added:
            continue
        if "ByteLevel" in kinds:
            pieces[i] = bytes(to_byte[character] for character in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            pieces[i] = bytes.fromhex(token[3:5])
        else:
            pieces[i] = token.replace("\u2581", " ").encode()
    return pieces


def _needs(path: Path, what: str, library: str) -> str:
    return f"{path}: {what}, read with {library}: pip install 'llamapro[tokenizers]'"


def _parts(raw: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Returns a component of a tokenizer.json, or those it is a sequence of."""
    return raw.get(key, [raw]) if raw else []


def _has_space_everywhere(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before each text between control tokens."""
    normalizers = _parts(raw.get("normalizer"), "normalizers")
    cutters = _parts(raw.get("pre_tokenizer"), "pretokenizers")
    return any(part.get("type") == "Prepend" for part in normalizers) or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") == "always"
        for part in cutters
    )


def _byte_characters() -> str:
    """Returns GPT-2's printable characters for the bytes 0 to 255 (its `bytes_to_unicode`)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))


# ---- The files beside it -----------------------------------------------------------------------


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} if there is no such file."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _name_of(token: Any) -> str | None:
    """Returns a token's name, written as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(
    directory: Path, names: dict[str, Any], raw_json: dict[str, Any]
) -> dict[str, _Added]:
    """Returns the tokens that the files of a directory add to its vocabulary, or rename."""
    lists = [names.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    roles = {_name_of(token) for key, token in names.items() if key.endswith("_token")}
    roles |= {_name_of(token) for tokens in lists for token in tokens}
    sources: dict[str, list[dict[str, Any]]] = {
        JSON_NAME: raw_json.get("added_tokens", []),
        COMPANIONS[0]: [
            {"id": i, **token} for i, token in names.get("added_tokens_decoder", {}).items()
        ],
        COMPANIONS[1]: [
            {"id": i, "content": name, "special": name in roles}
            for name, i in _read_object(directory / COMPANIONS[1]).items()
        ],
    }
    added: dict[str, _Added] = {}
    for source, tokens in sources.items():
        for raw in tokens:
            try:
                name, flags = raw["content"], (raw.get(k, False) for k in ("lstrip", "rstrip"))
                token = _Added(int(raw["id"]), bool(raw.get("special", False)), *flags)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{directory / source}: added token {raw!r}: {error!r}") from None
            if name not in added:
                added[name] = token
            elif added[name].id != token.id:
                raise DataError(
                    f"{directory / source}: {name!r} is token {token.id}, but another file there "
                    f"says {added[name].id}; remove the one that is not of the model"
                )
    return added


def _pattern(tokens: dict[str, _Added]) -> re.Pattern[str]:
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
