"""One way to start on one CPU, one GPU or many: a process group, FSDP2 shards, sums over ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llamapro.config import ConfigError
from llamapro.model import LlamaForCausalLM


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: of this process, 0 to world_size - 1.
        world_size: how many processes train together.
        device: where this process computes.
        mesh: all of them in one dimension.
        patient: the same processes, with a timeout of a week instead of minutes: for waiting until
            the main one has tokenised a corpus or written a file.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    patient: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Returns each value summed over all ranks; every rank must call it."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def from_main(self, value: Any) -> Any:
        """Returns the main rank's value on every rank; every rank must call it."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]


def world_size() -> int:
    """Returns how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the processes torchrun started, or makes a group of one: NCCL on GPU, gloo on CPU.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ConfigError: "cuda" without a GPU, or more processes on this machine than it has GPUs.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not gpus:
        raise ConfigError("train.device 'cuda': no GPU is visible; use 'auto' or 'cpu'")
    if gpus and local_rank >= gpus:
        raise ConfigError(f"{local_rank + 1} processes on this machine, but {gpus} GPU(s)")
    kind = "cuda" if gpus else "cpu"
    where = torch.device(kind, local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    try:
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield Ranks(dist.get_rank(), dist.get_world_size(), where, mesh, patient)
    finally:
        dist.destroy_process_group()


def shard(model: LlamaForCausalLM, ranks: Ranks, compute_dtype: torch.dtype) -> None:
    """Shards the model over the ranks, block by block (FSDP2), and moves the shards to the device.

    What trains keeps fp32 masters; what is frozen is stored in the compute dtype. Gradients are
    reduced in fp32. `requires_grad` must be set already.

    Args:
        model: fully loaded, on the CPU; only this rank's shards of it stay in memory.
        ranks: from `process_group`.
        compute_dtype: of matrix products and activations.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)

    def cast(module: nn.Module) -> None:
        trains = any(p.requires_grad for p in module.parameters())
        module.to(torch.float32 if trains else compute_dtype)

    for layer in model.model.layers:  # cast just before sharding: one full block at a time
        cast(layer)
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    # What no block contains belongs to the root unit.
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        cast(module)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
