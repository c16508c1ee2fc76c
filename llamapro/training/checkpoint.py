"""Training checkpoints: the trained tensors, their optimizer state, and where the run stands.

    RUN_DIR/checkpoints/step-00000500/
        trainable.safetensors   the trained tensors, fp32 masters: a new-block file
        optimizer.safetensors   AdamW's two moments of each
        state.json              step, tokens, every setting, hashes of base, tokenizer and data
        manifest.json           size and SHA-256 of the files above

A checkpoint is written aside and renamed, so a directory named step-* is complete. Hidden ones
(`.step-*`) are being written or removed, or were left by a killed process; the next save deletes
them, because only one process writes into a run directory (`lock.run_lock`). Tensors are gathered
whole, one by one, so the files do not depend on the number of processes.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llamapro.checkpoints import run
from llamapro.checkpoints.new_blocks import BlocksInfo, write_blocks
from llamapro.checkpoints.tensors import DTYPE_CODES, TensorSpec, tensor_chunks
from llamapro.checkpoints.writing import Target, write_safetensors
from llamapro.errors import CheckpointError, UserError, warn
from llamapro.files import output_directory
from llamapro.training.distributed import Ranks
from llamapro.training.lock import check_holder
from llamapro.training.settings import SaveSettings
from llamapro.training.weights import stored_name, stored_part, stored_shape

MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = dict[str, nn.Parameter]
Write = Callable[[Iterator[Tensor]], None]


class Saver:
    """Writes the training checkpoints of a run and removes old ones; every rank has one.

    In the foreground the main process holds one tensor at a time. In the background `save` returns
    as soon as the main process has copied everything into its memory; a thread then writes, hashes
    and removes while training goes on. The files are the same. As a context it leaves no thread
    behind: even when the body raises, a running save is completed, though no longer reported.
    """

    def __init__(
        self, run_dir: Path, settings: SaveSettings, ranks: Ranks, first_row: int = 0, step: int = 0
    ) -> None:
        """Writes nothing yet; `first_row` is as for `weights.stored_part`.

        The run directory is locked as long as the saver is used.
        """
        self.step = step  # of the latest checkpoint that was started or resumed from
        self._first_row = first_row
        self._run_dir, self._settings, self._ranks = run_dir, settings, ranks
        self._in_background = settings.in_background(ranks.device.type)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[None] | None = None  # on the main rank, in the background
        self._saved: dict[str, Any] | None = None  # not yet reported by `finish`
        self._started_s = self._ended_s = 0.0
        self._is_gone = False  # on the main rank: what a save wrote was removed meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def save(
        self,
        step: int,
        parameters: Parameters,
        optimizer: torch.optim.Optimizer,
        info: BlocksInfo,
        state: dict[str, Any],
    ) -> dict[str, Any] | None:
        """Finishes the save before and starts this one; every rank must call it.

        Everything that trains is saved as it is now, with the content of `state.json`. A damaged
        training checkpoint of the same step is replaced.

        Returns:
            The report of the save that ended (see `finish`): this one in the foreground, the one
            before it in the background. None if none did.

        Raises:
            CheckpointError: on every rank, with the same message, if one of them has no memory to
                gather, or as `finish`. Nothing is left of an incomplete checkpoint.
        """
        before = self.finish()
        self.step, self._started_s = step, time.perf_counter()
        text = json.dumps(state, indent=2) + "\n"  # now, because training changes the state
        row = self._first_row
        specs = [
            TensorSpec(stored_name(n, row), DTYPE_CODES[p.dtype], stored_shape(n, p, row))
            for n, p in parameters.items()
        ]
        write = partial(self._write, self._path(step), specs, info, text)
        save = self._save_in_background if self._in_background else self._save_now
        try:
            save(parameters, optimizer, write)
        except CheckpointError:
            if not self._ranks.on_main(lambda: self._is_gone):
                raise
            save(parameters, optimizer, write)  # training has not gone on
        blocked_s = time.perf_counter() - self._started_s
        self._saved = {"path": str(self._path(step)), "step": step, "blocked_s": blocked_s}
        return before if self._in_background else self.finish()

    # Both ways take tensors from `_gather`, which is a collective operation: whoever takes the next
    # tensor votes first, and waits until every other rank has taken it too.

    def _save_now(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer, write: Write
    ) -> None:
        """Gathers each tensor when the main rank has written the one before it."""
        failures: list[str] = []
        gathered = _gather(parameters, optimizer, self._ranks, failures, self._first_row)
        if self._ranks.is_main:
            try:
                write(gathered)  # takes every tensor, but not the last vote
            except (UserError, OSError) as failure:  # a lost vote is one too, and ends `gathered`
                failures.append(str(failure))
                self._is_gone = _is_removal(failure)
        deque(gathered, maxlen=0)  # the other ranks gather here; the main one votes once more
        if failures:
            raise CheckpointError(failures[0])
        self._ended_s = time.perf_counter()  # after the last vote

    def _save_in_background(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer, write: Write
    ) -> None:
        """Gathers everything at once, on every rank; then the main one writes its copies alone."""
        failures: list[str] = []
        gathered = _gather(parameters, optimizer, self._ranks, failures, self._first_row)
        copies = _copy(gathered, self._ranks, failures)

        def write_copies() -> None:
            try:
                write(iter(copies))
            except (UserError, OSError) as failure:
                if not _is_removal(failure):
                    raise
                write(iter(copies))  # all of it is still in memory

        if self._ranks.is_main:
            self._writing = self._pool.submit(write_copies)

    def has(self, step: int) -> bool:
        """Whether the latest save is of this step and still there; every rank must call it."""
        return step == self.step and self._ranks.on_main(self._path(step).exists)

    def _path(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / f"step-{step:08d}"

    @property
    def is_done(self) -> bool:
        """Whether a background save has ended; only the main rank knows, so ranks have to agree."""
        return self._writing is not None and self._writing.done()

    def finish(self) -> dict[str, Any] | None:
        """Waits until the save is written and old ones are removed; every rank must call it.

        Raises UserError on every rank if the main one could not write.

        Returns:
            A JSON-able report, the same on every rank: path and step; blocked_s, how long training
            stood still for it, including now; total_s, from its start to its end. None if there was
            nothing to finish.
        """
        saved, self._saved = self._saved, None
        if saved is None:
            return None
        called_s, writing, self._writing = time.perf_counter(), self._writing, None

        def wait() -> dict[str, Any]:
            if writing is not None:
                writing.result()
            saved["blocked_s"] += time.perf_counter() - called_s
            return saved | {"total_s": self._ended_s - self._started_s}

        return self._ranks.on_main(wait)

    def _write(
        self,
        target: Path,
        specs: list[TensorSpec],
        info: BlocksInfo,
        state: str,
        tensors: Iterator[Tensor],
    ) -> None:
        """Does the main rank's work, in either thread; its only collectives are in `tensors`."""
        check_holder(self._run_dir)
        make_way(target)

        def next_tensor() -> Iterator[memoryview]:
            return tensor_chunks(next(tensors))

        blocks = [Target(s.name, s.dtype, s.shape, [next_tensor]) for s in specs]
        moments = [replace(t, name=f"{t.name}.{m}") for t in blocks for m in MOMENTS]
        with output_directory(target) as aside:
            write_blocks(aside / run.TRAINABLE_FILE, blocks, info)
            write_safetensors(aside / run.OPTIMIZER_FILE, moments)
            (aside / run.STATE_FILE).write_text(state, encoding="utf-8")
            run.write_manifest(aside)
        remove_old(self._run_dir, self._settings.keep, self._settings.keep_every)
        self._ended_s = time.perf_counter()


