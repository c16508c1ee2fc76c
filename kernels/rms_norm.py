"""RMSNorm, alone and fused with the addition to the residual stream (Zhang & Sennrich, 2019).

Forward, for one row x of C elements:

    s = x + r                             only in `add_rms_norm`, rounded to x's dtype; else s = x
    y = round(s * rstd) * w               rstd = 1 / sqrt(mean(s^2) + eps)

Backward, with n = s * rstd and g = dy * w:

    ds' = ds + rstd * (g - n * mean(g * n))   ds: what the residual stream itself sends back
    dw  = sum over the rows of dy * n

x and r enter by their sum alone, so ds' is the gradient of both. Values are read in the tensors'
dtype, all is computed in fp32, and what is stored is rounded once. Forward rounds twice more, where
PyTorch does: s before its statistics are taken, and n before its product with w, which is the order
of Hugging Face.

A row is one block of next_power_of_2(C) elements, masked, in the registers of one program, so that
every tensor is read and written once.

Forward's grid is (N,). Program i owns row i: reads x, r and w; writes s, y and, for backward, rstd
in fp32.

Backward's grid is (P,). Program p owns the rows p, p + P, p + 2P, ...: reads dy, ds, s, rstd and w;
writes ds'. Where dw is asked for, it also adds up dy * n over its rows, in fp32, and writes the sum
to row p of a (P, C) buffer, which is then summed over P: no atomics, so the same bits every time. P
is what the GPU can hold at once, which keeps the buffer small beside the tensors. With the weight
frozen P = N, and the registers that the sum would take leave room for more programs at a time.

Shapes: N rows (all axes but the last), C hidden size, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamapro.kernels.device import cannot_run

MAX_SIZE = 1 << 16  # elements of a row; up to 2^14 nothing spills from the registers
# dx and dw from one launch up to here. Longer rows take two: together they would spill.
MAX_FUSED_BLOCK = 1 << 13
# What a multiprocessor holds of the backward kernel with dw, at up to 85 registers per thread.
WARPS_PER_MULTIPROCESSOR = 24


def unsupported(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why `rms_norm` and `add_rms_norm` cannot take rows of `size` elements, or None."""
    if reason := cannot_run(device, dtype):
        return reason
    return f"rows of {size} elements are longer than {MAX_SIZE}" if size > MAX_SIZE else None


def _num_warps(block: int) -> int:
    """Up to 32 warps, each thread with 16 elements of the row: two 16-byte loads in bf16."""
    return min(max(block // (16 * 32), 1), 32)


def _max_programs(device: torch.device, block: int) -> int:
    """How many programs that add up dw run at a time."""
    if device.type != "cuda":
        return 2  # the interpreter runs them one by one
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * max(1, WARPS_PER_MULTIPROCESSOR // _num_warps(block))


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,  # (N, C), rows x_stride apart
    residual_ptr,  # (N, C), rows residual_stride apart, or None: nothing to add
    weight_ptr,  # (C,)
    sum_ptr,  # (N, C), or None like the residual
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,)
    x_stride,
    residual_stride,
    C,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2^31
    col = tl.arange(0, BLOCK)
    mask = col < C
    s = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0)
        rounded = (s + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + col, rounded, mask=mask)
        s = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, axis=0) / C + eps)
    tl.store(rstd_ptr + row, rstd)
    normed = (s * rstd).to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + col, normed * weight, mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr,  # (N, C), rows dy_stride apart
    dsum_ptr,  # (N, C), rows dsum_stride apart, or None: nothing to add
    s_ptr,  # (N, C), rows s_stride apart
    weight_ptr,  # (C,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C), or None: not asked for
    dweight_ptr,  # (P, C) fp32, or None: not asked for
    dy_stride,
    dsum_stride,
    s_stride,
    N,
    C,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < C
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(program, N, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * s_stride + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = s * rstd
        if dweight_ptr is not None:
            dweight += dy * normed
        if dx_ptr is not None:
            # Loaded for every row (from cache), as it would fill registers from row to row.
            weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
            dnormed = dy * weight
            dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / C))
            if dsum_ptr is not None:
                dsum = tl.load(dsum_ptr + row * dsum_stride + col, mask=mask, other=0.0)
                dx += dsum.to(tl.float32)
            tl.store(dx_ptr + row * C + col, dx, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * C + col, dweight, mask=mask)


