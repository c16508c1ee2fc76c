"""The cases of time_kernels.py: each op at sizes of real models, and what computes it."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llamapro import ops
from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu

OURS = "llamapro"
EPS = 1e-5
Function = Callable[..., Any]


class Case(NamedTuple):
    """One op, shape and direction, and everything that computes it.

    Attributes:
        work: floating-point operations or bytes of one call.
        inputs: makes the tensors; gradients are computed of those that require them.
        functions: name -> returns the function, or raises the reason why it cannot run.
    """

    op: str
    shape: str
    direction: str
    work: float
    unit: str
    inputs: Callable[[], list[Tensor]]
    functions: dict[str, Callable[[], Function]]


class Cases:
    """The cases for one device: sizes of real models in bf16 on a GPU, tiny in fp32 on a CPU.

    `lengths` are those of attention.
    """

    def __init__(self, device: torch.device, lengths: list[int] | None = None):
        self.device = device
        self.lengths = lengths or ([2048, 4096, 8192, 16384] if device.type == "cuda" else [64])
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
        B, D = (2, 128) if self.is_gpu else (1, 32)
        for (H, KV), S in ((shape, S) for shape in shapes for S in self.lengths):
            functions: dict[str, Callable[[], Function]] = {
                OURS: partial(self._ours, attention, D, attention.attention),
                "cudnn": partial(self._on_gpu, partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
                "flash": partial(self._on_gpu, partial(sdpa, SDPBackend.FLASH_ATTENTION)),
                "cudnn, keys repeated": partial(self._on_gpu, cudnn_repeated),
                "flex": partial(self._on_gpu, partial(flex, S, self.device)),
                "flash 3": partial(self._on_gpu, partial(flash, "flash_attn_interface")),
                "flash 4": partial(self._on_gpu, partial(flash, "flash_attn.cute")),
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
            yield case._replace(
                direction="backward", work=2.5 * case.work, inputs=partial(self._random, *sizes)
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
        cos, sin = ops.rope_table(
            torch.arange(T, device=self.device),
            ops.rope_frequencies(D, 10000.0, device=self.device),
            self.dtype,
        )
        functions = self._functions(
            rope,
            D,
            lambda q, k: (rope.rope(q, cos, sin), rope.rope(k, cos, sin)),
            lambda q, k: (ops.rope(q, cos, sin), ops.rope(k, cos, sin)),
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
    """Calls a function that takes (B, H, T, D), without a copy."""

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


def cudnn_repeated() -> Function:
    """cuDNN's attention with keys and values repeated per head, for versions without groups."""
    attend = sdpa(SDPBackend.CUDNN_ATTENTION)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        return attend(q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))

    return repeated


def flex(S: int, device: torch.device) -> Function:
    """FlexAttention, compiled, with the blocks beyond the diagonal left out."""

    def is_causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(is_causal, None, None, S, S, device=device)
    attend = compiled(flex_attention)
    return _heads_first(lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True))


def flash(package: str) -> Function:
    """FlashAttention-3 or -4, from the package of its name; versions differ in what they return."""
    attend = import_module(package).flash_attn_func

    def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return first


def compiled(function: Function) -> Function:
    """torch.compile for one shape, as if it were the first."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
