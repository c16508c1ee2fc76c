"""Every kernel beside the best of the others, in one run on one GPU.

    python benchmarks/time_kernels.py [--op attention rms_norm ...] [--out RESULT.json]

Attention is given in TFLOP/s and beside cuDNN's and FlashAttention-2's (both through PyTorch's
scaled_dot_product_attention) and FlexAttention: causal, bf16, B 2, D 128; forward counts
4 B H S^2 D / 2 operations, backward 2.5 times that, however many a kernel really does. The output
projection with cross-entropy is in TFLOP/s too, of its two matrix products (the embedding is
frozen). What is bound by memory is in GB/s of the bytes that must move, and as a share of what a
copy of 1 GiB reaches in the same run; beside plain PyTorch, torch.compile and, where installed,
Liger-Kernel.

All take the same tensors in the same layout, heads after tokens, as in the model. Figures are
medians of CUDA events over runs with a cold L2 cache, after warm-up. What cannot run a case is a
row with the reason. Without a GPU, small shapes are run on the CPU, to test this file: those
figures mean nothing.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llamapro import ops
from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu

OURS = "llamapro"
EPS = 1e-5
# What one raises that does not take a case: PyTorch, a missing package, Triton's compiler or
# launcher, a version of Liger with other names or arguments.
REFUSALS = (RuntimeError, ImportError, AttributeError, TypeError, triton.TritonError)
Function = Callable[..., Any]


class Case(NamedTuple):
    """One op, shape and direction, and all that can compute it.

    Attributes:
        shape: for people.
        direction: forward, backward, or both.
        work: floating-point operations or bytes of one call.
        unit: TFLOP/s or GB/s.
        inputs: makes the tensors; gradients are computed of those that require them.
        functions: name -> what returns the function, or raises one of `REFUSALS`.
    """

    op: str
    shape: str
    direction: str
    work: float
    unit: str
    inputs: Callable[[], list[Tensor]]
    functions: dict[str, Callable[[], Function]]


class Cases:
    """The cases for one device: sizes of real models in bf16 on a GPU, tiny in fp32 on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32

    def _random(self, *shapes: tuple[int, ...], frozen: int = 0) -> list[Tensor]:
        """One tensor per shape; the last `frozen` of them ask for no gradient."""
        made = [torch.randn(shape, device=self.device, dtype=self.dtype) for shape in shapes]
        for x in made[: len(made) - frozen]:
            x.requires_grad_()
        return made

    def _ours(self, module: Any, size: int, function: Function) -> Function:
        if reason := module.unsupported(self.device, self.dtype, size):
            raise RuntimeError(reason)
        return function

    def _on_gpu(self, get: Callable[[], Function]) -> Function:
        if not self.is_gpu:
            raise RuntimeError("measured on a GPU only")
        return get()

    def _functions(
        self, module: Any, size: int, ours: Function, plain: Function, liger: Function
    ) -> dict[str, Callable[[], Function]]:
        """liger: takes the module of Liger's functions and returns the one to call."""
        return {
            OURS: lambda: self._ours(module, size, ours),
            "torch": lambda: plain,
            "torch.compile": lambda: self._on_gpu(lambda: compiled(plain)),
            "liger": lambda: self._on_gpu(
                lambda: liger(import_module("liger_kernel.transformers.functional"))
            ),
        }

    def attention(self) -> Iterator[Case]:
        shapes = [(64, 8), (32, 8), (32, 32)] if self.is_gpu else [(4, 2)]
        lengths = [2048, 4096, 8192, 16384] if self.is_gpu else [64]
        B, D = (2, 128) if self.is_gpu else (1, 32)
        for (H, KV), S in ((shape, S) for shape in shapes for S in lengths):
            ours = partial(self._ours, attention, D)
            functions: dict[str, Callable[[], Function]] = {
                OURS: partial(ours, attention.attention),
                "cudnn": partial(self._on_gpu, partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
                "flash": partial(self._on_gpu, partial(sdpa, SDPBackend.FLASH_ATTENTION)),
                "flex": partial(self._on_gpu, partial(flex, S, self.device)),
            }
            if not self.is_gpu:
                functions["torch"] = partial(sdpa, SDPBackend.MATH)
            sizes = [(B, S, heads, D) for heads in (H, KV, KV)]
            case = Case(
                "attention",
                f"B={B} S={S} H={H} KV={KV} D={D}",
                "forward",
                4 * B * H * S**2 * D / 2,
                "TFLOP/s",
                partial(self._random, *sizes, frozen=3),
                functions,
            )
            yield case
            fast = partial(attention.attention, deterministic=False)
            yield case._replace(
                direction="backward",
                work=2.5 * case.work,
                inputs=partial(self._random, *sizes),
                functions=functions | {f"{OURS}, not deterministic": partial(ours, fast)},
            )

    def rms_norm(self) -> Iterator[Case]:
        sizes = [(8192, 4096), (8192, 8192)] if self.is_gpu else [(64, 128)]
        for (N, C), frozen in ((size, frozen) for size in sizes for frozen in (0, 1)):
            shape = f"N={N} C={C} weight {'frozen' if frozen else 'trained'}"
            moved = N * C * self.dtype.itemsize
            functions = self._functions(
                rms_norm,
                C,
                lambda x, w: rms_norm.rms_norm(x, w, EPS),
                lambda x, w: ops.rms_norm(x, w, EPS),
                lambda liger: lambda x, w: liger.liger_rms_norm(x, w, EPS),
            )
            inputs = partial(self._random, (N, C), (C,), frozen=frozen)
            case = Case("rms_norm", shape, "forward", 2 * moved, "GB/s", inputs, functions)
            yield from (case, case._replace(direction="backward", work=3 * moved))
            functions = self._functions(
                rms_norm,
                C,
                lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
                lambda x, r, w: ops.add_rms_norm(x, r, w, EPS),
                lambda liger: lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, EPS),
            )
            inputs = partial(self._random, (N, C), (N, C), (C,), frozen=frozen)
            case = Case("add_rms_norm", shape, "forward", 4 * moved, "GB/s", inputs, functions)
            yield from (case, case._replace(direction="backward"))

    def rope(self) -> Iterator[Case]:
        B, T, D = (2, 4096, 128) if self.is_gpu else (1, 32, 16)
        cos, sin = ops.rope_table(torch.arange(T, device=self.device), D, 10000.0, self.dtype)
        functions = self._functions(
            rope,
            D,
            lambda q, k: rope.rope(q, k, cos, sin),
            lambda q, k: ops.rope(q, k, cos, sin),
            lambda liger: (
                lambda q, k: liger.liger_rope(
                    q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None]
                )
            ),
        )
        for H, KV in ((32, 32), (32, 8)) if self.is_gpu else ((4, 2),):
            moved = 2 * B * T * (H + KV) * D * self.dtype.itemsize
            inputs = partial(self._random, (B, T, H, D), (B, T, KV, D))
            shape = f"B={B} T={T} H={H} KV={KV} D={D}"
            case = Case("rope", shape, "forward", moved, "GB/s", inputs, functions)
            yield from (case, case._replace(direction="backward"))

    def swiglu(self) -> Iterator[Case]:
        for N, size in ((8192, 11008), (8192, 14336)) if self.is_gpu else ((64, 96),):
            moved = N * size * self.dtype.itemsize
            functions = self._functions(
                swiglu, size, swiglu.swiglu, ops.swiglu, lambda liger: liger.liger_swiglu
            )
            inputs = partial(self._random, (N, size), (N, size))
            shape = f"N={N} F={size}"
            case = Case("swiglu", shape, "forward", 3 * moved, "GB/s", inputs, functions)
            yield from (case, case._replace(direction="backward", work=5 * moved))

    def linear_cross_entropy(self) -> Iterator[Case]:
        def inputs(N: int, C: int, V: int) -> list[Tensor]:
            targets = torch.randint(V, (N,), device=self.device)
            return [*self._random((N, C), (V, C), frozen=1), targets]

        def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

        sizes = [(8192, 4096, 32000), (8192, 4096, 128256)] if self.is_gpu else [(64, 32, 96)]
        for N, C, V in sizes:
            functions = self._functions(
                cross_entropy,
                V,
                lambda *inputs: cross_entropy.linear_cross_entropy(*inputs)[0],
                plain,
                lambda liger: partial(liger.liger_fused_linear_cross_entropy, reduction="sum"),
            )
            yield Case(
                "linear_cross_entropy",
                f"N={N} C={C} V={V} weight frozen",
                "both",
                4 * N * C * V,
                "TFLOP/s",
                partial(inputs, N, C, V),
                functions,
            )


