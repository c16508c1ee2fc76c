"""A training step on the CPU, in two processes, beside transformers: speed, memory, start-up.

    python benchmarks/train_cpu.py [--size small] [--dtypes float32 bfloat16]
                                   [--sides ours ddp fsdp2] [--batch-size 2] [--steps 10]
                                   [--warmup 2] [--rounds 3] [--threads 1] [--out RESULT.json]

The sides are this implementation (`ours`, with `train.frozen replicate`: frozen weights are whole
in every process, as under DDP), and `transformers`' LlamaForCausalLM under DDP (`ddp`) and under
FSDP2 with all of it sharded (`fsdp2`). All get the same random weights and the same batches, and
train the same new blocks: frozen weights stored in the dtype, fp32 masters, clipping, fused AdamW.
DDP computes with them under autocast. Their losses show that they compute the same.

In each round, every side starts fresh processes, and then all of them take steps in turn. One side
computes while the others wait, so whatever else the machine does slows all alike, and the ratios
hold where the seconds do not. A step lasts as long as in its slowest process. Start-up is from
starting the processes to the end of their first step. Memory is the largest resident size of a
process. It includes the libraries, which do not grow with the model: `libraries` is the size once
everything is imported and nothing is built.
"""

import argparse
import importlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import measuring
import torch
from torch import Tensor, nn
from train_step import (
    CLIP,
    SIZES,
    LossOf,
    Size,
    build,
    build_model,
    build_optimizer,
    describe,
    random_batch,
)

from llamapro import cli
from llamapro.errors import ConfigError
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.optim import clip_gradients

SIDES = ("ours", "ddp", "fsdp2")
DTYPES = ("float32", "bfloat16")
PROCESSES = 2
TARGETS = {"speed": 1.2, "memory": 0.7}  # ours over theirs: at least, at most
COUNTS = {
    "batch_size": (2, "sequences per step and process"),
    "steps": (10, "steps that are measured in a round"),
    "warmup": (2, "steps before them that are not"),
    "rounds": (3, "times that fresh processes are started"),
    "threads": (1, "threads of each process"),
}


# ---- In the processes that compute -------------------------------------------------------------


def build_ddp(size: Size, dtype: torch.dtype) -> tuple[nn.Module, LossOf]:
    """Returns transformers' model under DDP, frozen as ours, and its mean loss."""
    inner = build_model("transformers", size, torch.device("cpu"), dtype, masters=True)
    model = nn.parallel.DistributedDataParallel(inner)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            # shift_labels: what should follow each token, as our targets.
            return model(
                input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False
            ).loss

    return model, loss_of


def build_side(side: str, size: Size, ranks: Ranks, dtype: torch.dtype) -> tuple[nn.Module, LossOf]:
    """Returns a side's model, and its mean loss over a batch of this process."""
    if side == "ddp":
        return build_ddp(size, dtype)
    if side == "ours":  # frozen weights whole in every process, as under DDP
        return build("torch", size, ranks, dtype, frozen="replicate")
    return build("transformers", size, ranks, dtype)


