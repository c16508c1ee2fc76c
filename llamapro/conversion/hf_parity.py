"""Compares this implementation with Hugging Face's on the user's own weights.

This is the only file that imports `transformers`, and it does so inside functions. `convert.py
verify --hf` prints the comparison, `llamapro.testing` asserts it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError

PROBE_SHAPE = (2, 64)  # B, T of the random batch


def random_ids(vocab_size: int, seed: int) -> Tensor:
    """Returns a batch of random token ids, `PROBE_SHAPE`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, PROBE_SHAPE, generator=generator)


def load_hf(path: str | Path, dtype: torch.dtype) -> Any:
    """Loads transformers' model of a directory; raises ConfigError if transformers is missing."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            "comparing with Hugging Face needs transformers: pip install 'llamapro[hf]'"
        ) from None
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def logits_and_gradients(model: nn.Module, ids: Tensor, gradients: bool) -> dict[str, Tensor]:
    """Returns "logits" and, by parameter name, gradients of the mean next-token loss, if asked for.

    Args:
        model: this implementation's or transformers'.
        ids: (B, T).
        gradients: whether every parameter gets one.
    """
    model.requires_grad_(gradients)
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    found = {"logits": logits.detach()}
    if gradients:
        mean_loss(logits, ids).backward()
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns the mean loss (nats) of the next tokens, in fp32 or better."""
    predictions = logits[:, :-1].flatten(0, 1)
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(predictions, ids[:, 1:].flatten())


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
    checkpoint = Checkpoint.open(path)
    path = checkpoint.path
    dtype = dtype or checkpoint.dtype
    ids = random_ids(checkpoint.config.vocab_size, seed)

    def loss(logits: Tensor) -> Tensor:
        return mean_loss(logits, ids)

    def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
        return (a.float() - b.float()).abs().max().item(), abs(loss(a) - loss(b)).item()

    theirs = load_hf(path, dtype)(ids).logits
    from transformers import __version__ as version  # `load_hf` says if it is missing

    model = checkpoint.load(dtype)
    ours = model(ids)
    # Training takes the loss by chunks without all logits: the same path is checked here.
    hidden = model.model(ids[:, :-1].contiguous()).flatten(0, 1)
    loss_sum, count = ops.linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].flatten())
    chunked = (loss_sum / count).item()
    del model
    max_logit, loss_difference = difference(ours, theirs)
    exact = theirs if dtype == torch.float32 else load_hf(path, torch.float32)(ids).logits
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