def _as_rows(x: Tensor) -> Tensor:
    """(..., C) to (N, C) with last stride 1 and any row stride: a view, or a copy if it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch_backward(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    programs: int,
) -> None:
    if not s.numel():
        return
    dy, s = _as_rows(dy), _as_rows(s)
    dsum = _as_rows(dsum) if dsum is not None else None
    N, C = s.shape
    block = triton.next_power_of_2(C)
    with torch.cuda.device_of(s):
        rms_norm_backward_kernel[(programs,)](
            dy,
            dsum,
            s,
            weight.contiguous(),
            rstd,
            dx,
            dweight,
            dy.stride(0),
            dsum.stride(0) if dsum is not None else 0,
            s.stride(0),
            N,
            C,
            BLOCK=block,
            num_warps=_num_warps(block),
        )


@torch.library.custom_op("llamapro::rms_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns s (empty without a residual), y and rstd."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        x = _as_rows(x)
        residual = _as_rows(residual) if residual is not None else None
        N, C = x.shape
        block = triton.next_power_of_2(C)
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
            rms_norm_forward_kernel[(N,)](
                x,
                residual,
                weight.contiguous(),
                s if residual is not None else None,
                y,
                rstd,
                x.stride(0),
                residual.stride(0) if residual is not None else 0,
                C,
                eps,
                BLOCK=block,
                num_warps=_num_warps(block),
            )
    return s, y, rstd


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = torch.empty_like(y) if residual is not None else x.new_empty(0)
    return s, y, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("llamapro::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Returns dx and dweight, empty where they are not asked for."""
    N, C = rstd.numel(), s.shape[-1]
    dx, dweight = s.new_empty(0), weight.new_empty(0)
    if needs_dx:
        dx = torch.empty_like(s, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(C)
    is_fused = needs_dx and needs_dweight and block <= MAX_FUSED_BLOCK
    if needs_dx and not is_fused:
        _launch_backward(dy, dsum, s, weight, rstd, dx, None, programs=N)
    if needs_dweight:
        programs = min(N, _max_programs(s.device, block))
        partial = torch.empty((programs, C), dtype=torch.float32, device=s.device)
        _launch_backward(dy, dsum, s, weight, rstd, dx if is_fused else None, partial, programs)
        dweight = partial.sum(0).to(weight.dtype)
    return dx, dweight


@_backward.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(s, memory_format=torch.contiguous_format) if needs_dx else s.new_empty(0)
    return dx, weight.new_empty(weight.shape if needs_dweight else 0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, y, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(dy, None, x, weight, rstd, needs_dx, needs_dweight)
        return dx if needs_dx else None, dweight if needs_dweight else None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        s, y, rstd = _forward(x, residual, weight, eps)
        ctx.save_for_backward(s, weight, rstd)
        return s, y

    @staticmethod
    def backward(
        ctx: Any, dsum: Tensor, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        needs_dx, needs_dresidual, needs_dweight, _ = ctx.needs_input_grad
        s, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(
            dy, dsum, s, weight, rstd, needs_dx or needs_dresidual, needs_dweight
        )
        return (
            dx if needs_dx else None,
            dx if needs_dresidual else None,
            dweight if needs_dweight else None,
            None,
        )


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, rows of x are {tuple(x.shape[-1:])}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}: they must be the same")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm `x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich, 2019).

    Of the gradients, only those that are asked for are computed.

    Args:
        x: (..., C), any strides; copied unless its last stride is 1 and one stride steps through
            its rows.
        weight: (C,), in x's dtype.

    Returns:
        (..., C) in x's dtype, contiguous.

    Raises:
        ValueError: the weight's shape or dtype does not fit x.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalises the sum: `s = x + residual`, `rms_norm(s)`.

    One kernel instead of two: the sum is not read again to be normalised, and in backward its two
    gradients are not added in a pass of their own.

    Args:
        x, residual: (..., C), of one shape and dtype; strides as in `rms_norm`.
        weight: (C,), in x's dtype.

    Returns:
        The sum and the normalised sum, both (..., C) in x's dtype, contiguous.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    _check(x, weight)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}"
        )
    return _AddRMSNorm.apply(x, residual, weight, eps)
