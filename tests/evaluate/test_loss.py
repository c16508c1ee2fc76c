"""Evaluation: every token is predicted once, with the loss Hugging Face's model has for it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from llamapro.config import ModelConfig
from llamapro.evaluate import Args, evaluate, measure, read_text, windows
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.text.tokenizer import Tokenizer

GENERATOR = torch.Generator().manual_seed(7)
TEXT = "def größe(self, parser):\n    return [x for x in parser]  # 日本\n"


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> transformers.LlamaForCausalLM:
    """Hugging Face's model, as it loads the same directory."""
    return transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the single file."""
    (found,) = result["files"].values()
    assert isinstance(found, dict)
    return found


def their_losses(model: transformers.LlamaForCausalLM, ids: list[int]) -> Tensor:
    """The loss of every token but the first, each given all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    return F.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="none")


# ---- Windows ----------------------------------------------------------------------------------


def test_windows_predict_every_token_once_with_enough_before_it() -> None:
    """This holds for all lengths to 40, contexts to 12 and strides up to the context."""
    for context in range(1, 13):
        for stride in range(1, context + 1):
            for length in range(41):
                predicted: list[int] = []
                for start, end, first in windows(length, context, stride):
                    assert 0 <= start < first <= end < length
                    assert end - start <= context
                    for token in range(first, end + 1):
                        # Those before the first full window have all there is.
                        assert token - start >= min(token, context - stride + 1)
                    predicted += range(first, end + 1)
                assert predicted == list(range(1, length)), (length, context, stride)


def test_windows_move_by_the_stride() -> None:
    """The cost is what was asked for: no more windows than the text needs."""
    assert list(windows(11, 4, 2)) == [(0, 4, 1), (2, 6, 5), (4, 8, 7), (6, 10, 9)]
    assert list(windows(11, 4, 4)) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert list(windows(5, 4, 2)) == [(0, 4, 1)]
    assert list(windows(6, 4, 2)) == [(0, 4, 1), (2, 5, 5)]


# ---- Loss -------------------------------------------------------------------------------------


def test_text_shorter_than_the_context_is_plain_cross_entropy(
    args: Args, tmp_path: Path, theirs: transformers.LlamaForCausalLM
) -> None:
    """One window: the mean over all tokens but BOS of transformers' losses."""
    file = tmp_path / "short.txt"
    file.write_text("def f(self)")
    ids = Tokenizer.load(args.dir).encode("def f(self)", bos=True)
    assert 4 < len(ids) < 32
    found = only(evaluate(replace(args, data=(str(file),))))
    losses = their_losses(theirs, ids)
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_stride_1_gives_every_token_the_whole_context(
    args: Args, ids: list[int], theirs: transformers.LlamaForCausalLM
) -> None:
    """Each token's loss is transformers' after exactly the 8 tokens before it, or all if fewer."""
    by_hand = [their_losses(theirs, ids[max(0, at - 8) : at + 1])[-1] for at in range(1, len(ids))]
    found = only(evaluate(replace(args, context=8, stride=1)))
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (32, 32), (20, 7)])
def test_loss_is_transformers_on_the_same_windows(
    args: Args, ids: list[int], theirs: transformers.LlamaForCausalLM, context: int, stride: int
) -> None:
    """Padding, masking and batching leave the sum over windows as it is window by window."""
    assert len(ids) > 3 * context
    total = 0.0
    for start, end, first in windows(len(ids), context, stride):
        total += their_losses(theirs, ids[start : end + 1])[first - 1 - start :].sum().item()
    found = only(evaluate(replace(args, context=context, stride=stride)))
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_default_is_the_models_context_and_half_of_it_as_stride(args: Args) -> None:
    """0 and 0 stand for 32 and 16, and the result says so."""
    result = evaluate(args)
    assert (result["context"], result["stride"]) == (32, 16)
    assert result["files"] == evaluate(replace(args, context=32, stride=16))["files"]
    assert result["files"] != evaluate(replace(args, context=32, stride=32))["files"]


def test_batch_size_does_not_change_the_result(args: Args) -> None:
    """Losses agree up to the order of fp32 sums."""
    losses = [only(evaluate(replace(args, batch_size=n)))["loss"] for n in (1, 2, 5, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_uniform_model_has_the_loss_and_bits_worked_out_by_hand(
    args: Args, model: LlamaForCausalLM, config: ModelConfig, ids: list[int], text_file: Path
) -> None:
    """Logits of 0 over 400 tokens: ln 400 a token, log2(400) * tokens / bytes of UTF-8 a byte."""
    uniform = build_on_meta(config)
    weights = model.state_dict()
    load_tensors(uniform, weights | {"lm_head.weight": torch.zeros(400, config.hidden_size)})
    text = read_text(str(text_file), Tokenizer.load(args.dir), "text")
    found = measure(uniform, text, 32, 16, 8)
    predicted, size = len(ids) - 1, text_file.stat().st_size
    assert text.bytes == size > len(TEXT * 4)
    assert found["loss"] == pytest.approx(math.log(400), rel=1e-6)
    assert found["perplexity"] == pytest.approx(400, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(400) * predicted / size, rel=1e-6)


def test_documents_of_a_jsonl_file_are_kept_apart(
    args: Args, tmp_path: Path, theirs: transformers.LlamaForCausalLM
) -> None:
    """Each line starts from BOS and sees nothing of the line before it; no EOS is predicted."""
    texts = ["def f(self)", "return [x for x in parser]"]
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.load(args.dir)
    apart = torch.cat([their_losses(theirs, tokenizer.encode(t, bos=True)) for t in texts])
    found = only(evaluate(replace(args, data=(str(file),), text_key="body")))
    assert found["tokens"] == len(apart)
    assert found["loss"] == pytest.approx(apart.mean().item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(
        apart.sum().item() / math.log(2) / sum(map(len, texts)), rel=1e-5
    )


def test_names_of_control_tokens_are_said_to_be_plain_characters(
    args: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in training: transformers takes them for the tokens."""
    file = tmp_path / "chat.txt"
    file.write_text("def f(self)</s>return x</s>")
    text = read_text(str(file), Tokenizer.load(args.dir), "text")
    assert 2 not in text.documents[0] and text.bytes == len(file.read_text())
    said = capsys.readouterr().err
    assert "'</s>' stands in the text 2 times, as plain characters\n" in said


def test_each_argument_is_measured_by_itself(args: Args, tmp_path: Path) -> None:
    """Two files and a folder that holds both: three results; tokens add up."""
    names = []
    for name, text in {"a.txt": "def f(self)", "b.txt": "return parser"}.items():
        (tmp_path / name).write_text(text)
        names.append(str(tmp_path / name))
    files = evaluate(replace(args, data=(*names, str(tmp_path))))["files"]
    a, b, both = files[names[0]], files[names[1]], files[str(tmp_path)]
    assert both["tokens"] == a["tokens"] + b["tokens"]
    total = a["loss"] * a["tokens"] + b["loss"] * b["tokens"]
    assert both["loss"] * both["tokens"] == pytest.approx(total, rel=1e-6)
