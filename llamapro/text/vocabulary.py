"""The vocabulary files of LLaMA-shaped models.

The library sentencepiece reads its own `tokenizer.model`, tiktoken Llama 3's `tokenizer.model` of
BPE ranks, and tokenizers `tokenizer.json`.
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, needed

JSON_NAME = "tokenizer.json"
# Meta's Hugging Face repositories keep Llama 3's ranks here, because other programs take a
# `tokenizer.model` beside a tokenizer.json for a sentencepiece model.
RANKS_NAME = "original/tokenizer.model"
# A line of Llama 3's vocabulary: a token's bytes in base64 and its rank.
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# From Meta's llama3 `tokenizer.py`: how text is cut before the merges, and the number of ranks.
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_RANKS = 128_000
# That file also cuts longer runs with or without white space: tiktoken crashes on a million spaces.
_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_RUN + 1},}}|(?<!\S)\S{{{_RUN + 1},}}")
_BOTH_KINDS = re.compile(r"\s+\S|\S+\s")
# The names of Llama 3.1 and later; some of them are still reserved tokens in 3.0.
LLAMA_3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]
# If no file says which tokens begin and end a document, the first of these that exists does.
_BOS_NAMES = ("<s>", "<|begin_of_text|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>")


@dataclass(frozen=True)
class AddedToken:
    """A token that was not trained with the vocabulary; the field names are tokenizer.json's."""

    id: int
    special: bool  # a control token gives no text, and its name in a text is plain characters
    lstrip: bool = False  # includes the white space before it
    rstrip: bool = False
    single_word: bool = False  # not found inside a longer word
    # Found after the others, in what a normaliser made of the text between them.
    normalized: bool = field(default=False, compare=False)

    def flags(self) -> dict[str, Any]:
        """Returns the fields for a fingerprint, to which one that is not set adds nothing."""
        fields = asdict(self).items()
        return {k: v for k, v in fields if k != "normalized" and (v or k != "single_word")}


@dataclass(frozen=True)
class Vocabulary:
    """The content of a vocabulary file, independent of the library that reads it."""

    encode: Callable[[str], list[int]]  # names of control tokens are plain characters
    pieces: dict[int, bytes]  # the text that an id stands for, without control tokens
    added: dict[str, AddedToken]  # control tokens, and others that `encode` finds itself
    # BOS and EOS according to this file alone, or None.
    bos_id: int | None
    eos_id: int | None
    # Text to ids, and where each ends, in characters of the text before it is normalised; None if
    # the library does not say it.
    ends: Callable[[str], tuple[list[int], list[int]]] | None = None
    library: Any = None  # the tokenizer of the library tokenizers, for a tokenizer.json
    # The text of added tokens, which is not always their name: a normaliser may put a space before
    # them, and they are found with it only; or the name is written as those of the pieces.
    words: dict[int, bytes] = field(default_factory=dict)


# ---- The three kinds of vocabulary file --------------------------------------------------------


def read_vocabulary(path: Path, content: bytes, raw_json: dict[str, Any]) -> Vocabulary:
    """Reads a vocabulary file of any kind; `raw_json` is the content of a tokenizer.json.

    Raises DataError if the file is damaged or of another kind, or its library is not installed.
    """
    if path.suffix == ".json":
        return _read_json(path, content, raw_json)
    if is_ranks(content):
        return _read_ranks(path, content)
    return _read_sentencepiece(path, content)


