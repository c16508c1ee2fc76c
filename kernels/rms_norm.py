"""RMSNorm, alone and fused with the addition to the residual stream (Zhang & Sennrich, 2019).

Forward, for one row x of C elements:

    s = round(x + r)                      in `add_rms_norm`; s = x in `rms_norm`
    y = round(s * rstd) * w               rstd = 1 / sqrt(mean(s^2) + eps)

Backward, with n = s * rstd and g = dy * w:

    dx = ds + rstd * (g - n * mean(g * n))    ds: the gradient of s as an output, in `add_rms_norm`
    dw = sum over the rows of dy * n

x and r enter by their sum alone, so dx is the gradient of both.

Forward's grid: (N,). One program owns one row. It reads x, r and w and writes s, y and, for
backward, rstd in fp32.

Backward's grid: (P,). Program p owns the rows p, p + P, p + 2P, ... It reads dy, ds, s, rstd and w
and writes dx. Where dw is needed, it also sums dy * n over its rows in fp32 and writes the sum to
row p of a (P, C) buffer, which is summed over P afterwards. There are no atomics, so the bits are
the same every time. P is as many programs as the GPU can hold at once, which keeps the buffer
small. With a frozen weight P = N: the registers that the sum would take hold more programs.

A row is one masked block of next_power_of_2(C) elements in the registers of one program, so every
tensor is read and written once.

Precision: values are read in the tensors' dtype, computed in fp32, and rounded once, when they are
stored. Forward also rounds where PyTorch does: s before its statistics are taken, and n before its
product with w, which is Hugging Face's order.

Shapes: N rows (all axes but the last), C hidden size, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamapro.kernels.device import cannot_run
from llamapro.kernels.tensors import dense_like, needed, num_warps, operator

MAX_SIZE = 1 << 16  # elements of a row; up to 2^14 nothing spills from the registers
# Up to this block, one launch computes dx and dw. For longer rows, both together would spill, so
# each takes a launch of its own.
MAX_FUSED_BLOCK = 1 << 13
# What a multiprocessor holds of the backward kernel with dw, at up to 85 registers per thread.
WARPS_PER_MULTIPROCESSOR = 24


def unsupported(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why `rms_norm` and `add_rms_norm` cannot take rows of `size` elements, or None."""
    if reason := cannot_run(device, dtype):
        return reason
    return f"rows of {size} elements are longer than {MAX_SIZE}" if size > MAX_SIZE else None


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C); None: nothing to add
    weight_ptr,  # (C,)
    sum_ptr,  # (N, C); None like the residual
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,) fp32
    C, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * C can pass 2^31
    col = tl.arange(0, BLOCK)
    mask = col < C
    s = tl.load(x_ptr + row * C + col, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * C + col, mask=mask, other=0.0)
        rounded = (s + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + col, rounded, mask=mask)
        # The norm is that of the stored sum, as if it had been read again.
        s = rounded.to(tl.float32)
    # Masked elements are 0 and add nothing; the mean is over the C that exist.
    rstd = tl.rsqrt(tl.sum(s * s, axis=0) / C + eps)
    tl.store(rstd_ptr + row, rstd)
    # Hugging Face's order: rounded to the dtype first, then multiplied by the weight.
    normed = (s * rstd).to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + col, normed * weight, mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr,  # (N, C)
    dsum_ptr,  # (N, C); None: nothing to add
    s_ptr,  # (N, C)
    weight_ptr,  # (C,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C); None: not needed
    dweight_ptr,  # (P, C) fp32; None: not needed
    N, C, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < C
    # Without dw nothing is carried from row to row, and each program has one row (P = N).
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(program, N, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * C + col, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * C + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = s * rstd
        if dweight_ptr is not None:
            dweight += dy * normed
        if dx_ptr is not None:
            # Loaded anew for every row (from cache): kept, it would fill registers all the time.
            weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
            dnormed = dy * weight
            # rstd depends on the whole row: the mean takes out the part of the gradient along it.
            dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / C))
            if dsum_ptr is not None:
                dsum = tl.load(dsum_ptr + row * C + col, mask=mask, other=0.0)
                dx += dsum.to(tl.float32)
            tl.store(dx_ptr + row * C + col, dx, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * C + col, dweight, mask=mask)


