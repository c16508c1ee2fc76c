"""Takes the new blocks out of a model again; its base is what remains, byte for byte."""

from pathlib import Path
from typing import Any

from llamapro.checkpoints.base import base_config, check_base, contained_base, layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import BASE_CARD_FILE
from llamapro.checkpoints.writing import Target, hashed, write_checkpoint
from llamapro.conversion.add_tokens import restore_tokenizer
from llamapro.conversion.companions import write_companions
from llamapro.conversion.model_card import CARD_FILE
from llamapro.files import output_directory, refuse_source


def strip_checkpoint(expanded: Checkpoint, out_dir: Path, force: bool = False) -> dict[str, Any]:
    """Writes the base inside an expanded or merged checkpoint, its tensors byte for byte.

    If a model was expanded several times, only the latest generation is taken out, with the tokens
    it added.

    Returns:
        JSON-able: path, layers, removed_layers, removed_tokens (a count), bytes, sha256.
    """
    layout = layout_of(expanded.config, expanded.path)
    refuse_source(out_dir, expanded.path)
    config = base_config(expanded)
    hashes: dict[str, str] = {}
    targets = [
        Target(base.name, base.dtype, base.shape, [hashed(base, name, hashes)])
        for name, base in contained_base(expanded).items()
    ]
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "strip")
        check_base(expanded, hashes)
        write_companions(aside, config, expanded.companions())
        if config.vocab_size < expanded.config.vocab_size:
            restore_tokenizer(aside)
        if (aside / BASE_CARD_FILE).exists():
            (aside / BASE_CARD_FILE).rename(aside / CARD_FILE)
    assert expanded.config.expansion is not None
    return {
        "path": str(out_dir),
        "layers": config.num_hidden_layers,
        "removed_layers": list(layout.new_layers),
        "removed_tokens": expanded.config.vocab_size - config.vocab_size,
        "sha256": expanded.config.expansion.base_sha256,  # compared while it was written
        "bytes": sum(target.nbytes for target in targets),
    }
