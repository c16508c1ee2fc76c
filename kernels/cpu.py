"""The CPU's fp32 product, and gradients written out where autograd would keep more than they need.

Each Function computes in forward what the formula in its first line says, rounding where plain
PyTorch rounds; what a pass gives does not depend on whether it needs a gradient. `ops` calls them
where no Triton kernel does, and has the meaning of each.

They also make few temporaries: the C library of a CPU does not reuse the hole that an aligned
tensor leaves for another of its size, so that what is made between two tensors that autograd keeps
costs memory as if it were kept. So buffers are written twice, and products are done in place. What
was written in place is given back as a view: the compiler of PyTorch 2.11 would lose its gradient.

Shapes: C hidden size, D head dim, F FFN size, V vocabulary, N tokens, n tokens of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: fp32, or fp64 if that is what comes in."""
    return torch.promote_types(dtype, torch.float32)


# ---- Matrix products ----------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, on the CPU in fp32 by oneDNN: on AMD half the time of MKL's, PyTorch's own.

    By itself PyTorch has oneDNN multiply in lower precisions only. The operator is what its
    compiler makes of `nn.Linear`; where it is missing, in a build without oneDNN, MKL multiplies.

    Args:
        x: (..., C), any strides.
        weight: (F, C), any strides, in x's dtype.

    Returns:
        (..., F) in x's dtype.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _HAS_ONEDNN:
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    """y = x W^T; with g = dL/dy: dL/dx = g W, dL/dW = g^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _onednn(grad, weight.t()) if weight is not None else None
        if x is None:
            return grad_x, None
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return grad_x, _onednn(grad_rows.t(), rows.t())


# ---- Norm, rotation, activation -----------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    """y = w (x r) with r = 1 / sqrt(mean(x^2) + eps), `x r` rounded to x's dtype; keeps x alone.

    With n = x r and g = dL/dy, all in fp32, and the sum over rows:

        dL/dw = sum g n,    dL/dx = r (g w - n mean(g w n))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = _normed(x, eps)[0].to(x.dtype).mul_(weight)
        return y.view_as(y)  # see above

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
            scaled = grad.to(normed.dtype) * weight  # a tensor of its own, to be written over
            shift = (scaled * normed).mean(-1, keepdim=True)
            grad_x = scaled.sub_(normed.mul_(shift)).mul_(r).to(x.dtype)
        return grad_x, grad_weight, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns n = x r, not rounded, a tensor of its own, and r (..., 1)."""
    wide = x.to(_wide(x.dtype))
    squares = wide.square()
    r = torch.rsqrt(squares.mean(-1, keepdim=True) + eps)
    return torch.mul(wide, r, out=squares), r


class Rotate(torch.autograd.Function):
    """y_1 = x_1 cos - x_2 sin, y_2 = x_2 cos + x_1 sin, of the halves of D; keeps the tables alone.

    A rotation's gradient is rotated back: by the angle's negative. x: (..., D); cos, sin, of two
    equal halves each, broadcast over it.
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