OPS: dict[str, Callable[[Cases], Iterator[Case]]] = {
    "attention": Cases.attention,
    "rms_norm": Cases.rms_norm,
    "rope": Cases.rope,
    "swiglu": Cases.swiglu,
    "linear_cross_entropy": Cases.linear_cross_entropy,
}


# ---- The others ---------------------------------------------------------------------------------


def _heads_first(function: Callable[..., Tensor]) -> Function:
    """For those who want (B, H, T, D): the same memory, seen that way."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attend


def sdpa(backend: SDPBackend) -> Function:
    """PyTorch's attention with one backend and no other to fall back on."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            is_grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)

    return _heads_first(attend)


def flex(S: int, device: torch.device) -> Function:
    """FlexAttention, compiled, with the blocks beyond the diagonal left out."""

    def is_causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(is_causal, None, None, S, S, device=device)
    attend = compiled(flex_attention)
    return _heads_first(lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True))


def compiled(function: Function) -> Function:
    """torch.compile for one shape, as if it were the first."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


# ---- Measuring ----------------------------------------------------------------------------------


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of a call."""
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
    """GB/s of reading and writing when 1 GiB (on a CPU: 1 MiB) is copied."""
    size = 1 << (30 if device.type == "cuda" else 20)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), device) / 1e9


