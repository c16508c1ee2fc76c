"""Compares the logits of base and expanded model, one block in memory at a time."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from llamapro import ops
from llamapro.checkpoints.base import layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.tensors import StoredTensor, same_bytes
from llamapro.config import differences
from llamapro.errors import CheckpointError
from llamapro.model import DecoderLayer, RMSNorm

PROBE_SHAPE = (2, 16)  # B, T of the random batch


class LogitComparison(NamedTuple):
    """The logits of base and expanded model on the same random batch, in the base's dtype.

    With added tokens the head has more rows, and its product may sum in another order, above all
    for 1 to 3 tokens in fp32 on a CPU. So the heads are compared with the base's rows alone, and
    `head_difference` is by how much the other rows move the base's logits.
    """

    bit_equal: bool
    max_difference: float
    tokens: int
    head_difference: float

    def check(self, where: str) -> None:
        """Raises CheckpointError if the logits differ, which identity blocks leave as they are."""
        if not self.bit_equal:
            raise CheckpointError(
                f"{where}: new blocks are the identity, yet logits differ from the base's by "
                f"{self.max_difference:.3e}; the base holds NaN or infinity, or was changed while "
                "it was read"
            )


class Probe:
    """One random batch on its way through both models, on the CPU.

    Tokens that were added to the expanded model are not in the batch, and have no logit in the
    comparison.

    Args:
        expanded: may lack tensors that are not written yet; `advance` stops before them.
    """

    def __init__(self, base: Checkpoint, expanded: Checkpoint):
        self.base, self.expanded = base, expanded
        self.layout = layout_of(expanded.config, expanded.path)
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(base.config.vocab_size, PROBE_SHAPE, generator=generator)
        self.dtype, self.index = base.dtype, 0
        self.is_alike = not differences(base.config.computation, expanded.config.computation)

    @torch.no_grad()
    def advance(self) -> bool:
        """Runs the next block of both models; returns False if there is none to run yet.

        A block of both with the same bytes and the same input runs once: its output is that of
        both.
        """
        if self.index == len(self.layout.sources):
            return False
        source = self.layout.sources[self.index]
        ours, theirs = self.expanded.layer(self.index), self.base.layer(source)
        if ours.keys() != theirs.keys():
            return False
        if self.index == 0:
            self.ours, self.theirs = (
                model.tensors["model.embed_tokens.weight"].map()[self.input_ids].to(self.dtype)
                for model in (self.expanded, self.base)
            )  # (B, T, C)
        is_new = self.index in self.layout.new_layers
        is_shared = not is_new and self.is_alike and same_bytes(self.ours, self.theirs)
        is_shared = is_shared and all(
            same_bytes(tensor.map(), theirs[name].map()) for name, tensor in ours.items()
        )
        self.ours = _output(self.expanded, self.index, ours, self.ours)
        if is_shared:
            self.theirs = self.ours
        elif not is_new:
            self.theirs = _output(self.base, source, theirs, self.theirs)
        self.index += 1
        return True

    @torch.no_grad()
    def compare(self) -> LogitComparison:
        """Returns the comparison; raises CheckpointError if a block has not run."""
        if self.index < len(self.layout.sources):
            raise CheckpointError(
                f"{self.expanded.path}: block {self.index} has not all tensors of block "
                f"{self.layout.sources[self.index]} of {self.base.path}"
            )
        rows = self.base.config.vocab_size
        ours, moved = _logits(self.expanded, self.ours, rows)  # (B, T, V)
        theirs, _ = _logits(self.base, self.theirs, rows)
        bit_equal = same_bytes(ours, theirs)  # a NaN equals itself
        difference = (ours.float() - theirs.float()).abs().max().item()
        return LogitComparison(bit_equal, difference, self.input_ids.numel(), moved)


def compare_logits(base: Checkpoint, expanded: Checkpoint) -> LogitComparison:
    """Runs both models, which are complete, on one random batch."""
    probe = Probe(base, expanded)
    with tqdm(total=len(probe.layout.sources), desc="compare blocks", disable=None) as bar:
        while probe.advance():
            bar.update()
    return probe.compare()


def _output(
    checkpoint: Checkpoint, index: int, stored: dict[str, StoredTensor], x: Tensor
) -> Tensor:
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config, index)
    layer.load_state_dict({name: t.map().to(x.dtype) for name, t in stored.items()}, assign=True)
    positions = torch.arange(x.shape[1])
    return layer(x, ops.rotary_table(checkpoint.config, positions, x.dtype))


def _logits(checkpoint: Checkpoint, x: Tensor, rows: int) -> tuple[Tensor, float]:
    """Returns the logits of the first rows, and by how much the head's other rows move them."""
    with torch.device("meta"):
        norm = RMSNorm(checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps)
    weight = checkpoint.tensors["model.norm.weight"].map().to(x.dtype)
    norm.load_state_dict({"weight": weight}, assign=True)
    tied = checkpoint.config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    head = checkpoint.tensors[name].map().to(x.dtype)
    linear, hidden = torch.nn.functional.linear, norm(x)
    moved = 0.0
    for tokens in (1, 2, 3, x.shape[0] * x.shape[1]) if len(head) > rows else ():
        h = hidden.flatten(0, 1)[:tokens]
        difference = linear(h, head)[:, :rows] - linear(h, head[:rows])
        moved = max(moved, difference.float().abs().max().item())
    return linear(hidden, head[:rows]), moved
