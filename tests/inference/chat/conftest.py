"""A small chat model, and conversations with it."""

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llamapro import generate as command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.inference import sampling
from llamapro.inference.cache import KVCache
from llamapro.inference.chat import Conversation
from llamapro.inference.decoding import next_logits
from llamapro.inference.options import SamplingOptions
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.template_files import BUILT_IN
from llamapro.text.tokenizer import Tokenizer

Config = Callable[..., ModelConfig]
Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

NAMES = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|im_start|>", "<|im_end|>"),
]
EOS_OF_CONFIG = 300


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_random_checkpoint: Write, tiny_config: Config
) -> Path:
    """A random model with a context of 160, all formats' control tokens, chatml's template."""
    path = tmp_path_factory.mktemp("chat") / "ckpt"
    config = tiny_config(
        vocab_size=416, max_position_embeddings=160, eos_token_id=[EOS_OF_CONFIG, 415]
    )
    write_random_checkpoint(path, config)
    size = Tokenizer.load(path).vocab_size
    added = {size + i: {"content": name, "special": True} for i, name in enumerate(NAMES)}
    raw = {"bos_token": "<s>", "eos_token": "</s>", "legacy": False, "added_tokens_decoder": added}
    (path / "tokenizer_config.json").write_text(json.dumps(raw))
    (path / "chat_template.jinja").write_text(BUILT_IN["chatml"])
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaForCausalLM:
    return Checkpoint.open(checkpoint).load()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


Start = Callable[..., Conversation]


@pytest.fixture
def start(checkpoint: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> Start:
    """`start(**options of the command) -> Conversation`: eight tokens an answer."""

    def start(system: str = "", chat_template: str = "", **options: Any) -> Conversation:
        template = ChatTemplate.load(checkpoint, tokenizer, chat_template)
        sampling = SamplingOptions(**{"max_new_tokens": 8} | options)
        return Conversation(model, tokenizer, template, sampling, system)

    return start


class Reader:
    """Records the model's inputs: `ids` in its context, and the number read at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[int] = []
        self.reads: list[int] = []

        def reading(model: LlamaForCausalLM, input_ids: Tensor, cache: KVCache) -> Tensor:
            self.ids = self.ids[: cache.length] + input_ids[0].tolist()
            self.reads.append(input_ids.shape[1])
            return next_logits(model, input_ids, cache)

        monkeypatch.setattr(sampling, "next_logits", reading)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


@pytest.fixture
def run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run) -> Run:
    """`run(stdin, *options) -> (exit status, stdout, stderr)` of the command."""

    def run(stdin: Any, *options: object, path: Path = checkpoint) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        base = (path, "--device", "cpu", "--max-new-tokens", 8)
        main = partial(command.main_chat, prog="llamapro chat")
        return run_command(main, *base, *options)

    return run
