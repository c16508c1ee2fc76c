"""The fastest settings that fit a GPU's memory by the plan's estimate; `--dry-run` prints them."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from llamapro import backends
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, suggest
from llamapro.formatting import format_bytes
from llamapro.model import Linear, build_on_meta
from llamapro.training.plan import compute_dtype, device_type, estimate_memory
from llamapro.training.settings import Frozen, Settings, TrainSettings
from llamapro.training.weights import freeze

# Memory in GB, as a GPU is sold. It has as many GiB, 7 % more, which are left to CUDA, NCCL and
# what the allocator cannot use.
GPUS = {
    "a10": 24, "a100": 80, "a100-40": 40, "a6000": 48, "b200": 180, "h100": 80, "h200": 141,
    "l4": 24, "l40s": 48, "rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32,
}  # fmt: skip
# Those of compute capability below 8.9 cannot multiply float8.
WITHOUT_FLOAT8 = ("a10", "a100", "a100-40", "a6000", "rtx-3090")
MULTIPLE = 16  # of both sizes of a float8 matrix, as PyTorch asks on a GPU
# With more tokens than this in a forward pass, matrix products hardly get faster.
ENOUGH_TOKENS = 8192
FIELDS = ("recompute", "micro_batch_size", "frozen")


def usable_bytes(device: str) -> int | None:
    """Returns the memory that a run may plan with on a GPU of `GPUS`, or one of "48GB".

    "" stands for this machine's GPU, None without one. Raises ConfigError for an unknown GPU.
    """
    if not device:
        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(0).total_memory * 0.93)
    name = _name(device)
    given = re.fullmatch(r"([1-9]\d*)-?gb", name)
    if not given and name not in GPUS:
        raise ConfigError(
            f"device {device!r}: no such GPU in the table{suggest(name, list(GPUS))}; known are "
            f"{', '.join(GPUS)}, or give its memory, such as 48GB"
        )
    return int(given[1] if given else GPUS[name]) * 10**9


def _name(device: str) -> str:
    return device.lower().replace(" ", "-")


def check_float8(settings: Settings, config: ModelConfig) -> None:
    """Raises ConfigError for `train.frozen_dtype` float8 where a GPU cannot compute it."""
    device, planned = torch.device(device_type(settings)), _name(settings.device)
    if settings.train.frozen_dtype != "float8" or device.type != "cuda":
        return
    linears = [module for module in build_on_meta(config).modules() if isinstance(module, Linear)]
    odd = {size for linear in linears for size in linear.weight.shape if size % MULTIPLE}
    why = ""
    if compute_dtype(settings) != torch.bfloat16:
        why = f"on a GPU it needs train.dtype bfloat16, not {settings.train.dtype}"
    elif odd:
        why = f"a matrix has the size {min(odd)}, which is not a multiple of {MULTIPLE}"
    elif planned in WITHOUT_FLOAT8:
        why = f"{planned} is a GPU without float8"
    elif not planned and torch.version.hip:
        why = "it is written for NVIDIA GPUs"
    elif not planned:
        gpu = torch.cuda.get_device_properties(device)
        if (gpu.major, gpu.minor) < (8, 9):
            why = f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, below 8.9"
    if why:
        raise ConfigError(f"train.frozen_dtype 'float8': {why}; take 'int8' or 'auto'")


def propose(settings: Settings, config: ModelConfig, world_size: int) -> dict[str, Any]:
    """Finds the fastest settings of memory that fit the GPU that is planned for.

    Returns:
        JSON-able: usable_bytes, and settings, by name, with their memory_bytes, or None where
        nothing fits. Empty without a GPU.
    """
    limit = usable_bytes(settings.device)
    if limit is None or settings.train.device == "cpu":
        return {}
    model = build_on_meta(config)
    freeze(model, settings.train.trainable, settings.train.new_tokens)
    device, dtype = torch.device("cuda"), compute_dtype(settings)
    with backends.use(settings.train.ops, settings.train.deterministic_attention):
        for train in _fastest_first(settings, world_size):
            planned = replace(settings, train=train)
            total = estimate_memory(planned, model, dtype, device, world_size)["total"]
            if total <= limit:
                found = {f"train.{name}": getattr(train, name) for name in FIELDS}
                return {"usable_bytes": limit, "settings": found | {"memory_bytes": total}}
    return {"usable_bytes": limit, "settings": None}


def _fastest_first(settings: Settings, world_size: int) -> Iterator[TrainSettings]:
    """Yields settings of memory from the fastest to the one that needs least.

    Recomputing makes a step about 40 % longer, so it comes last. Fewer tokens at a time cost more
    than gathering weights, which overlaps with computing, so frozen weights are sharded first.
    """
    t, length = settings.train, settings.data.seq_len
    share = t.batch_size // world_size  # sequences of a process
    most = max(ENOUGH_TOKENS // length, t.micro_batch_size)
    sizes = {n for n in (*(1 << i for i in range(20)), t.micro_batch_size) if n <= most}
    fitting = sorted((n for n in sizes if share % n == 0), reverse=True)
    whole = t.placement(world_size) == "replicate"
    places: list[Frozen] = ["replicate", "shard"] if whole else ["replicate", "gather", "shard"]
    if t.frozen_dtype != "auto":
        places = ["replicate"]  # rounded weights are never in parts
    for recompute, rows, frozen in itertools.product((False, True), fitting, places):
        yield replace(t, recompute=recompute, micro_batch_size=rows, frozen=frozen)


def render_proposal(found: dict[str, Any], device: str) -> str:
    """Returns the proposal as a line of the start-up block."""
    name = f"{device or 'this GPU'}, {format_bytes(found['usable_bytes'])} usable"
    if found["settings"] is None:
        text = f"nothing fits {name}: take more processes, or train.offload"
    else:
        named = dict(found["settings"])
        size = format_bytes(named.pop("memory_bytes"))
        words = [f"{key} {str(value).lower()}" for key, value in named.items()]
        text = f"{', '.join(words)}: {size} of {name}"
    return f"{'fastest fit':<16} {text}"
