"""How a training step grows with blocks, new blocks, tokens and processes: its time and memory.

    python benchmarks/growth.py [--axes blocks new_blocks tokens processes] [--steps 3]
                                [--rounds 3] [--dtype float32] [--out RESULT.json]

Each axis changes one number of a small model and keeps the others. In each round every point runs
in a process of its own, one after the other, so that other load slows all alike; times are medians
over rounds, memory is what the process held at its peak beyond the libraries (on a GPU, what was
allocated).

Beside each figure stands the ideal. For time it is the first point's, times the ratio of the
floating-point operations of the step, which are counted on tensors without memory. For memory it is
the plan of `train.py --dry-run`. `law` is the p of a fit y ~ x^p, by least squares of the
logarithms. For processes nothing runs: the plan says what each process of 7B + 8 blocks holds.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_step import CLIP, SIZES, Size, build, build_optimizer, random_batch

from llamapro import backends, cli
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, interleave, select_trainable
from llamapro.model import LlamaForCausalLM, build_on_meta
from llamapro.training.distributed import process_group
from llamapro.training.objective import NextToken
from llamapro.training.optim import clip_gradients
from llamapro.training.plan import estimate_memory
from llamapro.training.settings import DataSettings, Settings, TrainSettings

AXES = {
    "blocks": (8, 16, 32, 64),  # of the base
    "new_blocks": (1, 2, 4, 8, 16),
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),  # of the one sequence of a step
    "processes": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}
START = {"blocks": 16, "new_blocks": 4, "tokens": 1024}


def size_at(axis: str, value: int) -> Size:
    """Returns the small model with one number changed."""
    numbers = START | {axis: value}
    base = SIZES["small"].base
    base = base | {"num_hidden_layers": numbers["blocks"], "max_position_embeddings": 1 << 14}
    return Size(base, numbers["new_blocks"], numbers["tokens"])


def on_meta(size: Size) -> LlamaForCausalLM:
    base = ModelConfig.from_dict(size.base)
    layout = interleave(base.num_hidden_layers, size.new_blocks)
    model = build_on_meta(expand_config(base, layout, base_sha256=""))
    select_trainable(model, "new_blocks")
    return model


def count_operations(size: Size) -> int:
    """Returns the floating-point operations of a step's forward and backward."""
    model = on_meta(size)
    ids = torch.zeros(1, size.seq_len, dtype=torch.int64, device="meta")
    with backends.use("torch"), FlopCounterMode(display=False) as counter:
        NextToken(model)(ids, ids)[0].backward()
    return counter.get_total_flops()


def plan_bytes(size: Size, dtype: torch.dtype, device: torch.device, processes: int = 1) -> int:
    """Returns what `train.py --dry-run` says that one process needs."""
    settings = Settings(data=DataSettings(seq_len=size.seq_len))
    settings = replace(settings, train=TrainSettings(micro_batch_size=1))
    with backends.planning_for(device):
        return estimate_memory(settings, on_meta(size), dtype, device, processes)["total"]


# ---- One point, in a process of its own ---------------------------------------------------------


def held_bytes(device: torch.device) -> int:
    """Returns the most memory that this process has held so far.

    getrusage would not do: it starts with what the parent held.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def work(axis: str, value: int, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Returns the seconds of a step, the median without the first, and the peak of memory."""
    size, times = size_at(axis, value), []
    with process_group("auto") as ranks:
        libraries = held_bytes(ranks.device)
        model, loss_of = build("torch", size, ranks, dtype, frozen="replicate")
        optimizer, batch = build_optimizer(model), random_batch(size, 1, ranks.device)
        for _ in range(1 + steps):
            started = time.perf_counter()
            loss = loss_of(*batch)
            loss.backward()
            clip_gradients(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - started)
        peak = held_bytes(ranks.device) - libraries
    return {"step_s": statistics.median(times[1:]), "peak_bytes": peak}


# ---- An axis ------------------------------------------------------------------------------------


def measure(axis: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the points of an axis and their laws."""
    values, found = AXES[axis], dict[int, list[dict[str, float]]]()
    for number in range(args.rounds):
        for value in values:
            print(f"{axis} {value}, round {number + 1} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--worker", axis, str(value)]
            command += ["--steps", str(args.steps), "--dtype", args.dtype]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.setdefault(value, []).append(json.loads(answer))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points: list[dict[str, Any]] = []
    for value in values:
        size = size_at(axis, value)
        point: dict[str, Any] = {axis: value, "operations": count_operations(size)}
        point |= {key: statistics.median(r[key] for r in found[value]) for key in found[value][0]}
        first = points[0] if points else point
        point["ideal_s"] = first["step_s"] * point["operations"] / first["operations"]
        point["plan_bytes"] = plan_bytes(size, getattr(torch, args.dtype), device)
        points.append(point)
    return {"axis": axis, "points": points, "laws": laws(axis, points)}


def simulate() -> dict[str, Any]:
    """Returns what each process of 7B + 8 blocks holds in bf16, by the plan, on 1 to 512 GPUs."""
    size, points = SIZES["7b"], []
    for processes in AXES["processes"]:
        needed = plan_bytes(size, torch.bfloat16, torch.device("cuda"), processes)
        points.append({"processes": processes, "plan_bytes": needed})
    return {"axis": "processes", "points": points, "laws": laws("processes", points)}


def laws(axis: str, points: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the p of y ~ x^p for each figure of the points."""
    x = [math.log(point[axis]) for point in points]
    return {
        key: statistics.linear_regression(x, [math.log(point[key]) for point in points]).slope
        for key in points[0]
        if key != axis
    }


def render(result: dict[str, Any]) -> str:
    """Returns a table for each axis, its last line the laws."""
    tables = []
    for axis in result["axes"]:
        name, points = axis["axis"], axis["points"]
        forms = {"step_s": "{:.3f} s", "ideal_s": "{:.3f} s"}
        forms |= dict.fromkeys(("peak_bytes", "plan_bytes"), "{:.3g}")
        forms = {key: form for key, form in forms.items() if key in points[0]}
        rows = [[p[name], *(form.format(p[key]) for key, form in forms.items())] for p in points]
        rows.append(["law", *(f"x^{axis['laws'][key]:.2f}" for key in forms)])
        tables.append(measuring.table([name, *forms], rows))
    return "\n\n".join(tables)


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what to vary")
    parser.add_argument("--steps", type=int, default=3, help="steps of a point in each round")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each point")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        axis, value = args.worker
        print(json.dumps(work(axis, int(value), args.steps, getattr(torch, args.dtype))))
        return
    if min(args.steps, args.rounds) < 1:
        raise ConfigError("--steps and --rounds: expected 1 or more")
    settings = {"steps": args.steps, "rounds": args.rounds, "dtype": args.dtype, "start": START}
    settings |= SIZES["small"].base
    result: dict[str, Any] = {"machine": measuring.machine(), "settings": settings}
    result["versions"] = measuring.versions("torch")
    result["axes"] = []
    for axis in args.axes:
        result["axes"].append(simulate() if axis == "processes" else measure(axis, args))
        measuring.write(args.out, result)
    print(render(result))


if __name__ == "__main__":
    cli.run(main)