class SwiGLU(torch.autograd.Function):
    """y = SiLU(gate) * up; keeps the two alone and computes SiLU(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = F.silu(gate).mul_(up)
        return y.view_as(y)  # see above

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


# ---- Loss ---------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Summed loss of softmax(x W^T); forward has the gradient too, and backward only scales it.

    For token n with target t and logits l = W x_n, m = max_v l_v and s = sum_v exp(l_v - m):

        loss_n = m + log(s) - l_t,    dloss_n / dl_v = exp(l_v - m) / s - [v = t]

    So the logits are computed once, and those of one chunk of tokens live at a time. The first
    `frozen_rows` of W have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        needs: tuple[bool, bool],
        frozen_rows: int,
    ) -> Tensor:
        dtype = _wide(x.dtype)
        grad_x = torch.empty_like(x) if needs[0] else None  # (N, C)
        trained = weight[frozen_rows:]
        grad_weight = torch.zeros_like(trained, dtype=dtype) if needs[1] else None
        loss_sum = torch.zeros((), dtype=dtype, device=x.device)
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            counts = (targets[part] != IGNORE_INDEX)[:, None]  # (n, 1)
            index = targets[part, None].where(counts, 0)
            logits = F.linear(x[part], weight).to(dtype)  # (n, V), and so are its successors
            of_target = logits.gather(1, index)
            largest = logits.amax(1, keepdim=True)
            exps = logits.sub_(largest).exp_()
            total = exps.sum(1, keepdim=True)
            loss_sum = loss_sum + (largest + total.log() - of_target).where(counts, 0).sum()
            if not any(needs):
                continue
            grad = exps.mul_(counts / total).scatter_add_(1, index, -counts.to(dtype)).to(x.dtype)
            _add_chunk(grad, x, weight, part, frozen_rows, grad_x, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype, ctx.frozen_rows = weight.dtype, frozen_rows
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = _scaled(ctx, scale)
        return grad_x, grad_weight, None, None, None, None


class LinearKL(torch.autograd.Function):
    """Summed KL(q || p) of p = softmax(x W^T) from q, a teacher's, through the same W.

    For token n with l = W x_n and, of the teacher, l' = W' x'_n, where W' is the first rows of W
    that the teacher has: it gives the others no probability:

        KL_n = sum_v q_v (log q_v - log p_v),    dKL_n / dl_v = p_v - q_v

    Chunks, rounding and frozen rows are as in `LinearCrossEntropy`. q is a constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        teacher_x: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        needs: tuple[bool, bool],
        frozen_rows: int,
        teacher_rows: int,
    ) -> Tensor:
        dtype = _wide(x.dtype)
        grad_x = torch.empty_like(x) if needs[0] else None  # (N, C)
        trained = weight[frozen_rows:]
        grad_weight = torch.zeros_like(trained, dtype=dtype) if needs[1] else None
        kl_sum = torch.zeros((), dtype=dtype, device=x.device)
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            counts = (targets[part] != IGNORE_INDEX)[:, None]  # (n, 1)
            log_p = F.linear(x[part], weight).log_softmax(1, dtype)  # (n, V)
            log_q = F.linear(teacher_x[part], weight[:teacher_rows]).log_softmax(1, dtype)
            q = log_q.exp()  # (n, V of the teacher)
            terms = log_q.sub_(log_p[:, :teacher_rows]).mul_(q)
            kl_sum = kl_sum + terms.sum(1, keepdim=True).where(counts, 0).sum()
            if not any(needs):
                continue
            p = log_p.exp_()
            p[:, :teacher_rows] -= q
            grad = p.mul_(counts).to(x.dtype)
            _add_chunk(grad, x, weight, part, frozen_rows, grad_x, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype, ctx.frozen_rows = weight.dtype, frozen_rows
        return kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = _scaled(ctx, scale)
        return grad_x, None, grad_weight, None, None, None, None, None


def _add_chunk(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    part: slice,
    frozen_rows: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """From a chunk's gradient of logits (n, V), writes that of x and adds up that of W."""
    if grad_x is not None:
        torch.mm(grad, weight, out=grad_x[part])
    if grad_weight is not None:
        grad_weight += grad[:, frozen_rows:].t() @ x[part]


def _scaled(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x and W that forward has computed, times the sum's."""
    grad_x, grad_weight = ctx.saved_tensors
    if grad_x is not None:  # a product with a scalar tensor would round that to bf16 first
        grad_x = (grad_x.to(scale.dtype) * scale).to(grad_x.dtype)
    if grad_weight is not None:
        grad_weight = (grad_weight * scale).to(ctx.dtype)
        if ctx.frozen_rows:
            grad_weight = F.pad(grad_weight, (0, 0, ctx.frozen_rows, 0))
    return grad_x, grad_weight
