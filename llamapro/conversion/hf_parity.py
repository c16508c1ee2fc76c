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
from llamapro.errors import ConfigError, DataError, needed
from llamapro.text.tokenizer import Tokenizer

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
    with needed("comparing with Hugging Face needs transformers", "hf"):
        from transformers import AutoModelForCausalLM
    try:
        # A config.json may turn off the names of results, which the model itself reads.
        how = {"dtype": dtype, "local_files_only": True, "return_dict": True}
        return AutoModelForCausalLM.from_pretrained(path, **how).eval()
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


def compare_with_hf(
    path: str | Path,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    text: Path | None = None,
    gradients: bool = False,
) -> dict[str, Any]:
    """Runs both implementations on the CPU, on random tokens or the start of a text.

    Hugging Face's results in this dtype are also compared with its own in fp32: that difference is
    the noise of rounding alone. Memory holds two copies of the model, one of them in
    fp32; with `gradients`, up to three sets of them, too.

    The comparison is passed if our logits differ from Hugging Face's in fp32 by at most
    `tolerance`. Its default is twice that noise, and 1e-4 of the largest logit, which is far over
    what the order of sums changes in fp32 and far below what a wrong formula does. A gradient is
    passed by the same rule, with norms in place of the largest values.

    Returns:
        JSON-able: path, transformers (its version), dtype, text, tokens, loss (mean, in nats),
        training_loss_difference (of the loss that training computes in chunks), and for each of
        `PAIRS` max_logit_difference and loss_difference; gradients, by name the error as a share of
        what is allowed; tolerance, and passed.
    """
    checkpoint = Checkpoint.open(path)
    path = checkpoint.path
    dtype = dtype or checkpoint.dtype
    ids = random_ids(checkpoint.config.vocab_size)
    if text is not None:
        words = Tokenizer.load(path).encode(text.read_text("utf-8", "replace"), bos=True)
        ids = torch.tensor([words[: min(1024, checkpoint.config.max_position_embeddings)]])
        if ids.numel() < 2:
            raise DataError(f"{text}: too short to compare on: give a text of two tokens or more")

    def run(model: nn.Module) -> dict[str, Tensor]:
        return logits_and_gradients(model, ids, gradients)

    theirs = run(load_hf(path, dtype))
    exact = theirs if dtype == torch.float32 else run(load_hf(path, torch.float32))
    from transformers import __version__ as version  # `load_hf` says if it is missing

    model = checkpoint.load(dtype)
    found_here = run(model)
    # Training takes the loss by chunks without all logits: the same path is checked here.
    with torch.no_grad():
        hidden, targets = model.model(ids[:, :-1].contiguous()).flatten(0, 1), ids[:, 1:].flatten()
        loss_sum, count = ops.linear_cross_entropy(hidden, model.lm_head.weight, targets)
    del model
    ours, hf, hf_fp32 = (results["logits"] for results in (found_here, theirs, exact))
    loss = mean_loss(ours, ids).item()
    found: dict[str, Any] = {
        "path": str(path),
        "transformers": version,
        "dtype": str(dtype).removeprefix("torch."),
        "text": text and str(text),
        "tokens": ids.numel(),
        "loss": loss,
        "training_loss_difference": abs((loss_sum / count).item() - loss),
    }
    pairs = ((ours, hf), (hf, hf_fp32), (ours, hf_fp32))
    for prefix, (one, other) in zip(PAIRS, pairs, strict=True):
        found[f"{prefix}max_logit_difference"] = (one.float() - other.float()).abs().max().item()
        found[f"{prefix}loss_difference"] = abs(mean_loss(one, ids) - mean_loss(other, ids)).item()
    if tolerance is None:
        noise = found["hf_vs_hf_fp32_max_logit_difference"]
        tolerance = 2 * noise + 1e-4 * hf_fp32.abs().max().item()
    passed = found["ours_vs_hf_fp32_max_logit_difference"] <= tolerance  # False for NaN
    shares = {}
    for name in sorted(exact.keys() - {"logits"}):
        value, one, other = exact[name], found_here[name].float(), theirs[name].float()
        allowed = 2 * (other - value).norm() + 1e-4 * value.norm()
        shares[name] = ((one - value).norm() / allowed.clamp_min(1e-30)).item()
    passed = passed and all(share <= 1 for share in shares.values())
    return found | {"gradients": shares, "tolerance": tolerance, "passed": passed}


def render(found: dict[str, Any]) -> str:
    """Returns what `compare_with_hf` found as text."""
    tokens = f"{found['tokens']} random tokens"
    if found["text"]:
        tokens = f"{found['tokens']} tokens of {found['text']}"
    lines = [
        f"transformers {found['transformers']}, {found['dtype']}, {tokens}",
        f"  mean loss: {found['loss']:.4f} nats per token; training's loss, computed in chunks, "
        f"differs by {found['training_loss_difference']:.3g}",
    ]
    if shares := found["gradients"]:
        worst = max(shares, key=shares.__getitem__)
        said = f"the largest error, of {worst}, is {shares[worst]:.2f} of what is allowed"
        lines.append(f"  {len(shares)} gradients: {said}")
    for prefix, pair in PAIRS.items():
        logits = found[f"{prefix}max_logit_difference"]
        loss = found[f"{prefix}loss_difference"]
        lines.append(f"  {pair}: logits differ by up to {logits:.3g}, mean losses by {loss:.3g}")
    verdict = "PASS" if found["passed"] else "FAIL"
    lines.append(f"  {verdict}: the last may differ by up to {found['tolerance']:.3g}")
    return "\n".join(lines)
