"""Frozen blocks in 8 bits, for training: `train.frozen_dtype`.

Only the matrices of attention and MLP of frozen blocks are rounded. Embeddings, head, norms and new
blocks are not. No gradient of a frozen matrix is ever needed, so a block needs y = x W^T forward
and dL/dx = g W backward, where g = dL/dy.

    float8  x, g and W are rounded to float8_e4m3fn and multiplied as they are (Ada, Hopper, newer).
            Forward needs W with one scale per row, backward W^T with one scale per row of its own:
            two copies, as many bytes as bf16. A block that backward never reaches has one copy.
    int8    only W is rounded. It is one copy, widened just before each product.

Activations and gradients have one scale per row, which is a token: so the loss does not depend on
how a batch is split, and gradients, small in one token and large in another, need no more range
than e4m3 has. Its three bits of mantissa round twice as finely as the two of e5m2.

Shapes: M tokens, K features that go in, N features that come out.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamapro.model import Linear
from llamapro.training.settings import FrozenDtype

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
TINY = 1e-30  # a row of zeros has a scale that is not 0


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row: (..., K) to float8 (..., K) and the fp32 scales (..., 1) to multiply by.

    A row that is not finite has NaN, so a step with such a gradient is still found out.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).float()
    scale = largest.clamp(min=TINY) / LARGEST
    return (x / scale).to(FLOAT8), scale


def to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds each row: (N, K) to int8 (N, K) and scales (N, 1) in dtype, to multiply by."""
    # The scale is rounded first: so what is rounded then fits the scale that is multiplied by.
    scale = (weight.float().abs().amax(-1, keepdim=True).clamp(min=TINY) / 127).to(dtype)
    return (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """a b^T of float8 matrices: (M, K), (M, 1), (N, K), (N, 1) -> (M, N) in dtype.

    A CPU computes the same formula: exact products, sums in fp32, both scales, one rounding. Only
    the order and precision of the sums differ from a GPU's.
    """
    if a.device.type == "cuda":
        # CUTLASS's kernel for scales per row is fast only with the fast accumulation.
        return torch._scaled_mm(
            a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=True
        )
    wide = torch.promote_types(dtype, torch.float32)
    return (a.to(wide) @ b.to(wide).t() * a_scale * b_scale.t()).to(dtype)


class _Float8Product(torch.autograd.Function):
    """y = x W^T and dL/dx = g W, that is g (W^T)^T: the same product with the other copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *copies: Any) -> Tensor:
        weight, scale, *transposed = copies
        ctx.save_for_backward(*transposed)
        return _Float8Product.product(x, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Float8Product.product(grad, *ctx.saved_tensors), None, None, None, None

    @staticmethod
    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # (..., K) -> (..., N)
        rows, row_scale = to_float8(x.reshape(-1, x.shape[-1]))
        out = scaled_product(rows, row_scale, weight, scale, x.dtype)
        return out.view(*x.shape[:-1], -1)


class _Int8Product(torch.autograd.Function):
    """y = x W^T and dL/dx = g W. W is widened twice, because it is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return grad @ (weight * scale), None, None


class QuantizedLinear(nn.Module):
    """A frozen `Linear` whose matrix is in 8 bits; its bias, if any, is the linear's own."""

    def __init__(self, linear: Linear, kind: str, dtype: torch.dtype, has_backward: bool):
        super().__init__()
        weight = linear.weight.detach()
        self.kind, self.bias = kind, linear.bias
        copies: list[Tensor | None] = list(
            to_float8(weight) if kind == "float8" else to_int8(weight, dtype)
        )
        if kind == "float8":
            copies += to_float8(weight.t().contiguous()) if has_backward else (None, None)
        self.names = ("weight", "scale", "transposed", "transposed_scale")[: len(copies)]
        for name, tensor in zip(self.names, copies, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        function = _Float8Product if self.kind == "float8" else _Int8Product
        y = function.apply(x, *[getattr(self, name) for name in self.names])
        return y if self.bias is None else y + self.bias


def quantize(
    layer: nn.Module,
    kind: FrozenDtype,
    dtype: torch.dtype,
    device: torch.device,
    has_backward: bool,
) -> None:
    """Replaces the matrices of a frozen block by rounded ones on the device; "auto" leaves them.

    The dtype is that of activations. `has_backward` says whether gradients go through the block.
    """
    if kind == "auto":
        return
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                child.weight.data = child.weight.data.to(device)
                setattr(parent, name, QuantizedLinear(child, kind, dtype, has_backward))


def stored_bytes(
    layer: nn.Module, kind: FrozenDtype, dtype: torch.dtype, has_backward: bool
) -> int:
    """Returns the bytes of a frozen block, on the meta device, as `shard` stores it."""
    if kind != "auto":
        layer = copy.deepcopy(layer)
        quantize(layer, kind, dtype, torch.device("meta"), has_backward)
    unrounded = sum(p.numel() for p in layer.parameters()) * dtype.itemsize
    return unrounded + sum(buffer.nbytes for buffer in layer.buffers())
