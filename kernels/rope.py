"""Rotary position embedding in Hugging Face's rotate-half layout (Su et al., 2021).

Forward, for one head x of D elements at one position and i < D/2:

    y_i         = x_i         * cos_i - x_(i + D/2) * sin_i
    y_(i + D/2) = x_(i + D/2) * cos_i + x_i         * sin_i

Each pair (i, i + D/2) is rotated by its own angle. Backward rotates by the negative angle, so it is
the same kernel with -sin.

Grid: (B * T,). One program owns one token. It reads the token's cosines and sines once, reads all
heads of the token, and writes them rotated. The heads are one masked block of
(next_power_of_2(H), next_power_of_2(D/2)) pairs.

Precision: values are read in x's dtype, rotated in fp32, and rounded once, when they are stored. In
16 bits, PyTorch rounds both products before it adds them.

Shapes: B batch, T query length, H heads (of queries or of keys), D head dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamapro.kernels.device import cannot_run
from llamapro.kernels.tensors import dense_like, needed, num_warps, operator


def unsupported(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why `rope` cannot take heads of `size` elements, or None."""
    if reason := cannot_run(device, dtype):
        return reason
    return f"head dim {size} is odd" if size % 2 else None


@triton.jit
def rope_kernel(
    x_ptr,  # (B, T, H, D)
    cos_ptr,  # (T, D), batches table_stride apart (0: one table for all)
    sin_ptr,
    y_ptr,  # (B, T, H, D)
    table_stride, T, H,
    HALF: tl.constexpr,  # D / 2
    BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # token * H * D can pass 2^31
    b, t = token // T, token % T

    # One angle per pair. The second half of a row of the table repeats the first: it is not read.
    i = tl.arange(0, BLOCK_HALF)[None, :]
    table = b * table_stride + t * 2 * HALF + i
    cos = tl.load(cos_ptr + table, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=i < HALF, other=0.0).to(tl.float32)
    if INVERSE:  # a rotation by the negative angle has the same cosine
        sin = -sin

    # All heads of the token at once: they are rotated by the same angles.
    head = tl.arange(0, BLOCK_H)[:, None]
    mask = (head < H) & (i < HALF)
    at = token * H * 2 * HALF + head * 2 * HALF + i
    left = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, left * cos - right * sin, mask=mask)
    tl.store(y_ptr + at + HALF, right * cos + left * sin, mask=mask)


@operator("rope")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    B, T, H, D = x.shape
    y = dense_like(x)
    # A table (1, T, D), like (T, D), serves all batches: there is nothing to step over.
    table_stride = T * D if cos.ndim == 3 and cos.shape[0] == B else 0
    block_half, block_h = triton.next_power_of_2(D // 2), triton.next_power_of_2(H)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        rope_kernel[(B * T,)](  # nothing is launched on an empty grid
            x.contiguous(), cos.contiguous(), sin.contiguous(), y, table_stride, T, H,
            HALF=D // 2, BLOCK_HALF=block_half, BLOCK_H=block_h, INVERSE=inverse,
            num_warps=num_warps(block_h * block_half),
        )  # fmt: skip
    return y


_rotate.register_fake(lambda x, cos, sin, inverse: dense_like(x))


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)  # a rotation's gradient does not depend on x
        return _rotate(x, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return needed(ctx, _rotate(dy, *ctx.saved_tensors, inverse=True))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ops.rope`: (B, T, H, D), copied if it is not contiguous -> (B, T, H, D).

    The table is a constant: it gets no gradient. Only the first half of its last axis is read.
    Raises ValueError if the shapes or dtypes do not fit, or D is odd.
    """
    B, T, _, D = x.shape
    if D % 2:
        raise ValueError(f"head dim {D} is odd")
    if cos.shape != sin.shape or cos.shape not in ((T, D), (1, T, D), (B, T, D)):
        raise ValueError(
            f"cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}: must be {(T, D)} or {(B, T, D)}"
        )
    if not x.dtype == cos.dtype == sin.dtype:
        raise ValueError(f"x is {x.dtype}, cos {cos.dtype}, sin {sin.dtype}: must be the same")
    return _RoPE.apply(x, cos, sin)
