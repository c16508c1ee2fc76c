"""The `cpu` backend: plain PyTorch that keeps less for backward than autograd would.

Every function has the signature and meaning of the one of the same name in `ops.py`, whose formula
it computes. The code runs on any device; `auto` takes it wherever no Triton kernel runs.

Three things save memory. Forward keeps the inputs and computes the rest again in backward. The
loss computes its gradient in forward, one chunk of tokens at a time. Temporaries are written over,
because the C library does not reuse the hole that an aligned tensor leaves for another of the same
size: a temporary made between two tensors that autograd keeps costs as much memory as if kept.

A tensor that was written in place is returned as a view, because the compiler of PyTorch 2.11
would otherwise lose its gradient.

Shapes: B batch, T query length, S key length, H query heads, KV key/value heads, D head dim,
C hidden size, F FFN size, V vocabulary, N tokens, n tokens of one chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamapro.kernels import IGNORE_INDEX


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# ---- Matrix products ----------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T, plus the bias if there is one: (..., C), (F, C), (F,) -> (..., F).

    oneDNN takes half the time of MKL, PyTorch's own, for fp32 on AMD processors, if it is built in.
    """
    is_fp32 = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if is_fp32 and HAS_ONEDNN and not torch.compiler.is_compiling():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, without a gradient; the weight may be in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """y = x W^T + b; with g = dL/dy: dL/dx = g W, dL/dW = g^T x, dL/db = sum of g over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = onednn(grad, weight.t()) if weight is not None else None
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[2] else None
        if x is None:
            return grad_x, None, grad_bias
        return grad_x, onednn(grad_rows.t(), x.reshape(-1, x.shape[-1]).t()), grad_bias


# ---- Norm, rotation, activation -----------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm: (..., C), (C,) -> (..., C)."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of both, and its norm: all (..., C)."""
    total = residual + x
    return total, _RMSNorm.apply(total, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """y = w n with n = x r and r = 1 / sqrt(mean(x^2) + eps); n is rounded to x's dtype. Keeps x.

    With g = dL/dy, all in fp32, and sums over rows:

        dL/dw = sum g n,    dL/dx = r (g w - n mean(g w n))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = _normed(x, eps)[0].to(x.dtype).mul_(weight)
        return y.view_as(y)  # a view: see the top of the file

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        normed, r = _normed(x, ctx.eps)
        grad_x = grad_weight = None
        if needs_weight:
            grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if needs_x:
            scaled = grad.to(normed.dtype) * weight  # a new tensor, written over below
            shift = (scaled * normed).mean(-1, keepdim=True)
            grad_x = scaled.sub_(normed.mul_(shift)).mul_(r).to(x.dtype)
        return grad_x, grad_weight, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns n = x r as a new tensor, not rounded, and r (..., 1)."""
    wide = x.to(_wide(x.dtype))
    squares = wide.square()
    r = torch.rsqrt(squares.mean(-1, keepdim=True) + eps)
    return torch.mul(wide, r, out=squares), r


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the heads of every position: (B, T, heads, D) and (B, T, D) or (T, D) tables."""
    return _Rotate.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))


class _Rotate(torch.autograd.Function):
    """y_1 = x_1 cos - x_2 sin, y_2 = x_2 cos + x_1 sin for the halves of D. Keeps only the tables.

    The gradient of a rotation is the rotation back, by the negative angle.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x * cos
    half = x.shape[-1] // 2
    y[..., :half] -= x[..., half:] * sin[..., :half]
    y[..., half:] += x[..., :half] * sin[..., half:]
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, all (..., F)."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """y = SiLU(gate) * up. Keeps its inputs and computes SiLU(gate) again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = F.silu(gate).mul_(up)
        return y.view_as(y)  # a view: see the top of the file

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


# ---- Attention ----------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Any = None) -> Tensor:
    """Causal attention by PyTorch's fused kernel: (B, T, H, D), (B, S, KV, D) -> (B, T, H, D).

    `bounds` is an `ops.AttentionBounds`, or None for plain causal attention.
    """
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    # On a CPU, PyTorch packs the keys of every head before it multiplies, which in bf16 takes
    # several times as long as the product with one query. So for one query the heads of a group,
    # which read the same keys, go in as the queries of one head.
    is_single = T == 1 and q.device.type == "cpu"
    q = q.reshape(B, KV, H // KV, D) if is_single else q.transpose(1, 2)  # (B, heads, queries, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, KV, S, D)
    mask = None
    if bounds is not None or 1 < T < S:
        mask = torch.ones(1, T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if bounds is not None:
            mask = mask & (torch.arange(S, device=q.device) >= bounds.first[:, :, None])
        mask = mask[:, None]  # (B or 1, 1, T, S)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=q.shape[1] != KV
    )
    return out.reshape(B, 1, H, D) if is_single else out.transpose(1, 2)


# ---- Loss ---------------------------------------------------------------------------------------


def logits_at_once(device: torch.device, vocab_size: int) -> int:
    """Logits of one product: 256 MiB of a GPU's memory in fp32, or what a CPU multiplies well.

    A product has at least 256 tokens, because each reads the whole head: half as many rows take
    three quarters of the time.
    """
    return max(1 << 20 if device.type == "cpu" else 1 << 26, 256 * vocab_size)


def wide_at_once(device: torch.device) -> int:
    """Logits of a product that are in fp32 at a time: what stays in a CPU's cache, or all."""
    return 1 << (18 if device.type == "cpu" else 62)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of softmax(x W^T), and the number of targets: (N, C), (V, C), (N,) -> (), ()."""
    at_once = logits_at_once(x.device, weight.shape[0])
    return _loss(x, None, weight, targets, at_once, 0)


def linear_kl(
    x: Tensor, teacher_x: Tensor, weight: Tensor, targets: Tensor, teacher_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher || model) through one head, and the number of targets."""
    at_once = logits_at_once(x.device, weight.shape[0]) // 2  # the teacher's logits live too
    return _loss(x, teacher_x, weight, targets, at_once, teacher_rows or weight.shape[0])


def _loss(
    x: Tensor,
    teacher_x: Tensor | None,
    weight: Tensor,
    targets: Tensor,
    at_once: int,  # logits of one product
    teacher_rows: int,
) -> tuple[Tensor, Tensor]:
    # Inside a Function gradients are always off, so it cannot ask itself whether they are needed.
    is_on = torch.is_grad_enabled()
    needs_x, needs_weight = is_on and x.requires_grad, is_on and weight.requires_grad
    tokens = max(1, at_once // weight.shape[0])
    loss = _Loss.apply(x, teacher_x, weight, targets, tokens, teacher_rows, needs_x, needs_weight)
    return loss, (targets != IGNORE_INDEX).sum()


class _Loss(torch.autograd.Function):
    """Sums a loss of the logits l = x W^T over the tokens, chunk by chunk.

    Forward computes the loss and its gradient; backward only scales the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        teacher_x: Tensor | None,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        teacher_rows: int,
        needs_x: bool,
        needs_weight: bool,
    ) -> Tensor:
        dtype, needs_grad = _wide(x.dtype), needs_x or needs_weight
        grad_x = torch.empty_like(x) if needs_x else None  # (N, C)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None  # (V, C)
        losses = torch.zeros(len(x), 1, dtype=dtype, device=x.device)
        counts = (targets != IGNORE_INDEX)[:, None]  # (N, 1)
        index = targets[:, None].where(counts, 0)
        for chunk in _slices(len(x), chunk_tokens):
            logits = linear(x[chunk], weight)  # (n, V); their gradient takes their place
            teacher = None
            if teacher_x is not None:
                teacher = linear(teacher_x[chunk], weight[:teacher_rows])
            for rows in _slices(len(logits), max(1, wide_at_once(x.device) // len(weight))):
                out, counted = losses[chunk][rows], counts[chunk][rows]
                if teacher is None:
                    _cross_entropy(logits[rows], index[chunk][rows], out, counted, needs_grad)
                else:
                    _kl(logits[rows], teacher[rows], out, counted, needs_grad)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[chunk])
            if grad_weight is not None:
                grad_weight += logits.t() @ x[chunk]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return losses.where(counts, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:  # a product with a scalar tensor would round that to bf16 first
            grad_x = (grad_x.to(scale.dtype) * scale).to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtype)
        return grad_x, None, grad_weight, None, None, None, None, None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _cross_entropy(
    logits: Tensor, index: Tensor, losses: Tensor, counts: Tensor, needs_grad: bool
) -> None:
    """Writes the losses (n, 1), and over the logits (n, V) their gradient: 0 without a target.

    For target t, m = max_v l_v and s = sum_v exp(l_v - m):

        loss = m + log(s) - l_t,    dloss / dl_v = exp(l_v - m) / s - [v = t]
    """
    wide = logits.to(losses.dtype)  # the logits themselves if they are
    of_target = wide.gather(1, index)
    largest = wide.amax(1, keepdim=True)
    exps = wide.sub_(largest).exp_()
    total = exps.sum(1, keepdim=True)
    torch.sub(largest + total.log(), of_target, out=losses)
    if needs_grad:
        grad = exps.mul_(counts / total)
        logits.copy_(grad.scatter_add_(1, index, -counts.to(grad.dtype)))


def _kl(logits: Tensor, teacher: Tensor, losses: Tensor, counts: Tensor, needs_grad: bool) -> None:
    """Writes KL(q || p) of p = softmax(l) from the teacher's q, and over the logits its gradient.

    The teacher, a constant, has the logits of the first tokens, and gives the others no
    probability:

        KL = sum_v q_v (log q_v - log p_v),    dKL / dl_v = p_v - q_v
    """
    known = teacher.shape[1]
    log_p = logits.log_softmax(1, losses.dtype)  # (n, V)
    log_q = teacher.log_softmax(1, losses.dtype)
    q = log_q.exp()  # (n, V of the teacher)
    losses.copy_(log_q.sub_(log_p[:, :known]).mul_(q).sum(1, keepdim=True))
    if needs_grad:
        p = log_p.exp_()
        p[:, :known] -= q
        logits.copy_(p.mul_(counts))
