"""Gives a checkpoint that another tool expanded the record that training and merging read.

The paper's script, LLaMA-Factory and mergekit write expanded models without saying which layers are
new. An untrained new block is the identity: `o_proj` and `down_proj` are zero. Once it is trained
only the user knows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamapro.checkpoints.base import contained_base_sha256, contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.writing import Target, hashed, write_checkpoint
from llamapro.config import ExpansionRecord
from llamapro.conversion.companions import write_companions
from llamapro.conversion.same_logits import compare_logits
from llamapro.errors import ConfigError
from llamapro.files import output_directory, refuse_source


def adopt(
    checkpoint: Checkpoint, out_dir: Path, new_layers: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes a copy of the checkpoint whose `config.json` says which layers are new blocks.

    Args:
        checkpoint: expanded elsewhere; all bytes are copied as they are.
        new_layers: the new blocks, such as "4,9,14"; None for those that are the identity.

    Returns:
        JSON-able: path, layers, new_layers, source_layers, new_blocks ("identity" or "trained"),
        base_sha256, bytes; for the identity also logits_bit_equal (True) and tokens_compared.
    """
    refuse_source(out_dir, checkpoint.path)
    if (record := checkpoint.config.expansion) is not None:
        raise ConfigError(
            f"{checkpoint.path}: has a 'llamapro' record already, of new layers "
            f"{list(record.new_layers)}; use it as it is"
        )
    layers = range(checkpoint.config.num_hidden_layers)
    identity = [index for index in layers if checkpoint.is_identity(index)]
    new = _parse(new_layers, checkpoint) if new_layers is not None else identity
    config = checkpoint.config
    zero = "o_proj and down_proj zero"
    if config.o_proj_bias or config.mlp_bias:
        zero += ", weights and biases"
    if not 0 < len(new) < config.num_hidden_layers:
        raise ConfigError(
            f"{checkpoint.path}: {len(new)} of {config.num_hidden_layers} layers are the identity "
            f"({zero}); name the new blocks with --new-layers 4,9,14"
        )
    if missing := sorted(set(identity) - set(new)):
        raise ConfigError(
            f"--new-layers {new_layers}: layers {missing} of {checkpoint.path} are the identity "
            f"({zero}), as new blocks are, and are not among them; name these "
            "too, or leave the option out if all new blocks are untrained"
        )
    sources = tuple(_source(checkpoint, new, layer) for layer in new)
    found = ExpansionRecord(tuple(new), sources, "", (), None, config.computation)
    expanded = replace(checkpoint, config=replace(config, expansion=found))
    hashes: dict[str, str] = {}
    targets = [
        Target(name, t.dtype, t.shape, [hashed(t, name, hashes)])
        for name, t in checkpoint.tensors.items()
    ]
    is_identity = set(new) <= set(identity)
    result: dict[str, Any] = {
        "path": str(out_dir),
        "layers": config.num_hidden_layers,
        "new_layers": list(new),
        "source_layers": list(found.source_layers),
        "new_blocks": "identity" if is_identity else "trained",
    }
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "adopt")
        found = replace(found, base_sha256=contained_base_sha256(expanded, hashes))
        config = config.resized(config.num_hidden_layers, config.vocab_size, found)
        write_companions(aside, config, checkpoint.companions())
        if is_identity:
            base = contained_checkpoint(expanded)
            logits = compare_logits(base, Checkpoint.open(aside))
            logits.check(f"{out_dir}: not written")
            result |= {"logits_bit_equal": True, "tokens_compared": logits.tokens}
    size = sum(target.nbytes for target in targets)
    return result | {"base_sha256": found.base_sha256, "bytes": size}


def render(result: dict[str, Any]) -> str:
    """Returns what `adopt` did as text."""
    lines = [
        f"{result['path']}: {result['layers']} layers, the record of new blocks is written",
        f"new blocks   {result['new_layers']}: {result['new_blocks']}",
        f"copied from  {result['source_layers']}",
        f"base sha256  {result['base_sha256']}; 'llamapro verify DIR --base BASE' compares a base",
    ]
    if "tokens_compared" in result:
        lines.append(
            f"verified: logits of {result['tokens_compared']} random tokens bit-equal to the base's"
        )
    return "\n".join(lines)


def _parse(new_layers: str, checkpoint: Checkpoint) -> list[int]:
    try:
        new = sorted(int(layer) for layer in new_layers.split(","))
    except ValueError:
        raise ConfigError(f"--new-layers {new_layers!r}: expected layers like 4,9,14") from None
    last = checkpoint.config.num_hidden_layers - 1
    if len(set(new)) < len(new) or not 0 <= new[0] <= new[-1] <= last or len(new) > last:
        raise ConfigError(
            f"--new-layers {new_layers}: expected some of the layers 0 to {last} of "
            f"{checkpoint.path}, each once"
        )
    return new


def _source(checkpoint: Checkpoint, new: list[int], layer: int) -> int:
    """Returns the base layer that an untrained new block was copied from, or else that below it."""
    base_layers = [i for i in range(checkpoint.config.num_hidden_layers) if i not in new]
    below = max(sum(index < layer for index in base_layers) - 1, 0)
    copied = checkpoint.layer(layer)["mlp.up_proj.weight"].map()
    for base in sorted(range(len(base_layers)), key=lambda base: (base > below, abs(base - below))):
        if torch.equal(checkpoint.layer(base_layers[base])["mlp.up_proj.weight"].map(), copied):
            return base
    return below
