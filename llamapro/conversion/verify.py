"""Checks that an expanded checkpoint still contains its base, and that a run's files are intact.

Models need not fit in memory: checkpoints are read and run one block at a time.
"""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamapro.checkpoints.base import base_vocab_size, check_stored_base, new_sha256
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import check_bytes
from llamapro.checkpoints.run import find_damage, load_state, training_checkpoints
from llamapro.checkpoints.tensors import all_finite, combine_hashes, hash_tensors
from llamapro.config import differences
from llamapro.conversion.same_logits import compare_logits
from llamapro.errors import CheckpointError
from llamapro.text.store import TokenStore


def verify_run(path: str | Path) -> dict[str, Any]:
    """Reads every byte of a run directory, a training checkpoint or a new-block file.

    Returns:
        JSON-able: path, and intact, the paths of what was checked.
    """
    directory = Path(path)
    if directory.is_file():
        return {"path": str(path), "intact": [str(path)], "sha256": check_bytes(directory)}
    is_run = (directory / "checkpoints").is_dir()
    steps = training_checkpoints(directory) if is_run else [directory]
    if not steps:
        raise CheckpointError(f"{path}: has no training checkpoint yet")
    intact: list[str] = []
    damaged: list[str] = []
    for step in tqdm(steps, desc="check", disable=None):
        found = list(find_damage(step))
        if is_run and found and not step.exists():  # a running save removed it
            continue
        try:
            if is_run and not found:  # a copy elsewhere may have another name
                load_state(step)
        except CheckpointError as error:
            found = [str(error)]
        damaged += found
        intact += [] if found else [str(step)]
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}; intact: {', '.join(intact) or 'none'}")
    return {"path": str(path), "intact": intact}


def verify_tokens(path: str | Path) -> dict[str, Any]:
    """Reads every byte of a corpus in the cache of tokens, also if it has not changed."""
    store = TokenStore(path, None)
    store.check("check")
    return {"path": str(path), "tokens": store.tokens, "sha256": store.sha256}


def verify(path: str | Path, base_path: str | Path | None = None) -> dict[str, Any]:
    """Reads every byte of a checkpoint, and checks the base inside if it is expanded.

    With `base_path`, the checkpoint it was expanded from, hash and logits are compared as well.

    Returns:
        JSON-able: path, sha256, tensors, bytes; for an expanded checkpoint base_sha256,
        base_intact, new_layers, new_blocks ("identity" or "trained"), new_tokens (a count); with a
        base also logits_bit_equal, max_logit_difference and max_head_difference.
    """
    checkpoint = Checkpoint.open(path)
    path = checkpoint.path
    hashes = hash_tensors(checkpoint.tensors.values(), f"hash {checkpoint.path.name}")
    bad = [t.name for t in checkpoint.tensors.values() if not all_finite(t.map())]
    if bad:
        raise CheckpointError(f"{path}: NaN or infinity in {', '.join(bad[:5])}")
    result: dict[str, Any] = {
        "path": str(path),
        "sha256": combine_hashes((t, hashes[t.name]) for t in checkpoint.tensors.values()),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
    }
    record = checkpoint.config.expansion
    if record is None:
        if base_path is not None:
            raise CheckpointError(f"{path}: config.json has no 'llamapro' record: not expanded")
        return result
    check_stored_base(checkpoint, hashes)
    if record.new_sha256 and (found := new_sha256(checkpoint)) != record.new_sha256:
        raise CheckpointError(
            f"{path}: the base is intact, but the new blocks hash to {found[:16]}..., and the "
            f"record says {record.new_sha256[:16]}...: they were changed; merge again"
        )
    identity = all(checkpoint.is_identity(index) for index in record.new_layers)
    result |= {
        "base_sha256": record.base_sha256,
        "base_intact": True,
        "new_layers": list(record.new_layers),
        "new_blocks": "identity" if identity else "trained",
        "new_tokens": checkpoint.config.vocab_size - base_vocab_size(checkpoint.config),
    }
    if base_path is not None:
        base = Checkpoint.open(base_path)
        if (found := base.sha256()) != record.base_sha256:
            raise CheckpointError(
                f"{base_path}: hashes to {found[:16]}..., but {path} was expanded from "
                f"{record.base_sha256[:16]}...; this is another base"
            )
        if found_now := differences(base.config.computation, checkpoint.config.computation):
            raise CheckpointError(
                f"{base_path}: its weights are the base's, its config.json is not: of the base and "
                f"of {path}, {'; '.join(found_now)}"
            )
        logits = compare_logits(base, checkpoint)
        if identity:
            logits.check(str(path))
        result |= {
            "logits_bit_equal": logits.bit_equal,
            "max_logit_difference": logits.max_difference,
            "max_head_difference": logits.head_difference,
        }
    return result


def head_note(difference: float) -> str:
    """Returns in words what the rows of added tokens do to the logits of the others."""
    if not difference:
        return "the longer head moves no logit of the base here"
    return f"the longer head moves the base's logits by up to {difference:.1e}, a rounding"


def render(result: dict[str, Any]) -> str:
    """Returns what `verify` found as text."""
    lines = [f"{result['path']}: {result['tensors']} tensors complete and finite"]
    lines.append(f"sha256 {result['sha256']}")
    if "base_sha256" in result:
        lines.append(f"base intact: its tensors hash to {result['base_sha256']}, as recorded")
        lines.append(f"new blocks {result['new_layers']}: {result['new_blocks']}")
        if result["new_tokens"]:
            lines.append(f"new tokens {result['new_tokens']}: rows after the base's")
            if "max_head_difference" in result:
                lines.append(head_note(result["max_head_difference"]))
    if "logits_bit_equal" in result:
        lines.append(
            "logits bit-equal to the base's"
            if result["logits_bit_equal"]
            else f"logits differ from the base's by up to {result['max_logit_difference']:.3g}"
        )
    return "\n".join(lines)
