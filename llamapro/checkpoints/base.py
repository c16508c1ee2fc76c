"""The base inside an expanded model, used as it is: no file is written, no new block is computed.

Skipping the new blocks is the base: its blocks stand in the expanded checkpoint with every byte,
and so do its rows of embedding and head. Of a model that was expanded several times it is the one
that the latest expansion started from.
"""

import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.add_tokens import base_vocab_size
from llamapro.conversion.merge import base_config
from llamapro.conversion.verify import contained_base
from llamapro.errors import ConfigError
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors


def check_contained(expanded: Checkpoint, special: bool = False) -> None:
    """Finds out whether the base inside a checkpoint can be used in its place.

    Args:
        expanded: the checkpoint.
        special: names of control tokens will stand for them, as chat templates have it: also for
            added ones, which the base does not know.

    Raises:
        ConfigError: there is no record of new blocks; or, with `special`, the vocabulary grew.
    """
    config = expanded.config
    if config.expansion is None:
        raise ConfigError(
            f"--skip-new-blocks: config.json of {expanded.path} has no 'llamapro' record, so it "
            "has no new blocks; leave the option out"
        )
    added = config.vocab_size - base_vocab_size(config)
    if special and added:
        raise ConfigError(
            f"--skip-new-blocks: {expanded.path} has {added} added tokens, which its base does not "
            "know and conversations may name; 'convert.py strip' writes the base with its own "
            "tokenizer: use that"
        )


def load_contained(
    expanded: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """Loads the base inside a checkpoint: to the bit what `Checkpoint.load` gives of the base.

    New blocks are mapped with the rest of their file, but never read: they cost no memory, no time
    and no place in a KV cache. The logits are of the base's `vocab_size` tokens.

    Args:
        expanded: an expanded or merged checkpoint; `check_contained` comes before.
        dtype, device: as for `Checkpoint.load`.

    Raises:
        CheckpointError: there is no record of new blocks, or a file cannot be read.
    """
    mapped = expanded.state_dict()
    tensors = {
        base.name: mapped[name][: base.shape[0]].to(dtype or mapped[name].dtype)
        for name, base in contained_base(expanded).items()
    }
    model = build_on_meta(base_config(expanded))
    load_tensors(model, tensors)
    return model.to(device).requires_grad_(False).eval()
