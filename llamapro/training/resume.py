"""Resuming: from which training checkpoint, whether the run is still the same, and alone.

A run is what it was only with the same frozen weights, tokenizer and corpora. Paths do not say so:
their contents are hashed when a run starts, kept in every `state.json`, and compared on resume.
"""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import check_blocks, read_blocks
from llamapro.checkpoints.run import OPTIMIZER_FILE, TRAINABLE_FILE, load_state, newest_intact
from llamapro.checkpoints.tensors import combine_hashes, hash_tensors, read_header
from llamapro.errors import CheckpointError, ConfigError
from llamapro.files import make_directory
from llamapro.model import LlamaForCausalLM
from llamapro.text.store import TokenStore
from llamapro.training.checkpoint import MOMENTS, Parameters
from llamapro.training.distributed import Ranks
from llamapro.training.settings import Settings, flatten
from llamapro.training.weights import put_new_rows, stored_name, stored_shape, whole_part

LOCK_FILE = "lock"


# ---- Where to go on ----------------------------------------------------------------------------


def find_resume_point(
    run_dir: Path, ranks: Ranks
) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """Finds where to go on; the main rank reads and hashes, every rank must call it.

    Returns:
        The newest intact training checkpoint and its state, None and None in a fresh run, and one
        message for each newer one that is damaged.

    Raises:
        CheckpointError: on every rank, if there are training checkpoints and none is intact.
    """
    error, path, state = None, None, None
    damaged: list[str] = []
    if ranks.is_main:
        try:
            path, damaged = newest_intact(run_dir)
            state = load_state(path) if path else None
        except CheckpointError as failure:
            error = str(failure)
    error, path, state, damaged = ranks.from_main((error, path, state, damaged))
    if error:
        raise CheckpointError(error)
    return path, state, damaged


# ---- Identity: what must be the same for a run to go on -----------------------------------------


def make_identity(
    checkpoint: Checkpoint | None,
    trainable: Iterable[str],
    tokenizer_sha256: str,
    stores: dict[str, TokenStore],
) -> dict[str, Any]:
    """Hashes what a run is made of; it reads all of the frozen weights.

    Args:
        checkpoint: what is trained; None if from random weights.
        trainable: names of its tensors that train; the others are frozen.
        tokenizer_sha256: the tokenizer's fingerprint.
        stores: label -> tokens of each corpus, such as "train data/code" or "replay", whose bytes
            are what was written (`corpus.tokenize` sees to it).

    Returns:
        JSON-able, for `state["identity"]`: base, tokenizer, data.
    """
    names = set(trainable)
    tensors = checkpoint.tensors.values() if checkpoint else ()
    frozen = [tensor for tensor in tensors if tensor.name not in names]
    hashes = hash_tensors(frozen, "hash frozen weights") if frozen else {}
    return {
        "base": combine_hashes((tensor, hashes[tensor.name]) for tensor in frozen),
        "tokenizer": tokenizer_sha256,
        "data": {
            label: {"tokens": store.tokens, "sha256": store.sha256}
            for label, store in stores.items()
        },
    }


def check_identity(
    saved: Any, identity: dict[str, Any], run_dir: Path, allowed: Sequence[str] = ()
) -> None:
    """Refuses to go on with other weights, another tokenizer or other tokens.

    Args:
        saved: what `make_identity` returned when the training checkpoint was saved.
        identity: what `make_identity` returns now.
        run_dir: the run directory, for the message.
        allowed: settings (`resume.allow`) whose things may differ.

    Raises:
        ConfigError: naming everything that differs.
        CheckpointError: the training checkpoint does not hold an identity.
    """
    try:
        before = _named(saved)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{run_dir}: its training checkpoints do not say which base, tokenizer and data they "
            "were made with; choose another --run-dir"
        ) from None
    now = _named(identity)
    changed = {
        thing: f"{thing[1]} was {before.get(thing, 'not there')}, is {now.get(thing, 'not there')}"
        for thing in before | now
        if before.get(thing) != now.get(thing) and thing[0] not in allowed
    }
    if changed:
        shown = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1...", "; ".join(changed.values()))
        settings = " ".join(dict.fromkeys(setting for setting, _ in changed))
        raise ConfigError(
            f"{run_dir} holds a run made of other things: {shown}; put them back to continue it, "
            f"choose another --run-dir, or allow them: --resume.allow {settings}"
        )


