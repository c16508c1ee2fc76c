"""Training checkpoints: what trains, its optimizer state and where the run stands. Nothing frozen.

    RUN_DIR/checkpoints/step-00000500/
        trainable.safetensors   the trained tensors, fp32 masters: a new-block file (`blocks.py`)
        optimizer.safetensors   AdamW's two moments of each
        rng.safetensors         every rank's random generators (`rng.py`)
        state.json              step, tokens seen, every setting, what the run is made of
        manifest.json           size and SHA-256 of the files above

Written aside and renamed: a directory named step-* is complete. What is hidden (`.step-*`) is being
written or removed, or was left by a killed process; the next save takes it away, because only one
process writes into a run directory (`resume.RunLock`). Tensors are gathered whole, one by one, so
but for the generators the files do not depend on the number of processes.
"""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llamapro.checkpoints.new_blocks import BlocksInfo, check_blocks, read_blocks, write_blocks
from llamapro.checkpoints.run import (
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
    TRAINABLE_FILE,
    newest_intact,
    read_state,
    training_checkpoints,
    write_manifest,
)
from llamapro.checkpoints.tensors import DTYPE_CODES, TensorSpec, read_header, tensor_chunks
from llamapro.checkpoints.writing import write_safetensors
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, UserError
from llamapro.files import output_directory
from llamapro.training.distributed import Ranks
from llamapro.training.rng import gather_rng
from llamapro.training.weights import stored_name, stored_part, stored_shape, whole_part

MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = dict[str, nn.Parameter]


class Saver:
    """Writes the training checkpoints of a run and removes old ones; every rank has one.

    A save is started and, by all ranks at the same step, finished. In the foreground `start` does
    all of it, tensor by tensor: the main process holds one at a time. In the background `start`
    returns as soon as the main process has copied everything into its memory (12 bytes for each
    trained parameter); a thread writes, hashes and removes while training goes on. The files are
    the same.

    As a context it leaves no thread behind: even when the body raises, a save that is under way is
    written to its end, though no longer reported.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        keep_every: int,
        ranks: Ranks,
        in_background: bool,
        first_row: int = 0,
    ) -> None:
        """Sets up; nothing is written yet.

        Args:
            run_dir: of the run; locked for as long as this is used.
            keep: as for `remove_old`.
            keep_every: as for `remove_old`.
            ranks: from `process_group`.
            in_background: see above.
            first_row: embedding and head are saved from this row on, if they train for the sake of
                added tokens (`weights.stored_part`); 0 saves them whole.
        """
        self._first_row = first_row
        self._run_dir, self._ranks, self._in_background = run_dir, ranks, in_background
        self._keep, self._keep_every = keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[None] | None = None  # on the main rank, in the background
        self._saved: dict[str, Any] | None = None  # what `finish` has still to report
        self._started_s = self._ended_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(
        self,
        step: int,
        parameters: Parameters,
        optimizer: torch.optim.Optimizer,
        info: BlocksInfo,
        state: dict[str, Any],
    ) -> None:
        """Saves what everything is now; every rank must call it, the save before it finished.

        A damaged training checkpoint of the same step is replaced.

        Args:
            step: optimizer steps made.
            parameters: name -> sharded parameter, of all that trains.
            optimizer: AdamW over just these.
            info: what the trained tensors belong to.
            state: JSON-able, kept in `state.json`.

        Raises:
            CheckpointError: on every rank, with the same message, if one of them has no memory to
                gather or, in the foreground, the main one could not write or remove. Of what could
                not be written nothing is left.
        """
        assert self._saved is None, "finish() the save before"
        self._started_s = time.perf_counter()
        target = self._run_dir / "checkpoints" / f"step-{step:08d}"
        specs = [
            TensorSpec(stored_name(name, self._first_row), DTYPE_CODES[p.dtype], shape)
            for name, p in parameters.items()
            for shape in [stored_shape(name, p, self._first_row)]
        ]
        text = json.dumps(state, indent=2) + "\n"  # now: training changes the state
        rng = gather_rng(self._ranks)
        failures: list[str] = []
        gathered = _gather(parameters, optimizer, self._ranks, failures, self._first_row)
        if self._in_background:
            copies = iter(_copy(gathered, self._ranks, failures))
            if self._ranks.is_main:
                parts = (target, specs, copies, rng, info, text)
                self._writing = self._pool.submit(self._write, *parts)
        else:
            if self._ranks.is_main:
                try:
                    self._write(target, specs, gathered, rng, info, text)
                except UserError as failure:
                    failures.append(str(failure))
            for _ in gathered:  # the other ranks' part of it; on the main one the last vote
                pass
            if failures:  # the vote was lost, and the gathering ended, inside `_write`
                raise CheckpointError(failures[0])
            self._ended_s = time.perf_counter()  # with the last vote
        blocked_s = time.perf_counter() - self._started_s
        self._saved = {"path": str(target), "step": step, "blocked_s": blocked_s}

    @property
    def is_done(self) -> bool:
        """Whether there is a save in the background that `finish` would not have to wait for.

        Only the main rank knows, so the ranks have to agree: False on every other one.
        """
        return self._writing is not None and self._writing.done()

    def finish(self) -> dict[str, Any] | None:
        """Waits until the save is written and old ones are removed; every rank must call it.

        Returns:
            On every rank the same, JSON-able: the path and the step; blocked_s, how long training
            stood still for it, here included; total_s, from its start to its end. None if there
            was nothing to finish.

        Raises:
            CheckpointError: on every rank, with the same message, if the main one could not write
                or remove.
        """
        saved, self._saved = self._saved, None
        if saved is None:
            return None
        error, called_s = None, time.perf_counter()
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except UserError as failure:
                error = str(failure)
        saved["blocked_s"] += time.perf_counter() - called_s
        saved["total_s"] = self._ended_s - self._started_s
        error, saved = self._ranks.from_main((error, saved))
        if error:
            raise CheckpointError(error)
        return saved

    def _write(
        self,
        target: Path,
        specs: list[TensorSpec],
        tensors: Iterator[Tensor],
        rng: dict[str, Tensor],
        info: BlocksInfo,
        state: str,
    ) -> None:
        """Does the main rank's part, in whichever thread; no collective but those of `tensors`."""
        _make_way(target)
        moments = [TensorSpec(f"{s.name}.{m}", s.dtype, s.shape) for s in specs for m in MOMENTS]
        states = [TensorSpec(name, DTYPE_CODES[t.dtype], tuple(t.shape)) for name, t in rng.items()]

        def following(_: TensorSpec) -> Iterator[memoryview]:
            return tensor_chunks(next(tensors))

        with output_directory(target) as aside:
            write_blocks(aside / TRAINABLE_FILE, specs, following, info)
            write_safetensors(aside / OPTIMIZER_FILE, moments, following)
            write_safetensors(aside / RNG_FILE, states, lambda spec: tensor_chunks(rng[spec.name]))
            (aside / STATE_FILE).write_text(state, encoding="utf-8")
            write_manifest(aside)
        remove_old(self._run_dir, self._keep, self._keep_every)
        self._ended_s = time.perf_counter()


