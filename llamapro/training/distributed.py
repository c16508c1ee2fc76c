"""Processes that train together: a process group, FSDP2 shards, sums over ranks.

One CPU, one GPU and many machines go the same way.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from llamapro.errors import ConfigError, DataError, UserError, note
from llamapro.files import reason
from llamapro.training import peers
from llamapro.training.objective import NextToken
from llamapro.training.preemption import Stopped, StopRequest, default_signals
from llamapro.training.quantized import quantize
from llamapro.training.settings import TrainSettings
from llamapro.training.weights import is_trained, lowest_in_backward

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # all processes in one dimension "shard", or in two: "replicate", "shard"
    # A group of all processes with a timeout of a week instead of minutes, for waiting while the
    # main one tokenises a corpus or writes a file.
    patient: dist.ProcessGroup
    store: Any = None
    stop: StopRequest = field(default_factory=StopRequest)  # what this process was asked

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Returns each value, (), summed over all ranks; every rank must call it.

        All values are on one device; those on the CPU do not wait for the GPU.
        """
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
        dist.all_reduce(total)
        return total.tolist()

    def say(self, text: str) -> None:
        """Prints to standard error, where progress goes, on the main rank."""
        if self.is_main:
            note(text)

    def raise_stopped(self) -> None:
        """Raises Stopped if a rank was asked to stop; every rank must call it, and raises it."""
        if any(self.sum(self.stop.is_asked)):
            raise Stopped

    def on_main(self, work: Callable[[], T]) -> T:
        """Does work on the main rank alone, and returns its result on all; every rank must call it.

        Raises UserError or Stopped on every rank if the work raised it, or an OSError.
        """
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except (UserError, Stopped) as error:
                box[1] = error
            except OSError as error:  # the other ranks must not wait for ever
                box[1] = DataError(f"{error.filename or 'a file'}: {reason(error)}")
        _wait(lambda: dist.broadcast_object_list(box, src=0, group=self.patient))
        if box[1] is not None:
            raise box[1]
        return box[0]

    def on_all(self, work: Callable[[], object]) -> None:
        """Does work on every rank; raises the first rank's UserError on all of them."""
        errors: list[UserError | None] = [None] * self.world_size
        mine: UserError | None = None
        try:
            work()
        except UserError as error:
            mine = error
        _wait(lambda: dist.all_gather_object(errors, mine, group=self.patient))
        for found in filter(None, errors):
            raise found