def _named(identity: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Returns (setting that names it, name) -> value as text, for each thing that can differ."""
    named = {
        ("model.path", "the frozen base model"): f"sha256 {identity['base']}",
        ("model.tokenizer", "the tokenizer"): f"sha256 {identity['tokenizer']}",
    }
    for label, found in identity["data"].items():
        kind = label.split(" ", 1)[0]  # "train" or "val"
        text = f"{found['tokens']:,} tokens (sha256 {found['sha256']})"
        setting = "replay.data" if kind == "replay" else f"data.{kind}"
        named[setting, f"data {label!r}"] = text
    return named


# ---- Settings: what may change -----------------------------------------------------------------

# A resumed run may differ in these: in how and where it computes, how long, and what it shows.
# Everything else decides what is computed.
FREE_TO_CHANGE = {
    "config", "run_dir", "processes", "resume.allow", "log_every", "log_seconds", "log_to",
    "log_spikes", "dry_run", "json",
    "data.cache_dir", "data.workers",
    "train.steps", "train.epochs", "train.micro_batch_size", "train.device", "train.ops",
    "train.recompute", "train.frozen", "train.shard_size", "train.offload", "train.compile",
    "optim.final_lr_ratio", "optim.skip_bad_steps", "eval.every", "eval.sequences",
    "save.every", "save.keep", "save.keep_every", "save.background",
}  # fmt: skip
# Nobody needs to be told that these differ.
UNREPORTED = {"config", "run_dir", "processes", "resume.allow", "log_seconds"} | {"dry_run", "json"}


def changes(before: dict[str, Any], settings: Settings, where: str) -> list[str]:
    """Compares a run's settings with those it is to go on with.

    Args:
        before: what `flatten` gave, from JSON.
        settings: of now.
        where: names the run in the message.

    Returns:
        The allowed differences, for example "train.steps 100 -> 200".

    Raises:
        ConfigError: naming everything that differs and may not.
    """
    flat = json.loads(json.dumps(flatten(settings)))
    # A run of an earlier version did what is now the default of a setting it did not know.
    before = json.loads(json.dumps(flatten(Settings()))) | before
    free: list[str] = []
    refused: list[str] = []
    for key, value in flat.items():
        if before.get(key) == value or key in UNREPORTED:
            continue
        text = f"{key} {json.dumps(before.get(key))} -> {json.dumps(value)}"
        (free if key in FREE_TO_CHANGE or key in settings.resume.allow else refused).append(text)
    if refused:
        names = " ".join(text.split(" ", 1)[0] for text in refused)
        raise ConfigError(
            f"{where} holds a run with other settings: {'; '.join(refused)}; continue it with its "
            f"own, choose another --run-dir, or allow them: --resume.allow {names}"
        )
    return free


# ---- Weights and optimizer --------------------------------------------------------------------


def load_trained(path: Path, model: LlamaForCausalLM, first_row: int = 0) -> None:
    """Puts the trained tensors of a training checkpoint into a model, before it is sharded.

    Args:
        path: the training checkpoint.
        model: whole, with weights; `requires_grad` tells what trains.
        first_row: as for `Saver`.

    Raises:
        CheckpointError: they were trained on another base, or are other tensors.
    """
    trains = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    shapes = {stored_name(n, first_row): stored_shape(n, p, first_row) for n, p in trains.items()}
    file = path / TRAINABLE_FILE
    stored, info = read_blocks(file)
    check_blocks(file, stored, info, model.config, shapes)
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    joined = put_new_rows(trains, tensors) if first_row else trains
    for name, tensor in joined.items():
        model.get_parameter(name).data = tensors.get(name, tensor)


def load_optimizer(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    step: int,
    first_row: int = 0,
) -> None:
    """Loads the moments of a training checkpoint into the optimizer, each rank its own shards.

    Args:
        path: the training checkpoint.
        parameters: name -> sharded parameter, as given to `Saver.start`.
        optimizer: fresh AdamW over these.
        step: optimizer steps applied.
        first_row: as for `Saver`.

    Raises:
        CheckpointError: the file holds the moments of other parameters.
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
                ).to(parameter.device)  # the mesh is on the GPU, even if the parameter is offloaded
            state[moment] = full
        optimizer.state[parameter] = state


# ---- One run in a run directory -----------------------------------------------------------------


class RunLock:
    """Keeps a second run out of a run directory; for one process, `locked` is for all ranks.

    The kernel holds the lock and releases it when the process ends, however it ends. The file
    `lock` says who has it. A run directory that was made for it and is still empty goes again.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file = run_dir / LOCK_FILE

    def __enter__(self) -> Self:
        """Takes the lock; raises ConfigError if another run has it or there can be none."""
        try:
            while not self._take():
                pass
        except BlockingIOError:
            raise ConfigError(
                f"{self._run_dir}: another run is writing here ({self._holder()}); wait for it, "
                "stop it, or choose another --run-dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self._file}: cannot be locked: {error.strerror}; choose another --run-dir"
            ) from None
        return self

    def _take(self) -> bool:
        """Opens and locks; False if the file was removed in between, by the one who had it."""
        self._is_new = not self._run_dir.exists()
        make_directory(self._run_dir)
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._fd), os.stat(self._file)):
                raise FileNotFoundError
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        except FileNotFoundError:
            os.close(self._fd)
            return False
        except OSError:
            os.close(self._fd)
            raise
        return True

    def _holder(self) -> str:
        with suppress(OSError, ValueError):
            return self._file.read_text(encoding="utf-8")[:200].strip() or "it has just started"
        return "it has just ended"

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.unlink()
            if self._is_new:
                self._run_dir.rmdir()  # fails, as it should, if anything was written
        os.close(self._fd)


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Holds the run directory's lock on the main rank while the body runs; every rank must enter.

    Raises:
        ConfigError: on every rank, if another run has it.
    """
    error = None
    with ExitStack() as stack:
        if ranks.is_main:
            try:
                stack.enter_context(RunLock(run_dir))
            except ConfigError as failure:
                error = str(failure)
        if error := ranks.from_main(error):
            raise ConfigError(error)
        yield
