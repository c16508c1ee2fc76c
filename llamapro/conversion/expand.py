"""Expands checkpoint directories: the file side of `llamapro.expansion`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import BASE_CARD_FILE
from llamapro.checkpoints.new_blocks import NEW_ROWS
from llamapro.checkpoints.tensors import CHUNK_BYTES, combine_hashes, read_safetensors
from llamapro.checkpoints.writing import MAX_SHARD_BYTES, Part, Target, hashed, write_checkpoint
from llamapro.conversion.add_tokens import add_tokens, check_tokens, mean_rows
from llamapro.conversion.companions import write_companions
from llamapro.conversion.model_card import CARD_FILE
from llamapro.conversion.same_logits import Probe
from llamapro.errors import ConfigError
from llamapro.expansion import Layout
from llamapro.files import copy_companion, output_directory, refuse_source


def choose_layout(
    num_layers: int,
    num_new_blocks: int | None,
    blocks_per_group: int,
    after: str | None,
    placement: str,
) -> Layout:
    """Returns where the options of `expand` put new blocks in a base of `num_layers`."""
    if blocks_per_group != 1 and (after is not None or placement != "interleave"):
        raise ConfigError("--blocks-per-group is for interleaved groups; leave it out")
    if after is not None and placement != "interleave":
        raise ConfigError(f"--after says where new blocks go; leave --placement {placement} out")
    if after is not None and num_new_blocks is None:
        try:
            layers = [int(layer) for layer in after.split(",")]
        except ValueError:
            raise ConfigError(f"--after {after!r}: expected layers like 3,7,11") from None
        return expansion.insert_after(num_layers, layers)
    if after is not None or num_new_blocks is None:
        raise ConfigError("expand: give either --num-new-blocks N or --after LAYERS")
    if placement == "interleave":
        return expansion.interleave(num_layers, num_new_blocks, blocks_per_group)
    return expansion.stack(num_layers, num_new_blocks, placement)


def expand_checkpoint(
    base: Checkpoint,
    out_dir: Path,
    layout: Layout,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    new_tokens: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the expanded checkpoint and verifies it before it appears under its name.

    The ids of `new_tokens` follow the base's `vocab_size` rows.

    Returns:
        JSON-able: layers, new_layers, source_layers, new_tokens (name -> id) and bytes of the
        result, base_sha256, logits_bit_equal (True), tokens_compared and max_head_difference.
    """
    refuse_source(out_dir, base.path)
    if new_tokens:
        check_tokens(base.path, new_tokens, base.config.vocab_size)
    targets, hashes = _targets(base, layout, len(new_tokens))
    config_with = partial(expansion.expand_config, base.config, layout, new_tokens=len(new_tokens))
    expanded = Checkpoint(out_dir, config_with(""), {})
    probe = Probe(base, expanded)

    def compare(file: Path) -> None:
        # While its blocks are in memory: afterwards the disk would have to give them again.
        expanded.tensors.update(read_safetensors(file)[0])
        while probe.advance():
            pass

    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "expand", max_shard_bytes, compare)
        base_sha256 = combine_hashes((t, hashes[t.name]) for t in base.tensors.values())
        config = config_with(base_sha256)
        if base.repository:  # what the model card will call the base
            config = replace(config, raw=config.raw | {"_name_or_path": base.repository})
        write_companions(aside, config, base.companions())
        if new_tokens:
            add_tokens(aside, new_tokens, base.config.vocab_size)
        if (card := base.path / CARD_FILE).is_file():  # leaves room for that of the new model
            copy_companion(card, aside / BASE_CARD_FILE)
        Checkpoint.open(aside)  # raises if the files are no checkpoint together
        logits = probe.compare()
        logits.check(f"{out_dir}: not written")
    return {
        "path": str(out_dir),
        "layers": config.num_hidden_layers,
        "new_layers": list(layout.new_layers),
        "source_layers": [layout.sources[i] for i in layout.new_layers],
        "new_tokens": {t: i for i, t in enumerate(new_tokens, base.config.vocab_size)},
        "bytes": sum(target.nbytes for target in targets),
        "base_sha256": base_sha256,
        "logits_bit_equal": True,
        "tokens_compared": logits.tokens,
        "max_head_difference": logits.head_difference,
    }


def _targets(
    base: Checkpoint, layout: Layout, new_rows: int
) -> tuple[list[Target], dict[str, str]]:
    """Returns the expanded model's tensors, and the base's hashes once they are written."""
    targets: list[Target] = []
    hashes: dict[str, str] = {}
    for name, (source, is_zero) in expansion.expand_names(base.tensors, layout).items():
        stored = base.tensors[source]
        rows, *rest = stored.shape
        parts: list[Part] = [hashed(stored, source, hashes)]
        if is_zero:
            parts = [partial(_zeros, stored.nbytes)]
        elif expansion.is_in_layers(name, layout.new_layers):
            parts = [stored.chunks]
        elif name in NEW_ROWS and new_rows:
            parts.append(partial(mean_rows, stored, new_rows))
            rows += new_rows
        targets.append(Target(name, stored.dtype, (rows, *rest), parts))
    return targets, hashes


def _zeros(nbytes: int) -> Iterator[memoryview]:
    chunk = memoryview(bytearray(min(CHUNK_BYTES, nbytes)))
    return (chunk[: nbytes - start] for start in range(0, nbytes, CHUNK_BYTES))
