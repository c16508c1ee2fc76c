"""Expands and merges checkpoint directories tensor by tensor: memory stays small at any size."""

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
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
from llamapro.checkpoints.run import MAX_STATE_BYTES, STATE_FILE
from llamapro.checkpoints.tensors import (
    CHUNK_BYTES,
    DTYPES,
    StoredTensor,
    TensorSpec,
    combine_hashes,
    tensor_chunks,
)
from llamapro.checkpoints.writing import MAX_SHARD_BYTES, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.add_tokens import add_tokens, check_tokens, mean_row
from llamapro.conversion.companions import write_companions
from llamapro.conversion.model_card import Training, keep_base_card, write_card
from llamapro.conversion.verify import compare_logits
from llamapro.errors import CheckpointError, DataError
from llamapro.expansion import Layout
from llamapro.files import output_directory, read_json, refuse_source
from llamapro.model import build_on_meta
from llamapro.text.tokenizer import FILE_NAME, Tokenizer
from llamapro.text.vocabulary import JSON_NAME

Chunks = Iterator[memoryview | bytes]


def hashed_chunks(stored: StoredTensor, hashes: dict[str, str]) -> Chunks:
    """Yields a tensor's bytes; notes their SHA-256 in `hashes`: one read serves copy and hash.

    Of a tensor with rows of added tokens give only the base's: see `growing.split_rows`.
    """
    digest = hashlib.sha256()
    for chunk in stored.chunks():
        digest.update(chunk)
        yield chunk
    hashes[stored.name] = digest.hexdigest()


def _zeros(spec: TensorSpec) -> Chunks:
    zeros = bytes(min(CHUNK_BYTES, spec.nbytes))
    for at in range(0, spec.nbytes, CHUNK_BYTES):
        yield zeros[: spec.nbytes - at]


def expand_checkpoint(
    base: Checkpoint,
    out_dir: Path,
    layout: Layout,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    new_tokens: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the expanded checkpoint and verifies it before it appears under its name.

    Args:
        base: the checkpoint to expand.
        out_dir: the directory to create.
        layout: where the new blocks go (`llamapro.expansion`).
        force: replace an existing checkpoint, once the new one is complete.
        max_shard_bytes: largest safetensors file.
        new_tokens: control tokens that the vocabulary grows by; their ids follow the base's
            `vocab_size` rows (`llamapro.conversion.add_tokens`).

    Returns:
        JSON-able: layers, new_layers, source_layers, new_tokens (name -> id) and bytes of the
        result, base_sha256, logits_bit_equal (True) and tokens_compared.

    Raises:
        ConfigError: `out_dir` is or contains the base; or it exists, without `force`; or a new
            token is in the vocabulary already.
        DataError: the tokenizer cannot take tokens.
        CheckpointError: writing failed, or the result's logits differ from the base's.
    """
    refuse_source(out_dir, base.path)
    if new_tokens:
        check_tokens(base.path, new_tokens, base.config.vocab_size)
    names = expansion.expand_names(base.tensors, layout)
    specs = []
    for name, (source, _) in names.items():
        stored = base.tensors[source]
        more = len(new_tokens) if name in NEW_ROWS else 0
        shape = (stored.shape[0] + more, *stored.shape[1:])
        specs.append(TensorSpec(name, stored.dtype, shape))
    hashes: dict[str, str] = {}
    new = set(layout.new_layers)

    def chunks_of(spec: TensorSpec) -> Chunks:
        source, is_zero = names[spec.name]
        stored = base.tensors[source]
        if is_zero:
            return _zeros(spec)
        if expansion.is_in_layers(spec.name, new):
            return stored.chunks()
        if spec.shape == stored.shape:
            return hashed_chunks(stored, hashes)
        rows = mean_row(stored).expand(len(new_tokens), -1)
        return chain(hashed_chunks(stored, hashes), tensor_chunks(rows))

    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, specs, chunks_of, max_shard_bytes, label="expand")
        base_sha256 = combine_hashes((t, hashes[t.name]) for t in base.tensors.values())
        config = expansion.expand_config(base.config, layout, base_sha256, len(new_tokens))
        write_companions(aside, config, base.companions())
        if new_tokens:
            add_tokens(aside, new_tokens, base.config.vocab_size)
        keep_base_card(base.path, aside)
        logits = compare_logits(base, Checkpoint.open(aside))
        if not logits.bit_equal:
            raise CheckpointError(
                f"{out_dir}: not written: logits differ from the base's by "
                f"{logits.max_difference:.3e}; the base holds NaN or infinity, or was changed "
                "while it was read"
            )
    return {
        "path": str(out_dir),
        "layers": config.num_hidden_layers,
        "new_layers": list(layout.new_layers),
        "source_layers": [layout.sources[i] for i in layout.new_layers],
        "new_tokens": {t: i for i, t in enumerate(new_tokens, base.config.vocab_size)},
        "bytes": sum(spec.nbytes for spec in specs),
        "base_sha256": base_sha256,
        "logits_bit_equal": True,
        "tokens_compared": logits.tokens,
    }


def merge_checkpoint(
    expanded: Checkpoint,
    blocks_path: str | Path,
    out_dir: Path,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the expanded model with its trained blocks: an ordinary checkpoint, in its own dtype.

    A model card (`llamapro/conversion/model_card.py`) is written beside it.

    Args:
        expanded: the checkpoint the run started from.
        blocks_path: a run directory, a training checkpoint, or a new-block file.
        out_dir, force, max_shard_bytes: as for `expand_checkpoint`.

    Returns:
        JSON-able: path, blocks (the file used), step, tensors_replaced, bytes, base_intact.

    Raises:
        ConfigError: as `expand_checkpoint`, of the expanded checkpoint and the new-block file.
        CheckpointError: the blocks belong to another base, do not fit, or the base inside
            `expanded` no longer has the bytes its record says.
    """
    file = find_blocks(blocks_path)
    refuse_source(out_dir, expanded.path, file)
    blocks, info = read_blocks(file)
    expected = _expected_tensors(expanded, blocks, info)
    check_blocks(file, blocks, info, expanded.config, expected)
    training = Training.of(file, info)
    _check_tokenizer(expanded, file, training)
    hashes: dict[str, str] = {}

    def chunks_of(spec: TensorSpec) -> Chunks:
        if spec.name in blocks:  # fp32 masters become the checkpoint's dtype
            return tensor_chunks(blocks[spec.name].read().to(DTYPES[spec.dtype]))
        base_rows, new_rows = split_rows(expanded.tensors[spec.name], expanded.config)
        base_chunks = hashed_chunks(base_rows, hashes)
        if new_rows is None:
            return base_chunks
        trained = blocks.get(NEW_ROWS[spec.name], new_rows)
        return chain(base_chunks, tensor_chunks(trained.read().to(DTYPES[spec.dtype])))

    specs = [TensorSpec(t.name, t.dtype, t.shape) for t in expanded.tensors.values()]
    config = expanded.config
    if info.trainable == "all":
        # The base is no longer inside, so the record that says where it is would be false.
        raw = {key: value for key, value in config.raw.items() if key != "llamapro"}
        config = dataclasses.replace(config, expansion=None, raw=raw)
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, specs, chunks_of, max_shard_bytes, label="merge")
        if config.expansion is not None:
            check_base(expanded, hashes)
        write_companions(aside, config, expanded.companions())
        write_card(aside, out_dir.resolve().name, config, [training])
    return {
        "path": str(out_dir),
        "blocks": str(file),
        "step": info.step,
        "tensors_replaced": len(blocks),
        "bytes": sum(spec.nbytes for spec in specs),
        "base_intact": config.expansion is not None,
    }


