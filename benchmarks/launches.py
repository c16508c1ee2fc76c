"""Records what the kernels' public functions launch, on CPU tensors, without computing.

A stand-in for Triton's driver says which GPU there is, and a hook takes each launch with the
specialisation that Triton itself derived from the arguments. compile_kernels.py compiles the
launches of `cases`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu, tiles
from llamapro.kernels import device as kernel_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- Recording ----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One launch as Triton specialised it, and the numbers it was made with.

    Attributes:
        case: what was called, for people.
        signature, constants, attributes: as `ASTSource` takes them.
        grid: programs along each axis.
        numbers: integer arguments by their name in the IR, a descriptor's shape and strides too.
    """

    case: str
    kernel: Any
    architecture: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    numbers: dict[str, int]

    def code(self) -> str:
        """The key of the compiled code: equal for launches that share it."""
        kernel = f"{self.kernel.__module__}.{self.kernel.__name__}"
        return repr((kernel, *self[2:8]))


class _Driver:
    """Stands in for Triton's CUDA driver: knows the target, has no device."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # the key under which Triton keeps what it derives of a target

    def get_current_stream(self, device: int) -> int:
        return 0


def _numbers(arguments: dict[str, Any]) -> dict[str, int]:
    found = {}
    for name, value in arguments.items():
        if isinstance(value, int):
            found[name] = int(value)
        elif isinstance(value, TensorDescriptor):
            found |= {f"{name}.shape.{i}": n for i, n in enumerate(value.shape)}
            found |= {f"{name}.stride.{i}": n for i, n in enumerate(value.strides)}
    return found


@contextmanager
def recording(architecture: int, case: str) -> Iterator[list[Launch]]:
    """Notes every launch made inside, for that architecture, instead of compiling and running it.

    Tensors that kernels would have written keep whatever was in their memory.
    """
    launches: list[Launch] = []
    run = JITFunction.run
    tiled = 90 if architecture == 90 else 80  # as `device.architecture` says
    made: tuple[tuple[int, int, int], dict[str, int]]

    def run_recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        nonlocal made
        named = {k: v for k, v in kwargs.items() if k in self.signature.parameters}
        bound = self.signature.bind(*args, **named)
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        x, y, z = (*sizes, 1, 1)[:3]
        made = (x, y, z), _numbers(bound.arguments)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(
            Launch(
                case,
                fn.jit_function,
                architecture,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                compile["num_warps"],
                compile["num_stages"],
                *made,
            )
        )
        return True  # neither compile nor launch

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(architecture)),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", take),
        mock.patch.object(JITFunction, "run", run_recorded),
        mock.patch.object(kernel_device, "architecture", lambda device: tiled),
    ):
        yield launches


# ---- What is called -----------------------------------------------------------------------------


class Case(NamedTuple):
    """A public function and what it is called with; its name says the same, for people.

    Attributes:
        name: words, the op and the dtype first.
        call: runs forward, and backward where the case has one.
        is_quick: is part of the short list.
    """

    name: str
    call: Callable[[], object]
    is_quick: bool = False


def _run(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs forward, and backward for the arguments that require gradients."""
    out = function(*arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    asked = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    if asked:
        torch.autograd.grad(outputs, asked, [torch.empty_like(y) for y in outputs])


def attention_case(
    dtype: str, D: int, *words: str, shape: tuple[int, int, int, int] = (2, 2048, 32, 8)
) -> Case:
    """shape: (B, S, H, KV). words: bounds, unaligned, decode (one query, forward only)."""

    def call() -> None:
        B, S, H, KV = shape
        T = 1 if "decode" in words else S
        width = D + 1 if "unaligned" in words else D
        q, k, v = (
            torch.empty(B, length, heads, width, dtype=DTYPES[dtype])[..., :D].requires_grad_(T > 1)
            for length, heads in ((T, H), (S, KV), (S, KV))
        )
        bounds = None
        if "bounds" in words:
            bounds = tuple(torch.empty(1, length, dtype=torch.int32) for length in (T, S))
        _run(attention.attention, q, k, v, bounds)

    name = " ".join(("attention", dtype, f"D={D}", *words))
    return Case(name, call, dtype == "bf16" and D == 128 and not words)


def rms_norm_case(dtype: str, C: int, *words: str, rows: int = 4096) -> Case:
    """words: add, frozen."""

    def call() -> None:
        x, residual = (torch.empty(rows, C, dtype=DTYPES[dtype]).requires_grad_() for _ in range(2))
        weight = torch.empty(C, dtype=DTYPES[dtype], requires_grad="frozen" not in words)
        if "add" in words:
            _run(rms_norm.add_rms_norm, x, residual, weight, 1e-5)
        else:
            _run(rms_norm.rms_norm, x, weight, 1e-5)

    return Case(
        " ".join(("rms_norm", dtype, f"C={C}", *words)), call, C == 4096 and dtype == "bf16"
    )


def rope_case(
    dtype: str, D: int, *words: str, shape: tuple[int, int, int, int] = (2, 2048, 32, 8)
) -> Case:
    """shape: (B, T, H, KV). words: batched (a table per batch)."""

    def call() -> None:
        B, T, H, KV = shape
        both = tuple(torch.empty(B, T, n, D, dtype=DTYPES[dtype]) for n in (H, KV))
        table = (B, T, D) if "batched" in words else (T, D)
        cos, sin = (torch.empty(table, dtype=DTYPES[dtype]) for _ in range(2))
        for x in both:  # queries, then keys
            _run(rope.rope, x.requires_grad_(), cos, sin)

    return Case(" ".join(("rope", dtype, f"D={D}", *words)), call, D == 128 and dtype == "bf16")


def swiglu_case(dtype: str, F: int, *words: str, rows: int = 4096) -> Case:
    def call() -> None:
        gate, up = (torch.empty(rows, F, dtype=DTYPES[dtype]) for _ in range(2))
        _run(swiglu.swiglu, gate.requires_grad_(), up.requires_grad_())

    return Case(" ".join(("swiglu", dtype, f"F={F}", *words)), call, dtype == "bf16")


def cross_entropy_case(dtype: str, V: int, *words: str) -> Case:
    """words: no_grad. Matrix products are computed, so they are small."""

    def call() -> None:
        x = torch.zeros(64, 16, dtype=DTYPES[dtype], requires_grad="no_grad" not in words)
        weight = torch.zeros(V, 16, dtype=DTYPES[dtype])
        loss, _ = cross_entropy.linear_cross_entropy(x, weight, torch.zeros(64, dtype=torch.int64))
        if x.requires_grad:
            loss.backward()

    name = " ".join(("linear_cross_entropy", dtype, f"V={V}", *words))
    return Case(name, call, V == 32000 and dtype == "bf16")


def cases() -> list[Case]:
    """Every public function, in the sizes and dtypes that its kernels are made for."""
    found = []
    plain_and_bounded: tuple[tuple[str, ...], ...] = ((), ("bounds",))
    sizes = [("bf16", D) for D in (64, 80, 96, 128, 256)]
    sizes += [("fp16", 128)] + [("fp32", D) for D in (64, 128, 256)]
    for words in plain_and_bounded:
        found += [attention_case(dtype, D, *words) for dtype, D in sizes]
        found += [attention_case("bf16", 128, "MHA", *words, shape=(2, 2048, 32, 32))]
        found += [attention_case("bf16", D, *words) for D in (8, 32)]
        found += [attention_case("bf16", 128, "decode", *words)]
    found += [attention_case(dtype, 128, "unaligned") for dtype in ("bf16", "fp32")]
    sizes = [("bf16", C) for C in (4096, 5120, 8192, 16384)]
    sizes += [("fp16", 4096), ("fp32", 4096), ("fp32", 16384)]
    for dtype, C in sizes:
        for words in ((), ("frozen",), ("add",), ("add", "frozen")):
            found += [rms_norm_case(dtype, C, *words)]
    for dtype in DTYPES:
        for words in ((), ("batched",)):
            found += [rope_case(dtype, D, *words) for D in (64, 128)]
        found += [swiglu_case(dtype, 11008), swiglu_case(dtype, 14336)]
        for V in (32000, 128256):
            found += [cross_entropy_case(dtype, V), cross_entropy_case(dtype, V, "no_grad")]
    # More than 2^31 elements in each tensor.
    many, rows = (5, 1 << 17, 32, 32), (1 << 18) + 1024
    for words in plain_and_bounded:
        found += [attention_case("bf16", 128, "large", *words, shape=many)]
    found += [rms_norm_case("bf16", 8192, "large", *words, rows=rows) for words in ((), ("add",))]
    found += [swiglu_case("bf16", 8192, "large", rows=rows)]
    found += [rope_case("bf16", 128, "large", shape=many)]
    return found


class _Noting(dict[Any, Any]):
    """A dict that knows which of its keys were looked up."""

    def __init__(self, items: dict[Any, Any]):
        super().__init__(items)
        self.taken: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.taken.add(key)
        return super().__getitem__(key)


def record(
    chosen: list[Case], architectures: Sequence[int] = (80, 90)
) -> tuple[list[Launch], set[tuple[str, int, int, int]]]:
    """Calls the cases for each architecture; returns their launches and the tiles they took."""
    launches = []
    table = _Noting(tiles.TILES)
    with mock.patch.object(tiles, "TILES", table):
        for architecture in architectures:
            for case in chosen:
                with recording(architecture, case.name) as found:
                    case.call()
                assert found, f"{case.name} launched nothing"
                launches += found
    return launches, table.taken
