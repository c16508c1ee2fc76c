"""Puts new blocks trained on different domains into one model; takes all of them out again.

Each new-block file was trained alone, on the same base. A new block adds to the residual stream, so
the blocks of all files can stand in one model: on top of each base layer those of the first file,
then those of the second, and so on. Two files of 8 blocks on 32 base layers give 48 layers.
To a later training they are one generation: all of them would train.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro import expansion
from llamapro.checkpoints.base import (
    base_config,
    base_names,
    base_vocab_size,
    check_base,
    contained_base,
    layout_of,
)
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import BASE_CARD_FILE
from llamapro.checkpoints.new_blocks import BlocksInfo, check_blocks, find_blocks, read_blocks
from llamapro.checkpoints.tensors import DTYPES, StoredTensor, TensorSpec, tensor_chunks
from llamapro.checkpoints.writing import MAX_SHARD_BYTES, write_checkpoint
from llamapro.config import ExpansionRecord
from llamapro.conversion.add_tokens import restore_tokenizer
from llamapro.conversion.companions import write_companions
from llamapro.conversion.expand import Chunks, hashed_chunks
from llamapro.conversion.model_card import CARD_FILE, Training, write_card
from llamapro.errors import CheckpointError, ConfigError
from llamapro.expansion import Layout
from llamapro.files import output_directory, refuse_source


@dataclass(frozen=True)
class _Blocks:
    """A new-block file, found to fit the base.

    Attributes:
        file: its path.
        info: its metadata; `source_layers` are filled in.
        tensors: name in the file's own expanded model -> where it is stored.
    """

    file: Path
    info: BlocksInfo
    tensors: dict[str, StoredTensor]

    def on_top_of(self, base_layer: int) -> list[tuple[int, int]]:
        """Returns (layer, source) of the blocks directly above a base layer; -1: below all."""
        pairs = zip(self.info.new_layers, self.info.source_layers, strict=True)
        # Below the n-th new block there are n others, and base layers.
        return [pair for n, pair in enumerate(pairs) if pair[0] - n - 1 == base_layer]


def _open_blocks(path: Path, expanded: Checkpoint) -> _Blocks:
    """Opens a new-block file; raises CheckpointError unless it fits the base inside `expanded`."""
    record = expanded.config.expansion
    assert record is not None
    file = find_blocks(path)
    tensors, info = read_blocks(file)
    if info.trainable == "all" or not info.base_sha256:
        raise CheckpointError(
            f"{file}: holds all weights of a model, not new blocks of a base; merge it alone"
        )
    if len(info.new_layers) > len(tensors):  # before names are made for millions of layers
        raise CheckpointError(
            f"{file}: damaged: its metadata name {len(info.new_layers):,} new blocks, but it holds "
            f"{len(tensors):,} tensors"
        )
    # Its layout may be another than that of `expanded`; only the base has to be the same.
    its_record = dataclasses.replace(record, new_layers=info.new_layers)
    config = dataclasses.replace(expanded.config, expansion=its_record)
    expected = {
        f"model.layers.{index}.{part}": stored.shape
        for index in info.new_layers
        for part, stored in expanded.layer(0).items()
    }
    check_blocks(file, tensors, info, config, expected)
    sources = info.source_layers
    if not sources and info.new_layers == record.new_layers:
        sources = record.source_layers
    base_layers = expanded.config.num_hidden_layers - len(record.new_layers)
    its_layers = base_layers + len(info.new_layers)
    where = f"{file}: its metadata"
    if not sources:
        raise CheckpointError(
            f"{where} do not say from which layers its blocks were copied; merge it alone, into "
            "the expanded checkpoint it was trained on"
        )
    raw = {"new_layers": info.new_layers, "source_layers": sources, "base_sha256": ""}
    ExpansionRecord.from_dict(raw, its_layers, where)  # raises for impossible layers
    return _Blocks(file, dataclasses.replace(info, source_layers=sources), tensors)


def merge_many(
    expanded: Checkpoint,
    blocks_paths: Sequence[Path],
    out_dir: Path,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the base with the new blocks of several files, and a model card beside it.

    Args:
        expanded: an expanded checkpoint; the base inside it is used, its own new blocks are not.
        blocks_paths: run directories, training checkpoints or new-block files, all trained on this
            base, in whichever layouts.
        out_dir, force, max_shard_bytes: as for `streaming.expand_checkpoint`.

    Returns:
        JSON-able: path, blocks (the files used), steps (of each), layers, new_layers,
        source_layers, tensors_replaced, bytes, base_intact (True).

    Raises:
        ConfigError: as `streaming.expand_checkpoint`; or a file is given twice.
        CheckpointError: `expanded` has no record, its base was changed, or tokens were added to
            its vocabulary; or a file was trained on another base or tokenizer than the others, or
            does not fit.
    """
    layout_of(expanded.config, expanded.path)  # raises without a record
    if base_vocab_size(expanded.config) < expanded.config.vocab_size:
        raise CheckpointError(
            f"{expanded.path}: tokens were added to its vocabulary, and each file may have rows of "
            "its own for them; merge one file, or expand without --add-tokens"
        )
    files = [_open_blocks(path, expanded) for path in blocks_paths]
    refuse_source(out_dir, expanded.path, *(blocks.file for blocks in files))
    trainings = [Training.of(blocks.file, blocks.info) for blocks in files]
    _check_together(files, trainings)
    layout, trained = _combine(files, base_config(expanded).num_hidden_layers)
    base_of = base_names(expanded.tensors, layout_of(expanded.config, expanded.path))
    stored_as = {base: expanded.tensors[name] for name, base in base_of.items()}
    source_of = {
        name: stored_as[source]
        for name, (source, _) in expansion.expand_names(stored_as, layout).items()
    }
    specs = [TensorSpec(name, like.dtype, like.shape) for name, like in source_of.items()]
    hashes: dict[str, str] = {}

    def chunks_of(spec: TensorSpec) -> Chunks:
        if spec.name in trained:  # fp32 masters become the checkpoint's dtype
            return tensor_chunks(trained[spec.name].read().to(DTYPES[spec.dtype]))
        return hashed_chunks(source_of[spec.name], hashes)

    assert expanded.config.expansion is not None
    base_sha256 = expanded.config.expansion.base_sha256
    config = expansion.expand_config(base_config(expanded), layout, base_sha256)
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, specs, chunks_of, max_shard_bytes, label="merge")
        check_base(expanded, hashes)
        write_companions(aside, config, expanded.companions())
        write_card(aside, out_dir.resolve().name, config, trainings)
    return {
        "path": str(out_dir),
        "blocks": [str(blocks.file) for blocks in files],
        "steps": [blocks.info.step for blocks in files],
        "layers": config.num_hidden_layers,
        "new_layers": list(layout.new_layers),
        "source_layers": [layout.sources[i] for i in layout.new_layers],
        "tensors_replaced": len(trained),
        "bytes": sum(spec.nbytes for spec in specs),
        "base_intact": True,
    }


