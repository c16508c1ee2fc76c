"""Records every collective of a step under FSDP, among real or simulated ranks.

Pretended ranks cost nothing: the model takes its step on tensors that have shapes but no memory
(`FakeTensorMode`), in a process group of which the others do not exist (PyTorch's "fake" backend).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from llamapro import backends
from llamapro.training.distributed import Ranks, make_mesh
from llamapro.training.objective import NextToken
from llamapro.training.optim import clip_gradients

_c10d: Any = dist.distributed_c10d  # what it does not export, too
# Operation -> (its name, the argument that is whole on every rank, the group's argument).
_COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, 2),
    "c10d::allreduce_": ("all-reduce", 0, 1),
    "_c10d_functional::all_reduce": ("all-reduce", 0, 2),
}
_LOCAL = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
# FSDP names what it communicates for the profiler: "FSDP::all_gather (model.layers.3)".
_UNIT = re.compile(r"FSDP::(?:all_gather|post_backward_reduce)(?: \((.+)\))?")


@dataclass(frozen=True)
class Collective:
    """One collective operation, as this rank called it.

    Attributes:
        phase: "forward", "backward" or, once per optimizer step, "step".
        operation: "all-gather", "reduce-scatter" or "all-reduce".
        unit: the FSDP unit whose weights or gradients it moves; "" is the root.
        ranks: of the group.
        bytes: of the tensor that is whole: gathered, or to be reduced; padding included.
    """

    phase: str
    operation: str
    unit: str
    ranks: tuple[int, ...]
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends if the group forms a ring; it receives the same number."""
        times = 2 if self.operation == "all-reduce" else 1  # a reduce-scatter, then an all-gather
        return times * self.bytes * (len(self.ranks) - 1) / len(self.ranks)


class Recorder(TorchDispatchMode):
    """Notes the collectives called inside it, on fake and on real tensors alike.

    Attributes:
        phase: what the following are noted under.
        collectives: in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.collectives = "", list[Collective]()
        self._unit = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it communicates inside: this is called again from there
        if func.namespace == "profiler" and (found := _UNIT.fullmatch(str(args[0]))):
            self._unit = (found[1] or "").removeprefix("model.")  # the root is the objective
        elif func.namespace in ("c10d", "_c10d_functional") and func.name() not in _LOCAL:
            operation, whole, group_at = _COLLECTIVES[func.name()]
            tensors = args[whole] if isinstance(args[whole], list) else [args[whole]]
            group = args[group_at]
            if isinstance(group, str):
                group = _c10d._resolve_process_group(group)
            else:
                group = dist.ProcessGroup.unbox(group)
            ranks = tuple(dist.get_process_group_ranks(group))
            unit = "" if self.phase == "step" else self._unit
            size = sum(t.nbytes for t in tensors)
            self.collectives.append(Collective(self.phase, operation, unit, ranks, size))
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_ranks(world_size: int, shard_size: int = 0) -> Iterator[Ranks]:
    """Makes this process rank 0 of many that do not exist; nothing that it asks of them happens."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        mesh = make_mesh("cpu", world_size, shard_size)
        nowhere = torch.device("meta")
        yield Ranks(0, world_size, nowhere, mesh, dist.group.WORLD)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


def record_micro_batch(
    objective: NextToken, rows: int, length: int, clip: float, replayed: int | None = None
) -> list[Collective]:
    """Takes a step of one micro-batch on fake tensors; returns what was communicated.

    Args:
        objective: sharded on the meta device; its weights are fake afterwards.
        replayed: the number of last rows that are.
    """
    # Backends do not communicate, and the kernels need a GPU.
    with FakeTensorMode(allow_non_fake_inputs=True), backends.use("cpu"):
        objective.to_empty(device="cpu")
        ids = torch.zeros(rows, length, dtype=torch.int64)
        with Recorder() as recorder:
            recorder.phase = "forward"
            loss, _ = objective(ids, ids, replayed=replayed)
            recorder.phase = "backward"
            loss.backward()
            recorder.phase = "step"
            clip_gradients(objective.parameters(), clip)
    return recorder.collectives


def links_between_nodes(mesh: DeviceMesh, ranks_per_node: int) -> dict[tuple[int, ...], float]:
    """Says which part of a ring's links joins two machines, for each group that rank 0 is in.

    That is also, on average over a machine's ranks, the part of what they send that leaves it. Of
    all groups along a dimension the worst counts: a machine may hold one whole and parts of others.
    """
    parts = {}
    for dim, size in enumerate(mesh.mesh.shape):
        groups = mesh.mesh.movedim(dim, -1).reshape(-1, size)
        nodes = groups // ranks_per_node
        joins = nodes != nodes.roll(-1, dims=1)  # each rank sends to the next
        parts[tuple(groups[0].tolist())] = joins.double().mean(dim=1).max().item()
    return parts
