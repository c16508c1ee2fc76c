"""Merges new blocks into their base, from one file or several.

Several new-block files may have been trained one by one on the same base. A new block adds to the
residual stream, so the blocks of all files can stand in one model: on top of each base layer come
those of the first file, then those of the second, and so on. Two files of 8 blocks on 32 base
layers give 48 layers. A later training treats them as one generation and trains all of them.
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llamapro import expansion
from llamapro.checkpoints.base import (
    base_config,
    base_vocab_size,
    check_base,
    contained_base,
    split_rows,
)
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import (
    NEW_ROWS,
    BlocksInfo,
    check_blocks,
    find_blocks,
    read_blocks,
)
from llamapro.checkpoints.run import STATE_FILE, look_again
from llamapro.checkpoints.tensors import DTYPES, StoredTensor
from llamapro.checkpoints.writing import MAX_SHARD_BYTES
from llamapro.config import ExpansionRecord, ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.conversion.model_card import Training, write_card
from llamapro.conversion.rewrite import Target, converted, hashed, rewritten
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.expansion import Layout
from llamapro.files import refuse_source
from llamapro.model import build_on_meta
from llamapro.text.tokenizer import FILE_NAME, Tokenizer
from llamapro.text.vocabulary import JSON_NAME

# ---- One file ----------------------------------------------------------------------------------


def merge(
    source: Path, blocks: Sequence[Path], out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Merges into the checkpoint or `config.json` at `source`, as what is given demands.

    All else is as for `merge_checkpoint`; `merge_many` if there are several `blocks`; or
    `assemble_checkpoint` if `source` is a file.
    """

    def once() -> dict[str, Any]:
        if len(blocks) > 1:
            return merge_many(Checkpoint.open(source), blocks, out_dir, force)
        if source.is_file():
            return assemble_checkpoint(source, blocks[0], out_dir, force)
        return merge_checkpoint(Checkpoint.open(source), blocks[0], out_dir, force)

    return look_again(once)


def render(out_dir: Path, result: dict[str, Any]) -> str:
    """Returns the result of `merge` as text."""
    if "new_layers" in result:
        return (
            f"{out_dir}: {result['layers']} layers, base tensors intact\n"
            f"new blocks   {result['new_layers']} of {len(result['blocks'])} files\n"
            f"copied from  {result['source_layers']}"
        )
    base = "base tensors intact" if result["base_intact"] else "all tensors trained"
    replaced, step = result["tensors_replaced"], result["step"]
    return f"{out_dir}: {replaced} trained tensors of step {step} merged, {base}"


