"""Output projection and cross-entropy in one: the loss of `softmax(x W^T)` without all its logits.

Forward, for token n with target t and logits l = W x_n, over all V classes:

    m = max_v l_v,    r = sum_{v != t} exp(l_v - m),    s = r + exp(l_t - m)
    loss_n = m - l_t + log(s)

    d loss_n / d l_v = exp(l_v - m) / s             for v != t
    d loss_n / d l_t = exp(l_t - m) / s - 1 = -r / s

    grad_x_n = sum_v (d loss_n / d l_v) W_v,        grad_W_v = sum_n (d loss_n / d l_v) x_n

Backward only scales both gradients by the gradient of the summed loss. Forward computes them chunk
by chunk of tokens, while the logits are at hand, so that no logits are kept for backward or
computed again. This is the idea of Hsu et al. 2024 ("Liger Kernel") and of Wijmans et al. 2024
("Cut Your Losses"); the running maximum and sum are Milakov & Gimelshein's (2018):

    for each chunk:  logits = x_chunk W^T            (torch, in x's dtype)
                     logits -> d loss / d logits     (the kernel below, in place)
                     grad_x_chunk = logits W         (torch, in x's dtype)
                     grad_W += logits^T x_chunk      (torch, product and sum in fp32)

The last line is left out where the embedding is frozen, as it is when only new blocks train. Both
gradients are left out where nothing needs them.

Shapes: N tokens, n tokens of one chunk, C hidden size, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamapro.kernels import IGNORE_INDEX
from llamapro.kernels.device import cannot_run
from llamapro.kernels.tensors import dense_like, operator

# Logits of a chunk: 256 MiB in bf16. That is 4,194 tokens at V = 32,000 and 1,046 at V = 128,256,
# enough rows to keep the matrix products at full speed. Smaller chunks would read W too often.
CHUNK_LOGITS = 1 << 27

# 16 logits per thread: two 16-byte loads of bf16 where V is a multiple of 16. That takes at most 40
# registers, so 6 programs run at a time per multiprocessor and hide each other's reductions.
BLOCK, NUM_WARPS = 4096, 8
ALIGNED = 64


# ---- One program per token: loss, and logits into their gradient -------------------------------
#
# Grid: (n,). One program owns one row of V logits. It reads the row once, in blocks, for m and r,
# and writes the loss. If a gradient is needed, it reads the row again, now from the L2 cache, and
# overwrites it. All arithmetic is in fp32; what is stored is rounded once, to the logits' dtype.


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (n, V), one row every `stride` elements
    targets_ptr,  # (n,) int64
    losses_ptr,  # (n,) fp32
    V, stride, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2^31
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    if (target < 0) | (target >= V):  # ignored, whatever its logits are
        tl.store(losses_ptr + row, 0.0)
        if NEEDS_GRAD:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + cols, zeros, mask=cols < V)
    else:
        true_logit = tl.load(logits_ptr + target).to(tl.float32)
        # m starts finite, so that a logit of -inf gives exp(-inf) = 0 and never exp(-inf + inf).
        m = tl.maximum(true_logit, -3.4e38)
        r = 0.0
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            # The load's mask cannot leave out the target: it would split into single loads.
            others = tl.where(cols == target, float("-inf"), logits)
            # A larger maximum shrinks what was summed so far.
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
                # -r / s, not probability - 1, which is 0 or one rounding where the model is sure.
                grad = tl.where(cols == target, -r, tl.exp(logits - m)) * inverse
                tl.store(logits_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)


# ---- As an operator ----------------------------------------------------------------------------


@operator("linear_cross_entropy")
def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss_sum, count, and the gradients of loss_sum, without elements if not needed.

    grad_weight is in fp32: a sum over all tokens may not fit fp16 before it is scaled.
    """
    N, V = x.shape[0], weight.shape[0]
    targets = targets.contiguous()
    is_counted = targets != IGNORE_INDEX
    # As in torch, this is an error at once on the CPU, and a later device assertion on the GPU.
    is_known = (targets >= 0) & (targets < V) | ~is_counted
    torch._assert_async(is_known.all(), f"targets must be ids below {V} or {IGNORE_INDEX}")

    chunks = max(1, triton.cdiv(N * V, CHUNK_LOGITS))
    rows = max(1, triton.cdiv(N, chunks))  # equal chunks: no small remainder
    # Matrix products are fastest where rows start at multiples of 16 bytes. With a vocabulary of
    # 32,001 those of logits would not, so each row gets a multiple of ALIGNED elements.
    stride = triton.cdiv(V, ALIGNED) * ALIGNED
    logits = torch.empty((min(rows, N), stride), dtype=x.dtype, device=x.device)[:, :V]
    losses = torch.empty((N,), dtype=torch.float32, device=x.device)
    grad_x = dense_like(x, needs_x)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else (0,), dtype=torch.float32)
    # One buffer holds the logits of each chunk in turn, and then their gradient.
    for start in range(0, N, rows):
        part = x[start : start + rows]  # (n, C)
        chunk = logits[: part.shape[0]]  # (n, V)
        torch.mm(part, weight.t(), out=chunk)
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
            _cross_entropy_kernel[(part.shape[0],)](
                chunk, targets[start : start + rows], losses[start : start + rows], V, stride,
                NEEDS_GRAD=needs_x or needs_weight, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        if needs_x:
            torch.mm(chunk, weight, out=grad_x[start : start + rows])
        if needs_weight:
            grad_weight += _product_in_fp32(chunk.t(), part)
    return losses.sum(), is_counted.sum(), grad_x, grad_weight


@_forward.register_fake
def _(x, weight, targets, needs_x, needs_weight):
    loss_sum, count = x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.int64)
    grad_weight = weight.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    return loss_sum, count, dense_like(x, needs_x), grad_weight


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b in fp32: not rounded to their dtype, and without overflow in fp16."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the CPU has no mm with another output dtype


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x * scale, computed in fp32 and rounded to `dtype`; scale is () fp32."""
    # With an axis, scale is not rounded to x's dtype before the product, as a scalar would be.
    return torch.mul(x, scale[None], out=torch.empty_like(x, dtype=dtype))


# ---- What is called ----------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor, Tensor]:
        loss_sum, count, grad_x, grad_weight = _forward(x, weight, targets, needs_x, needs_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return loss_sum, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        scaled_x = _scaled(grad_x, grad_loss, grad_x.dtype) if needs_x else None
        scaled_weight = _scaled(grad_weight, grad_loss, ctx.dtype) if needs_weight else None
        return scaled_x, scaled_weight, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.linear_cross_entropy`: (N, C), (V, C), (N,) -> (), (); any strides.

    Logits are rounded to x's dtype, as `F.linear` does; softmax, losses and their sum are in fp32.
    The gradient of x is rounded to its dtype before and after it is scaled; that of the weight is
    summed in fp32 and rounded once. Raises RuntimeError if a target is not below V (on a GPU: a
    device-side assertion, later).
    """
    has_graph = torch.is_grad_enabled()  # under no_grad, ctx.needs_input_grad can still be True
    needs_x, needs_weight = has_graph and x.requires_grad, has_graph and weight.requires_grad
    return _LinearCrossEntropy.apply(x, weight, targets, needs_x, needs_weight)


unsupported = cannot_run  # every vocabulary is taken
