"""The tokenizer in a GGUF file's metadata, written as the files that transformers reads.

A file of the kind "gpt2" holds byte-level BPE and names the way text is cut before the merges. One
of the kind "llama" holds sentencepiece's pieces and scores, which become a `tokenizer.model` again.
"""

import importlib
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from llamapro.conversion.companions import CONFIG_NAME, SPACE, tokenizer_files
from llamapro.errors import DataError, needed, note, suggest, warn
from llamapro.text.template_files import FOR_TOOLS, TOOLS_FILE
from llamapro.text.vocabulary import JSON_NAME, LLAMA_3_PATTERN, byte_characters

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in sentencepiece
_NO_ID = (1 << 32) - 1
# Roles of tokens: GGUF's name -> that of sentencepiece and transformers.
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}

# ---- How text is cut before the merges, from the tokenizer.json of each model named -------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = LLAMA_3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED_CODER = _QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_PORO = r" ?[^(\s|.,!?…。，、।۔،)]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHINESE = "[一-龥\u0800-一가-\ud7ff]+"
# Each pattern cuts the pieces that the one before it left.
_CUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"): (LLAMA_3_PATTERN,),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): (LLAMA_3_PATTERN,),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell"): (r"\p{N}", _GPT2),
    ("exaone", "minerva-7b"): (r"\p{N}", _GPT2),
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"): (_QWEN2,),
    ("seed-coder",): (_SEED_CODER,),
    ("poro-chat",): (_PORO,),
    ("viking",): (_PORO, r"\p{N}"),
    ("tekken",): (_TEKKEN,),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}"),
    ("deepseek-v3",): (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_V3),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
PATTERNS = {name: patterns for names, patterns in _CUTS.items() for name in names}
# The metadata that are read, and those that decide no token.
_READ = re.compile(
    r"tokenizer\.(ggml\.(model|pre|tokens|token_type|scores|merges|add_(bos|eos)_token|\w+_token_id"
    rf"|add_space_prefix|remove_extra_whitespaces)|chat_templates|chat_template(\.{FOR_TOOLS})?)"
)
# A piece that is a token is that token, even if no merges lead to it; and BOS is put first.
_LIKE_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "tekken")


