"""Options that `generate` and `evaluate` share: device, dtype, backends, sampling."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import arg

from llamapro import backends
from llamapro.checkpoints.base import check_contained, contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.stacking import stack
from llamapro.errors import ConfigError, note
from llamapro.model import LlamaForCausalLM


@dataclass(kw_only=True)
class ComputeOptions:
    """Device, dtype and backends."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights and computation; auto: the checkpoint's."""
    ops: str = "auto"
    """Backend: cpu, torch, triton, or auto (Triton on a GPU). Also auto,attention=torch."""
    skip_new_blocks: bool = False
    """Compute with the base inside: leave out the latest new blocks and their added tokens."""
    blocks: tuple[Path, ...] = ()
    """New blocks to put on DIR: files, training checkpoints, run directories or hf://owner/name."""

    def open(self, path: Path) -> Checkpoint:
        """Opens a checkpoint and puts the new blocks on it; their files say where they belong."""
        checkpoint = Checkpoint.open(path)
        return stack(checkpoint, self.blocks).checkpoint if self.blocks else checkpoint

    def choose_device(self) -> str:
        """Returns "cpu" or "cuda"; raises ConfigError for "cuda" without a GPU."""
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise ConfigError("--device cuda: no GPU is visible; use auto or cpu")
        return self.device if self.device != "auto" else "cuda" if has_gpu else "cpu"

    @contextmanager
    def backends(self) -> Iterator[None]:
        """Applies --ops inside the with-block; raises ConfigError for a wrong choice."""
        try:
            backends.parse(self.ops)
        except ValueError as error:
            raise ConfigError(f"--ops: {error}") from None
        with backends.use(self.ops):
            yield

    def load(self, checkpoint: Checkpoint) -> LlamaForCausalLM:
        """Loads a model, inside `backends`, and prints its device and backends on standard error.

        Raises ConfigError if there is no GPU, no kernel for --ops, or no new block to skip.
        """
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.skip_new_blocks:
            check_contained(checkpoint)
            checkpoint = contained_checkpoint(checkpoint)
        model = checkpoint.load(dtype, self.choose_device())
        weight = model.lm_head.weight
        try:
            chosen = backends.summary(model.config, weight.device, weight.dtype)
        except backends.BackendError as error:
            raise ConfigError(f"--ops {self.ops}: {error}; use auto, or torch for it") from None
        kind = str(weight.dtype).removeprefix("torch.")
        which = "the base inside, new blocks skipped; " if self.skip_new_blocks else ""
        note(f"{checkpoint.path}: {which}{kind} on {weight.device}; ops: {chosen}")
        return model


@dataclass(kw_only=True)
class SamplingOptions:
    """The choice of the next token, and the number of tokens."""

    max_new_tokens: int = 256
    """Most tokens to write. A text also ends at its EOS, and where the context is full."""
    temperature: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Sampling temperature; 0: the most likely token. Default: generation_config.json's, or 0."""
    top_p: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of probability to sample from. Default: generation_config.json's, or 1.0."""
    seed: int = 0
    """Seed of the sampling; the same seed writes the same text."""

    def find_mistakes(self) -> list[str]:
        """Returns a message for every value that is impossible."""
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            wrong.append(f"--temperature {self.temperature}: expected 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            wrong.append(f"--top-p {self.top_p}: expected more than 0, at most 1")
        if not 0 <= self.seed < 1 << 64:
            wrong.append(f"--seed {self.seed}: expected 0 or more, below 2^64")
        return wrong
