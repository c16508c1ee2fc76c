"""A table of what a checkpoint holds: layers, which are new and from where, sizes, hashes."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from llamapro.checkpoints.base import base_vocab_size, layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import find_blocks, is_training_output, read_blocks
from llamapro.checkpoints.tensors import StoredTensor, combine_hashes, hash_tensors
from llamapro.errors import CheckpointError

_LAYER_PREFIX = re.compile(r"model\.layers\.\d+\.")


def describe(path: str | Path) -> dict[str, Any]:
    """Reads and hashes a checkpoint, the newest intact step of a run, or a new-block file.

    Returns:
        JSON-able: path, kind, parameters, bytes, sha256, config (checkpoints), record (of the
        expansion or the new-block file) and rows, one per part of the model: part, origin,
        parameters, dtype, bytes, sha256.

    Raises:
        CheckpointError: it is damaged, or nothing of this kind.
    """
    directory = Path(path)
    if is_training_output(directory):
        file = find_blocks(directory)
        tensors, info = read_blocks(file)
        hashes = hash_tensors(tensors.values(), "hash")
        rows = _rows(tensors, hashes, {})
        summary = _summary(file, "trained blocks", tensors, hashes, rows)
        return summary | {"record": dataclasses.asdict(info)}
    checkpoint = Checkpoint.open(path)
    hashes = hash_tensors(checkpoint.tensors.values(), "hash")
    rows = _rows(checkpoint.tensors, hashes, _origins(checkpoint))
    kind = "checkpoint" if checkpoint.config.expansion is None else "expanded checkpoint"
    expansion = checkpoint.config.expansion
    return _summary(checkpoint.path, kind, checkpoint.tensors, hashes, rows) | {
        "config": checkpoint.config.raw,
        "record": None if expansion is None else expansion.to_dict(),
    }


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
        try:
            pairs = list(zip(generation["new_layers"], generation["source_layers"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: generation {number} of the 'llamapro' record "
                "does not say which layers were new, and copied from where"
            ) from None
        for layer, source in pairs:
            origins[f"layer {layer}"] = f"new, copy of base {source}"
            if len(generations) > 1:
                origins[f"layer {layer}"] += f" (generation {number})"
    return origins


def _rows(
    tensors: dict[str, StoredTensor], hashes: dict[str, str], origins: dict[str, str]
) -> list[dict[str, Any]]:
    parts: dict[str, list[StoredTensor]] = {}
    for name, tensor in tensors.items():
        words = name.removeprefix("model.").removesuffix(".weight").split(".")
        part = words[0]
        if part == "layers":
            part = f"layer {words[1]}"
        parts.setdefault(part, []).append(tensor)
    return [
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


def _summary(
    path: Path,
    kind: str,
    tensors: dict[str, StoredTensor],
    hashes: dict[str, str],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return {
        "path": str(path),
        "kind": kind,
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
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
