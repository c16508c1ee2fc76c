"""Simulates a training step on many GPUs with one CPU: shards, memory and traffic.

    python benchmarks/simulate.py --config configs/llama2-70b.toml --ranks 512
    python benchmarks/simulate.py --config configs/llama2-70b.toml --ranks 512 \
        --train.shard-size 8 --train.frozen replicate --bandwidth 50

Every option of `train.py` means what it means there. Only a config.json is read: no weights, no
data. Nothing is computed by a formula: the real model takes the step, sharded by the real `shard`
among pretended ranks, and `traffic.py` records what FSDP asks of them.
"""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
import tyro
from torch.distributed.tensor import DTensor
from traffic import Collective, fake_ranks, links_between_nodes, record_micro_batch

from llamapro import backends, cli
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, interleave
from llamapro.formatting import format_bytes, format_count, format_duration
from llamapro.model import LlamaForCausalLM, build_on_meta
from llamapro.training.checks import check
from llamapro.training.distributed import shard
from llamapro.training.objective import make_objective
from llamapro.training.plan import estimate_memory
from llamapro.training.preset import parse
from llamapro.training.settings import DataSettings, Settings, TrainSettings
from llamapro.training.weights import freeze, is_trained


@dataclass(frozen=True)
class Options:
    """Options beyond those of train.py, which may follow."""

    ranks: int
    """Number of GPUs, with one process each."""
    ranks_per_node: int = 8
    """GPUs of one machine, which neighbouring ranks share."""
    num_new_blocks: int = 0
    """Expand the model first, as 'convert.py expand' does; 0 if model.path is already expanded."""
    bandwidth: float = 0.0
    """GB/s (10^9 bytes) from a GPU to other machines, each way, to estimate the least time on the
    network. 50 is a 400 Gb/s link; 0 estimates nothing."""


def simulate(settings: Settings, config: ModelConfig, options: Options) -> dict[str, Any]:
    """Returns what one optimizer step is for a rank, JSON-able; takes seconds and no GPU.

    Returns:
        parameters, units (kinds of FSDP units with their largest tensor's shards), memory_bytes
        (see `estimate_memory`), traffic (rows of calls and bytes per rank and step), and totals.
        `sent_bytes` count a rank's sending, `between_nodes_bytes` its part of what its machine
        sends to others; as much is received.
    """
    t, world = settings.train, options.ranks
    dtype = torch.float32 if t.dtype == "float32" else torch.bfloat16

    def build() -> LlamaForCausalLM:
        model = build_on_meta(config)
        freeze(model, t.trainable, t.new_tokens)
        return model

    model = build()
    with backends.use("cpu"):  # which kernels can run, only a GPU of that machine could say
        memory = estimate_memory(settings, model, dtype, torch.device("cpu"), world)
    trains = {f"model.layers.{i}": is_trained(layer) for i, layer in enumerate(model.model.layers)}
    trains[""] = is_trained(model.model.embed_tokens)
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)

    micro_batches = t.batch_size // (world * t.micro_batch_size)
    kinds = _kinds(settings, micro_batches, world)
    collectives: list[tuple[Collective, int]] = []
    with fake_ranks(world, t.shard_size) as ranks:
        for kind, (replayed, times) in enumerate(kinds.items()):
            model = build()
            objective = make_objective(model, settings.replay)
            # Offloading moves nothing between ranks.
            shard(objective, ranks, dtype, TrainSettings(frozen=t.placement(world)))
            units = _units(model, t.shard_size or world)
            size = (t.micro_batch_size, settings.data.seq_len)
            for each in record_micro_batch(objective, *size, settings.optim.clip, replayed):
                # Gradients leave their group with the last micro-batch, as `train_step` has it.
                is_once = each.phase == "step" or each.operation == "all-reduce"
                collectives.append((each, (kind == 0) if is_once else times))
        between = links_between_nodes(ranks.mesh, options.ranks_per_node)
    traffic: dict[tuple, dict[str, Any]] = {}
    for each, times in collectives:
        weights = "trained" if each.phase == "step" or trains[each.unit] else "frozen"
        key = (each.phase, each.operation, weights, len(each.ranks))
        fields = dict(zip(("phase", "operation", "weights", "ranks"), key, strict=True))
        row = traffic.setdefault(
            key, fields | {"calls": 0, "sent_bytes": 0.0, "between_nodes_bytes": 0.0}
        )
        row["calls"] += times
        row["sent_bytes"] += times * each.sent
        row["between_nodes_bytes"] += times * each.sent * between[each.ranks]
    rows = list(traffic.values())
    crossing = sum(row["between_nodes_bytes"] for row in rows)
    return {
        "model": settings.model.path or settings.model.config,
        "layers": config.num_hidden_layers,
        "ranks": world,
        "nodes": -(-world // options.ranks_per_node),
        "shard_size": t.shard_size or world,
        "frozen": t.placement(world),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {"total": total, "trainable": trainable, "frozen": total - trainable},
        "tokens_per_step": t.batch_size * settings.data.seq_len,
        "micro_batches": micro_batches,
        "units": units,
        "memory_bytes": memory,
        "traffic": rows,
        "sent_bytes": sum(row["sent_bytes"] for row in rows),
        "between_nodes_bytes": crossing,
        "bandwidth": options.bandwidth,
        "network_s": crossing / (options.bandwidth * 1e9) if options.bandwidth else None,
    }


def _kinds(settings: Settings, micro_batches: int, world: int) -> Counter[int | None]:
    """Counts a step's micro-batches without the base and, where replay is distilled, with it."""
    replay, batch_size = settings.replay, settings.train.batch_size
    others = batch_size - round(batch_size * replay.share) if replay.distill else batch_size
    rows = settings.train.micro_batch_size * world
    ends = range(rows, (micro_batches + 1) * rows, rows)
    return Counter(1 if end > others else None for end in ends)


def _units(model: LlamaForCausalLM, parts: int) -> list[dict[str, Any]]:
    """Describes the kinds of sharded units by their largest tensor, whole and on two ranks."""
    root = [model.model.embed_tokens, model.model.norm, model.lm_head]
    kinds: dict[str, list[list[Any]]] = {"embeddings, norm, head": [root]}
    is_above = False
    for layer in model.model.layers:
        is_above = is_above or is_trained(layer)
        kind = "frozen block above" if is_above else "frozen block below"
        kinds.setdefault("trained block" if is_trained(layer) else kind, []).append([layer])
    names = {p: name for name, p in model.named_parameters()}
    described = []
    for kind, units in kinds.items():
        weights = dict.fromkeys(p for module in units[0] for p in module.parameters())
        largest = max(weights, key=lambda p: p.numel())
        shape = list(largest.shape)
        first = last = shape
        if isinstance(largest, DTensor):
            # Rows are dealt out in equal chunks; the last ranks may get fewer, or none.
            first = list(largest.to_local().shape)
            last = [max(0, shape[0] - first[0] * (parts - 1)), *shape[1:]]
        described.append(
            {
                "unit": kind,
                "count": len(units),
                "parameters": sum(p.numel() for p in weights),
                "largest": re.sub(r"model\.layers\.\d+\.", "", names[largest]),
                "shape": shape,
                "first_rank": first,
                "last_rank": last,
            }
        )
    return described


def render(found: dict[str, Any], settings: Settings) -> str:
    """Returns the simulation as text."""
    sizes, memory = found["parameters"], dict(found["memory_bytes"])
    total = format_bytes(memory.pop("total"))
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items() if size)
    t = settings.train
    lines = [
        f"model       {found['model']}: {found['layers']} layers, {format_count(sizes['total'])} "
        f"parameters, {format_count(sizes['trainable'])} train",
        f"ranks       {found['ranks']} on {found['nodes']} machine(s); weights in "
        f"{found['shard_size']} parts, frozen ones: {found['frozen']}",
        f"step        {format_count(found['tokens_per_step'])} tokens = {found['ranks']} ranks x "
        f"{found['micro_batches']} micro-batch(es) x {t.micro_batch_size} x "
        f"{settings.data.seq_len}; {found['dtype']}",
        f"memory      about {total} per rank, with train.ops torch: {parts}",
    ]
    rows = []
    for u in found["units"]:
        first, last = u["first_rank"], u["last_rank"]
        held = "whole" if first == u["shape"] else f"{first} .. {last}" if first != last else first
        tensor = f"{u['largest']} {u['shape']}: {held}"
        rows.append([u["unit"], u["count"], format_count(u["parameters"]), tensor])
    heads = ["unit", "count", "parameters", "largest tensor, on the first and last rank"]
    lines += ["", measuring.table(heads, rows)]
    heads = ["per rank and step", "", "", "ranks", "calls", "sent", "to other machines"]
    rows = [
        [row[key] for key in ("phase", "operation", "weights", "ranks", "calls")]
        + [format_bytes(row[key]) for key in ("sent_bytes", "between_nodes_bytes")]
        for row in found["traffic"]
    ]
    both = [format_bytes(found[key]) for key in ("sent_bytes", "between_nodes_bytes")]
    rows.append(["in all; the same is received", "", "", "", "", *both])
    lines += ["", measuring.table(heads, rows)]
    if found["network_s"] is not None:
        lines += [
            "",
            f"estimate: at least {format_duration(found['network_s'])} per step on the network "
            f"between machines, at {found['bandwidth']:g} GB/s per GPU",
        ]
    return "\n".join(lines)


