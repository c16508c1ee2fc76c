"""Times every kernel beside the best other implementations, in one run on one GPU.

    python benchmarks/time_kernels.py [--op attention rms_norm ...] [--lengths 4096] [--out FILE]

Attention (causal, bf16, B 2, D 128) is compared in TFLOP/s with cuDNN's and FlashAttention-2's
through PyTorch's scaled_dot_product_attention, with FlexAttention and, where installed,
FlashAttention-3 and -4. Forward counts
4 B H S^2 D / 2 operations and backward 2.5 times that, however many a kernel really does. The
output projection with cross-entropy is in TFLOP/s of its two matrix products (the embedding is
frozen). Kernels bound by memory are in GB/s of the bytes that must move, and as a share of what a
copy of 1 GiB reaches in the same run. They are compared with plain PyTorch, torch.compile and,
where installed, Liger-Kernel.

All take the same tensors in the same layout, heads after tokens, as in the model. Figures are
medians over replays of a CUDA graph with a cold L2 cache, after warm-up: the time of the kernels,
without that of Python and of launches. What cannot be captured in a graph is timed by events
("timed_by"), and its figure includes Python's time. An implementation that cannot run a case has a
row with the reason. The file of figures is complete after every case. Without a GPU, small shapes
run on the CPU to test this file; those figures mean nothing.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import measuring
import torch
import triton
from kernel_cases import OPS, OURS, Case, Cases, Function

from llamapro import backends

# Raised where a case is not taken: by PyTorch, a missing package, Triton's compiler or launcher, or
# a version of Liger with other names or arguments.
REFUSALS = (RuntimeError, ImportError, AttributeError, TypeError, triton.TritonError)


def seconds(function: Callable[[], object], device: torch.device) -> tuple[float, str]:
    """Returns the median time of a call, and what measured it: "graph", "events" or "clock"."""
    if device.type == "cuda":
        try:
            return graph_seconds(function), "graph"
        except RuntimeError:  # something in it waits for the GPU, or allocates in its own way
            torch.cuda.synchronize()
            milliseconds = triton.testing.do_bench(function, 50, 300, return_mode="median")
            return float(milliseconds) / 1e3, "events"
    function()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times), "clock"


def graph_seconds(function: Callable[[], object], calls: int = 5) -> float:
    """Returns the time of a call's kernels: a graph of flushes and calls, less one of flushes."""
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # more than any L2 cache

    def replayed(*work: Callable[[], object]) -> float:
        for each in work * 2:  # what is compiled or allocated once is not captured
            each()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=stream):
            for each in work * calls:
                each()
        run = triton.testing.do_bench(graph.replay, 25, 200, return_mode="median")
        return float(run) / calls / 1e3

    return replayed(flushed.zero_, function) - replayed(flushed.zero_)


def copy_bandwidth(device: torch.device) -> float:
    """Returns the GB/s of reading and writing when 1 GiB (on a CPU: 1 MiB) is copied."""
    size = 1 << (30 if device.type == "cuda" else 20)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), device)[0] / 1e9


def timed(case: Case, function: Function) -> Callable[[], object]:
    """Returns the timed pass: forward without a graph, backward of one forward, or both."""
    inputs = case.inputs()
    asked = [x for x in inputs if x.requires_grad]
    if case.direction == "forward":

        def run_forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return run_forward
    if case.direction == "both":
        return lambda: torch.autograd.grad(function(*inputs), asked)
    out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs]
    return lambda: torch.autograd.grad(outputs, asked, grads, retain_graph=True)


def measure(case: Case, device: torch.device, copy: float) -> list[dict[str, Any]]:
    """Returns a row per function with its rate or the reason why it has none; ours with a ratio."""
    rows = []
    for name, get in case.functions.items():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "direction": case.direction}
        row |= {"by": name, "unit": case.unit}
        try:
            row["seconds"], row["timed_by"] = seconds(timed(case, get()), device)
        except REFUSALS as error:
            row["refused"] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        else:
            scale = 1e12 if case.unit == "TFLOP/s" else 1e9
            row["rate"] = case.work / row["seconds"] / scale
            if case.unit == "GB/s":
                row["share_of_copy"] = row["rate"] / copy
        rows.append(row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    best = max((r["rate"] for r in rows if "rate" in r and OURS not in r["by"]), default=None)
    for row in rows:
        if OURS in row["by"] and "rate" in row and best is not None:
            row["ours_to_best_other"] = row["rate"] / best
    return rows


def line(row: dict[str, Any]) -> str:
    """Returns a row for people."""
    text = f"{row['op']:<21}{row['shape']:<38}{row['direction']:<9}{row['by']:<28}"
    if "refused" in row:
        return f"{text}-- {row['refused']}"
    text += f"{row['seconds'] * 1e3:9.3f} ms {row['rate']:9.1f} {row['unit']:<8}"
    if "share_of_copy" in row:
        text += f"{row['share_of_copy']:7.0%} of copy"
    if "ours_to_best_other" in row:
        text += f"   {row['ours_to_best_other']:.2f} x best other"
    return text


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS), help="ops to time")
    parser.add_argument("--lengths", type=int, nargs="+", help="lengths of attention; default all")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # a graph captures on a stream that is not the default one
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.manual_seed(0)
    copy = copy_bandwidth(device)
    result: dict[str, Any] = {"machine": measuring.machine(), "copy_gb_per_s": copy}
    result["versions"] = measuring.versions("torch", "triton")
    print(f"{result['machine']['gpu'] or 'CPU'}, copy {copy:.0f} GB/s")
    result["rows"] = []
    cases = Cases(device, args.lengths)
    with backends.use("cpu"):  # the others' plain PyTorch; ours are called directly
        for case in itertools.chain.from_iterable(OPS[op](cases) for op in args.op):
            for row in measure(case, device, copy):
                print(line(row), flush=True)
                result["rows"].append(row)
            measuring.write(args.out, result | {"machine_after": measuring.machine()})


if __name__ == "__main__":
    main()
