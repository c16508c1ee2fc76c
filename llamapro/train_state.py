"""Training checkpoints: what trains, its optimizer state and where the run stands. Nothing frozen.

    RUN_DIR/checkpoints/step-00000500/
        trainable.safetensors   the trained tensors, fp32 masters: a new-block file (`blocks.py`)
        optimizer.safetensors   AdamW's two moments of each
        state.json              step, tokens seen, every setting, versions
        manifest.json           size and SHA-256 of the files above

Written aside and renamed: a directory named step-* is complete. Tensors are gathered one by one,
so the main process holds one at a time, and the files do not depend on the number of processes.
Training draws no random numbers (data order is a function of seed and step), so no RNG is kept.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llamapro.blocks import (
    TRAINABLE_FILE,
    BlocksInfo,
    check_blocks,
    read_blocks,
    training_checkpoints,
    write_blocks,
)
from llamapro.checkpoint import DTYPE_CODES, TensorSpec, read_header, tensor_chunks
from llamapro.config import CheckpointError, ConfigError, ModelConfig, UserError
from llamapro.distributed import Ranks
from llamapro.output import output_directory, write_safetensors
from llamapro.settings import FREE_TO_CHANGE, Settings, flatten

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = dict[str, nn.Parameter]


def save(
    run_dir: Path,
    step: int,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    info: BlocksInfo,
    state: dict[str, Any],
    ranks: Ranks,
) -> Path:
    """Writes one training checkpoint; every rank must call it.

    Args:
        run_dir: of the run.
        step: optimizer steps made.
        parameters: name -> sharded parameter, of all that trains.
        optimizer: AdamW over just these.
        info: what the trained tensors belong to.
        state: JSON-able, kept in `state.json`.
        ranks: from `process_group`.

    Returns:
        The directory.

    Raises:
        CheckpointError: on every rank, if the main one could not write.
    """
    gathered = _gather(parameters, optimizer)
    target = run_dir / "checkpoints" / f"step-{step:08d}"
    error = None
    if ranks.is_main:
        try:
            with output_directory(target) as aside:
                _write(aside, parameters, gathered, info, state)
        except UserError as failure:
            error = str(failure)
    for _ in gathered:  # the other ranks' part of the gathering, and the rest after a failure
        pass
    if error := ranks.from_main(error):  # one rank's failure is everyone's
        raise CheckpointError(error)
    return target


def _gather(parameters: Parameters, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yields all parameters, then all moments, each whole; a collective operation per tensor."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    for parameter in parameters.values():
        yield whole(parameter.detach())
    for parameter in parameters.values():
        for moment in MOMENTS:
            yield whole(optimizer.state[parameter][moment])


def _write(
    aside: Path,
    parameters: Parameters,
    gathered: Iterator[Tensor],
    info: BlocksInfo,
    state: dict[str, Any],
) -> None:
    specs = [
        TensorSpec(name, DTYPE_CODES[p.dtype], tuple(p.shape)) for name, p in parameters.items()
    ]
    moments = [TensorSpec(f"{s.name}.{m}", s.dtype, s.shape) for s in specs for m in MOMENTS]
    write_blocks(aside / TRAINABLE_FILE, specs, lambda _: tensor_chunks(next(gathered)), info)
    write_safetensors(aside / OPTIMIZER_FILE, moments, lambda _: tensor_chunks(next(gathered)))
    (aside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    manifest = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(aside.iterdir())
    }
    (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_old(run_dir: Path, keep: int) -> None:
    """Deletes all but the latest `keep` training checkpoints."""
    for path in training_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """Reads `state.json` after checking every file of the training checkpoint by the manifest.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        expected = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE}: not readable: {error!r}") from None
    for name, size, sha256 in expected:
        file = path / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but {MANIFEST_FILE} lists it")
        if file.stat().st_size != size or _sha256(file) != sha256:
            raise CheckpointError(
                f"{file}: damaged: {file.stat().st_size:,} bytes of {size:,}, or other content; "
                f"remove {path} to resume from the training checkpoint before it"
            )
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))


def check_settings(state: dict[str, Any], settings: Settings, run_dir: Path) -> None:
    """Raises ConfigError, naming each, if settings that decide what is computed have changed."""
    before, now = state["settings"], json.loads(json.dumps(flatten(settings)))
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if key not in FREE_TO_CHANGE and before.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {'; '.join(changed)}; "
            "continue it with its own, or choose another --run-dir"
        )


def load_trained(
    path: Path, config: ModelConfig, expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Reads the trained tensors of a training checkpoint, whole, on the CPU.

    Args:
        path: the training checkpoint.
        config: of the model that is trained.
        expected: name -> shape of every parameter that trains.

    Raises:
        CheckpointError: they were trained on another base, or are other tensors.
    """
    file = path / TRAINABLE_FILE
    tensors, info = read_blocks(file)
    check_blocks(file, tensors, info, config, expected)
    return {name: tensor.read() for name, tensor in tensors.items()}


def load_optimizer(
    path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Gives the optimizer the moments of a training checkpoint, each rank its own shards.

    Args:
        path: the training checkpoint.
        parameters: name -> sharded parameter, as given to `save`.
        optimizer: fresh AdamW over these.
        step: optimizer steps made.

    Raises:
        CheckpointError: the file does not hold just these parameters' moments.
    """
    file = path / OPTIMIZER_FILE
    stored = read_header(file)
    if set(stored) != {f"{name}.{moment}" for name in parameters for moment in MOMENTS}:
        raise CheckpointError(f"{file}: holds the moments of other parameters")
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {"step": torch.tensor(float(step), device=parameter.device)}
        for moment in MOMENTS:
            full = stored[f"{name}.{moment}"].read().to(parameter.device)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            state[moment] = full
        optimizer.state[parameter] = state