def _is_removal(failure: Exception) -> bool:
    """Whether a write failed because its directory was removed meanwhile."""
    return isinstance(failure.__context__ or failure, FileNotFoundError)


def _copy(tensors: Iterator[Tensor], ranks: Ranks, failures: list[str]) -> list[Tensor]:
    """Copies to the memory of the main rank; a tensor that does not fit loses the next vote."""
    copies: list[Tensor] = []
    for tensor in tensors:
        if ranks.is_main:
            try:
                # With one process on a CPU the tensor is the parameter, which training changes.
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

    Before each one, and after the last, all ranks vote, because a rank that failed on its own would
    leave the others waiting for it. `failures` holds the failures of this rank.
    """
    named = [(name, name, parameter.detach()) for name, parameter in parameters.items()]
    for name, parameter in parameters.items():
        named += [(name, f"{name}.{m}", optimizer.state[parameter][m]) for m in MOMENTS]
    for name, label, tensor in named:
        try:
            if isinstance(tensor, DTensor):
                _make_room(tensor)
        except RuntimeError as error:  # PyTorch's out of memory, of any device
            failures.append(f"rank {ranks.rank}: no memory to gather {label!r} for saving: {error}")
        _vote(ranks, failures)
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield stored_part(name, whole, first_row)
    _vote(ranks, failures)


def _make_room(tensor: Tensor) -> None:
    """Allocates and frees the memory of the whole tensor, which gathering then takes."""
    torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _vote(ranks: Ranks, failures: list[str]) -> None:
    """Raises the lowest rank's failure as CheckpointError on every rank, if any has one."""

    def tell() -> None:
        if failures:
            raise CheckpointError(failures[0])

    ranks.on_all(tell)


# ---- Which of them stay --------------------------------------------------------------------------


def make_way(target: Path) -> None:
    """Deletes the remains of a killed process, and a damaged training checkpoint at the target."""
    with suppress(OSError):
        for stale in target.parent.glob(".step-*"):
            _delete(stale)
    if not target.exists():
        return
    try:
        run.read_state(target)
    except CheckpointError:
        _remove(target)
    else:
        raise CheckpointError(f"{target}: exists and is intact; it is not replaced")


def _remove(path: Path) -> None:
    """Hides, then deletes."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        path.rename(hidden)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from None
    _delete(hidden)


def _delete(hidden: Path) -> None:
    """Deletes what nobody sees; what is left, the next save tries again."""
    with suppress(OSError):
        if hidden.is_symlink():  # of a user who moved it to another disk, where it stays
            hidden.unlink()
    shutil.rmtree(hidden, ignore_errors=True)


def remove_old(run_dir: Path, keep: int, keep_every: int = 0) -> None:
    """Deletes all but the latest training checkpoints and the newest intact one.

    Before anything is deleted the newest is read back from the disk and checked. What cannot be
    removed is said once, and tried again after every save. `keep` and `keep_every` are those of
    `SaveSettings`; the run directory is locked. Raises CheckpointError if none is intact.
    """
    old, failures = list[Path](), list[CheckpointError]()
    try:
        old = run.training_checkpoints(run_dir)[:-keep]
    except CheckpointError as error:
        failures.append(error)
    if keep_every:
        old = [path for path in old if int(path.name.removeprefix("step-")) % keep_every]
    newest = run.newest_intact(run_dir)[0] if old else None
    for path in old:
        if path != newest:
            try:
                _remove(path)
            except CheckpointError as error:
                failures.append(error)
    for failure in failures:
        warn(f"{failure}; it stays, and training goes on")
