"""Describes a checkpoint in a table: its layers, which of them are new, sizes and hashes."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from llamapro.checkpoints.base import base_vocab_size, layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import is_training_output, open_blocks
from llamapro.checkpoints.run import look_again
from llamapro.checkpoints.tensors import StoredTensor, combine_hashes, hash_tensors

_LAYER_PREFIX = re.compile(r"model\.layers\.\d+\.")


def describe(path: str | Path) -> dict[str, Any]:
    """Reads and hashes a checkpoint, the newest intact step of a run, or a new-block file.

    Returns:
        JSON-able: path, kind, parameters, bytes, sha256, config (checkpoints), record (of the
        expansion or the new-block file) and rows, one per part of the model: part, origin,
        parameters, dtype, bytes, sha256.
    """
    if is_training_output(Path(path)):
        return look_again(lambda: _describe_blocks(path))
    checkpoint = Checkpoint.open(path)
    record = checkpoint.config.expansion
    kind = "checkpoint" if record is None else "expanded checkpoint"
    return _summary(checkpoint.path, kind, checkpoint.tensors, _origins(checkpoint)) | {
        "config": checkpoint.config.raw,
        "record": None if record is None else record.to_dict(),
    }


def _describe_blocks(path: str | Path) -> dict[str, Any]:
    file, tensors, info = open_blocks(path)
    return _summary(file, "trained blocks", tensors, {}) | {"record": dataclasses.asdict(info)}


def _origins(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns where each layer comes from, and how many new rows embedding and head have."""
    record = checkpoint.config.expansion
    if record is None:
        return {}
    base_layers = layout_of(checkpoint.config).base_layers
    origins = {f"layer {index}": f"base {base}" for base, index in enumerate(base_layers)}
    if new_tokens := checkpoint.config.vocab_size - base_vocab_size(checkpoint.config):
        origins |= dict.fromkeys(("embed_tokens", "lm_head"), f"base, {new_tokens} new rows")
    generations: list[Any] = [*record.generations, record.to_dict()]
    for number, generation in enumerate(generations, 1):
        pairs = zip(generation["new_layers"], generation["source_layers"], strict=True)
        for layer, source in pairs:
            origins[f"layer {layer}"] = f"new, copy of base {source}"
            if len(generations) > 1:
                origins[f"layer {layer}"] += f" (generation {number})"
    return origins


def _summary(
    path: Path, kind: str, tensors: dict[str, StoredTensor], origins: dict[str, str]
) -> dict[str, Any]:
    hashes = hash_tensors(tensors.values(), "hash")
    parts: dict[str, list[StoredTensor]] = {}
    for name, tensor in tensors.items():
        words = name.removeprefix("model.").removesuffix(".weight").split(".")
        part = f"layer {words[1]}" if words[0] == "layers" else words[0]
        parts.setdefault(part, []).append(tensor)
    rows = [
        {
            "part": part,
            "origin": origins.get(part, ""),
            "parameters": sum(math.prod(t.shape) for t in members),
            "dtype": ", ".join(sorted({t.dtype for t in members})),
            "bytes": sum(t.nbytes for t in members),
            # Named as inside the block, so that a block keeps its hash wherever it stands.
            "sha256": combine_hashes(
                (dataclasses.replace(t, name=_LAYER_PREFIX.sub("", t.name)), hashes[t.name])
                for t in members
            ),
        }
        for part, members in parts.items()
    ]
    return {
        "path": str(path),
        "kind": kind,
        "parameters": sum(math.prod(t.shape) for t in tensors.values()),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "sha256": combine_hashes((t, hashes[t.name]) for t in tensors.values()),
        "rows": rows,
    }


def render(found: dict[str, Any]) -> str:
    """Returns the table as text."""
    lines = [
        f"{found['path']}: {found['kind']}, {found['parameters']:,} parameters, "
        f"{found['bytes'] / 1e6:,.1f} MB",
        f"sha256 {found['sha256']}",
    ]
    if config := found.get("config"):
        keys = "num_hidden_layers hidden_size intermediate_size num_attention_heads"
        keys += " num_key_value_heads head_dim vocab_size rope_theta tie_word_embeddings"
        shown = [f"{key} {config[key]}" for key in keys.split() if key in config]
        lines.append("config: " + ", ".join(shown))
    if record := found.get("record"):
        lines.append(f"new layers {record['new_layers']}, base sha256 {record['base_sha256']}")
    header = f"{'part':<14} {'origin':<34} {'parameters':>14} {'dtype':<6} {'MB':>10}  sha256"
    lines += ["", header, "-" * len(header)]
    for row in found["rows"]:
        lines.append(
            f"{row['part']:<14} {row['origin']:<34} {row['parameters']:>14,} {row['dtype']:<6} "
            f"{row['bytes'] / 1e6:>10,.2f}  {row['sha256'][:12]}"
        )
    return "\n".join(lines)
