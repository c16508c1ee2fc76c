"""The files beside the weights: config.json, and what transformers needs for a tokenizer.model.

From a `tokenizer.model` alone, transformers 4 and 5 make different tokenizers: without BOS, without
the space before a text, with merges in the order of the ids and not of the scores. A
`tokenizer.json` leaves nothing to be made: both read it as it is. From Llama 3's BPE ranks neither
makes a tokenizer with BOS and EOS; Meta's own repositories ship a tokenizer.json.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamapro.config import ModelConfig
from llamapro.errors import DataError, warn
from llamapro.files import copy_companion, read_json, write_json
from llamapro.inference.sampling import GENERATION_FILE, end_ids
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.template_files import DEFAULT_FILE, own_template
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import (
    JSON_NAME,
    LLAMA_3_PATTERN,
    LLAMA_3_SPECIAL,
    RANKS_NAME,
    byte_characters,
    is_ranks,
    parse_ranks,
)

CONFIG_NAME = "tokenizer_config.json"
# What the config.json of every LLaMA says; sizes and the like are added to it.
PLAIN_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}
# Changed by every normalisation that sentencepiece has: runs of spaces, NFKC, case.
_PROBE = "  A  ﬁ e\u0301 "
_LONGEST = 256  # characters of a piece; sentencepiece's own limit is 16
SPACE = "\u2581"


def tokenizer_files(model_file: Path, max_length: int | None = None) -> dict[str, dict[str, Any]]:
    """Returns the files for transformers beside a `tokenizer.model`, file name -> JSON object.

    They are `tokenizer_config.json`, and `tokenizer.json` if the model can be written as one: Llama
    3's ranks, or BPE that changes a text only by one space before it, as LLaMA's. A damaged file
    gets none. The ids of plain text are those of sentencepiece or tiktoken. The name of a control
    token in a text becomes that token, as everywhere in transformers. `max_length` is the model's
    context in tokens, written into Llama 3's files.
    """
    from sentencepiece import SentencePieceProcessor

    content = model_file.read_bytes()
    try:
        if is_ranks(content):
            return _ranks_files(parse_ranks(model_file, content), max_length)
        model = SentencePieceProcessor(model_file=str(model_file))
    except (DataError, OSError, RuntimeError):
        return {}
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    names = {f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        **names,
        "add_bos_token": "bos_token" in names,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    if not _is_plain_bpe(model):
        return {CONFIG_NAME: config}
    # Version 5's LlamaTokenizer would replace parts of tokenizer.json by its own.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {CONFIG_NAME: config, JSON_NAME: _tokenizer_json(model)}


def _is_plain_bpe(model: Any) -> bool:
    """Says whether a tokenizer.json can do what the model does; see `tokenizer_files`."""
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    known = set(pieces)

    def has_merges(i: int, piece: str) -> bool:  # to user-defined ones ("<|im_start|>") none lead
        is_made = not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        return (
            len(piece) == 1
            or not is_made
            or model.is_unused(i)
            or any(piece[:at] in known and piece[at:] in known for at in range(1, len(piece)))
        )

    return (
        model.normalize(_PROBE) == SPACE + _PROBE.replace(" ", SPACE)
        and max(map(len, pieces)) <= _LONGEST  # every way to cut a piece is looked at
        and all(has_merges(i, piece) for i, piece in enumerate(pieces))
        and all(f"<0x{byte:02X}>" in known for byte in range(256))
        # BPE's scores are the negative ranks of the merges; unigram's are logarithms.
        and all(model.get_score(i) == int(model.get_score(i)) for i in range(len(pieces)))
        and not _has_ties(pieces, [model.get_score(i) for i in range(len(pieces))])
    )


def _has_ties(pieces: list[str], scores: list[float]) -> bool:
    """Says whether two pieces of one score may want the same part of a text.

    Sentencepiece then merges the pair on the left, a tokenizer.json always the same of the two.
    Pieces that were added to a vocabulary for another language often all have the score 0.
    """
    known, first, last = set(pieces), defaultdict(set), defaultdict(set)
    for piece, score in zip(pieces, scores, strict=True):
        # LLaMA's runs of spaces have one score, and come out the same.
        for at in range(1, len(piece) if len(set(piece)) > 1 else 0):
            if piece[:at] in known and piece[at:] in known:
                first[score, piece[:at]].add(piece)
                last[score, piece[at:]].add(piece)
    return any(len(last[part] | first[part]) > 1 for part in first.keys() & last.keys())


def _tokenizer_json(model: Any) -> dict[str, Any]:
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    control = {p: i for p, i in vocab.items() if model.is_control(i) or model.is_unknown(i)}
    made = [
        p
        for p, i in vocab.items()
        if p not in control and not model.is_byte(i) and not model.is_unused(i)
    ]
    # Sentencepiece merges the pair whose piece has the highest score; here pairs have ranks.
    made.sort(key=lambda piece: (-model.get_score(vocab[piece]), vocab[piece]))
    usable = set(made)
    merges = [
        [piece[:at], piece[at:]]
        for piece in made
        for at in range(1, len(piece))
        if piece[:at] in usable and piece[at:] in usable
    ]
    bos = model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else None
    metaspace: dict[str, Any] = {"type": "Metaspace", "replacement": SPACE, "split": False}
    metaspace["prepend_scheme"] = "never"
    return {
        **_head(control),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # Metaspace leaves a text alone that starts with its mark. No text starts with " " by now,
        # so the first puts a space before every text; the second turns that into the mark.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                metaspace | {"replacement": " ", "prepend_scheme": "first"},
                metaspace,
            ],
        },
        "post_processor": _bos_first(bos, model.bos_id()),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            **_BPE,
            "unk_token": model.id_to_piece(model.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _ranks_files(ranks: dict[bytes, int], max_length: int | None) -> dict[str, dict[str, Any]]:
    """Returns both files of Llama 3's ranks, as in Meta's repositories."""
    shown = byte_characters()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    control = {name: i for i, name in enumerate(LLAMA_3_SPECIAL, len(ranks))}
    bos, eos = LLAMA_3_SPECIAL[:2]
    # tiktoken merges any two parts whose whole has a rank, the lowest first; here pairs have ranks.
    merges = [
        (rank, ranks[token[:at]], ranks[token[at:]], f"{names[token[:at]]} {names[token[at:]]}")
        for token, rank in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}}
    split |= {"behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,  # true would take spaces away from decoded text
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    processors = [plain | {"trim_offsets": False, "use_regex": True}, _bos_first(bos, control[bos])]
    raw = {
        **_head(control),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, plain | {"use_regex": False}],
        },
        "post_processor": {"type": "Sequence", "processors": processors},
        "decoder": {**plain, "use_regex": True},
        "model": {
            **_BPE,
            # As tiktoken: a piece that is a token is that token, even if no merges lead to it.
            "ignore_merges": True,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }
    return {CONFIG_NAME: config, JSON_NAME: raw}


_BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _head(control: dict[str, int]) -> dict[str, Any]:
    """Returns how a tokenizer.json begins; its control tokens are name -> id."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": name, **flags, "special": True}
        for name, i in sorted(control.items(), key=lambda item: item[1])
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}


