"""The base inside an expanded checkpoint: found, hashed and loaded without its new blocks.

Expansion leaves every byte of the base in place: its blocks stand between the new ones, and its
rows come first in embedding and head. So leaving out what is new gives the base back. The base of
a model that was expanded several times is the model that the latest expansion started from.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import NEW_ROWS
from llamapro.checkpoints.tensors import StoredTensor, combine_hashes, hash_tensors
from llamapro.config import ExpansionRecord, ModelConfig
from llamapro.errors import CheckpointError, ConfigError, warn
from llamapro.expansion import Layout


def layout_of(config: ModelConfig, path: str | Path = "checkpoint") -> Layout:
    """Rebuilds the layout from the `llamapro` record; raises CheckpointError without one."""
    record = config.expansion
    if record is None:
        raise CheckpointError(f"{path}: config.json has no 'llamapro' record")
    source_of = dict(zip(record.new_layers, record.source_layers, strict=True))
    sources, base_layer = [], 0
    for index in range(config.num_hidden_layers):
        sources.append(source_of.get(index, base_layer))
        base_layer += index not in source_of
    return Layout(tuple(sources), record.new_layers)


def base_names(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """Returns name in the expanded model -> name in the base, without the new blocks' tensors."""
    number = {str(index): base for base, index in enumerate(layout.base_layers)}
    found = {}
    for name in names:
        _, _, rest = name.partition("model.layers.")
        index, _, part = rest.partition(".")
        if not rest:
            found[name] = name
        elif index in number:
            found[name] = f"model.layers.{number[index]}.{part}"
    return found


def base_vocab_size(config: ModelConfig) -> int:
    """Returns how many rows of embedding and head belong to the model that was expanded."""
    record = config.expansion
    return (record and record.base_vocab_size) or config.vocab_size


def base_config(expanded: Checkpoint) -> ModelConfig:
    """Returns the configuration of the base inside: undoes `expansion.expand_config`."""
    config, layout = expanded.config, layout_of(expanded.config, expanded.path)
    assert config.expansion is not None
    layers, vocab_size = len(layout.base_layers), base_vocab_size(config)
    if not config.expansion.generations:
        return config.resized(layers, vocab_size, None)
    number = {index: base for base, index in enumerate(layout.base_layers)}
    *earlier, latest = [
        generation | {"new_layers": [number[i] for i in generation["new_layers"]]}
        for generation in config.expansion.generations
    ]
    file = str(expanded.path / "config.json")
    record = ExpansionRecord.from_dict(latest | {"generations": earlier}, layers, file)
    return config.resized(layers, vocab_size, record)


def split_rows(
    stored: StoredTensor, config: ModelConfig
) -> tuple[StoredTensor, StoredTensor | None]:
    """Splits embedding and head into the base's rows and the new ones; None if there are none."""
    rows = base_vocab_size(config)
    if stored.name not in NEW_ROWS or rows == config.vocab_size:
        return stored, None
    base_rows = replace(stored, shape=(rows, *stored.shape[1:]))
    new_shape = (stored.shape[0] - rows, *stored.shape[1:])
    return base_rows, replace(stored, shape=new_shape, offset=stored.offset + base_rows.nbytes)


def contained_base(expanded: Checkpoint) -> dict[str, StoredTensor]:
    """Returns name in the expanded model -> the base's part of it, under its name in the base."""
    layout = layout_of(expanded.config, expanded.path)
    return {
        name: replace(split_rows(expanded.tensors[name], expanded.config)[0], name=base_name)
        for name, base_name in base_names(expanded.tensors, layout).items()
    }


def contained_checkpoint(expanded: Checkpoint) -> Checkpoint:
    """Returns the base inside as a checkpoint, whose tensors stay in the expanded one's files.

    Loaded, it is bit for bit the base. New blocks are not read and cost neither memory nor time.
    """
    tensors = {tensor.name: tensor for tensor in contained_base(expanded).values()}
    return replace(expanded, config=base_config(expanded), tensors=tensors)


def contained_base_sha256(expanded: Checkpoint, hashes: dict[str, str]) -> str:
    """Returns the base's `sha256()`; `hashes` are of its parts, by name in the expanded model."""
    return combine_hashes((t, hashes[name]) for name, t in contained_base(expanded).items())


def new_sha256(expanded: Checkpoint) -> str:
    """Returns the hash of what is not the base's: new blocks, and the rows of added tokens."""
    names = base_names(expanded.tensors, layout_of(expanded.config, expanded.path))
    rows = [split_rows(tensor, expanded.config)[1] for tensor in expanded.tensors.values()]
    new = [tensor for name, tensor in expanded.tensors.items() if name not in names]
    new += [part for part in rows if part is not None]
    hashes = hash_tensors(new, "hash new blocks")
    return combine_hashes((part, hashes[part.name]) for part in new)


def check_base(expanded: Checkpoint, hashes: dict[str, str]) -> None:
    """Raises CheckpointError if the base inside does not have the hash that the record names.

    Opening the checkpoint has compared its config.json with the record.
    """
    record = expanded.config.expansion
    assert record is not None
    if record.computation is None:
        warn(
            f"{expanded.path}: its record was written by an older version and does not say with "
            "which rope_theta, heads and eps the base was expanded; only weights are compared"
        )
    found, recorded = contained_base_sha256(expanded, hashes), record.base_sha256
    if found != recorded:
        raise CheckpointError(
            f"{expanded.path}: the base inside hashes to {found[:16]}..., its record says "
            f"{recorded[:16]}...: base weights were changed; put back what 'expand' wrote, "
            "or expand the changed base"
        )


def check_stored_base(
    expanded: Checkpoint, hashes: dict[str, str], cache_dir: str | Path | None = None
) -> None:
    """Does what `check_base` does, with `hashes` of whole tensors, the new blocks' left out."""
    # Where tokens were added, the base's rows of embedding and head are hashed here.
    split = (split_rows(tensor, expanded.config) for tensor in expanded.tensors.values())
    grown = [base_rows for base_rows, new_rows in split if new_rows is not None]
    check_base(expanded, hashes | hash_tensors(grown, "hash base", cache_dir))


def check_contained(expanded: Checkpoint, special: bool = False) -> None:
    """Raises ConfigError if the base inside a checkpoint cannot be used in its place.

    With `special`, names of control tokens will be encoded; the base does not know added ones.
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
            "know and conversations may name; 'llamapro strip' writes the base with its own "
            "tokenizer: use that"
        )
