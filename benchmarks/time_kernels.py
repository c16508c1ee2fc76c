"""Times every kernel beside the best other implementations, in one run on one GPU.

    python benchmarks/time_kernels.py [--op attention rms_norm ...] [--out RESULT.json]

Attention (causal, bf16, B 2, D 128) is compared in TFLOP/s with cuDNN's and FlashAttention-2's
through PyTorch's scaled_dot_product_attention, and with FlexAttention. Forward counts
4 B H S^2 D / 2 operations and backward 2.5 times that, however many a kernel really does. The
output projection with cross-entropy is in TFLOP/s of its two matrix products (the embedding is
frozen). Kernels bound by memory are in GB/s of the bytes that must move, and as a share of what a
copy of 1 GiB reaches in the same run. They are compared with plain PyTorch, torch.compile and,
where installed, Liger-Kernel.

All take the same tensors in the same layout, heads after tokens, as in the model. Figures are
medians of CUDA events over runs with a cold L2 cache, after warm-up. An implementation that cannot
run a case has a row with the reason. Without a GPU, small shapes run on the CPU to test this file;
those figures mean nothing.
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


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of a call."""
    if device.type == "cuda":
        milliseconds = triton.testing.do_bench(function, 50, 300, return_mode="median")
        return float(milliseconds) / 1e3
    function()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Returns the GB/s of reading and writing when 1 GiB (on a CPU: 1 MiB) is copied."""
    size = 1 << (30 if device.type == "cuda" else 20)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), device) / 1e9


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
            row["seconds"] = seconds(timed(case, get()), device)
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
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    copy = copy_bandwidth(device)
    result: dict[str, Any] = {"machine": measuring.machine(), "copy_gb_per_s": copy}
    result["versions"] = measuring.versions("torch", "triton")
    print(f"{result['machine']['gpu'] or 'CPU'}, copy {copy:.0f} GB/s")
    result["rows"] = []
    with backends.use("cpu"):  # the others' plain PyTorch; ours are called directly
        for case in itertools.chain.from_iterable(OPS[op](Cases(device)) for op in args.op):
            for row in measure(case, device, copy):
                print(line(row), flush=True)
                result["rows"].append(row)
    measuring.write(args.out, result | {"machine_after": measuring.machine()})


if __name__ == "__main__":
    main()