def timed(case: Case, function: Function) -> Callable[[], object]:
    """What is timed: forward without a graph, backward of one forward, or both."""
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
    """A row per function: its rate, or why there is none; ours also beside the best other."""
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
    """A row for people."""
    text = f"{row['op']:<21}{row['shape']:<38}{row['direction']:<9}{row['by']:<28}"
    if "refused" in row:
        return f"{text}-- {row['refused']}"
    text += f"{row['seconds'] * 1e3:9.3f} ms {row['rate']:9.1f} {row['unit']:<8}"
    if "share_of_copy" in row:
        text += f"{row['share_of_copy']:7.0%} of copy"
    if "ours_to_best_other" in row:
        text += f"   {row['ours_to_best_other']:.2f} x best other"
    return text


def machine(device: torch.device) -> dict[str, Any]:
    """Names, versions and, on a GPU, its clocks and limits."""
    found: dict[str, Any] = {
        "machine": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": None,
    }
    if device.type == "cuda":
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            values = done.stdout.splitlines()[0].split(", ")
            found["nvidia_smi"] = dict(zip(fields.split(","), values, strict=True))
        except (OSError, subprocess.CalledProcessError) as error:
            found["nvidia_smi"] = f"not available: {error}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    copy = copy_bandwidth(device)
    before = machine(device)
    print(f"{before['gpu'] or 'CPU'}, copy {copy:.0f} GB/s")
    rows = []
    with ops.use("torch"):  # the others' plain PyTorch; ours are called directly
        for op in args.op:
            for case in OPS[op](Cases(device)):
                for row in measure(case, device, copy):
                    print(line(row), flush=True)
                    rows.append(row)
    if args.out:
        result = {"machine": before, "machine_after": machine(device), "copy_gb_per_s": copy}
        args.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
