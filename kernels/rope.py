"""Rotary position embedding in Hugging Face's rotate-half layout (Su et al., 2021).

Forward, for one head x of D elements at one position, i < D/2:

    y_i       = x_i       * cos_i - x_(i + D/2) * sin_i
    y_(i+D/2) = x_(i+D/2) * cos_i + x_i         * sin_i

Each pair (i, i + D/2) is rotated by its own angle. Backward is the inverse rotation: the same
kernel with -sin. Values are read in the tensors' dtype, rotated in fp32 and rounded once, when they
are stored; in 16 bits PyTorch rounds both products first.

The grid is (B * T,). Program i owns token i: reads its cosines and sines once, then rotates all its
query heads and all its key heads, each set as one block of (next_power_of_2(heads),
next_power_of_2(D/2)) pairs, masked. So q and k take one launch; in backward too, or only the one
whose gradient is asked for.

Shapes: B batch, T query length, H query heads, KV key/value heads, D head dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamapro.kernels.device import cannot_run


def unsupported(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why `rope` cannot take heads of `size` elements, or None."""
    if reason := cannot_run(device, dtype):
        return reason
    return f"head dim {size} is odd" if size % 2 else None


@triton.jit
def _rotate_heads(
    x_ptr,  # one token's heads, head_stride apart
    y_ptr,  # the same, without gaps
    head_stride,
    heads,
    cos,  # (BLOCK_HALF,) fp32
    sin,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads) & (i < HALF)
    left = tl.load(x_ptr + head * head_stride + i, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x_ptr + head * head_stride + HALF + i, mask=mask, other=0.0).to(tl.float32)
    y = y_ptr + head * 2 * HALF + i
    tl.store(y, left * cos[None, :] - right * sin[None, :], mask=mask)
    tl.store(y + HALF, right * cos[None, :] + left * sin[None, :], mask=mask)


@triton.jit
def rope_kernel(
    q_ptr,  # (B, T, H, D), last stride 1; or None: not asked for
    k_ptr,  # (B, T, KV, D), last stride 1; or None
    cos_ptr,  # (T, D), batches table_stride apart (0: one for all)
    sin_ptr,
    q_out_ptr,  # (B, T, H, D) contiguous
    k_out_ptr,  # (B, T, KV, D) contiguous
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    table_stride,
    T,
    H,
    KV,
    HALF: tl.constexpr,  # D / 2
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # token * stride can pass 2^31
    b, t = token // T, token % T
    i = tl.arange(0, BLOCK_HALF)
    table = b * table_stride + t * 2 * HALF + i
    # The second half of a row of the table repeats the first, and is not read.
    cos = tl.load(cos_ptr + table, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=i < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    if q_ptr is not None:
        q = q_ptr + b * q_batch_stride + t * q_token_stride
        out = q_out_ptr + token * H * 2 * HALF
        _rotate_heads(q, out, q_head_stride, H, cos, sin, HALF, BLOCK_HALF, BLOCK_H)
    if k_ptr is not None:
        k = k_ptr + b * k_batch_stride + t * k_token_stride
        out = k_out_ptr + token * KV * 2 * HALF
        _rotate_heads(k, out, k_head_stride, KV, cos, sin, HALF, BLOCK_HALF, BLOCK_KV)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("llamapro::rope", mutates_args=())
def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    needs_q: bool,
    needs_k: bool,
) -> tuple[Tensor, Tensor]:
    """Returns q and k rotated, empty where they are not asked for."""
    B, T, H, D = q.shape
    KV = k.shape[2]
    q_out = torch.empty(q.shape if needs_q else 0, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape if needs_k else 0, dtype=k.dtype, device=k.device)
    q, k = _with_unit_stride(q), _with_unit_stride(k)
    block_half = triton.next_power_of_2(D // 2)
    block_h, block_kv = triton.next_power_of_2(H), triton.next_power_of_2(KV)
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever q is
        rope_kernel[(B * T,)](  # nothing is launched on an empty grid
            q if needs_q else None,
            k if needs_k else None,
            cos.contiguous(),
            sin.contiguous(),
            q_out,
            k_out,
            *q.stride()[:3],
            *k.stride()[:3],
            T * D if cos.shape[0] == B and cos.ndim == 3 else 0,
            T,
            H,
            KV,
            HALF=D // 2,
            BLOCK_HALF=block_half,
            BLOCK_H=block_h,
            BLOCK_KV=block_kv,
            INVERSE=inverse,
            # 16 pairs per thread: in bf16 two 16-byte loads from either half.
            num_warps=min(max(max(block_h, block_kv) * block_half // (16 * 32), 1), 32),
        )
    return q_out, k_out


@_rotate.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    needs_q: bool,
    needs_k: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape if needs_q else 0), k.new_empty(k.shape if needs_k else 0)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, inverse=False, needs_q=True, needs_k=True)

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        needs_q, needs_k, _, _ = ctx.needs_input_grad
        dq, dk = _rotate(dq, dk, *ctx.saved_tensors, True, needs_q, needs_k)
        return dq if needs_q else None, dk if needs_k else None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (i, i + D/2) of queries and keys by their position's angle.

    The table is a constant: it gets no gradient.

    Args:
        q: (B, T, H, D), any strides; copied unless the last is 1. So is k.
        k: (B, T, KV, D).
        cos, sin: (T, D) or (B, T, D), in q's dtype. Both halves of the last axis must be equal, as
            `ops.rope_table` makes them: only the first is read.

    Returns:
        q and k rotated, contiguous.

    Raises:
        ValueError: the shapes or dtypes do not fit, or D is odd.
    """
    B, T, _, D = q.shape
    if D % 2:
        raise ValueError(f"head dim {D} is odd")
    if (*k.shape[:2], k.shape[3]) != (B, T, D):
        raise ValueError(
            f"q is {tuple(q.shape)}, k is {tuple(k.shape)}: B, T and D must be the same"
        )
    if cos.shape != sin.shape or cos.shape not in ((T, D), (1, T, D), (B, T, D)):
        raise ValueError(
            f"cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}: must be {(T, D)} or {(B, T, D)}"
        )
    if len({q.dtype, k.dtype, cos.dtype, sin.dtype}) > 1:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, cos {cos.dtype}, sin {sin.dtype}: must be the same"
        )
    return _RoPE.apply(q, k, cos, sin)
