"""Merges new blocks into their base, from one file or several."""

import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamapro import expansion
from llamapro.checkpoints.base import base_vocab_size, check_base, new_sha256, split_rows
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import NEW_ROWS, NewBlocks, check_blocks, open_blocks
from llamapro.checkpoints.run import STATE_FILE, look_again
from llamapro.checkpoints.stacking import stack
from llamapro.checkpoints.tensors import DTYPES, StoredTensor
from llamapro.checkpoints.writing import Target, converted, hashed, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions, write_template
from llamapro.conversion.model_card import CARD_FILE, Training
from llamapro.conversion.model_card import render as render_card
from llamapro.errors import CheckpointError, ConfigError, DataError, warn
from llamapro.files import output_directory, refuse_source
from llamapro.model import build_on_meta
from llamapro.text.tokenizer import FILE_NAME, Tokenizer
from llamapro.text.vocabulary import JSON_NAME


def merge(
    source: Path, blocks: Sequence[Path], out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Merges into the checkpoint or `config.json` at `source`, as what is given demands."""

    if source.is_file() and source.suffix != ".json":
        raise ConfigError(
            f"{source}: give the checkpoint directory or the config.json first, then the new blocks"
        )

    def once() -> dict[str, Any]:
        if source.is_file() and len(blocks) == 1:
            return assemble_checkpoint(source, blocks[0], out_dir, force)
        checkpoint = Checkpoint.open(source)
        is_base = checkpoint.config.expansion is None
        # New blocks go on a base that has none; all weights of a model take the place of its own.
        if len(blocks) > 1 or (is_base and open_blocks(blocks[0]).info.base_sha256):
            return merge_many(checkpoint, blocks, out_dir, force)
        return merge_checkpoint(checkpoint, blocks[0], out_dir, force)

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
    expanded: Checkpoint, blocks_path: str | Path, out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes the expanded model with its trained blocks, in its own dtype, and a model card.

    `blocks_path` is a run directory, a training checkpoint or a new-block file.

    Returns:
        JSON-able: path, blocks (the file used), step, tensors_replaced, bytes, base_intact.
    """
    blocks = open_blocks(blocks_path)
    training = Training.of(blocks)
    refuse_source(out_dir, expanded.path, blocks.file)
    _check(expanded.path, expanded.config, blocks_path, blocks, training)
    _warn_of_another_tokenizer(expanded, blocks.file, training)
    config = expanded.config
    if blocks.info.trainable == "all":
        # The base is no longer inside, so the record that says where it is would be false.
        config = config.resized(config.num_hidden_layers, config.vocab_size, None)
    trained = {name: t for name, t in blocks.tensors.items() if name in expanded.tensors}
    whole = replace(expanded, config=config, tensors=expanded.tensors | trained)
    dtypes = {name: expanded.tensors[name].dtype for name in trained}
    rows = {name: t for name, t in blocks.tensors.items() if name not in trained}
    size = _write(out_dir, whole, dtypes, [training], expanded.companions(), force, rows)
    return _result(out_dir, size, blocks)


def assemble_checkpoint(
    config_file: Path, blocks_path: str | Path, out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes the checkpoint of a run that started from a `config.json` alone: all it trained.

    The result has the dtype in which the run kept the weights. It is returned as by
    `merge_checkpoint`.
    """
    config = ModelConfig.from_file(config_file)
    blocks = open_blocks(blocks_path)
    refuse_source(out_dir, config_file, blocks.file)
    if blocks.info.trainable != "all":
        raise ConfigError(
            f"{config_file}: {blocks.file} holds new blocks alone; give the expanded checkpoint "
            "directory, or its base's"
        )
    training = Training.of(blocks)
    _check(config_file, config, blocks_path, blocks, training)
    # The run knows which tokenizer it was trained with; its file may have any name.
    tokenizer = training.part("settings").get("model.tokenizer")
    if not isinstance(tokenizer, str):
        state = blocks.file.parent / STATE_FILE
        raise CheckpointError(f"{state}: missing or damaged: names no 'model.tokenizer'")
    vocabulary, *beside = Tokenizer.load(tokenizer).files
    # The run's config.json may name another dtype, in which transformers would load the weights.
    dtypes = {name: tensor.dtype for name, tensor in blocks.tensors.items()}
    stored = str(DTYPES[dtypes["model.embed_tokens.weight"]]).removeprefix("torch.")
    keys = {"torch_dtype", *({"dtype"} & config.raw.keys())}  # of transformers 4, and of 5
    config = replace(config, raw=config.raw | dict.fromkeys(sorted(keys), stored))
    whole = Checkpoint(config_file.parent, config, blocks.tensors)
    size = _write(out_dir, whole, dtypes, [training], beside, force, {}, vocabulary)
    return _result(out_dir, size, blocks)


def merge_many(
    base: Checkpoint, blocks_paths: Sequence[Path], out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes a base with the new blocks of one file or several, and a model card.

    Base and files are those of `stack`.

    Returns:
        JSON-able: path, blocks (the files used), steps (of each), layers, new_layers,
        source_layers, tensors_replaced, bytes, base_intact (True).
    """
    whole, files, dtypes = stack(base, blocks_paths)
    refuse_source(out_dir, base.path, *(blocks.file for blocks in files))
    trainings = [Training.of(blocks) for blocks in files]
    known = {t.tokenizer: str(b.file) for b, t in zip(files, trainings, strict=True) if t.tokenizer}
    if len(known) > 1:
        which = "; ".join(f"{file} with {sha256[:16]}..." for sha256, file in known.items())
        raise CheckpointError(f"trained with different tokenizers (sha256): {which}")
    size = _write(out_dir, whole, dtypes, trainings, base.companions(), force, {})
    record = whole.config.expansion
    assert record is not None
    return {
        "path": str(out_dir),
        "blocks": [str(blocks.file) for blocks in files],
        "steps": [blocks.info.step for blocks in files],
        "layers": whole.config.num_hidden_layers,
        "new_layers": list(record.new_layers),
        "source_layers": list(record.source_layers),
        "tensors_replaced": len(dtypes),
        "bytes": size,
        "base_intact": True,
    }


def _write(
    out_dir: Path,
    whole: Checkpoint,
    dtypes: Mapping[str, str],
    trainings: Sequence[Training],
    companions: Iterable[Path],
    force: bool,
    new_rows: Mapping[str, StoredTensor],
    vocabulary: Path | None = None,
) -> int:
    """Writes a merged checkpoint with its model card, and returns the number of bytes of weights.

    Args:
        whole: the merged model, whose trained tensors lie in the files of new blocks.
        dtypes: name of each of them -> the dtype in which it is written; all others are the base's.
        new_rows: the trained rows of added tokens, by their names in the file.
        vocabulary: the tokenizer's file, of any name, if it is not among the companions.
    """
    targets: list[Target] = []
    hashes: dict[str, str] = {}
    for name, stored in whole.tensors.items():
        dtype = dtypes.get(name, stored.dtype)
        base_rows, grown = split_rows(stored, whole.config)
        parts = [hashed(base_rows, name, hashes)]
        if name in dtypes:
            parts = [converted(stored, dtype)]
        elif grown is not None:
            parts.append(converted(new_rows.get(NEW_ROWS[name], grown), dtype))
        targets.append(Target(name, dtype, stored.shape, parts))
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "merge")
        if hashes:  # not if all weights were trained
            check_base(whole, hashes)
        if vocabulary is not None:
            name = JSON_NAME if vocabulary.suffix == ".json" else FILE_NAME
            shutil.copyfile(vocabulary, aside / name)
        write_companions(aside, whole.config, companions)
        if record := whole.config.expansion:
            config = whole.config
            record = replace(record, new_sha256=new_sha256(Checkpoint.open(aside)))
            config = config.resized(config.num_hidden_layers, config.vocab_size, record)
            (aside / "config.json").write_text(config.to_json(), encoding="utf-8")
        templates = {training.template for training in trainings if training.template}
        if len(templates) == 1:
            write_template(aside, templates.pop())
        elif templates:
            warn(f"{out_dir}: trained with different chat templates; the base's, if any, stays")
        card = render_card(out_dir.resolve().name, whole.config, trainings, aside)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return sum(target.nbytes for target in targets)


def _result(out_dir: Path, size: int, blocks: NewBlocks) -> dict[str, Any]:
    return {
        "path": str(out_dir),
        "blocks": str(blocks.file),
        "step": blocks.info.step,
        "tensors_replaced": len(blocks.tensors),
        "bytes": size,
        "base_intact": blocks.info.trainable != "all",
    }


def _check(
    given: Path, config: ModelConfig, blocks_path: str | Path, blocks: NewBlocks, training: Training
) -> None:
    """Raises CheckpointError unless the file was trained on the model `given`, and is complete."""
    shapes = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    added, tensors, info = config.vocab_size - base_vocab_size(config), blocks.tensors, blocks.info
    is_whole = info.trainable == "all"
    expected = {
        name: shape
        for name, shape in shapes.items()
        if is_whole or expansion.is_in_layers(name, info.new_layers)
    }
    if added and not set(NEW_ROWS.values()).isdisjoint(tensors):  # rows of added tokens may be in
        expected |= {NEW_ROWS[n]: (added, *shapes[n][1:]) for n in NEW_ROWS if n in shapes}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if is_whole and found != expected:
        settings = training.part("settings")
        model = settings.get("model.path") or settings.get("model.config")
        fix = f": llamapro merge {shlex.join((str(model), str(blocks_path)))} OUT_DIR"
        theirs, ours = _describe(found, expected), _describe(expected, found)
        raise CheckpointError(
            f"{blocks_path}: the run trained all weights of a model of {theirs}; {given} has "
            f"{ours}. Merge it into the model that it started from"
            + (fix if model else " (model.path of the run)")
        )
    check_blocks(blocks, config, expected)


def _describe(shapes: dict[str, tuple[int, ...]], others: dict[str, tuple[int, ...]]) -> str:
    """Returns a model's number of layers; where others have as many, a shape that differs."""
    layers, same = (len({n.split(".")[2] for n in m if ".layers." in n}) for m in (shapes, others))
    if layers != same:
        return f"{layers} layers"
    name = next(name for name in others | shapes if shapes.get(name) != others.get(name))
    return f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"


def _warn_of_another_tokenizer(expanded: Checkpoint, file: Path, training: Training) -> None:
    """Says on standard error if the blocks were trained with another tokenizer than is beside."""
    try:
        found = Tokenizer.load(expanded.path).fingerprint
    except DataError:  # none, or its library is missing: nothing to compare
        return
    if training.tokenizer is not None and training.tokenizer != found:
        warn(
            f"{file} was trained with tokenizer sha256 {training.tokenizer[:16]}..., but "
            f"{expanded.path} has {found[:16]}..., which goes into the result: copy the run's own "
            "(model.tokenizer) there"
        )