def read_tokenizer(
    metadata: dict[str, Any], vocab_size: int, file: Path
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the tokenizer that a GGUF file's metadata hold: ids of control tokens, and files."""
    mark = "tokenizer.ggml."
    own = {key.removeprefix(mark): v for key, v in metadata.items() if key.startswith(mark)}
    get = own.get
    kind = get("model", "none")
    if kind in ("none", "no_vocab"):
        note(f"{file}: holds no tokenizer; copy the model's into the result")
        return {"bos_token_id": get("bos_token_id")}, {}
    if kind not in ("gpt2", "llama"):
        raise DataError(
            f"{file}: tokenizer.ggml.model is {kind!r}, not supported (only 'gpt2' and 'llama')"
        )
    of_text = ("tokenizer.", "general.sampling.")
    for key, value in metadata.items():
        if key.startswith(of_text) and value and not _READ.fullmatch(key):
            warn(f"{file}: {key[:80]} {value!r:.80} is not known, and not used")
    with needed(f"{file}: its tokenizer needs protobuf and tokenizers", "gguf"):
        import google.protobuf  # noqa: F401
        import tokenizers  # noqa: F401
    tokens, types = _tokens(get("tokens"), get("token_type"), vocab_size, file)
    ids = _ids(own, len(tokens), file)
    for number in (i for role, i in ids.items() if role != "unknown"):
        types[number] = CONTROL if types[number] == USER_DEFINED else types[number]
    has_bos = kind == "llama" or get("pre") in _LIKE_LLAMA_3
    frame = {"bos": get("add_bos_token", has_bos), "eos": get("add_eos_token", False)}
    has_frame = {role: is_on and role in ids for role, is_on in frame.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[ids[role]] for role, name in _NAMES.items() if role in ids},
        **{f"add_{role}_token": is_on for role, is_on in has_frame.items()},
        "clean_up_tokenization_spaces": False,  # true would take spaces away from decoded text
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if (length := metadata.get("llama.context_length")) is not None:
        config["model_max_length"] = length
    files: dict[str, bytes] = {}
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(tokens, types, get("merges"), get("pre"), file)
        else:
            tokenizer, model = _sentencepiece(tokens, types, own, ids, file)
            if USER_DEFINED not in types:  # which the two libraries take differently
                files["tokenizer.model"] = model
        _frame(tokenizer, tokens, types, ids, has_frame)
    except DataError:
        raise
    except Exception as error:  # the library raises plain exceptions
        raise DataError(f"{file}: its tokenizer is damaged ({str(error)[:200]})") from None
    texts = {JSON_NAME: tokenizer.to_str(pretty=True) + "\n"}
    texts[CONFIG_NAME] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    for key, name in {"": "chat_template.jinja", f".{FOR_TOOLS}": TOOLS_FILE}.items():
        texts[name] = str(metadata.get(f"tokenizer.chat_template{key}") or "")
    files |= {name: text.encode() for name, text in texts.items() if text}
    ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot", "eom") if role in ids))
    named: dict[str, Any] = {"bos_token_id": ids.get("bos")}
    named["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return named | ({"pad_token_id": ids["padding"]} if "padding" in ids else {}), files


def _ids(own: dict[str, Any], count: int, file: Path) -> dict[str, int]:
    """Returns role -> id of the control tokens, each below the number of tokens."""
    ids, defaults = {}, {"bos": 1, "eos": 2, "unknown": 0} if own["model"] == "llama" else {}
    for role in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        number = own.get(f"{role}_token_id", defaults.get(role))
        if number in (None, _NO_ID):
            continue
        if type(number) is not int or not 0 <= number < count:
            raise DataError(
                f"{file}: tokenizer.ggml.{role}_token_id is {number!r}, expected below "
                f"{count:,}, the number of tokens"
            )
        ids[role] = number
    return ids


def _tokens(tokens: Any, types: Any, vocab_size: int, file: Path) -> tuple[list[str], list[int]]:
    """Checks the tokens and their types; an empty token gets a name that no text has."""
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise DataError(f"{file}: tokenizer.ggml.tokens is missing or no list of texts")
    if len(tokens) > vocab_size:
        raise DataError(
            f"{file}: tokenizer.ggml.tokens has {len(tokens):,} tokens, but the embedding has "
            f"{vocab_size:,} rows; the tokenizer is another model's"
        )
    types = [NORMAL] * len(tokens) if types is None else types
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError(
            f"{file}: tokenizer.ggml.token_type must list a type for each of {len(tokens):,} tokens"
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ((most, count),) = Counter(tokens).most_common(1)
    if count > 1:
        raise DataError(f"{file}: tokenizer.ggml.tokens has {most[:80]!r} twice")
    return tokens, list(types)


def _byte_level(
    tokens: list[str], types: list[int], merges: Any, pre: str | None, file: Path
) -> Any:
    """Returns byte-level BPE as a tokenizer of the library, still without control tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre is None:
        note(
            f"{file}: does not name the way text is cut (tokenizer.ggml.pre); took llama.cpp's "
            "'default', which may not be the model's"
        )
        pre = "default"
    if pre not in PATTERNS:
        raise DataError(
            f"{file}: tokenizer.ggml.pre is {pre!r}{suggest(str(pre), list(PATTERNS))}, which is "
            f"not supported; there are: {', '.join(PATTERNS)}"
        )
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges[:1]):
        raise DataError(f"{file}: tokenizer.ggml.merges is missing or no list of texts")
    known = set(byte_characters())
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == NORMAL and not known.issuperset(token):
            raise DataError(
                f"{file}: token {i}, {token[:80]!r}, is not written in bytes' characters"
            )
    pairs = [(m[:at], m[at + 1 :]) for m in merges if (at := m.find(" ", 1)) > 0]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in _LIKE_LLAMA_3))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    tokens: list[str], types: list[int], own: dict[str, Any], ids: dict[str, int], file: Path
) -> tuple[Any, bytes]:
    """Returns sentencepiece's BPE as a tokenizer of the library, and as a `tokenizer.model`."""
    from tokenizers import Tokenizer, decoders

    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    if own.get("remove_extra_whitespaces"):
        raise DataError(f"{file}: tokenizer.ggml.remove_extra_whitespaces is true, not supported")
    scores = own.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise DataError(
            f"{file}: tokenizer.ggml.scores must list a score for each of {len(tokens):,} tokens"
        )
    if len({score for score, kind in zip(scores, types, strict=True) if kind == NORMAL}) == 1:
        raise DataError(
            f"{file}: tokenizer.ggml.scores are {scores[-1]} for every piece, so the order of the "
            "merges is lost; use a file whose tokenizer was converted from a tokenizer.model"
        )
    if odd := [
        t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and SPACE in t
    ]:
        raise DataError(f"{file}: user-defined token {odd[0][:80]!r} has a space; not supported")
    model = proto.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # Added tokens of the library, like control tokens: no merges lead to them.
        kind = CONTROL if kind == USER_DEFINED else kind
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.byte_fallback = True
    for role, name in _NAMES.items():
        setattr(model.trainer_spec, f"{name}_id", ids.get(role, -1))
        if role in ids:
            setattr(model.trainer_spec, f"{name}_piece", tokens[ids[role]])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokenizer.model")
        path.write_bytes(model.SerializeToString())
        raw = tokenizer_files(path).get(JSON_NAME)
    if raw is None:
        raise DataError(
            f"{file}: tokenizer.ggml.tokens and scores are not those of sentencepiece's BPE with "
            "all 256 bytes, and pieces of different scores, the only 'llama' tokenizer supported"
        )
    tokenizer = Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
    if not own.get("add_space_prefix", True):
        model.normalizer_spec.add_dummy_prefix = False
        tokenizer.pre_tokenizer = None
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer, model.SerializeToString()


def _frame(
    tokenizer: Any,
    tokens: list[str],
    types: list[int],
    ids: dict[str, int],
    has_frame: dict[str, bool],
) -> None:
    """Adds the control and user-defined tokens, and puts BOS and EOS around every text."""
    from tokenizers import AddedToken, processors

    control = {i for role, i in ids.items() if role != "unknown"}
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        is_special = kind in (CONTROL, UNKNOWN) or i in control
        if is_special or kind == USER_DEFINED:
            added.append(AddedToken(token, normalized=False, special=is_special))
    tokenizer.add_tokens(added)
    first, last = ([tokens[ids[role]]] if has_frame[role] else [] for role in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{part}:1" for part in (*first, "$B", *last))],
        special_tokens=[(tokens[ids[role]], ids[role]) for role in has_frame if has_frame[role]],
    )