@operator("rms_norm")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns s (without elements if there is no residual), y and rstd."""
    s, y, rstd = _forward_outputs(x, residual)
    if not x.numel():
        return s, y, rstd
    C = x.shape[-1]
    block = triton.next_power_of_2(C)
    residual = None if residual is None else residual.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        rms_norm_forward_kernel[(x.numel() // C,)](
            x.contiguous(), residual, weight.contiguous(), None if residual is None else s, y, rstd,
            C, eps, BLOCK=block, num_warps=num_warps(block),
        )  # fmt: skip
    return s, y, rstd


def _forward_outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return dense_like(x, residual is not None), dense_like(x), rstd


_forward.register_fake(lambda x, residual, weight, eps: _forward_outputs(x, residual))


def _max_programs(device: torch.device, block: int) -> int:
    """Returns how many programs that sum dw run at a time."""
    if device.type != "cuda":
        return 2  # the interpreter runs them one by one
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * max(1, WARPS_PER_MULTIPROCESSOR // num_warps(block))


@operator("rms_norm_backward")
def _backward(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor,
    needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns dx and dweight, without elements where they are not needed."""
    dx, dweight = dense_like(s, needs_dx), dense_like(weight, needs_dweight)
    if not s.numel():
        return dx, dweight.zero_()
    dy, s, weight = dy.contiguous(), s.contiguous(), weight.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    C = s.shape[-1]
    N, block = s.numel() // C, triton.next_power_of_2(C)

    def launch(programs: int, dx: Tensor | None, partial: Tensor | None) -> None:
        with torch.cuda.device_of(s):
            rms_norm_backward_kernel[(programs,)](
                dy, dsum, s, weight, rstd, dx, partial, N, C,
                BLOCK=block, num_warps=num_warps(block),
            )  # fmt: skip

    is_fused = needs_dx and needs_dweight and block <= MAX_FUSED_BLOCK
    if needs_dx and not is_fused:
        launch(N, dx, None)
    if needs_dweight:
        programs = min(N, _max_programs(s.device, block))
        # One row of sums per program, added up afterwards in an order that never changes.
        partial = torch.empty((programs, C), dtype=torch.float32, device=s.device)
        launch(programs, dx if is_fused else None, partial)
        dweight.copy_(partial.sum(0))
    return dx, dweight


@_backward.register_fake
def _(dy, dsum, s, weight, rstd, needs_dx, needs_dweight):
    return dense_like(s, needs_dx), dense_like(weight, needs_dweight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        s, y, rstd = _forward(x, residual, weight, eps)
        ctx.save_for_backward(x if residual is None else s, weight, rstd)
        return y if residual is None else (s, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dsum, dy = (None, *grads)[-2:]  # without a residual, y is the only output
        needs_dx, needs_dresidual, needs_dweight, _ = ctx.needs_input_grad
        needs_sum = needs_dx or needs_dresidual
        dx, dweight = _backward(dy, dsum, *ctx.saved_tensors, needs_sum, needs_dweight)
        return needed(ctx, dx, dx, dweight)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, rows of x are {tuple(x.shape[-1:])}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}: they must be the same")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `ops.rms_norm`: (..., C), copied if it is not contiguous, and (C,) -> (..., C).

    Raises ValueError if the weight's shape or dtype does not fit x.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ops.add_rms_norm`: the sum and its norm, both (..., C).

    This is one kernel instead of two: the sum is not read again to be normalised, and in backward
    its two gradients are not added in a pass of their own. Raises ValueError as `rms_norm`.
    """
    _check(x, weight)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}"
        )
    return _RMSNorm.apply(x, residual, weight, eps)