def _wait(call: Callable[[], object]) -> None:
    """Waits for other ranks in a thread: a signal's handler runs only while this one is free."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


# ---- How the processes meet ---------------------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank() -> bool:
    """Returns whether torchrun, or another launcher, started this process as one of several.

    Raises ConfigError if it set some of its variables and left others out, or empty.
    """
    if not os.environ.keys() & {"RANK", "WORLD_SIZE"}:
        return False
    numbers = [name for name in VARIABLES if name != "MASTER_ADDR"]
    numbers += [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
    wrong = [name for name in VARIABLES if not os.environ.get(name)]
    wrong += [n for n in numbers if n not in wrong and not os.environ[n].isdecimal()]
    if not wrong and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        wrong = ["RANK", "WORLD_SIZE"]
    if wrong:
        shown = ", ".join(f"{name} is {os.environ.get(name, 'not set')!r}" for name in wrong)
        raise ConfigError(
            f"{shown}: unset {' and '.join(VARIABLES)} to train in one process, or use torchrun"
        )
    return True


def world_size() -> int:
    """Returns how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns the number of this process on its machine."""
    return _local("LOCAL_RANK", 0)


def on_several_machines() -> bool:
    """Returns whether the processes that torchrun started are spread over machines."""
    return _local("LOCAL_WORLD_SIZE", 1) < world_size()


def _local(name: str, alone: int) -> int:
    """Returns a number that torchrun sets; a shell may hold it without the others."""
    return int(os.environ.get(name, alone)) if "RANK" in os.environ else alone


@cache
def meeting_place() -> tuple[Any, int, int]:
    """Returns torchrun's store, this process's rank and the number of processes.

    Raises ConfigError if nobody answers at the address that torchrun gave.
    """
    # After a restart torchrun's store still holds the addresses of the earlier processes. The
    # prefix keeps them from being taken for those of this start.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        with default_signals():
            store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = ":".join(os.environ[name] for name in VARIABLES[2:])
        raise ConfigError(
            f"the other processes were not found at {address} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0][:200]}"
        ) from None
    return dist.PrefixStore(f"start-{start}", store), rank, size  # type: ignore[attr-defined]


def make_mesh(kind: str, world_size: int, shard_size: int = 0) -> DeviceMesh:
    """Arranges all processes of the group on "cpu" or "cuda" as `Ranks.mesh` says."""
    shape = {"replicate": world_size // shard_size} if shard_size else {}
    shape["shard"] = shard_size or world_size
    return init_device_mesh(kind, tuple(shape.values()), mesh_dim_names=tuple(shape))


@contextmanager
def process_group(device: str, shard_size: int = 0) -> Iterator[Ranks]:
    """Joins the processes torchrun started, or makes a group of one: NCCL on GPU, gloo on CPU.

    Raises ConfigError for "cuda" without a GPU, or more processes on a machine than GPUs.

    Args:
        device: "auto", "cpu" or "cuda".
        shard_size: divides the number of processes. Groups of neighbouring ranks each hold a copy
            of the weights and average their gradients (HSDP), so weights are gathered within a
            group, ideally a machine. 0 makes one group.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise ConfigError("train.device 'cuda': no GPU is visible; use 'auto' or 'cpu'")
    # The same on every process, so that all of them end here, also rank 0, which prints the error.
    local_world = max(local_rank() + 1, _local("LOCAL_WORLD_SIZE", 1))
    if gpus and local_world > gpus:
        raise ConfigError(
            f"{local_world} processes on this machine, but {gpus} GPU(s); start at most {gpus} "
            "here, or set train.device to cpu"
        )
    kind = "cuda" if gpus else "cpu"
    where = torch.device(kind, local_rank()) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    store, rank, size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    watched: AbstractContextManager[None] = nullcontext()
    if is_rank():
        store, rank, size = meeting_place()
        watched = peers.watched(store, rank, size, "connecting")
    try:
        with peers.loss_is_said():
            with default_signals(), watched:
                dist.init_process_group(backend, store=store, rank=rank, world_size=size)
                mesh = make_mesh(kind, size, shard_size)
                patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            yield Ranks(rank, size, where, mesh, patient, store)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard(objective: NextToken, ranks: Ranks, compute_dtype: torch.dtype, t: TrainSettings) -> None:
    """Spreads the model over the ranks, block by block (FSDP2), and moves it to the device.

    Trained weights are always sharded and keep fp32 masters. Frozen weights are stored in the
    compute dtype and have no gradient. Gradients are reduced in fp32. A block below the first one
    that trains is gathered at most once per step, for forward, because backward never reaches it.
    Offloading leaves replicated weights on the GPU. FSDP's hooks run between compiled blocks,
    uncompiled. Raises ConfigError for `train.offload` without a GPU.

    Args:
        objective: holds the model, loaded on the CPU, with `requires_grad` set. It becomes the
            root, so call it and not the model. Only this rank's shards stay in memory.
        compute_dtype: the dtype of matrix products and activations.
    """
    if t.offload and ranks.device.type != "cuda":
        raise ConfigError(
            f"train.offload true: the device is {ranks.device.type}, whose memory the weights are "
            "in already; set it to false, or train on a GPU"
        )
    sharded = partial(
        fully_shard,
        mesh=ranks.mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if t.offload else OffloadPolicy(),
    )
    model, frozen = objective.model, t.placement(ranks.world_size)
    # FSDP leaves these weights alone. Each is a copy: on a CPU it may still be the file, which
    # another program can overwrite.
    whole_on = ranks.device if frozen == "replicate" else None
    layers = list(model.model.layers)
    trains = [is_trained(layer) for layer in layers]
    first = lowest_in_backward(model)
    for index, layer in enumerate(layers):  # cast just before sharding: one full block at a time
        if t.compile:
            layer.compile()
        if t.recompute and index >= first:  # below nothing is kept for backward anyway
            checkpoint(layer)
        if not trains[index]:
            quantize(layer, t.frozen_dtype, compute_dtype, ranks.device, index >= first)
        _cast(layer, compute_dtype, whole_on)
        if trains[index] or whole_on is None:
            is_kept = frozen == "gather" and index >= first and not trains[index]
            unit = sharded(layer, reshard_after_forward=not is_kept)
            if index == first:
                # FSDP gathers ahead of time the unit that ran before: the block below, which
                # backward does not reach, or the last one of an evaluation. Naming a unit that is
                # whole already, this one, leaves nothing to gather.
                unit.set_modules_to_backward_prefetch([unit])
    # Embedding, final norm and head are in no block: they belong to the root unit.
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        _cast(module, compute_dtype, whole_on)
    whole = {p for p in model.parameters() if whole_on is not None and not p.requires_grad}
    sharded(objective, ignored_params=whole)


def _cast(module: nn.Module, compute_dtype: torch.dtype, whole_on: torch.device | None) -> None:
    """Gives trained weights fp32 and frozen ones the compute dtype; may copy these to a device."""
    for p in module.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else compute_dtype)
        if whole_on is not None and not p.requires_grad:
            p.data = p.data.to(whole_on, copy=True)
