"""The public API: by its example, and beside the commands, which do the same in files."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llamapro
from llamapro import generate as command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import CheckpointError, ConfigError
from llamapro.expansion import interleave
from llamapro.testing import assert_matches_hf

IDS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base_dir(
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
) -> Path:
    path = tmp_path_factory.mktemp("api") / "base"
    return write_random_checkpoint(path, tiny_config(max_position_embeddings=64))


def test_the_paper_in_15_lines_runs(
    base_dir: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss falls, the result loads, and only what is new has changed."""
    example = root / "examples" / "paper_in_15_lines.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(base_dir), str(tmp_path / "pro")])
    runpy.run_path(str(example))
    shown = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in shown if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    statements = example.read_text().split("sys.argv[1:]\n")[1]
    assert len([line for line in statements.splitlines() if line.strip()]) <= 15
    found = verify(str(tmp_path / "pro"), str(base_dir))  # the base inside is intact, to the byte
    assert not found["logits_bit_equal"]


def test_the_paper_in_15_lines_says_how_it_is_used(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its two arguments: one line, and exit status 2."""
    monkeypatch.setattr(sys, "argv", ["paper_in_15_lines.py", "base"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(root / "examples" / "paper_in_15_lines.py"))
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("usage: ") and message.count("\n") == 1


def test_expansion_in_memory_is_the_commands(base_dir: Path, tmp_path: Path) -> None:
    """The saved model and what `expand` writes: the same weights, record and tokenizer."""
    model = llamapro.expand(llamapro.load(base_dir), 2)
    assert torch.equal(model(IDS), llamapro.load(base_dir)(IDS))
    llamapro.save(model, tmp_path / "ours")
    expand_checkpoint(Checkpoint.open(base_dir), tmp_path / "theirs", interleave(4, 2))
    ours, theirs = (Checkpoint.open(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.sha256() == theirs.sha256()
    assert ours.config.raw == theirs.config.raw
    names = {f.name for f in theirs.path.iterdir()} - {"BASE_README.md"}
    assert {f.name for f in ours.path.iterdir()} == names
    with pytest.raises(ConfigError, match="exists"):
        llamapro.save(model, tmp_path / "ours")


def test_only_new_blocks_train(base_dir: Path) -> None:
    """The optimizer gets all that needs a gradient; a model without new blocks is refused."""
    base = llamapro.load(base_dir)
    model = llamapro.expand(base, 2)
    parameters = llamapro.train_only_new(model)
    assert len(parameters) == 2 * 9
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="no 'llamapro' record"):
        llamapro.train_only_new(base)


def test_a_merged_model_that_was_trained_further_verifies(base_dir: Path, tmp_path: Path) -> None:
    """The hash that `merge` recorded is of the new blocks of before."""
    model = llamapro.expand(llamapro.load(base_dir), 2)
    record = replace(model.config.expansion, new_sha256="0" * 64)  # type: ignore[type-var]
    model.config = model.config.resized(6, model.config.vocab_size, record)
    with torch.no_grad():
        for parameter in llamapro.train_only_new(model):
            parameter.add_(1)
    llamapro.save(model, tmp_path / "out")
    assert verify(tmp_path / "out")["new_blocks"] == "trained"


def test_generate_writes_what_the_command_writes(
    base_dir: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """The samples are the same, also those of an expanded model, whose tokenizer is its base's."""
    options = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 0.9, "seed": 3}
    words = [w for k, v in options.items() for w in ("--" + k.replace("_", "-"), v)]
    _, shown, _ = run_command(command.main, base_dir, "--prompt", "def f(", *words, "--json")
    model = llamapro.expand(llamapro.load(base_dir), 4)
    text = llamapro.generate(model, "def f(", **options)
    assert text == json.loads(shown)["text"]
    assert llamapro.generate is command  # callable, although the module was imported by its name
    with pytest.raises(ConfigError, match="expected 1 to 63"):
        llamapro.generate(model, "7" * 64)


def test_models_made_in_memory_say_what_they_lack(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    """A tokenizer, or what config.json needs."""
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = llamapro.LlamaForCausalLM(llamapro.ModelConfig(**sizes, head_dim=8))
    with pytest.raises(ConfigError, match="give a tokenizer"):
        llamapro.generate(model, "x")
    with pytest.raises(ConfigError, match=r"ModelConfig\.from_dict"):
        llamapro.save(model, tmp_path / "x")
    llamapro.save(llamapro.LlamaForCausalLM(tiny_config()), tmp_path / "made")
    assert llamapro.load(tmp_path / "made").config == tiny_config()
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        llamapro.load(tmp_path / "none")


def test_another_model_does_not_match_transformers(base_dir: Path) -> None:
    """The assertion of `llamapro.testing` names the tensor, its error and what is allowed."""
    model = llamapro.expand(llamapro.load(base_dir), 2)
    assert_matches_hf(model, gradients=True)
    model.model.norm.eps = 1e-3  # which config.json does not say
    with pytest.raises(AssertionError, match=r"logits: error .* allowed"):
        assert_matches_hf(model)