def merge_checkpoint(
    expanded: Checkpoint,
    blocks_path: str | Path,
    out_dir: Path,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the expanded model with its trained blocks, in its own dtype, and a model card.

    `blocks_path` is a run directory, a training checkpoint or a new-block file; the other arguments
    are those of `expand_checkpoint`.

    Returns:
        JSON-able: path, blocks (the file used), step, tensors_replaced, bytes, base_intact.
    """
    file = find_blocks(blocks_path)
    refuse_source(out_dir, expanded.path, file)
    blocks, info = read_blocks(file)
    check_blocks(file, blocks, info, expanded.config, _expected_shapes(expanded, blocks, info))
    training = Training.of(file, info)
    _warn_of_another_tokenizer(expanded, file, training)
    targets: list[Target] = []
    hashes: dict[str, str] = {}
    for name, stored in expanded.tensors.items():
        base_rows, new_rows = split_rows(stored, expanded.config)
        parts = [hashed(base_rows, name, hashes)]
        if name in blocks:
            parts = [converted(blocks[name], stored.dtype)]
        elif new_rows is not None:
            parts.append(converted(blocks.get(NEW_ROWS[name], new_rows), stored.dtype))
        targets.append(Target(name, stored.dtype, stored.shape, parts))
    config = expanded.config
    if info.trainable == "all":
        # The base is no longer inside, so the record that says where it is would be false.
        config = config.resized(config.num_hidden_layers, config.vocab_size, None)
    companions = expanded.companions()
    with _merged(out_dir, targets, config, companions, [training], force, max_shard_bytes):
        if config.expansion is not None:
            check_base(expanded, hashes)
    about = {"blocks": str(file), "step": info.step, "tensors_replaced": len(blocks)}
    return _result(out_dir, targets, config.expansion is not None, about)


def assemble_checkpoint(
    config_file: Path, blocks_path: str | Path, out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes the checkpoint of a run that started from a `config.json` alone: all it trained.

    The result has the dtype in which the run kept the weights. Arguments, result and errors are
    those of `merge_checkpoint`, with the run's `config.json` in place of a checkpoint.
    """
    config = ModelConfig.from_file(config_file)
    file = find_blocks(blocks_path)
    refuse_source(out_dir, config_file, file)
    blocks, info = read_blocks(file)
    expected = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    check_blocks(file, blocks, info, config, expected)
    training = Training.of(file, info)
    # The run knows which tokenizer it was trained with; its file may have any name.
    tokenizer = training.part("settings").get("model.tokenizer")
    if not isinstance(tokenizer, str):
        state = file.parent / STATE_FILE
        raise CheckpointError(f"{state}: missing or damaged: names no 'model.tokenizer'")
    vocabulary, *beside = Tokenizer.load(tokenizer).files
    # The run's config.json may name another dtype, in which transformers would load the weights.
    stored = str(DTYPES[blocks["model.embed_tokens.weight"].dtype]).removeprefix("torch.")
    keys = {"torch_dtype", *({"dtype"} & config.raw.keys())}  # of transformers 4, and of 5
    config = dataclasses.replace(config, raw=config.raw | dict.fromkeys(sorted(keys), stored))
    targets = [Target(t.name, t.dtype, t.shape, [t.chunks]) for t in blocks.values()]
    with _merged(out_dir, targets, config, beside, [training], force) as aside:
        name = JSON_NAME if vocabulary.suffix == ".json" else FILE_NAME
        shutil.copyfile(vocabulary, aside / name)
    about = {"blocks": str(file), "step": info.step, "tensors_replaced": len(blocks)}
    return _result(out_dir, targets, False, about)


def _result(
    out_dir: Path, targets: Iterable[Target], base_intact: bool, about: dict[str, Any]
) -> dict[str, Any]:
    size = sum(target.nbytes for target in targets)
    return {"path": str(out_dir), **about, "bytes": size, "base_intact": base_intact}


@contextmanager
def _merged(
    out_dir: Path,
    targets: Sequence[Target],
    config: ModelConfig,
    companions: Iterable[Path],
    trainings: Sequence[Training],
    force: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Iterator[Path]:
    """Writes a merged checkpoint with its model card; the body checks the weights' sources."""
    with rewritten(out_dir, targets, "merge", force, max_shard_bytes) as aside:
        yield aside
        write_companions(aside, config, companions)
        write_card(aside, out_dir.resolve().name, config, trainings)


def _expected_shapes(
    expanded: Checkpoint, blocks: Iterable[str], info: BlocksInfo
) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of what a new-block file must hold; rows of added tokens may be in."""
    has_new_rows = not set(NEW_ROWS.values()).isdisjoint(blocks)
    expected = {}
    for name, stored in expanded.tensors.items():
        if info.trainable == "all" or expansion.is_in_layers(name, info.new_layers):
            expected[name] = stored.shape
        if has_new_rows and (new_rows := split_rows(stored, expanded.config)[1]) is not None:
            expected[NEW_ROWS[name]] = new_rows.shape
    return expected


def _warn_of_another_tokenizer(expanded: Checkpoint, file: Path, training: Training) -> None:
    """Says on standard error if the blocks were trained with another tokenizer than is beside."""
    try:
        found = Tokenizer.load(expanded.path).fingerprint
    except DataError:  # none, or its library is missing: nothing to compare
        return
    if training.tokenizer is not None and training.tokenizer != found:
        print(
            f"warning: {file} was trained with tokenizer sha256 {training.tokenizer[:16]}..., but "
            f"{expanded.path} has {found[:16]}..., which goes into the result: copy the run's own "
            "(model.tokenizer) there",
            file=sys.stderr,
        )


# ---- Several files -----------------------------------------------------------------------------


class _NewBlocks(NamedTuple):
    """A new-block file that fits the base; its `info` has `source_layers`."""

    file: Path
    info: BlocksInfo
    tensors: dict[str, StoredTensor]


def merge_many(
    expanded: Checkpoint, blocks_paths: Sequence[Path], out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes the base inside `expanded` with the new blocks of several files, and a model card.

    The files may have been trained in any layouts, as long as they have the same base.

    Returns:
        JSON-able: path, blocks (the files used), steps (of each), layers, new_layers,
        source_layers, tensors_replaced, bytes, base_intact (True).
    """
    inside = contained_base(expanded)
    stored_as = {base.name: expanded.tensors[name] for name, base in inside.items()}
    record = expanded.config.expansion
    assert record is not None
    if base_vocab_size(expanded.config) < expanded.config.vocab_size:
        raise CheckpointError(
            f"{expanded.path}: tokens were added to its vocabulary, and each file may have rows of "
            "its own for them; merge one file, or expand without --add-tokens"
        )
    files = [_open_blocks(path, expanded, record) for path in blocks_paths]
    refuse_source(out_dir, expanded.path, *(blocks.file for blocks in files))
    trainings = [Training.of(blocks.file, blocks.info) for blocks in files]
    _check_together(files, trainings)
    base = base_config(expanded)
    layout, trained = _combine(files, base.num_hidden_layers)
    targets: list[Target] = []
    hashes: dict[str, str] = {}
    for name, (source, _) in expansion.expand_names(stored_as, layout).items():
        stored = stored_as[source]
        part = hashed(stored, stored.name, hashes)
        if name in trained:
            part = converted(trained[name], stored.dtype)
        targets.append(Target(name, stored.dtype, stored.shape, [part]))
    config = expansion.expand_config(base, layout, record.base_sha256)
    with _merged(out_dir, targets, config, expanded.companions(), trainings, force):
        check_base(expanded, hashes)
    about = {
        "blocks": [str(blocks.file) for blocks in files],
        "steps": [blocks.info.step for blocks in files],
        "layers": config.num_hidden_layers,
        "new_layers": list(layout.new_layers),
        "source_layers": [layout.sources[i] for i in layout.new_layers],
        "tensors_replaced": len(trained),
    }
    return _result(out_dir, targets, True, about)


def _open_blocks(path: Path, expanded: Checkpoint, record: ExpansionRecord) -> _NewBlocks:
    """Opens a new-block file; raises CheckpointError unless it fits the base inside `expanded`."""
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
    if not sources:
        raise CheckpointError(
            f"{file}: its metadata do not say from which layers its blocks were copied; merge it "
            "alone, into the expanded checkpoint it was trained on"
        )
    layers = expanded.config.num_hidden_layers - len(record.new_layers) + len(info.new_layers)
    raw = {"new_layers": info.new_layers, "source_layers": sources, "base_sha256": ""}
    ExpansionRecord.from_dict(raw, layers, f"{file}: its metadata")  # raises if impossible
    return _NewBlocks(file, dataclasses.replace(info, source_layers=sources), tensors)


def _check_together(files: Sequence[_NewBlocks], trainings: Sequence[Training]) -> None:
    """Refuses the same file twice, and files that were trained with different tokenizers."""
    paths = [blocks.file.resolve() for blocks in files]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path}: given twice; its blocks would be added twice")
    known = {t.tokenizer: str(b.file) for b, t in zip(files, trainings, strict=True) if t.tokenizer}
    if len(known) > 1:
        which = "; ".join(f"{file} with {sha256[:16]}..." for sha256, file in known.items())
        raise CheckpointError(f"trained with different tokenizers (sha256): {which}")


def _combine(
    files: Sequence[_NewBlocks], base_layers: int
) -> tuple[Layout, dict[str, StoredTensor]]:
    """Stacks the files' blocks on the base layers; returns the layout and the trained tensors."""
    above: dict[int, list[tuple[_NewBlocks, int, int]]] = {}  # base layer -> blocks on top of it
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