def read_config(path: str, num_new_blocks: int) -> ModelConfig:
    """Reads a config.json, or that of a checkpoint directory, and expands it if asked to.

    Raises:
        ConfigError: it does not exist, is damaged, or does not split into that many groups.
    """
    where = Path(path)
    if not where.exists():
        raise ConfigError(
            f"model.path {path}: does not exist; a simulation needs no weights, so a config.json "
            "alone will do: give it with --model.path"
        )
    config = ModelConfig.from_file(where / "config.json" if where.is_dir() else where)
    if not num_new_blocks:
        return config
    return expand_config(config, interleave(config.num_hidden_layers, num_new_blocks), "")


def main() -> None:
    options, rest = tyro.cli(
        Options, prog="benchmarks/simulate.py", description=__doc__, return_unknown_args=True
    )
    for name, least in (("ranks", 1), ("ranks_per_node", 1), ("num_new_blocks", 0)):
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
    if not 0 <= options.bandwidth < float("inf"):
        raise ConfigError(f"--bandwidth is {options.bandwidth}, expected GB/s, or 0")
    settings = parse(rest)
    path = settings.model.path or settings.model.config
    # Which files are read does not matter here, so they need not be named.
    model = dataclasses.replace(settings.model, path=path, config="")
    data = DataSettings(train=("-",), seq_len=settings.data.seq_len)
    settings = dataclasses.replace(settings, model=model, data=data)
    check(settings, options.ranks)
    config = read_config(path, options.num_new_blocks)
    length = settings.data.length(config.max_position_embeddings)
    settings = dataclasses.replace(settings, data=dataclasses.replace(data, seq_len=length))
    if settings.train.trainable == "new_blocks" and config.expansion is None:
        raise ConfigError(
            f"{path}: not an expanded model; add --num-new-blocks N, or set train.trainable to all"
        )
    found = simulate(settings, config, options)
    cli.print_result(found, settings.json, render(found, settings))


if __name__ == "__main__":
    cli.run(main)