def _check_together(files: Sequence[_Blocks], trainings: Sequence[Training]) -> None:
    """Refuses the same file twice, and files that were trained with different tokenizers."""
    paths = [blocks.file.resolve() for blocks in files]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path}: given twice; its blocks would be added twice")
    known = {t.tokenizer: str(b.file) for b, t in zip(files, trainings, strict=True) if t.tokenizer}
    if len(known) > 1:
        which = "; ".join(f"{file} with {sha256[:16]}..." for sha256, file in known.items())
        raise CheckpointError(f"trained with different tokenizers (sha256): {which}")


def _combine(files: Sequence[_Blocks], base_layers: int) -> tuple[Layout, dict[str, StoredTensor]]:
    """Stacks the blocks of all files on the layers of the base, in the order of the files.

    Returns:
        The layout of the merged model, and by name there each trained tensor.
    """
    sources: list[int] = []
    new_layers: list[int] = []
    trained: dict[str, StoredTensor] = {}
    for base_layer in range(-1, base_layers):
        if base_layer >= 0:
            sources.append(base_layer)
        for blocks in files:
            for layer, source in blocks.on_top_of(base_layer):
                before, now = f"model.layers.{layer}.", f"model.layers.{len(sources)}."
                trained |= {
                    now + name.removeprefix(before): stored
                    for name, stored in blocks.tensors.items()
                    if name.startswith(before)
                }
                new_layers.append(len(sources))
                sources.append(source)
    return Layout(tuple(sources), tuple(new_layers)), trained


def strip_checkpoint(
    expanded: Checkpoint,
    out_dir: Path,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the base that is inside an expanded checkpoint: its tensors byte for byte.

    Of a model that was expanded several times, the latest generation is taken out, with the tokens
    it added.

    Args:
        expanded: an expanded or merged checkpoint.
        out_dir, force, max_shard_bytes: as for `streaming.expand_checkpoint`.

    Returns:
        JSON-able: path, layers, removed_layers, removed_tokens (how many), sha256 (the base's, as
        recorded), bytes.

    Raises:
        ConfigError: as `streaming.expand_checkpoint`, of the expanded checkpoint.
        CheckpointError: there is no record of new blocks, or the base was changed.
    """
    layout = layout_of(expanded.config, expanded.path)
    refuse_source(out_dir, expanded.path)
    inside = contained_base(expanded)
    stored_as = {base.name: dataclasses.replace(base, name=name) for name, base in inside.items()}
    specs = [TensorSpec(name, stored.dtype, stored.shape) for name, stored in stored_as.items()]
    config = base_config(expanded)
    hashes: dict[str, str] = {}
    with output_directory(out_dir, force) as aside:
        write_checkpoint(
            aside,
            specs,
            lambda spec: hashed_chunks(stored_as[spec.name], hashes),
            max_shard_bytes,
            label="strip",
        )
        check_base(expanded, hashes)
        write_companions(aside, config, expanded.companions())
        if config.vocab_size < expanded.config.vocab_size:
            restore_tokenizer(aside)
        if (aside / BASE_CARD_FILE).exists():
            (aside / BASE_CARD_FILE).rename(aside / CARD_FILE)
        sha256 = Checkpoint.open(aside).sha256()  # read back from the files
        assert expanded.config.expansion is not None
        if sha256 != expanded.config.expansion.base_sha256:
            raise CheckpointError(f"{out_dir}: not written: its files were changed meanwhile")
    return {
        "path": str(out_dir),
        "layers": config.num_hidden_layers,
        "removed_layers": list(layout.new_layers),
        "removed_tokens": expanded.config.vocab_size - config.vocab_size,
        "sha256": sha256,
        "bytes": sum(spec.nbytes for spec in specs),
    }
