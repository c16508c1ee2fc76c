"""For your own tests: asserts that a model computes what Hugging Face's transformers computes.

from llamapro.testing import assert_matches_hf

def test_my_checkpoint() -> None:
    assert_matches_hf("checkpoints/merged", gradients=True)
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llamapro import api
from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.hf_parity import load_hf, logits_and_gradients, random_ids
from llamapro.model import LlamaForCausalLM


def assert_matches_hf(
    model: LlamaForCausalLM | str | Path,
    input_ids: Tensor | None = None,
    gradients: bool = False,
    seed: int = 0,
) -> None:
    """Asserts that logits, and optionally gradients, are those of transformers on the same weights.

    Both run in fp32 on the CPU, and transformers in fp64 too. Against fp64, the error of this
    implementation may be at most twice the error of transformers in fp32. A further 1e-7 of the
    largest value is allowed, because transformers' own error can be 0.

    Args:
        model: a model, a checkpoint directory, or `hf://owner/name`.
        input_ids: (B, T) token ids; None draws 2 x 64 random ones, with `seed`.
        gradients: compare every parameter's gradient of the mean next-token loss as well.
    """
    with tempfile.TemporaryDirectory() as directory:
        if isinstance(model, LlamaForCausalLM):
            path = Path(directory) / "model"
            api.save(model, path)
            ours = copy.deepcopy(model).to("cpu", torch.float32)
        else:
            checkpoint = Checkpoint.open(model)
            path, ours = checkpoint.path, checkpoint.load(torch.float32)
        ids = random_ids(ours.config.vocab_size, seed) if input_ids is None else input_ids
        found = logits_and_gradients(ours, ids, gradients)
        expected = logits_and_gradients(load_hf(path, torch.float32), ids, gradients)
        exact = logits_and_gradients(load_hf(path, torch.float64), ids, gradients)
    assert found.keys() == exact.keys(), f"other parameters: {found.keys() ^ exact.keys()}"
    for name, value in exact.items():
        error = (found[name] - value).abs().max().item()
        allowed = 2 * (expected[name] - value).abs().max().item() + 1e-7 * value.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