def _bos_first(bos: str | None, bos_id: int) -> dict[str, Any]:
    """Returns the part of a tokenizer.json that puts BOS before every text, if there is one."""
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}] if bos else []
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*first, text],
        "pair": [*first, text, *second, other],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}} if bos else {},
    }


def write_companions(directory: Path, config: ModelConfig, files: Iterable[Path]) -> None:
    """Writes `config.json` and copies tokenizer, generation and licence files beside it.

    A `tokenizer.model` that comes alone gets the files that transformers needs with it. One of
    Llama 3's ranks goes to `original`, as in Meta's repositories: transformers and llama.cpp take
    what lies beside a tokenizer.json for sentencepiece's.
    """
    (directory / "config.json").write_text(config.to_json(), encoding="utf-8")
    for file in files:
        if file.is_file() or not file.exists():
            is_extra = file.parent.name == "additional_chat_templates"
            folder = directory / file.parent.name if is_extra else directory
            folder.mkdir(exist_ok=True)
            copy_companion(file, folder / file.name)
    vocabulary = directory / "tokenizer.model"
    if not vocabulary.exists():
        return
    if not any(directory.glob("tokenizer*.json")):
        made = tokenizer_files(vocabulary, config.max_position_embeddings)
        for name, content in made.items():
            write_json(directory / name, content)
        if made and JSON_NAME not in made:
            warn(
                "tokenizer.model: no tokenizer.json can be made that splits every text as it does; "
                "without one transformers may split some texts differently"
            )
    if is_ranks(vocabulary.read_bytes()):
        (directory / RANKS_NAME).parent.mkdir()
        vocabulary.rename(directory / RANKS_NAME)


def write_template(directory: Path, template: str) -> None:
    """Writes the chat template that a model was trained with, in place of another.

    What it puts behind an answer becomes an EOS of `generation_config.json`, or other programs
    would not stop there.
    """
    if own_template(directory) == template:
        return
    _write_ends(directory, template)
    (directory / DEFAULT_FILE).unlink(missing_ok=True)  # it would come first
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = directory / CONFIG_NAME
    if file.exists() and (config := read_json(file)).pop("chat_template", None) is not None:
        write_json(file, config)


def _write_ends(directory: Path, template: str) -> None:
    """Adds the ends of answers that are no EOS yet to `generation_config.json`."""
    config = ModelConfig.from_file(directory / "config.json")
    try:
        tokenizer = Tokenizer.load(directory)
        made = ChatTemplate(template, tokenizer, "the template of the run", is_trusted=False)
    except DataError as error:
        warn(f"what ends an answer is not known, so {GENERATION_FILE} stays as it is: {error}")
        return
    known = end_ids(config, tokenizer)
    if ends := made.end_ids() - known:
        file = directory / GENERATION_FILE
        fields = read_json(file) if file.exists() else {"bos_token_id": tokenizer.bos_id}
        write_json(file, fields | {"eos_token_id": sorted(known | ends)})
