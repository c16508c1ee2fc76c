"""Compares the tokenizer files of a directory where several answer one question.

Texts are split by each of them, because two files of the same tokens may still differ in merges,
normaliser, cuts or what they do around a control token.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, warn
from llamapro.text.token_files import COMPANIONS, name_of, read_object
from llamapro.text.vocabulary import (
    JSON_NAME,
    LLAMA_3_PATTERN,
    AddedToken,
    Vocabulary,
    json_pieces,
    parts_of,
)

# Words, spaces, line ends, digits, other scripts, code: normalisers and cuts differ in these.
_PROBES = (
    *("Hello world", " leading and  two   spaces ", "\n\n\ttabs\r\n", "1234567 3.14"),
    *("naïve Ωμέγα 日本語 😀", "e\u0301 ﬁ", "def f(x):\n    return x**2  # ok"),
    "DON'T https://a.b/c?d=e",
)
_SOME, _TOGETHER = 4096, 32  # pieces of a vocabulary that are tried, too; how many at once
# What transformers 5 reads a tokenizer.json with, or what is compared without importing it.
_KNOWN = {"", "TokenizersBackend", "PreTrainedTokenizer"}
_KNOWN |= {"LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"}


def what_is_missing(directory: Path) -> str:
    """Returns what to do with a directory that has no vocabulary file."""
    fix = "put the model's own there"
    if (directory / "vocab.json").exists():
        fix = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes one of vocab.json"
    return f"no tokenizer.model or {JSON_NAME} in this directory; {fix}"


def say_unread_files(candidates: list[Path], directory: Path) -> None:
    """Warns if a vocabulary beside the one that is read holds something else."""
    model, ranks, whole = candidates
    if model.exists() and ranks.exists() and model.read_bytes() != ranks.read_bytes():
        warn(f"{ranks}: not read; it is another file than {model}")
    parts = directory / "vocab.json"
    if parts.exists() and whole.exists():
        raw = read_object(whole)
        added = {name_of(token) for token in raw.get("added_tokens", [])}
        vocabs = (read_object(parts), dict(raw["model"]["vocab"]))
        one, other = ({n: i for n, i in vocab.items() if n not in added} for vocab in vocabs)
        if one != other:
            warn(f"{parts}: not read, as in transformers; its tokens are not {whole.name}'s")
    config = read_object(directory / COMPANIONS[0])
    if "AutoTokenizer" in (config.get("auto_map") or {}):
        warn(f"{directory}: the tokenizer's own code (auto_map) is not run; its files are read")
    if config.get("fix_mistral_regex"):
        warn(f"{directory}: fix_mistral_regex is not applied; transformers may cut words otherwise")
    for name in config.get("fast_tokenizer_files") or []:
        if name != JSON_NAME and (directory / name).exists():
            warn(f"{directory / name}: not read; transformers may take it for {JSON_NAME}")


def takes_json(
    path: Path,
    is_named: bool,
    vocabulary: Vocabulary,
    json_path: Path,
    raw: dict[str, Any],
    beside: Vocabulary | None,
) -> bool:
    """Whether a directory stands for its tokenizer.json, which splits texts differently.

    Args:
        is_named: whether the user named it, so that it counts.
        raw: the content of the tokenizer.json.
        beside: the same as its library reads it; None if it cannot.
    """
    # Sentencepiece's user-defined pieces are added tokens there.
    listed = {token.get("id"): name_of(token) for token in raw.get("added_tokens", [])}
    texts = {i: str(name).replace("\u2581", " ").encode() for i, name in listed.items()}
    rest = {i: piece for i, piece in vocabulary.pieces.items() if texts.get(i) != piece}
    if json_pieces(json_path, raw) != rest:
        raise DataError(
            f"{path} and {json_path.name} are of different vocabularies; remove the one that is "
            f"not the model's"
        )
    # Some pieces from everywhere, and the last ones, which were added for another language.
    pieces = [piece for piece in rest.values() if len(piece) > 1]
    pieces = pieces[:: 1 + len(pieces) // _SOME] + pieces[-_SOME:]
    parts = [b"".join(pieces[at : at + _TOGETHER]) for at in range(0, len(pieces), _TOGETHER)]
    probes = [*_PROBES, *(part.decode(errors="ignore") for part in parts)]
    pairs = ((text, vocabulary.encode(text), beside.encode(text)) for text in probes if beside)
    probe = next((text for text, ids, other in pairs if ids != other), None)
    if probe is not None:
        warn(
            f"{path} and {json_path.name} split {probe!r:.200} into different tokens: "
            f"{path.name if is_named else json_path.name} is read, transformers 5 reads "
            f"{json_path.name}; remove the one that the model was not trained with"
        )
    return probe is not None and not is_named


def say_differences(
    encode: Callable[..., list[int]],
    added: dict[str, AddedToken],
    beside: Vocabulary,
    path: Path,
    raw: dict[str, Any],
) -> None:
    """Warns if texts have other ids in transformers than here.

    Args:
        encode: `Tokenizer.encode`.
        added: the tokens that it knows.
        beside: the tokenizer.json as its library reads it.
    """
    config = read_object(path.parent / COMPANIONS[0])
    kind, has_choice = _class_of(read_object(path.parent / "config.json"), config)
    if kind in _KNOWN:
        probe = _split_by_class(kind, beside, raw, config)
    else:
        probe = _split_by_transformers(encode, path.parent)
    if probe is not None:
        fix = f"; PreTrainedTokenizerFast in {COMPANIONS[0]} makes it read the file"
        warn(
            f"{path}: its rules count here; transformers 5 takes those of tokenizer_class {kind!r},"
            f" which split {probe!r} into different tokens{fix * has_choice}"
        )
    listed = {token["content"]: token for token in raw.get("added_tokens", [])}
    same = [name for name in listed if added.get(name) == beside.added.get(name)]
    one_of_each = {str({**listed[name], "id": 0, "content": ""}): name for name in same}
    as_text = config.get("split_special_tokens") is True
    for name in one_of_each.values():
        text = f"a {name} b{name}c\n{name}"
        if encode(text, special=True) != _with_names(beside, text, as_text):
            warn(f"{path}: transformers splits {text!r} into other tokens than are read here")
            break


def _class_of(model: dict[str, Any], config: dict[str, Any]) -> tuple[str, bool]:
    """Returns the class that transformers 5 takes, and whether tokenizer_config.json can say so.

    `model` is the content of config.json. Mistral's and Qwen2's have theirs, whatever is named.
    """
    kind, key = model.get("model_type"), "tokenizer_class"
    default = "Qwen2Tokenizer" if kind in ("qwen2", "qwen3") else ""
    if kind in ("mistral", "qwen2"):
        return default, False
    return str(config.get(key) or model.get(key) or default).removesuffix("Fast"), True


def _split_by_transformers(encode: Callable[..., list[int]], directory: Path) -> str | None:
    """Returns a text that the installed transformers splits otherwise, or None."""
    try:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        pairs = [(text, encode(text, bos=True), theirs(text).input_ids) for text in _PROBES]
    except Exception:  # it is not installed, or cannot read what is read here
        return None
    return next((text for text, ids, other in pairs if other[: len(ids)] != ids), None)


def _with_names(vocabulary: Vocabulary, text: str, as_text: bool = False) -> list[int]:
    """Returns the ids of a text in which names of tokens stand for them, as in transformers."""
    vocabulary.library.encode_special_tokens = as_text
    try:
        ids: list[int] = vocabulary.library.encode(text, add_special_tokens=False).ids
    finally:
        vocabulary.library.encode_special_tokens = True
    return ids


def _split_by_class(
    kind: str, vocabulary: Vocabulary, raw: dict[str, Any], config: dict[str, Any]
) -> str | None:
    """Returns a text that transformers 5 splits otherwise than its tokenizer.json says, or None.

    For these classes it replaces the file's normaliser and cuts by its own, and takes added tokens
    from an added_tokens_decoder, if there is one, alone.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    library, space = vocabulary.library, config.get("add_prefix_space")
    is_bytes = any(part.get("type") == "ByteLevel" for part in parts_of(raw["decoder"], "decoders"))
    cutter: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    if kind == "GPT2Tokenizer":
        cutter = pre_tokenizers.ByteLevel(add_prefix_space=space is True)
    elif kind == "Qwen2Tokenizer":  # cuts numbers into digits
        split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN.replace("{1,3}", "")), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=space is True, use_regex=False)
        cutter, normalizer = pre_tokenizers.Sequence([split, bytes_only]), normalizers.NFC()
    elif kind == "LlamaTokenizer" and not is_bytes:
        scheme = "always" if config.get("legacy") is True else "first"
        scheme = "never" if space is False else scheme
        cutter = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    else:
        return None
    if table := config.get("added_tokens_decoder"):
        known = {*map(name_of, table.values()), *raw["model"]["vocab"]}
        if lost := [name for name in vocabulary.added if name not in known]:
            return lost[0]
    name = next((name for name, token in vocabulary.added.items() if token.special), "")
    probes, encode = [*_PROBES, f"a{name}b"], partial(_with_names, vocabulary)
    own, before = (library.normalizer, library.pre_tokenizer), [*map(encode, probes)]
    library.normalizer, library.pre_tokenizer = normalizer, cutter
    after = [*map(encode, probes)]
    library.normalizer, library.pre_tokenizer = own
    pairs = zip(probes, before, after, strict=True)
    return next((text for text, ids, other in pairs if ids != other), None)
