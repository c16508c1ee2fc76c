"""New-block files: what a training run earned, small enough to share, tied to its base by hash.

One safetensors file holds the trained tensors under their names in the expanded model; its metadata
say which base they belong to. A run keeps one in every training checkpoint:
`RUN_DIR/checkpoints/step-00000100/trainable.safetensors`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llamapro.checkpoint import ChunksOf, StoredTensor, TensorSpec, read_header
from llamapro.config import CheckpointError, ModelConfig
from llamapro.output import write_safetensors

TRAINABLE_FILE = "trainable.safetensors"
_KEY = "llamapro"


@dataclass(frozen=True)
class BlocksInfo:
    """What a new-block file belongs to.

    Attributes:
        trainable: "new_blocks" or "all", as in `train.trainable`.
        base_sha256: of the frozen base; "" if all trained or the model was never expanded.
        new_layers: the layers that are new blocks; empty as above.
        step: optimizer steps made.
    """

    trainable: str
    base_sha256: str
    new_layers: tuple[int, ...]
    step: int

    @classmethod
    def of(cls, config: ModelConfig, trainable: str, step: int) -> "BlocksInfo":
        """Describes a run on a model with this configuration."""
        record = config.expansion
        if trainable == "all" or record is None:
            return cls(trainable, "", (), step)
        return cls(trainable, record.base_sha256, record.new_layers, step)


def training_checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run's complete training checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def find_blocks(path: str | Path) -> Path:
    """Returns the new-block file of a run directory (its latest), training checkpoint, or file.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    steps = training_checkpoints(path)
    for candidate in [path / TRAINABLE_FILE, *(s / TRAINABLE_FILE for s in reversed(steps))]:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"{path}: no run directory, training checkpoint or new-block file "
        f"(looked for {TRAINABLE_FILE} and checkpoints/step-*/{TRAINABLE_FILE})"
    )


def write_blocks(
    file: Path, specs: list[TensorSpec], chunks_of: ChunksOf, info: BlocksInfo
) -> None:
    """Writes a new-block file."""
    write_safetensors(file, specs, chunks_of, {_KEY: json.dumps(asdict(info))})


def read_blocks(file: Path) -> tuple[dict[str, StoredTensor], BlocksInfo]:
    """Opens a new-block file; raises CheckpointError if it is damaged or of another kind."""
    tensors = read_header(file)
    with open(file, "rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    try:
        raw = json.loads(header["__metadata__"][_KEY])
        info = BlocksInfo(
            raw["trainable"], raw["base_sha256"], tuple(raw["new_layers"]), int(raw["step"])
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: no 'llamapro' metadata: not a new-block file") from None
    return tensors, info


def check_blocks(
    file: Path,
    tensors: dict[str, StoredTensor],
    info: BlocksInfo,
    config: ModelConfig,
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Raises CheckpointError unless the file was trained on just this expanded model.

    Args:
        expected: name -> shape of every tensor that must be in the file.
    """

    def wrong() -> Iterator[str]:
        record = config.expansion
        if info.base_sha256 and record is None:
            yield "belongs to an expanded model, but this one has no 'llamapro' record"
        elif record is not None and info.base_sha256:
            if info.base_sha256 != record.base_sha256:
                yield (
                    f"was trained on base sha256 {info.base_sha256[:16]}..., this model's base is "
                    f"{record.base_sha256[:16]}..."
                )
            if info.new_layers != record.new_layers:
                yield f"has new blocks {list(info.new_layers)}, model has {list(record.new_layers)}"
        for name, shape in expected.items():
            if name not in tensors:
                yield f"tensor {name!r} is missing"
            elif tensors[name].shape != shape:
                yield f"{name!r} is {list(tensors[name].shape)}, expected {list(shape)}"
        yield from (f"unexpected tensor {name!r}" for name in tensors if name not in expected)

    if mistakes := list(wrong()):
        more = f"; and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise CheckpointError(f"{file}: " + "; ".join(mistakes[:5]) + more)
