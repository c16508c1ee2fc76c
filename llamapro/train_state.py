"""Training checkpoints: what trains, its optimizer state and where the run stands. Nothing frozen.

    RUN_DIR/checkpoints/step-00000500/
        trainable.safetensors   the trained tensors, fp32 masters: a new-block file (`blocks.py`)
        optimizer.safetensors   AdamW's two moments of each
        state.json              step, tokens seen, every setting, what the run is made of
        manifest.json           size and SHA-256 of the files above

Written aside and renamed: a directory named step-* is complete. What is hidden (`.step-*`) is being
written or removed, or was left by a killed process; the next save takes it away, because only one
process writes into a run directory (`resume.RunLock`). Tensors are gathered one by one, so the main
process holds one at a time, and the files do not depend on the number of processes. Training draws
no random numbers (data order is a function of seed and step), so no RNG is kept.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from llamapro.resume import (
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    file_sha256,
    newest_intact,
    read_state,
)
from llamapro.settings import FREE_TO_CHANGE, Settings, flatten

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
    """Writes one training checkpoint; every rank must call it, the main one with the run locked.

    A damaged training checkpoint of the same step is replaced.

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
        CheckpointError: on every rank, with the same message, if one of them has no memory to
            gather or the main one could not write. Nothing is left of it.
    """
    failures: list[str] = []
    gathered = _gather(parameters, optimizer, ranks, failures)
    target = run_dir / "checkpoints" / f"step-{step:08d}"
    if ranks.is_main:
        try:
            _make_way(target)
            with output_directory(target) as aside:
                _write(aside, parameters, gathered, info, state)
        except UserError as failure:
            failures.append(str(failure))
    for _ in gathered:  # the other ranks' part of it; on the main one the last vote
        pass
    if failures:  # the vote was lost, and the gathering ended, inside the main rank's writing
        raise CheckpointError(failures[0])
    return target


def _gather(
    parameters: Parameters, optimizer: torch.optim.Optimizer, ranks: Ranks, failures: list[str]
) -> Iterator[Tensor]:
    """Yields all parameters, then all moments, each whole; a collective operation per tensor.

    Before each one, and after the last, all ranks vote: a rank that failed on its own would leave
    the others waiting for it. `failures` holds what has gone wrong on this rank.
    """
    named = [(name, parameter.detach()) for name, parameter in parameters.items()]
    for name, parameter in parameters.items():
        named += [(f"{name}.{m}", optimizer.state[parameter][m]) for m in MOMENTS]
    for name, tensor in named:
        try:
            if isinstance(tensor, DTensor):
                _make_room(tensor)
        except RuntimeError as error:  # PyTorch's out of memory, of any device
            failures.append(f"rank {ranks.rank}: no memory to gather {name!r} for saving: {error}")
        _vote(ranks, failures)
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    _vote(ranks, failures)


def _make_room(tensor: Tensor) -> None:
    """Takes the memory of the whole tensor and gives it back to PyTorch's cache, for just it."""
    torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _vote(ranks: Ranks, failures: list[str]) -> None:
    """Raises CheckpointError on every rank, the lowest rank's, if any has a failure."""
    found: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(found, failures[0] if failures else None, group=ranks.patient)
    for failure in found:
        if failure:
            raise CheckpointError(failure)


def _make_way(target: Path) -> None:
    """Takes away what a killed process left, and a damaged training checkpoint at the target."""
    _remove_leftovers(target.parent)
    if not target.exists():
        return
    try:
        read_state(target)
    except CheckpointError:
        _remove(target)
    else:
        raise CheckpointError(f"{target}: exists and is intact; it is not replaced")


def _remove_leftovers(directory: Path) -> None:
    for stale in directory.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _remove(path: Path) -> None:
    """Hides, then deletes: what is named step-* stays complete when the process is killed."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from None


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
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(aside.iterdir())
    }
    (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def remove_old(run_dir: Path, keep: int, keep_every: int = 0) -> None:
    """Deletes all but the latest training checkpoints and the newest intact one.

    Before anything is deleted the newest is read back from the disk and checked.

    Args:
        run_dir: of the run; locked.
        keep: how many of the latest stay.
        keep_every: those whose step is a multiple of this stay too; 0: none.

    Raises:
        CheckpointError: none is intact, or one cannot be removed; the others are left.
    """
    _remove_leftovers(run_dir / "checkpoints")
    old = [
        path
        for path in training_checkpoints(run_dir)[:-keep]
        if not keep_every or int(path.name.removeprefix("step-")) % keep_every
    ]
    if not old:
        return
    newest, _ = newest_intact(run_dir)
    for path in old:
        if path != newest:
            _remove(path)


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
