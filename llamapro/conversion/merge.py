"""Merges new blocks into their base, from one file or several."""

import dataclasses
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamapro import expansion
from llamapro.checkpoints.base import check_base, split_rows
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import (
    NEW_ROWS,
    BlocksInfo,
    check_blocks,
    find_blocks,
    read_blocks,
)
from llamapro.checkpoints.run import STATE_FILE, look_again
from llamapro.checkpoints.stacking import stack
from llamapro.checkpoints.tensors import DTYPES, StoredTensor
from llamapro.checkpoints.writing import Target, converted, hashed, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions, write_template
from llamapro.conversion.model_card import CARD_FILE, Training
from llamapro.conversion.model_card import render as render_card
from llamapro.errors import CheckpointError, DataError, warn
from llamapro.files import output_directory, refuse_source
from llamapro.model import build_on_meta
from llamapro.text.tokenizer import FILE_NAME, Tokenizer
from llamapro.text.vocabulary import JSON_NAME


def merge(
    source: Path, blocks: Sequence[Path], out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Merges into the checkpoint or `config.json` at `source`, as what is given demands."""

    def once() -> dict[str, Any]:
        if source.is_file() and len(blocks) == 1:
            return assemble_checkpoint(source, blocks[0], out_dir, force)
        checkpoint = Checkpoint.open(source)
        is_base = checkpoint.config.expansion is None
        # New blocks go on a base that has none; all weights of a model take the place of its own.
        if len(blocks) > 1 or (is_base and read_blocks(find_blocks(blocks[0]))[1].base_sha256):
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
    file = find_blocks(blocks_path)
    blocks, info = read_blocks(file)
    training, expected = Training.of(file, info), _expected_shapes(expanded, blocks, info)
    refuse_source(out_dir, expanded.path, file)
    _check_whole_model(expanded.path, blocks_path, blocks, training, expected)
    check_blocks(file, blocks, info, expanded.config, expected)
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
    with _merged(out_dir, targets, config, companions, [training], force):
        if config.expansion is not None:
            check_base(expanded, hashes)
    about = {"blocks": str(file), "step": info.step, "tensors_replaced": len(blocks)}
    return _result(out_dir, targets, config.expansion is not None, about)


def assemble_checkpoint(
    config_file: Path, blocks_path: str | Path, out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes the checkpoint of a run that started from a `config.json` alone: all it trained.

    The result has the dtype in which the run kept the weights. It is returned as by
    `merge_checkpoint`.
    """
    config = ModelConfig.from_file(config_file)
    file = find_blocks(blocks_path)
    refuse_source(out_dir, config_file, file)
    blocks, info = read_blocks(file)
    expected = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    training = Training.of(file, info)
    _check_whole_model(config_file, blocks_path, blocks, training, expected)
    check_blocks(file, blocks, info, config, expected)
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
) -> Iterator[Path]:
    """Writes a merged checkpoint with its model card; the body checks the weights' sources."""
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "merge")
        yield aside
        write_companions(aside, config, companions)
        templates = {training.template for training in trainings if training.template}
        if len(templates) == 1:
            write_template(aside, templates.pop())
        elif templates:
            warn(f"{out_dir}: trained with different chat templates; the base's, if any, stays")
        card = render_card(out_dir.resolve().name, config, trainings, aside)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


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


def _check_whole_model(
    given: Path,
    blocks_path: str | Path,
    blocks: dict[str, StoredTensor],
    training: Training,
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Refuses a run that trained all weights of a model of other shapes than the one given."""
    found = {name: tensor.shape for name, tensor in blocks.items()}
    if training.info.trainable != "all" or found == expected:
        return
    settings = training.part("settings")
    model = settings.get("model.path") or settings.get("model.config")
    fix = f": llamapro merge {model} {blocks_path} OUT_DIR" if model else " (model.path of the run)"
    theirs, ours = _describe(found, expected), _describe(expected, found)
    raise CheckpointError(
        f"{blocks_path}: the run trained all weights of a model of {theirs}; {given} has {ours}. "
        f"Merge it into the model that it started from{fix}"
    )


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
        print(
            f"warning: {file} was trained with tokenizer sha256 {training.tokenizer[:16]}..., but "
            f"{expanded.path} has {found[:16]}..., which goes into the result: copy the run's own "
            "(model.tokenizer) there",
            file=sys.stderr,
        )


def merge_many(
    base: Checkpoint, blocks_paths: Sequence[Path], out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes a base with the new blocks of one file or several, and a model card.

    Base and files are those of `stack`.

    Returns:
        JSON-able: path, blocks (the files used), steps (of each), layers, new_layers,
        source_layers, tensors_replaced, bytes, base_intact (True).
    """
    whole, files, trained = stack(base, blocks_paths)
    refuse_source(out_dir, base.path, *(blocks.file for blocks in files))
    trainings = [Training.of(blocks.file, blocks.info) for blocks in files]
    known = {t.tokenizer: str(b.file) for b, t in zip(files, trainings, strict=True) if t.tokenizer}
    if len(known) > 1:
        which = "; ".join(f"{file} with {sha256[:16]}..." for sha256, file in known.items())
        raise CheckpointError(f"trained with different tokenizers (sha256): {which}")
    targets: list[Target] = []
    hashes: dict[str, str] = {}
    for name, stored in whole.tensors.items():
        dtype = trained.get(name, stored.dtype)
        is_new = name in trained
        part = converted(stored, dtype) if is_new else hashed(stored, name, hashes)
        targets.append(Target(name, dtype, stored.shape, [part]))
    config, companions = whole.config, base.companions()
    with _merged(out_dir, targets, config, companions, trainings, force):
        check_base(whole, hashes)
    record = config.expansion
    assert record is not None
    about = {
        "blocks": [str(blocks.file) for blocks in files],
        "steps": [blocks.info.step for blocks in files],
        "layers": config.num_hidden_layers,
        "new_layers": list(record.new_layers),
        "source_layers": list(record.source_layers),
        "tensors_replaced": len(trained),
    }
    return _result(out_dir, targets, True, about)
