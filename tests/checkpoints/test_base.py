"""Skipping the new blocks is the base: the same bits, whatever the new blocks have learned."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import cli, expansion
from llamapro import evaluate as evaluate_command
from llamapro import generate as generate_command
from llamapro.checkpoints.base import contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.writing import in_memory, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.model import LlamaForCausalLM

TOKENS = ("<|im_start|>", "<|im_end|>")
IDS = torch.arange(3, 43).view(2, 20)
Expand = Callable[..., tuple[Path, Path]]
Run = Callable[..., dict[str, Any]]


def train_new_blocks(path: Path) -> None:
    """Overwrites an expanded checkpoint: its latest new blocks and added rows compute something."""
    checkpoint = Checkpoint.open(path)
    record = checkpoint.config.expansion
    assert record is not None
    generator = torch.Generator().manual_seed(5)
    tensors = {name: stored.read() for name, stored in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if expansion.is_in_layers(name, record.new_layers):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        elif record.base_vocab_size is not None and tensor.ndim == 2 and "layers" not in name:
            tensor[record.base_vocab_size :] += 1
    write_checkpoint(path, in_memory(tensors))


@pytest.fixture
def expand(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Expand:
    """`expand(generations=1, dtype=..., new_tokens=(), **config) -> (base, trained)`.

    The base is what the latest of the expansions started from.
    """

    def make(
        generations: int = 1,
        dtype: torch.dtype = torch.float32,
        new_tokens: tuple[str, ...] = (),
        **overrides: Any,
    ) -> tuple[Path, Path]:
        config = tiny_config(**{"num_hidden_layers": 2, "max_position_embeddings": 64} | overrides)
        path = write_random_checkpoint(tmp_path / "g0", config, dtype)
        for generation in range(1, generations + 1):
            base, path = path, tmp_path / f"g{generation}"
            tokens = new_tokens if generation == generations else ()
            checkpoint = Checkpoint.open(base)
            layout = expansion.interleave(checkpoint.config.num_hidden_layers, 1)
            expand_checkpoint(checkpoint, path, layout, new_tokens=tokens)
            train_new_blocks(path)
        return base, path

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(module, *arguments)`: the command's JSON, in this process; or what it says, with 2."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(module: ModuleType, *arguments: object) -> dict[str, Any]:
        words = [*map(str, arguments), "--device", "cpu", "--json"]
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        with pytest.raises(SystemExit) as caught:
            cli.run(module.main)
        out, said = capsys.readouterr()
        return {"status": caught.value.code, "said": said} | (json.loads(out) if out else {})

    return run


@torch.inference_mode()
def logits(model: LlamaForCausalLM) -> Tensor:
    return model(IDS)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dtype": torch.bfloat16},
        {"generations": 2},
        {"new_tokens": TOKENS},
        {"new_tokens": TOKENS, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_logits_without_the_new_blocks_are_the_bases_bits(
    case: dict[str, Any], expand: Expand
) -> None:
    """They are those of the latest generation's base; an added token has no logit."""
    base, trained = (Checkpoint.open(path) for path in expand(**case))
    contained, expected = contained_checkpoint(trained).load(), logits(base.load())
    assert torch.equal(logits(contained).view(torch.uint8), expected.view(torch.uint8))
    assert contained.config == base.config
    assert not torch.equal(logits(trained.load())[..., :400], expected)


def test_new_blocks_are_not_computed_and_have_no_cache(expand: Expand) -> None:
    """A model of the base's layers, in another dtype where one is asked for."""
    base, trained = expand()
    contained = contained_checkpoint(Checkpoint.open(trained)).load(torch.bfloat16)
    assert len(contained.model.layers) == 2 and contained.lm_head.weight.dtype == torch.bfloat16
    expected = logits(Checkpoint.open(base).load(torch.bfloat16))
    assert torch.equal(logits(contained).view(torch.uint8), expected.view(torch.uint8))


def test_commands_compute_with_the_base(expand: Expand, run: Run, tmp_path: Path) -> None:
    """Generate writes what the base writes, evaluate measures its loss; --against stays whole."""
    base, trained = expand(new_tokens=TOKENS)
    asked = ("--prompt", "usage", "--temperature", 1, "--max-new-tokens", 20)
    written = [
        run(generate_command, *place, *asked)["text"]
        for place in ((base,), (trained, "--skip-new-blocks"), (trained,))
    ]
    assert written[0] == written[1] != written[2]

    text = tmp_path / "text.txt"
    text.write_text("parser.add_argument(name, help=text)\n" * 8)
    ask = ("--data", text, "--shift-prompts", 0)
    whole = run(evaluate_command, trained, *ask)["files"][str(text)]
    skipped = run(evaluate_command, trained, "--skip-new-blocks", *ask)["files"][str(text)]
    assert skipped == run(evaluate_command, base, *ask)["files"][str(text)] != whole
    both = run(evaluate_command, trained, "--skip-new-blocks", "--against", trained, *ask)
    assert both["files"][str(text)] == skipped | {"base": whole, "shift": None}


def test_a_model_without_new_blocks_has_none_to_skip(expand: Expand, run: Run) -> None:
    """Said as a mistake of the user's, by every command."""
    base, _ = expand()
    for words in ((base, "--prompt", "a"), (base, "--chat", "--prompt", "a")):
        told = run(generate_command, *words, "--skip-new-blocks")
        assert told["status"] == 2 and "has no 'llamapro' record" in told["said"]


def test_a_conversation_may_name_tokens_that_the_base_does_not_know(
    expand: Expand, run: Run
) -> None:
    """A chat on a model with added tokens refuses to skip its new blocks."""
    _, trained = expand(new_tokens=TOKENS)
    told = run(generate_command, trained, "--chat", "--prompt", "a", "--skip-new-blocks")
    assert told["status"] == 2 and "2 added tokens" in told["said"]
