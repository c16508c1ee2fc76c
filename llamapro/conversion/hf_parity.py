"""Compares this implementation with Hugging Face's on the user's own weights.

This is the only file that imports `transformers`, and it does so inside the function.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError

PROBE_SHAPE = (2, 64)  # B, T of the random batch


@torch.no_grad()
def compare_with_hf(
    path: str | Path, dtype: torch.dtype | None = None, seed: int = 0
) -> dict[str, Any]:
    """Runs both implementations on one random batch, on the CPU, and compares logits and loss.

    The difference between Hugging Face's own results in fp32 and in this dtype is reported too: it
    is the noise of rounding alone. Memory holds two copies of the model, one of them in fp32.

    Args:
        path: a checkpoint directory, or `hf://owner/name`.
        dtype: of the computation; None takes the checkpoint's.
        seed: of the random token ids.

    Returns:
        For each pair (ours and theirs in `dtype`, theirs in `dtype` and in fp32, ours in `dtype`
        and theirs in fp32) the largest difference of two logits and the difference of the mean
        losses (nats); and how far the loss that training computes, in chunks, is from the loss
        computed from the logits.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers import __version__ as version
    except ImportError:
        raise ConfigError("--hf needs transformers: pip install 'llamapro[hf]'") from None

    checkpoint = Checkpoint.open(path)
    path = checkpoint.path
    dtype = dtype or checkpoint.dtype
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(checkpoint.config.vocab_size, PROBE_SHAPE, generator=generator)

    def hf_logits(dtype: torch.dtype) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        return model.eval()(ids).logits

    def loss(logits: Tensor) -> Tensor:
        predictions = logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(predictions, ids[:, 1:].flatten())

    def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
        return (a.float() - b.float()).abs().max().item(), abs(loss(a) - loss(b)).item()

    theirs = hf_logits(dtype)
    model = checkpoint.load(dtype)
    ours = model(ids)
    # Training takes the loss by chunks without all logits: the same path is checked here.
    hidden = model.model(ids[:, :-1].contiguous()).flatten(0, 1)
    loss_sum, count = ops.linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].flatten())
    chunked = (loss_sum / count).item()
    del model
    max_logit, loss_difference = difference(ours, theirs)
    exact = theirs if dtype == torch.float32 else hf_logits(torch.float32)
    hf_max_logit, hf_loss = difference(theirs, exact)
    ours_max_logit, ours_loss = difference(ours, exact)
    return {
        "path": str(path),
        "transformers": version,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": ids.numel(),
        "loss": loss(ours).item(),
        "training_loss_difference": abs(chunked - loss(ours).item()),
        "max_logit_difference": max_logit,
        "loss_difference": loss_difference,
        "hf_vs_hf_fp32_max_logit_difference": hf_max_logit,
        "hf_vs_hf_fp32_loss_difference": hf_loss,
        "ours_vs_hf_fp32_max_logit_difference": ours_max_logit,
        "ours_vs_hf_fp32_loss_difference": ours_loss,
    }
