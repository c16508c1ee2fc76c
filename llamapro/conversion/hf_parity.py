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
# Prefix of two keys of `compare_with_hf` -> the two results that are compared.
PAIRS = {
    "": "this implementation and transformers",
    "hf_vs_hf_fp32_": "transformers and transformers in fp32",
    "ours_vs_hf_fp32_": "this implementation and transformers in fp32",
}


def random_ids(vocab_size: int, seed: int = 0) -> Tensor:
    """Returns a batch of random token ids, `PROBE_SHAPE`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, PROBE_SHAPE, generator=generator)


def load_hf(path: str | Path, dtype: torch.dtype) -> Any:
    """Loads transformers' model of a directory; raises ConfigError if transformers is missing."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            "comparing with Hugging Face needs transformers: pip install -e '.[hf]'"
        ) from None
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
    except Exception as error:  # whatever its loader raises, and its own checks of a config.json
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{path}: transformers cannot load it: {type(error).__name__}: {reason}"
        ) from None


def logits_and_gradients(model: nn.Module, ids: Tensor, gradients: bool) -> dict[str, Tensor]:
    """Returns "logits" and, if asked for, by name the gradients of the mean next-token loss."""
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
    path: str | Path, dtype: torch.dtype | None = None, tolerance: float | None = None
) -> dict[str, Any]:
    """Runs both implementations on one random batch, on the CPU, and compares logits and loss.

    Hugging Face's results in this dtype are also compared with its own in fp32: that difference is
    the noise of rounding alone. Memory holds two copies of the model, one of them in fp32.

    The comparison is passed if our logits differ from Hugging Face's in fp32 by at most
    `tolerance`. Its default is twice that noise, and 1e-4 of the largest logit, which is far over
    what the order of sums changes in fp32 and far below what a wrong formula does.

    Returns:
        JSON-able: path, transformers (its version), dtype, tokens, loss (mean, nats per token),
        training_loss_difference (of the loss that training computes in chunks), and for each of
        `PAIRS` max_logit_difference and loss_difference; tolerance, and passed.
    """
    checkpoint = Checkpoint.open(path)
    path = checkpoint.path
    dtype = dtype or checkpoint.dtype
    ids = random_ids(checkpoint.config.vocab_size)

    theirs = load_hf(path, dtype)(ids).logits
    from transformers import __version__ as version  # `load_hf` says if it is missing

    model = checkpoint.load(dtype)
    ours = model(ids)
    # Training takes the loss by chunks without all logits: the same path is checked here.
    hidden = model.model(ids[:, :-1].contiguous()).flatten(0, 1)
    loss_sum, count = ops.linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].flatten())
    del model
    exact = theirs if dtype == torch.float32 else load_hf(path, torch.float32)(ids).logits
    loss = mean_loss(ours, ids).item()
    found: dict[str, Any] = {
        "path": str(path),
        "transformers": version,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": ids.numel(),
        "loss": loss,
        "training_loss_difference": abs((loss_sum / count).item() - loss),
    }
    pairs = ((ours, theirs), (theirs, exact), (ours, exact))
    for prefix, (one, other) in zip(PAIRS, pairs, strict=True):
        found[f"{prefix}max_logit_difference"] = (one.float() - other.float()).abs().max().item()
        found[f"{prefix}loss_difference"] = abs(mean_loss(one, ids) - mean_loss(other, ids)).item()
    if tolerance is None:
        noise = found["hf_vs_hf_fp32_max_logit_difference"]
        tolerance = 2 * noise + 1e-4 * exact.abs().max().item()
    passed = found["ours_vs_hf_fp32_max_logit_difference"] <= tolerance  # False for NaN
    return found | {"tolerance": tolerance, "passed": passed}


def render(found: dict[str, Any]) -> str:
    """Returns what `compare_with_hf` found as text."""
    lines = [
        f"transformers {found['transformers']}, {found['dtype']}, {found['tokens']} random tokens",
        f"  mean loss: {found['loss']:.4f} nats per token; training's loss, computed in chunks, "
        f"differs by {found['training_loss_difference']:.3g}",
    ]
    for prefix, pair in PAIRS.items():
        logits = found[f"{prefix}max_logit_difference"]
        loss = found[f"{prefix}loss_difference"]
        lines.append(f"  {pair}: logits differ by up to {logits:.3g}, mean losses by {loss:.3g}")
    verdict = "PASS" if found["passed"] else "FAIL"
    lines.append(f"  {verdict}: the last may differ by up to {found['tolerance']:.3g}")
    return "\n".join(lines)
