"""The host's time for a call of each kernel, with the launch itself left out; needs no GPU.

    python benchmarks/host_time.py [--calls 500] [--rounds 9] [--out RESULT.json]

Small CPU tensors go through each public function, and its kernels are replaced by nothing. What is
left is Python's and PyTorch's part of a call: checks, autograd, outputs. It is timed as the
functions are called, and as torch.compile calls them, through PyTorch's dispatcher. Both take
turns; figures are medians over rounds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import measuring
import torch
from torch import Tensor

from llamapro.kernels import attention, attention_backward, rms_norm, rope, swiglu

MODULES = (attention, attention_backward, rms_norm, rope, swiglu)


class _Nothing:
    """Stands in for a kernel: a launch returns at once."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


def calls() -> dict[str, Callable[[], Tensor]]:
    """Returns a call of each function, with inputs whose gradients are asked for."""
    x, weight = torch.randn(1, 8, 64, requires_grad=True), torch.randn(64)
    q, table = torch.randn(1, 8, 4, 64, requires_grad=True), torch.randn(8, 64)
    return {
        "rms_norm": lambda: rms_norm.rms_norm(x, weight, 1e-5),
        "swiglu": lambda: swiglu.swiglu(x, x),
        "rope": lambda: rope.rope(q, table, table),
        "attention": lambda: attention.attention(q, q, q),
    }


def microseconds(call: Callable[[], Any], number: int) -> float:
    started = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - started) / number * 1e6


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--calls", type=int, default=500, help="calls of a round")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    kernels = [(module, name) for module in MODULES for name in vars(module) if "_kernel" in name]
    for module, name in kernels:
        setattr(module, name, _Nothing())
    rows: list[dict[str, Any]] = []
    for name, forward in calls().items():
        gradient = torch.ones_like(forward())
        for case, call in (
            (name, torch.no_grad()(forward)),
            (f"{name} and backward", lambda f=forward, g=gradient: f().backward(g)),
        ):
            times: dict[str, list[float]] = {"direct": [], "dispatcher": []}
            for _ in range(args.rounds):
                times["direct"].append(microseconds(call, args.calls))
                with mock.patch("torch.compiler.is_compiling", lambda: True):
                    times["dispatcher"].append(microseconds(call, args.calls))
            found = {side: statistics.median(values) for side, values in times.items()}
            rows.append({"case": case} | found)
    result = {"machine": measuring.machine(), "versions": measuring.versions("torch", "triton")}
    measuring.write(args.out, result | {"calls": args.calls, "rounds": args.rounds, "rows": rows})
    lines = [
        (r["case"], f"{r['direct']:.0f}", f"{r['dispatcher']:.0f}",
         f"{r['dispatcher'] / r['direct']:.2f}x")
        for r in rows
    ]  # fmt: skip
    print(measuring.table(("call", "direct, us", "dispatcher, us", "ratio"), lines))


if __name__ == "__main__":
    main()