def _copy(tensors: Iterator[Tensor], ranks: Ranks, failures: list[str]) -> list[Tensor]:
    """Copies on the main rank into its memory; one that does not fit loses the next vote."""
    copies: list[Tensor] = []
    for tensor in tensors:
        if ranks.is_main:
            try:
                # Of one process on a CPU, the tensor is the parameter itself: training changes it.
                copies.append(tensor.to("cpu", copy=True))
            except RuntimeError as error:
                failures.append(f"rank 0: no memory to copy what is saved: {error}")
    return copies


def _gather(
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    failures: list[str],
    first_row: int,
) -> Iterator[Tensor]:
    """Yields all parameters, then all moments, each whole; a collective operation per tensor.

    Before each one, and after the last, all ranks vote: a rank that failed on its own would leave
    the others waiting for it. `failures` holds what has gone wrong on this rank.
    """
    named = [(name, parameter.detach()) for name, parameter in parameters.items()]
    for name, parameter in parameters.items():
        named += [(name, optimizer.state[parameter][m]) for m in MOMENTS]
    for name, tensor in named:
        try:
            if isinstance(tensor, DTensor):
                _make_room(tensor)
        except RuntimeError as error:  # PyTorch's out of memory, of any device
            failures.append(f"rank {ranks.rank}: no memory to gather {name!r} for saving: {error}")
        _vote(ranks, failures)
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield stored_part(name, whole, first_row)
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
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    step: int,
    first_row: int = 0,
) -> None:
    """Gives the optimizer the moments of a training checkpoint, each rank its own shards.

    Args:
        path: the training checkpoint.
        parameters: name -> sharded parameter, as given to `Saver.start`.
        optimizer: fresh AdamW over these.
        step: optimizer steps made.
        first_row: as for `Saver`.

    Raises:
        CheckpointError: the file does not hold just these parameters' moments.
    """
    file = path / OPTIMIZER_FILE
    stored = read_header(file)
    names = {name: stored_name(name, first_row) for name in parameters}
    if set(stored) != {f"{name}.{moment}" for name in names.values() for moment in MOMENTS}:
        raise CheckpointError(f"{file}: holds the moments of other parameters")
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {"step": torch.tensor(float(step), device=parameter.device)}
        for moment in MOMENTS:
            saved = stored[f"{names[name]}.{moment}"].read()
            full = whole_part(name, saved, first_row).to(parameter.device)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                ).to(parameter.device)  # the mesh's is the GPU, also of what is offloaded
            state[moment] = full
        optimizer.state[parameter] = state
