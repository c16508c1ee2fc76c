"""Output projection and cross-entropy in one: the loss of `softmax(x W^T)` with few logits held.

Forward, for token n with target t and logits l = W x_n, over all V classes:

    m = max_v l_v,    r = sum_{v != t} exp(l_v - m),    s = r + exp(l_t - m)
    loss_n = m - l_t + log(s)

    d loss_n / d l_v = exp(l_v - m) / s             for v != t
    d loss_n / d l_t = exp(l_t - m) / s - 1 = -r / s

    grad_x_n = sum_v (d loss_n / d l_v) W_v,        grad_W_v = sum_n (d loss_n / d l_v) x_n

Backward only scales both by the gradient of the sum of the losses. The gradient being at hand where
the logits are, forward computes it chunk by chunk of tokens, and no logits wait for backward or are
computed again (the idea of Hsu et al. 2024, "Liger Kernel", and of Wijmans et al. 2024, "Cut Your
Losses"; the running maximum and sum are Milakov & Gimelshein's, 2018):

    for each chunk:  logits = x_chunk W^T            (torch, in x's dtype)
                     logits -> d loss / d logits     (the kernel below, in place)
                     grad_x_chunk = logits W         (torch, in x's dtype)
                     grad_W += logits^T x_chunk      (torch, product and sum in fp32)

The last line is left out where the embedding is frozen, as it is when only new blocks train, and
done for its last rows alone where only those of added tokens train; both gradients are left out
where nothing asks for them.

Shapes: N tokens, n tokens of one chunk, C hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llamapro.kernels.device import cannot_run

IGNORE_INDEX = -100
# Logits of a chunk: 256 MiB in bf16. That is 4,194 tokens at V = 32,000, enough rows to keep the
# matrix products at full speed, and 1,046 at V = 128,256. Fewer make W be read too often.
CHUNK_LOGITS = 1 << 27

# 16 logits per thread: two 16-byte loads of bf16, where V is a multiple of 16. Then at most 40
# registers, so that 6 programs run at a time per multiprocessor and hide each other's reductions.
BLOCK, NUM_WARPS = 4096, 8
SCALE_BLOCK, SCALE_WARPS = 2048, 4


# ---- One program per token: loss, and logits into their gradient -------------------------------
#
# Grid (n,). A program owns one row of V logits. It reads the row once, in blocks, for m and r, and
# if a gradient is needed once more (from L2 cache, where it has just been) to overwrite it. All
# arithmetic is in fp32; what is stored is rounded once, to the logits' dtype.


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (n, V), contiguous
    targets_ptr,  # (n,) int64
    losses_ptr,  # (n,) fp32
    V,
    NEEDS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * V can pass 2^31
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    if (target < 0) | (target >= V):  # ignored: its logits, whatever they are, do not count
        tl.store(losses_ptr + row, 0.0)
        if NEEDS_GRAD:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + cols, zeros, mask=cols < V)
    else:
        true_logit = tl.load(logits_ptr + target).to(tl.float32)
        # A finite start, so that logits of -inf make exp(-inf) = 0 and never exp(-inf + inf).
        m = tl.maximum(true_logit, -3.4e38)
        r = 0.0
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            # Not in the load's mask, which would split it into loads of single logits.
            others = tl.where(cols == target, float("-inf"), logits)
            larger = tl.maximum(m, tl.max(others, 0))
            r = r * tl.exp(m - larger) + tl.sum(tl.exp(others - larger), 0)
            m = larger
        s = r + tl.exp(true_logit - m)
        tl.store(losses_ptr + row, m - true_logit + tl.log(s))
        if NEEDS_GRAD:
            inverse = 1.0 / s
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                logits = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
                # Not probability - 1: where the model is sure, that would be 0 or one rounding.
                grad = tl.where(cols == target, -r, tl.exp(logits - m)) * inverse
                tl.store(logits_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)


# ---- Backward: out = x * scale ------------------------------------------------------------------
#
# Grid (size / BLOCK,). The scale is a number on the device, which nobody waits for. torch would
# round it to bf16 before the product; here the product is in fp32 and is rounded once.


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    out = x * tl.load(scale_ptr)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < size)


# ---- The two as ops ----------------------------------------------------------------------------


@torch.library.custom_op("llamapro::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    need_x: bool,
    need_weight: bool,
    frozen_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss_sum, count, and the gradients of loss_sum, each empty if not needed.

    grad_weight is of the rows that are not frozen, in fp32: a sum over all tokens, which may not
    fit fp16 before it is scaled.
    """
    (N, C), V = x.shape, weight.shape[0]
    targets = targets.contiguous()
    is_counted = targets != IGNORE_INDEX
    # As torch: an error at once on the CPU, and on the GPU a device assertion, without waiting.
    is_known = (targets >= 0) & (targets < V) | ~is_counted
    torch._assert_async(is_known.all(), f"targets must be ids below {V} or {IGNORE_INDEX}")

    chunks = max(1, triton.cdiv(N * V, CHUNK_LOGITS))
    rows = max(1, triton.cdiv(N, chunks))  # equal chunks: no small remainder
    logits = torch.empty((min(rows, N), V), dtype=x.dtype, device=x.device)
    losses = torch.empty((N,), dtype=torch.float32, device=x.device)
    grad_x = torch.empty((N, C) if need_x else (0,), dtype=x.dtype, device=x.device)
    trained = (V - frozen_rows, C)
    grad_weight = weight.new_zeros(trained if need_weight else (0,), dtype=torch.float32)
    for start in range(0, N, rows):
        part = x[start : start + rows]  # (n, C)
        chunk = logits[: part.shape[0]]  # (n, V)
        torch.mm(part, weight.t(), out=chunk)
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
            _cross_entropy_kernel[(part.shape[0],)](
                chunk,
                targets[start : start + rows],
                losses[start : start + rows],
                V,
                NEEDS_GRAD=need_x or need_weight,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
        if need_x:
            torch.mm(chunk, weight, out=grad_x[start : start + rows])
        if need_weight:
            grad_weight += _product_in_fp32(chunk[:, frozen_rows:].t(), part)
    return losses.sum(), is_counted.sum(), grad_x, grad_weight


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    need_x: bool,
    need_weight: bool,
    frozen_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    trained = (weight.shape[0] - frozen_rows, weight.shape[1])
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.int64),
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(trained if need_weight else (0,), dtype=torch.float32),
    )


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, neither rounded to their dtype nor, in fp16, overflowing."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the CPU has no such product


