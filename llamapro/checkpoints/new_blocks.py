"""New-block files: the trained tensors of a run, small enough to share, tied to their base by hash.

One safetensors file holds the tensors under their names in the expanded model. Its metadata name
the base they belong to and the combined SHA-256 of the tensors, so that the file can be checked
wherever it goes. A run keeps one in every training checkpoint:
`RUN_DIR/checkpoints/step-00000100/trainable.safetensors`.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llamapro import filesystem
from llamapro.checkpoints.hub import repository, resolve
from llamapro.checkpoints.run import MANIFEST_FILE, TRAINABLE_FILE, find_damage, newest_intact
from llamapro.checkpoints.tensors import (
    CHUNK_BYTES,
    StoredTensor,
    combine_hashes,
    hash_tensors,
    read_safetensors,
)
from llamapro.checkpoints.writing import Target, hashed, write_safetensors
from llamapro.config import ModelConfig, differences
from llamapro.errors import CheckpointError, Problems, note, warn

# Only the rows of added tokens are stored: name in the model -> name in the file.
NEW_ROWS = {
    "model.embed_tokens.weight": "model.embed_tokens.new_rows",
    "lm_head.weight": "lm_head.new_rows",
}
_KEY = "llamapro"
_HASH_KEY = "llamapro_sha256"


@dataclass(frozen=True)
class BlocksInfo:
    """The base and the run that a new-block file belongs to."""

    trainable: str  # "new_blocks" or "all", as in `train.trainable`
    base_sha256: str  # of the frozen base; "" if all was trained or nothing was expanded
    new_layers: tuple[int, ...]  # the layers that are new blocks; empty in the same cases
    step: int  # optimizer steps made
    source_layers: tuple[int, ...] = ()  # each new block's base layer; empty in old files too
    computation: dict[str, Any] | None = None  # `ModelConfig.computation`; None in old files

    @classmethod
    def of(cls, config: ModelConfig, trainable: str, step: int) -> "BlocksInfo":
        """Describes a run on a model with this configuration."""
        record = config.expansion
        if trainable == "all" or record is None:
            return cls(trainable, "", (), step, (), config.computation)
        base, layers, sources = record.base_sha256, record.new_layers, record.source_layers
        return cls(trainable, base, layers, step, sources, config.computation)


class NewBlocks(NamedTuple):
    """A new-block file whose header was checked."""

    file: Path
    tensors: dict[str, StoredTensor]
    info: BlocksInfo


def is_training_output(path: Path) -> bool:
    """Says whether a path is a run directory, a training checkpoint or a file."""
    return path.is_file() or any(
        (path / name).exists() for name in ("checkpoints", TRAINABLE_FILE, MANIFEST_FILE)
    )


def open_blocks(path: str | Path) -> NewBlocks:
    """Opens the new-block file that `find_blocks` finds."""
    return read_blocks(find_blocks(path))


def find_blocks(path: str | Path) -> Path:
    """Returns the new-block file of a run, a training checkpoint or `hf://owner/name`, or itself.

    From a run it takes the newest intact training checkpoint; standard error names newer ones that
    are damaged, and why. Every byte is read, also of the other files of a training checkpoint.
    """
    given, path = path, resolve(path)
    if repository(given) is not None:
        path /= TRAINABLE_FILE
        if not path.exists():
            raise CheckpointError(f"{given}: has no {TRAINABLE_FILE}, so it shares no new blocks")
    if path.is_file():
        check_bytes(path)
        return path
    if (path / TRAINABLE_FILE).exists() or (path / MANIFEST_FILE).exists():
        for problem in find_damage(path):
            raise CheckpointError(f"{problem}; {TRAINABLE_FILE} alone may be given by its own name")
        return path / TRAINABLE_FILE
    step, damaged = newest_intact(path)
    if step is None:
        raise CheckpointError(
            f"{path}: no run directory, training checkpoint or new-block file "
            f"(looked for {TRAINABLE_FILE} and checkpoints/step-*/{TRAINABLE_FILE})"
            + f"; give {path.parent}"
            * (path.name == "checkpoints")
        )
    for problem in damaged:
        note(f"{problem}; taking {step.name} instead")
    return step / TRAINABLE_FILE


def write_blocks(file: Path, targets: Sequence[Target], info: BlocksInfo) -> None:
    """Writes a new-block file."""
    hashes: dict[str, str] = {}
    noted = [replace(t, parts=[hashed(t, t.name, hashes)]) for t in targets]
    # The header comes before the tensors, so their hash takes the place of one as long.
    unknown = "0" * hashlib.sha256().digest_size * 2
    write_safetensors(file, noted, {_KEY: json.dumps(asdict(info)), _HASH_KEY: unknown})
    with open(file, "rb") as handle:
        size = 8 + int.from_bytes(handle.read(8), "little")
        handle.seek(0)
        header = handle.read(size)
        mark = f'"{_HASH_KEY}":"'
        known = f"{mark}{combine_hashes((t, hashes[t.name]) for t in targets)}".encode()
        header = header.replace(f"{mark}{unknown}".encode(), known)
        if filesystem.RANDOM_WRITES in filesystem.lacks(file.parent):
            with open(again := file.with_suffix(".again"), "xb") as out:
                out.write(header)
                shutil.copyfileobj(handle, out, CHUNK_BYTES)
            again.replace(file)
            return
    with open(file, "r+b") as whole:
        whole.write(header)


def check_bytes(file: Path) -> str:
    """Compares the tensors of a new-block file with the hash inside it, and returns that hash.

    Raises CheckpointError if the bytes are not those that were written, or it is no new-block file.
    """
    tensors = read_blocks(file).tensors
    hashes = hash_tensors(tensors.values(), f"hash {file.name}")
    found = combine_hashes((tensor, hashes[tensor.name]) for tensor in tensors.values())
    written = read_safetensors(file)[1].get(_HASH_KEY)
    if written is None:
        raise CheckpointError(
            f"{file}: written by an older version, which stored no hash of its tensors; give the "
            "training checkpoint or run that it lies in, whose manifest has one"
        )
    if found != written:
        raise CheckpointError(
            f"{file}: damaged: its tensors hash to {found[:16]}..., not {str(written)[:16]}..."
        )
    return found


def identity(file: Path) -> str:
    """Returns what copies of a new-block file share: its hash; an old file has its path alone."""
    return read_safetensors(file)[1].get(_HASH_KEY) or str(file.resolve())


def read_blocks(file: Path) -> NewBlocks:
    """Opens a new-block file; raises CheckpointError if its header is damaged or of another kind.

    The bytes of the tensors are not read; `find_blocks` and the manifest check them.
    """
    tensors, metadata = read_safetensors(file)
    try:
        raw = json.loads(metadata[_KEY])
        trainable, base, layers, step = (
            raw[key] for key in ("trainable", "base_sha256", "new_layers", "step")
        )
        sources, computation = raw.get("source_layers", []), raw.get("computation")
        numbers = [step, *layers, *sources]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{file}: no 'llamapro' metadata: not a new-block file") from None
    if (
        trainable not in ("new_blocks", "all")
        or not isinstance(base, str)
        or not isinstance(computation, dict | None)
        or any(type(number) is not int or number < 0 for number in numbers)
        or len(sources) not in (0, len(layers))
        or (trainable == "new_blocks" and not base)
    ):
        raise CheckpointError(f"{file}: damaged: its 'llamapro' metadata is {str(raw)[:200]}")
    info = BlocksInfo(trainable, base, tuple(layers), step, tuple(sources), computation)
    return NewBlocks(file, tensors, info)


def check_blocks(
    blocks: NewBlocks, config: ModelConfig, expected: dict[str, tuple[int, ...]]
) -> None:
    """Raises CheckpointError unless the file was trained on exactly this expanded model.

    `expected` is the shape of every tensor that must be in the file.
    """
    file, tensors, info = blocks
    problems, record = Problems(limit=5), config.expansion
    if record is not None and info.base_sha256:
        if info.base_sha256 != record.base_sha256:
            problems.add(
                f"was trained on base sha256 {info.base_sha256[:16]}..., this model's base is "
                f"{record.base_sha256[:16]}..."
            )
        if info.new_layers != record.new_layers:
            problems.add(
                f"has new blocks {list(info.new_layers)}, model has {list(record.new_layers)}"
            )
    if info.computation is None:
        warn(
            f"{file}: written by an older version, so it does not say with which rope_theta, heads "
            "and eps it was trained; only the base's weights are compared"
        )
    else:
        found = differences(info.computation, config.computation)
        problems.add(*(f"was trained with another config.json: {change}" for change in found))
    for name, shape in expected.items():
        if name not in tensors:
            problems.add(f"tensor {name!r} is missing")
        elif tensors[name].shape != shape:
            problems.add(f"{name!r} is {list(tensors[name].shape)}, expected {list(shape)}")
    problems.add(*(f"unexpected tensor {name!r}" for name in tensors if name not in expected))
    problems.check(CheckpointError, str(file))
