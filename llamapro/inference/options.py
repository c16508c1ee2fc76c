"""Where and with what `generate` and `evaluate` compute: the options they share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from llamapro import backends
from llamapro.checkpoints.base import check_contained, load_contained
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError
from llamapro.model import LlamaForCausalLM


@dataclass(kw_only=True)
class ComputeOptions:
    """Device, dtype and backends."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and computation; auto: the checkpoint's."""
    ops: str = "auto"
    """What computes: torch, triton, or auto (Triton on a GPU wherever its kernel can run); per op
    behind it, as in auto,attention=torch."""
    skip_new_blocks: bool = False
    """Leave out the latest generation's new blocks, and the tokens added with them: what computes
    is the base inside, to the bit."""

    def choose_device(self) -> str:
        """Returns "cpu" or "cuda"; raises ConfigError for "cuda" without a GPU."""
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise ConfigError("--device cuda: no GPU is visible; use auto or cpu")
        return self.device if self.device != "auto" else "cuda" if has_gpu else "cpu"

    @contextmanager
    def backends(self) -> Iterator[None]:
        """Computes as --ops says inside the with-block; raises ConfigError for a wrong choice."""
        try:
            backends.parse(self.ops)
        except ValueError as error:
            raise ConfigError(f"--ops: {error}") from None
        with backends.use(self.ops):
            yield

    def load(self, checkpoint: Checkpoint) -> LlamaForCausalLM:
        """Loads a model, inside `backends`, and says on standard error what will compute it.

        Raises:
            ConfigError: no GPU, a Triton kernel was asked for that cannot run, or there are no new
                blocks to skip.
            CheckpointError: as `Checkpoint.load`.
        """
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.skip_new_blocks:
            check_contained(checkpoint)
            model = load_contained(checkpoint, dtype, self.choose_device())
        else:
            model = checkpoint.load(dtype, self.choose_device())
        weight = model.lm_head.weight
        try:
            chosen = backends.summary(model.config, weight.device, weight.dtype)
        except backends.BackendError as error:
            raise ConfigError(f"--ops {self.ops}: {error}; use auto, or torch for it") from None
        kind = str(weight.dtype).removeprefix("torch.")
        which = "the base inside, new blocks skipped; " if self.skip_new_blocks else ""
        where = f"{kind} on {weight.device}"
        print(f"{checkpoint.path}: {which}{where}; ops: {chosen}", file=sys.stderr)
        return model