def _read_sentencepiece(path: Path, content: bytes) -> Vocabulary:
    import sentencepiece

    try:
        if not content:
            raise RuntimeError("the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(f"{path}: not a sentencepiece model ({error})") from None
    pieces: dict[int, bytes] = {}
    added: dict[str, AddedToken] = {}
    for i in range(model.vocab_size()):
        piece: str = model.id_to_piece(i)
        if model.is_control(i) or model.is_unknown(i):
            added[piece] = AddedToken(i, special=True)
        else:
            pieces[i] = _piece_bytes(piece)

    def ends(text: str) -> tuple[list[int], list[int]]:
        found = model.encode_as_offset_mapping(text)
        return found["ids"], [end for _, end in found["offsets"]]

    bos, eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
    has_offsets = hasattr(model, "encode_as_offset_mapping")  # from version 0.2.1 on
    return Vocabulary(model.encode, pieces, added, bos, eos, ends if has_offsets else None)


def is_ranks(content: bytes) -> bool:
    """Whether a `tokenizer.model` holds BPE ranks, as Llama 3's, and not a sentencepiece model."""
    return _RANK_LINE.match(content) is not None


def parse_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Returns the tokens of Llama 3's `tokenizer.model` and their ranks, which are their ids.

    Raises DataError that names `path` if the content is damaged or another model's.
    """
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
    return ranks


def _read_ranks(path: Path, content: bytes) -> Vocabulary:
    with needed(f"{path}: BPE ranks (Llama 3), read with tiktoken", "tokenizers", DataError):
        import tiktoken
    ranks = parse_ranks(path, content)
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA_3_SPECIAL)}
    encoding = tiktoken.Encoding(
        path.name, pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )

    def encode(text: str) -> list[int]:
        if not _may_have_long_run(text):
            return encoding.encode_ordinary(text)
        ids, at = [], 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + _RUN, run.end(), _RUN):
                ids += encoding.encode_ordinary(text[at:cut])
                at = cut
        return ids + encoding.encode_ordinary(text[at:])

    return Vocabulary(
        encode,
        {rank: token for token, rank in ranks.items()},
        {name: AddedToken(i, special=True) for name, i in special.items()},
        special[_BOS_NAMES[1]],
        special[_EOS_NAMES[1]],
    )


def _may_have_long_run(text: str) -> bool:
    """Whether `_LONG_RUN` may be in a text; searching for it takes half as long as encoding."""
    step = _RUN // 2  # a long run fills one of the blocks of this many characters
    starts = range(0, len(text) - step, step)
    return not all(_BOTH_KINDS.match(text, at, at + step) for at in starts)


def _read_json(path: Path, content: bytes, raw: dict[str, Any]) -> Vocabulary:
    with needed(f"{path}: read with tokenizers", "tokenizers", DataError):
        import tokenizers
    try:
        model = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain exceptions
        raise DataError(f"{path}: not a tokenizer of the tokenizers library ({error})") from None
    if dropout := getattr(model.model, "dropout", None):
        raise DataError(
            f"{path}: model.dropout is {dropout}, so a text has other tokens each time; set it to 0"
        )
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # as text, which is what their names are
    added = {
        token.content: AddedToken(
            i, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized
        )
        for i, token in model.get_added_tokens_decoder().items()
    }

    def encode(text: str) -> list[int]:
        # The same ids as `encode`, which also finds offsets, and holds the interpreter lock.
        return model.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def ends(text: str) -> tuple[list[int], list[int]]:
        found = model.encode(text, add_special_tokens=False)
        return found.ids, [end for _, end in found.offsets]

    bos, eos = (
        next((added[name].id for name in names if name in added), None)
        for names in (_BOS_NAMES, _EOS_NAMES)
    )
    read, words = _reader_of(path, raw), {}
    for name, token in added.items():
        text = read(model.id_to_token(token.id) or name)
        # Half a character, such as "é" as a byte's name: text as it is.
        words[token.id] = text if text.decode(errors="ignore").encode() == text else name.encode()
    return Vocabulary(encode, json_pieces(path, raw), added, bos, eos, ends, model, words)


def read_beside(path: Path, raw: dict[str, Any]) -> Vocabulary | None:
    """Reads a tokenizer.json that is not the vocabulary itself; None if it cannot be compared."""
    try:
        return _read_json(path, json.dumps(raw).encode(), raw) if raw else None
    except DataError:
        return None


def json_pieces(path: Path, raw: dict[str, Any]) -> dict[int, bytes]:
    """Returns id to bytes of the tokens in a tokenizer.json, without the added ones.

    Raises DataError if the decoder is not that of a LLaMA-shaped model, or there is no vocabulary.
    """
    read, vocab = _reader_of(path, raw), (raw.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # Unigram: names and scores
        vocab = {name: i for i, (name, _) in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise DataError(f"{path}: has no vocabulary ('model.vocab')")
    added = {token["id"] for token in raw.get("added_tokens", [])}
    return {i: read(name) for name, i in vocab.items() if i not in added}


def _reader_of(path: Path, raw: dict[str, Any]) -> Callable[[str], bytes]:
    """Returns what gives a token's bytes for its name; raises DataError for an unknown decoder."""
    kinds = {part.get("type") for part in parts_of(raw.get("decoder"), "decoders")}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise DataError(
            f"{path}: its decoder is {sorted(map(str, kinds))}, expected ByteLevel, ByteFallback "
            f"or Metaspace: not the tokenizer of a LLaMA-shaped model"
        )
    return _shown_bytes if "ByteLevel" in kinds else _piece_bytes


def _shown_bytes(name: str) -> bytes:
    """Returns the bytes of a token that is named in GPT-2's characters for them, or is text."""
    try:
        return bytes(map(_TO_BYTE.__getitem__, name))
    except KeyError:
        return name.encode()


def _piece_bytes(name: str) -> bytes:
    """Returns the bytes of a token that is named as sentencepiece does: "<0x0A>", "▁word"."""
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    return name.replace("\u2581", " ").encode()


def parts_of(raw: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Returns the parts of a tokenizer.json's component: itself, unless it is a sequence."""
    return raw.get(key, [raw]) if raw else []


def has_space_everywhere(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before each text between control tokens."""
    normalizers = parts_of(raw.get("normalizer"), "normalizers")
    cutters = parts_of(raw.get("pre_tokenizer"), "pretokenizers")
    return any(part.get("type") == "Prepend" for part in normalizers) or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") == "always"
        for part in cutters
    )


def frame_of(
    home: Path, raw: dict[str, Any], config: dict[str, Any], bos_id: int | None, eos_id: int | None
) -> tuple[list[int], list[int]]:
    """Returns the ids that transformers' tokenizer puts before every text, and those behind it.

    A tokenizer.json says it in its post-processor, whatever `add_bos_token` says beside it, as in
    transformers 5. Version 4 differs for the class LlamaTokenizer, which rewrites that part. A
    tokenizer.model alone puts BOS first unless `add_bos_token` is false, as LLaMA was trained and
    as in version 4; version 5 would have no BOS without an `add_bos_token` that is true. Raises
    DataError if the post-processor cannot be read.

    Args:
        raw: its content, {} if there is none.
        config: `tokenizer_config.json`.
    """
    if not raw:
        pairs = ((bos_id, config.get("add_bos_token", True)), (eos_id, config.get("add_eos_token")))
        before, behind = ([i] if i is not None and is_on else [] for i, is_on in pairs)
        return before, behind
    before, behind = [], []
    try:
        for part in parts_of(raw.get("post_processor"), "processors"):
            if part["type"] == "TemplateProcessing":
                found = before
                for piece in part["single"]:
                    if "SpecialToken" in piece:
                        found += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
                    else:
                        found = behind
            elif part["type"] in ("BertProcessing", "RobertaProcessing"):
                before.append(part["cls"][1])
                behind.append(part["sep"][1])
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{home / JSON_NAME}: its post_processor cannot be read ({error!r})"
        ) from None
    return before, behind


def byte_characters() -> str:
    """Returns GPT-2's printable characters for the bytes 0 to 255 (its `bytes_to_unicode`)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))


_TO_BYTE = {character: byte for byte, character in enumerate(byte_characters())}