@torch.library.custom_op("llamapro::scaled", mutates_args=())
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x * scale, computed in fp32, in a dtype. x: contiguous; scale: () fp32."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(x.numel(), SCALE_BLOCK),)
    with torch.cuda.device_of(x):
        _scale_kernel[grid](x, scale, out, x.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS)
    return out


@_scaled.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


# ---- What is called ----------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        need_x: bool,
        need_weight: bool,
        frozen_rows: int,
    ) -> tuple[Tensor, Tensor]:
        loss_sum, count, grad_x, grad_weight = _forward(
            x, weight, targets, need_x, need_weight, frozen_rows
        )
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype, ctx.frozen_rows = weight.dtype, frozen_rows
        return loss_sum, count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        scaled_x = _scaled(grad_x, grad_loss, grad_x.dtype) if need_x else None
        scaled_weight = _scaled(grad_weight, grad_loss, ctx.dtype) if need_weight else None
        if scaled_weight is not None and ctx.frozen_rows:
            scaled_weight = F.pad(scaled_weight, (0, 0, ctx.frozen_rows, 0))
        return scaled_x, scaled_weight, None, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, frozen_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of `softmax(x @ weight.T)`, without holding all logits at once.

    Logits are rounded to x's dtype, as `F.linear` does; softmax, losses and their sum are in fp32.
    The gradients are computed here, if anything asks for them, and scaled in backward: that of x is
    rounded to its dtype before and after, that of the weight is summed in fp32 and rounded once.

    Args:
        x: (N, C), any strides.
        weight: (V, C), the output embedding, any strides, in x's dtype.
        targets: (N,) int64 token ids, any strides; `IGNORE_INDEX` (-100) adds neither loss nor
            count.
        frozen_rows: of the first so many rows of the weight no gradient is computed: it is 0.

    Returns:
        loss_sum: () fp32, in nats.
        count: () int64, the number of targets that are not ignored.

    Raises:
        RuntimeError: a target is not below V (on a GPU: a device-side assertion, later).
    """
    needs_graph = torch.is_grad_enabled()  # a Function's own flags do not know of no_grad
    need_x, need_weight = needs_graph and x.requires_grad, needs_graph and weight.requires_grad
    return _LinearCrossEntropy.apply(x, weight, targets, need_x, need_weight, frozen_rows)


def unsupported(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why the kernel cannot take such input, or None. Any vocabulary size is right."""
    return cannot_run(device, dtype)
