"""New blocks on their base, as one checkpoint: nothing is written, tensors stay in their files.

Several new-block files may have been trained one by one on the same base. A new block adds to the
residual stream, so the blocks of all files can stand in one model: on top of each base layer come
those of the first file, then those of the second, and so on. Two files of 8 blocks on 32 base
layers give 48 layers. A later training treats them as one generation and trains all of them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llamapro import expansion
from llamapro.checkpoints.base import base_vocab_size, contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import NewBlocks, check_blocks, identity, open_blocks
from llamapro.checkpoints.tensors import StoredTensor
from llamapro.config import ExpansionRecord
from llamapro.errors import CheckpointError, ConfigError
from llamapro.expansion import Layout


class Stacked(NamedTuple):
    """A base with the new blocks of files on it."""

    checkpoint: Checkpoint  # the base's directory; configuration and names of the whole model
    files: list[NewBlocks]  # in the order of their blocks; the `info` of each has `source_layers`
    trained: dict[str, str]  # name of each tensor from a file -> the dtype that the base has there


def stack(base: Checkpoint, paths: Sequence[str | Path]) -> Stacked:
    """Puts new blocks on their base; the files may have been trained in any layouts.

    Raises CheckpointError if a file is damaged or does not belong to this base, or the vocabulary
    grew, and ConfigError if a file, or a run, is given twice.

    Args:
        base: the base, whose every byte is then read for its hash; or an expanded model with the
            base inside, whose record has the hash and whose own new blocks are left out.
        paths: new-block files, training checkpoints, run directories or `hf://owner/name`.
    """
    record = base.config.expansion
    if base_vocab_size(base.config) < base.config.vocab_size:
        raise CheckpointError(
            f"{base.path}: tokens were added to its vocabulary, and each file may have rows of its "
            "own for them; merge one file, or expand without --add-tokens"
        )
    if record is None:
        record, inside = ExpansionRecord((), (), base.sha256()), base
    else:
        inside = contained_checkpoint(base)
    files = [_open(path, base, record) for path in paths]
    known: dict[object, Path] = {}
    for file, _, info in files:
        place = file.resolve()
        keys: dict[object, str] = {(identity(file), info.step): "given twice, before as"}
        if place.match("checkpoints/step-*/*"):
            keys[place.parent.parent] = "of the same run as"
        for key, what in keys.items():
            if (other := known.setdefault(key, file)) is not file:
                raise ConfigError(f"{file}: {what} {other}; its blocks would be added twice")
    layout, trained = _combine(files, inside.config.num_hidden_layers)
    tensors, dtypes = {}, {}
    for name, (source, _) in expansion.expand_names(inside.tensors, layout).items():
        tensors[name] = trained.get(name, inside.tensors[source])
        if name in trained:
            dtypes[name] = inside.tensors[source].dtype
    whole = expansion.expand_config(inside.config, layout, record.base_sha256)
    checkpoint = dataclasses.replace(base, config=whole, tensors=tensors)
    return Stacked(checkpoint, files, dtypes)


def _open(path: str | Path, base: Checkpoint, record: ExpansionRecord) -> NewBlocks:
    """Opens a new-block file; raises CheckpointError unless it fits the base."""
    blocks = open_blocks(path)
    file, tensors, info = blocks
    if info.trainable == "all" or not info.base_sha256:
        raise CheckpointError(
            f"{file}: holds all weights of a model, not new blocks of a base; merge it alone"
        )
    if len(info.new_layers) > len(tensors):  # before names are made for millions of layers
        raise CheckpointError(
            f"{file}: damaged: its metadata name {len(info.new_layers):,} new blocks, but it holds "
            f"{len(tensors):,} tensors"
        )
    # Its layout may be another than that of `base`; only the base has to be the same.
    its_record = dataclasses.replace(record, new_layers=info.new_layers)
    config = dataclasses.replace(base.config, expansion=its_record)
    expected = {
        f"model.layers.{index}.{part}": stored.shape
        for index in info.new_layers
        for part, stored in base.layer(0).items()
    }
    check_blocks(blocks, config, expected)
    sources = info.source_layers
    if not sources and info.new_layers == record.new_layers:
        sources = record.source_layers
    if not sources:
        raise CheckpointError(
            f"{file}: its metadata do not say from which layers its blocks were copied; merge it "
            "alone, into the expanded checkpoint it was trained on"
        )
    layers = base.config.num_hidden_layers - len(record.new_layers) + len(info.new_layers)
    raw = {"new_layers": info.new_layers, "source_layers": sources, "base_sha256": ""}
    ExpansionRecord.from_dict(raw, layers, f"{file}: its metadata")  # raises if impossible
    return blocks._replace(info=dataclasses.replace(info, source_layers=sources))


def _combine(
    files: Sequence[NewBlocks], base_layers: int
) -> tuple[Layout, dict[str, StoredTensor]]:
    """Stacks the files' blocks on the base layers; returns the layout and the trained tensors."""
    above: dict[int, list[tuple[NewBlocks, int, int]]] = {}  # base layer -> blocks on top of it
    for blocks in files:
        pairs = zip(blocks.info.new_layers, blocks.info.source_layers, strict=True)
        for number, (layer, source) in enumerate(pairs):
            # Below a new block stand `number` others of its file; the rest are base layers.
            above.setdefault(layer - number - 1, []).append((blocks, layer, source))
    layout = expansion.place(
        base_layers, {base: [source for _, _, source in found] for base, found in above.items()}
    )
    stacked = [block for _, found in sorted(above.items()) for block in found]
    trained: dict[str, StoredTensor] = {}
    for index, (blocks, layer, _) in zip(layout.new_layers, stacked, strict=True):
        old = f"model.layers.{layer}."
        for name, stored in blocks.tensors.items():
            if name.startswith(old):
                trained[f"model.layers.{index}.{name.removeprefix(old)}"] = stored
    return layout, trained