def resident_mb() -> float:
    """Returns the largest resident size so far of this process, in units of 10^6 bytes."""
    # A child starts with its parent's: the parent imports no more than this has imported by now.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def work(side: str, args: argparse.Namespace) -> None:
    """Takes a step for each line of standard input and answers with its figures."""
    if side != "ours":
        importlib.import_module("transformers.models.llama.modeling_llama")
    libraries_mb = resident_mb()
    size = SIZES[args.size]
    with process_group("cpu") as ranks:
        model, loss_of = build_side(side, size, ranks, getattr(torch, args.dtypes[0]))
        optimizer = build_optimizer(model)
        inputs, targets = random_batch(size, args.batch_size, ranks.device, ranks.rank)
        for _ in sys.stdin:
            started = time.perf_counter()
            loss = loss_of(inputs, targets)
            loss.backward()
            clip_gradients(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            answer = {"step_s": time.perf_counter() - started, "loss": loss.item()}
            answer |= {"peak_mb": resident_mb(), "libraries_mb": libraries_mb}
            del loss  # it would hold the graph of this step while the next is computed
            print(json.dumps(answer), flush=True)


# ---- In the process that measures --------------------------------------------------------------


class Group:
    """The processes of one side, which take a step when they are told to."""

    def __init__(self, side: str, dtype: str, args: argparse.Namespace):
        self.started = time.perf_counter()
        self.name = f"{side} in {dtype}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--worker", side, "--dtypes", dtype, "--size", args.size]
        words += ["--batch-size", str(args.batch_size)]
        common = {"WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"OMP_NUM_THREADS": args.threads}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | {key: str(value) for key, value in common.items()}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(PROCESSES)
        ]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the processes, and waits for them."""
        for process in self.processes:
            process.kill()
            process.communicate()

    def step(self) -> dict[str, float]:
        """Takes one step.

        Returns:
            step_s, loss (the mean over the processes), peak_mb and libraries_mb.

        Raises:
            RuntimeError: a process has ended.
        """
        for process in self.processes:
            assert process.stdin is not None
            try:
                print("step", file=process.stdin, flush=True)
            except BrokenPipeError:
                raise RuntimeError(f"{self.name}: a process ended; see its message") from None
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{self.name}: a process ended; see its message")
            answers.append(json.loads(line))
        slowest = {key: max(answer[key] for answer in answers) for key in answers[0]}
        return slowest | {"loss": statistics.mean(answer["loss"] for answer in answers)}


def measure(dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all rounds of one dtype; returns a row for each side, the ratios of ours in it."""
    start_s: dict[str, list[float]] = {side: [] for side in args.sides}
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    losses: dict[str, list[float]] = {}
    for number in range(args.rounds):
        print(f"{dtype}: round {number + 1} of {args.rounds} ...", file=sys.stderr, flush=True)
        order = args.sides[:: -1 if number % 2 else 1]
        with ExitStack() as stack:
            groups = {}
            for side in order:
                groups[side] = stack.enter_context(Group(side, dtype, args))
                losses[side] = [groups[side].step()["loss"]]
                start_s[side].append(time.perf_counter() - groups[side].started)
            for step in range(1, args.warmup + args.steps):
                for side in order:
                    answer = groups[side].step()
                    losses[side].append(answer["loss"])
                    if step >= args.warmup:
                        steps[side].append(answer)
    tokens = PROCESSES * args.batch_size * SIZES[args.size].seq_len
    rows: list[dict[str, Any]] = []
    for side in args.sides:
        step_s = statistics.median(step["step_s"] for step in steps[side])
        row: dict[str, Any] = {"side": side, "dtype": dtype}
        row |= {"tokens_per_s": tokens / step_s, "step_s": step_s}
        row |= {key: max(s[key] for s in steps[side]) for key in ("peak_mb", "libraries_mb")}
        row |= {"start_s": statistics.median(start_s[side])}
        row |= {"first_loss": losses[side][0], "last_loss": losses[side][-1]}
        rows.append(row)
    if "ours" in args.sides:
        ours = rows[args.sides.index("ours")]
        for row in rows:
            if row is not ours:
                # Of two steps taken one after the other, so that the load of the moment cancels.
                pairs = zip(steps["ours"], steps[row["side"]], strict=True)
                row["ours"] = {
                    "speed": statistics.median(
                        theirs["step_s"] / s["step_s"] for s, theirs in pairs
                    ),
                    "memory": ours["peak_mb"] / row["peak_mb"],
                    "start": ours["start_s"] / row["start_s"],
                }
    return rows


def render(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    s, machine = result["settings"], result["machine"]
    heads = "side,dtype,tokens/s,step s,peak MB,libraries,start s,last loss,ours: speed,memory"
    rows = []
    for row in result["rows"]:
        figures = [f"{row['tokens_per_s']:,.0f}", f"{row['step_s']:.3f}", f"{row['peak_mb']:.0f}"]
        figures += [f"{row['libraries_mb']:.0f}", f"{row['start_s']:.2f}"]
        ratios = [f"{ratio:.2f}x" for ratio in row.get("ours", {}).values()]
        rows.append([row["side"], row["dtype"], *figures, f"{row['last_loss']:.4f}", *ratios])
    speed, memory = TARGETS["speed"], TARGETS["memory"]
    return (
        f"{s['size']}, {s['num_hidden_layers']} blocks + {s['new_blocks']} new, {PROCESSES} "
        f"processes x {s['batch_size']} x {s['seq_len']} tokens a step, {s['threads']} thread(s) "
        f"each on {machine['cores']} cores with a load of {machine['load_average']:.1f}\n"
        f"{measuring.table([*heads.split(','), 'start-up'], rows)}\n"
        f"target: speed at least {speed}x, memory at most {memory}x of ddp"
    )


def main() -> None:
    parser = measuring.parser(__doc__)
    sizes = ("tiny", "small", "smollm")
    parser.add_argument("--size", choices=sizes, default="small", help="size of the model")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="sides")
    for name, (default, text) in COUNTS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=text)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args)
    wrong = [f"--{k.replace('_', '-')} {vars(args)[k]}" for k in COUNTS if vars(args)[k] < 1]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: expected 1 or more")
    if set(args.sides) != {"ours"} and find_spec("transformers") is None:
        raise ConfigError(
            "the sides 'ddp' and 'fsdp2' need transformers: pip install -e '.[hf]', or leave "
            "them out with --sides ours"
        )
    result = describe(args, *COUNTS) | {"targets": TARGETS}
    result["settings"]["processes"] = PROCESSES
    result["rows"] = [row for dtype in args.dtypes for row in measure(dtype, args)]
    result["machine"]["load_average_after"] = os.getloadavg()[0]
    measuring.write(args.out, result)
    print(render(result))


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
