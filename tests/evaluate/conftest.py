"""A small random model, a text and the options to measure it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro import evaluate as command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.evaluate import Args
from llamapro.model import LlamaForCausalLM
from llamapro.text.tokenizer import Tokenizer

Config = Callable[..., ModelConfig]
Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


TEXT = "def größe(self, parser):\n    return [x for x in parser]  # 日本\n"


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> ModelConfig:
    # No EOS: a random model writes it now and then, and fewer positions would count.
    return tiny_config(max_position_embeddings=32, num_hidden_layers=2, eos_token_id=None)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_random_checkpoint: Write, config: ModelConfig
) -> Path:
    """A random model of two layers with a context of 32 tokens."""
    return write_random_checkpoint(tmp_path_factory.mktemp("evaluate") / "ckpt", config)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaForCausalLM:
    return Checkpoint.open(checkpoint).load()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of several contexts."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def ids(text_file: Path, checkpoint: Path) -> list[int]:
    """Its tokens, BOS first."""
    return Tokenizer.load(checkpoint).encode(text_file.read_text(encoding="utf-8"), bos=True)


@pytest.fixture
def args(checkpoint: Path, text_file: Path) -> Args:
    """Small enough for the small context."""
    return Args(
        checkpoint,
        data=(str(text_file),),
        shift_prompts=4,
        shift_prompt_tokens=8,
        shift_new_tokens=8,
        device="cpu",
    )


@pytest.fixture
def run(run_command: Run) -> Run:
    """`run(*arguments) -> (exit status, stdout, stderr)` of the command."""
    return lambda *arguments: run_command(command.main, *arguments, "--device", "cpu")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """Six short prompts with two choices, of which the first is right."""
    file = tmp_path / "law.jsonl"
    choices = [["self", "parser"], ["x", "return x"], ["no", "for x in parser"]] * 2
    rows = [{"prompt": f"def {i}(", "choices": c, "answer": 0} for i, c in enumerate(choices)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
