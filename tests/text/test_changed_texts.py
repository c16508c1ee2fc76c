"""Tokenizers that change a text, by NFC, NFKC or `<unk>`: roles are traced as in transformers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer

TAGGED = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
UNTAGGED = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "user", "content": "Te\u0301 ﬁx ça 日 a"},
    {"role": "assistant", "content": "He\u0301llo ﬁ １ a 日本.  b"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "Ende e\u0301"},
]
NAMES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _byte_level(*steps: Any) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.normalizer = normalizers.Sequence(list(steps))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return made


def _without_bytes() -> tokenizers.Tokenizer:
    """A vocabulary that has `<unk>` for most characters."""
    pieces = ["<unk>", *"abcdefghijklmnopqrstuvwxyz\n▁HT."]
    model = models.BPE({c: i for i, c in enumerate(pieces)}, [], unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    return made


KINDS = {
    "NFC": lambda: _byte_level(normalizers.NFC()),
    "NFKC": lambda: _byte_level(normalizers.NFKC()),
    "accents and case": lambda: _byte_level(
        normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()
    ),
    "white space": lambda: _byte_level(normalizers.Strip()),
    "unknown": _without_bytes,
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_marks_of_changed_texts_are_those_of_transformers(
    kind: str, tmp_path: Path
) -> None:
    """Where a token lies in the text before it was changed decides whose it is."""
    made = KINDS[kind]()
    made.add_special_tokens(NAMES)
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs = theirs.apply_chat_template(CHAT, chat_template=TAGGED, **options)
    tokenizer = Tokenizer.load(tmp_path)
    for source in (TAGGED, UNTAGGED):
        ids, trained = ChatTemplate(source, tokenizer, "t").encode(CHAT)
        assert ids == theirs["input_ids"]
        assert list(map(int, trained)) == theirs["assistant_masks"]


def test_roles_are_traced_where_sentencepiece_changes_a_text(tmp_path: Path) -> None:
    """Its default rules: NFKC, and runs of spaces become one."""
    model = io.BytesIO()
    options: dict[str, Any] = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True}
    options |= {"sentence_iterator": iter(Path(__file__).read_text(encoding="utf-8").splitlines())}
    options |= {"model_writer": model, "minloglevel": 2, "user_defined_symbols": NAMES[2:]}
    sentencepiece.SentencePieceTrainer.train(**options)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.load(tmp_path)
    for source in (TAGGED, UNTAGGED):
        ids, trained = ChatTemplate(source, tokenizer, "t").encode(CHAT)
        parts = [[i for i, t in zip(ids, trained, strict=True) if t == w] for w in (True, False)]
        assert parts[0].count(tokenizer.special_tokens["<|im_end|>"]) == 2
        answer, asked = map(tokenizer.decode, parts)
        assert answer.replace(" ", "") == "Héllofi1a日本.bEndeé"
        assert "Té fix ça 日 a" in asked and "llo" not in asked