def _check_tokenizer(expanded: Checkpoint, file: Path, training: Training) -> None:
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


def assemble_checkpoint(
    config_file: Path, blocks_path: str | Path, out_dir: Path, force: bool = False
) -> dict[str, Any]:
    """Writes the checkpoint of a run that started from a `config.json` alone: all it trained.

    In the dtype the run kept it in, which is what the result's `config.json` says.

    Args:
        config_file: the `config.json` of the run.
        blocks_path, out_dir, force: as for `merge_checkpoint`.

    Returns:
        As `merge_checkpoint`.

    Raises:
        ConfigError: as `expand_checkpoint`, of the `config.json` and the new-block file.
        CheckpointError: the run did not train all weights of this configuration.
    """
    config = ModelConfig.from_file(config_file)
    file = find_blocks(blocks_path)
    refuse_source(out_dir, config_file, file)
    blocks, info = read_blocks(file)
    expected = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    check_blocks(file, blocks, info, config, expected)
    # The run's config.json may say another: transformers would load the weights in that one.
    stored = str(DTYPES[blocks["model.embed_tokens.weight"].dtype]).removeprefix("torch.")
    keys = {"torch_dtype", *({"dtype"} & config.raw.keys())}  # of transformers 4, and of 5
    config = dataclasses.replace(config, raw=config.raw | dict.fromkeys(sorted(keys), stored))
    with output_directory(out_dir, force) as aside:
        write_checkpoint(
            aside, list(blocks.values()), lambda spec: blocks[spec.name].chunks(), label="merge"
        )
        # The run knows which tokenizer it was trained with; its file may have any name.
        vocabulary, *beside = Tokenizer.load(_tokenizer_of(file.parent)).files
        name = JSON_NAME if vocabulary.suffix == ".json" else FILE_NAME
        shutil.copyfile(vocabulary, aside / name)
        write_companions(aside, config, beside)
        write_card(aside, out_dir.resolve().name, config, [Training.of(file, info)])
    return {
        "path": str(out_dir),
        "blocks": str(file),
        "step": info.step,
        "tensors_replaced": len(blocks),
        "bytes": sum(tensor.nbytes for tensor in blocks.values()),
        "base_intact": False,
    }


def _tokenizer_of(step: Path) -> str:
    """Returns the path of the tokenizer that a training checkpoint was made with."""
    try:
        return str(read_json(step / STATE_FILE, MAX_STATE_BYTES)["settings"]["model.tokenizer"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{step / STATE_FILE}: damaged: names no 'model.tokenizer'") from None


def _expected_tensors(
    checkpoint: Checkpoint, blocks: Iterable[str], info: BlocksInfo
) -> dict[str, tuple[int, ...]]:
    expected = {
        name: tensor.shape
        for name, tensor in checkpoint.tensors.items()
        if info.trainable == "all" or expansion.is_in_layers(name, info.new_layers)
    }
    if set(NEW_ROWS.values()).isdisjoint(blocks):
        return expected
    rows = {name: split_rows(t, checkpoint.config)[1] for name, t in checkpoint.tensors.items()}
    return expected | {NEW_ROWS[name]: new.shape for name, new in rows.items() if new}
