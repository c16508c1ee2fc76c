"""The tokenizer files that `transformers` needs beside a sentencepiece `tokenizer.model`.

From that file alone, or with a `tokenizer_config.json`, transformers 4 and 5 make different
tokenizers: without BOS, without the space before a text, with merges in the order of the ids and
not of the scores. A `tokenizer.json` leaves nothing to be made: both read it as it is.
"""

from pathlib import Path
from typing import Any

# Changed by every normalisation that sentencepiece has: runs of spaces, NFKC, case.
_PROBE = "  A  ﬁ e\u0301 "
_LONGEST = 256  # characters of a piece; sentencepiece's own limit is 16
SPACE = "\u2581"


def tokenizer_files(model_file: Path) -> dict[str, dict[str, Any]]:
    """Returns what belongs beside a sentencepiece model, file name -> JSON object.

    The ids of plain text are sentencepiece's own. The names of control tokens in a text are those
    tokens, as everywhere in transformers; after one, no space is put before the text.

    Args:
        model_file: a `tokenizer.model`.

    Returns:
        `tokenizer_config.json`, and `tokenizer.json` if the model can be written as one: BPE that
        changes nothing in a text but for one space before it, as LLaMA's. Nothing for other kinds
        of file, such as Llama 3's BPE ranks.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError):
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
        return {"tokenizer_config.json": config}
    # Version 5's LlamaTokenizer would replace parts of tokenizer.json by its own.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"tokenizer_config.json": config, "tokenizer.json": _tokenizer_json(model)}


def _is_plain_bpe(model: Any) -> bool:
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    return (
        model.normalize(_PROBE) == SPACE + _PROBE.replace(" ", SPACE)
        and max(map(len, pieces)) <= _LONGEST  # every way to cut a piece is looked at
        and all(f"<0x{byte:02X}>" in pieces for byte in range(256))
        # BPE's scores are the negative ranks of the merges; unigram's are logarithms.
        and all(model.get_score(i) == int(model.get_score(i)) for i in range(len(pieces)))
    )


def _tokenizer_json(model: Any) -> dict[str, Any]:
    size = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in size}
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
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}] if bos else []
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, i in sorted(control.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # Metaspace leaves a text alone that starts with its mark. No text starts with " " by now,
        # so the first puts a space before every text; the second turns that into the mark.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Metaspace",
                    "replacement": mark,
                    "prepend_scheme": scheme,
                    "split": False,
                }
                for mark, scheme in ((" ", "first"), (SPACE, "never"))
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*first, text],
            "pair": [*first, text, *second, other],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}}
            if bos
            else {},
        },
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
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
