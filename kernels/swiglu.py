"""SwiGLU's elementwise part, SiLU(gate) * up (Shazeer, 2020).

Forward, for one element:

    s = gate * sigmoid(gate)
    y = round(s) * up

Backward computes s again instead of keeping it:

    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dup   = dy * round(s)

Grid: one axis, (N * blocks per row,). One program owns BLOCK consecutive elements of one row.
Forward reads gate and up and writes y; backward reads gate, up and dy and writes those of dgate and
dup that are needed. Contiguous tensors are one long row. Otherwise rows may lie any distance apart,
such as in the two halves of one fused projection.

Precision: values are read in the tensors' dtype, computed in fp32, and rounded once, when they are
stored. s is also rounded to that dtype, because PyTorch stores it between its two operations.

Shapes: N rows, F FFN size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamapro.kernels.device import cannot_run
from llamapro.kernels.tensors import as_rows, dense_like, needed

BLOCK = 2048
NUM_WARPS = 4  # 16 elements per thread: in bf16 two 16-byte loads from each tensor


def unsupported(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why `swiglu` cannot take such tensors, or None; it takes every size."""
    return cannot_run(device, dtype)


@triton.jit
def _block_of_row(F, BLOCK: tl.constexpr):
    """Returns the row and the columns of this program, in 64 bits: a row may be a whole tensor."""
    blocks = tl.cdiv(F, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    return row, (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def swiglu_forward_kernel(
    gate_ptr,  # (N, F), rows gate_stride apart
    up_ptr,  # (N, F), rows up_stride apart
    y_ptr,  # (N, F), contiguous
    gate_stride, up_stride, F, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = _block_of_row(F, BLOCK)
    mask = col < F
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    # For a very negative gate, exp overflows to inf and the quotient is the -0 that it should be.
    silu = (gate / (1.0 + tl.exp(-gate))).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * F + col, silu * up, mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr,  # (N, F), rows dy_stride apart
    gate_ptr,
    up_ptr,
    dgate_ptr,  # (N, F), contiguous; None: not needed
    dup_ptr,  # (N, F), contiguous; None: not needed
    dy_stride, gate_stride, up_stride, F, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = _block_of_row(F, BLOCK)
    mask = col < F
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    # Computing this again is cheaper than reading it from memory.
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if dgate_ptr is not None:  # up is read for dgate only
        up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
        dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dgate_ptr + row * F + col, dgate, mask=mask)
    if dup_ptr is not None:
        silu = (gate * sigmoid).to(dup_ptr.dtype.element_ty).to(tl.float32)
        tl.store(dup_ptr + row * F + col, dy * silu, mask=mask)


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    """Views all tensors in one shape (N, F); copies only where there is no such view."""
    # Memory without gaps is one long row, whatever F is, so that blocks are full.
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


@torch.library.custom_op("llamapro::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = dense_like(gate)
    gate, up = _as_rows(gate, up)
    N, F = gate.shape
    with torch.cuda.device_of(gate):  # Triton launches on the current device, wherever gate is
        swiglu_forward_kernel[(N * triton.cdiv(F, BLOCK),)](  # nothing on an empty grid
            gate, up, y, gate.stride(0), up.stride(0), F, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return y


_forward.register_fake(lambda gate, up: dense_like(gate))


@torch.library.custom_op("llamapro::swiglu_backward", mutates_args=())
def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, needs_dgate: bool, needs_dup: bool
) -> tuple[Tensor, Tensor]:
    """Returns dgate and dup, without elements where they are not needed."""
    dgate, dup = dense_like(gate, needs_dgate), dense_like(up, needs_dup)
    dy, gate, up = _as_rows(dy, gate, up)
    N, F = gate.shape
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(N * triton.cdiv(F, BLOCK),)](
            dy, gate, up, dgate if needs_dgate else None, dup if needs_dup else None,
            dy.stride(0), gate.stride(0), up.stride(0), F, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dgate, dup


@_backward.register_fake
def _(dy, gate, up, needs_dgate, needs_dup):
    return dense_like(gate, needs_dgate), dense_like(up, needs_dup)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return needed(ctx, *_backward(dy, *ctx.saved_tensors, *ctx.needs_input_grad))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (Shazeer, 2020).

    Only the two inputs are kept for backward, and only the gradients asked for are computed.

    Args:
        gate, up: (..., F), of one shape and dtype, any strides; such as the halves of one tensor
            (..., 2F). Copied unless the last stride is 1 and one stride steps through the rows.

    Returns:
        (..., F) in their dtype, contiguous.

    Raises:
        ValueError: the shapes or dtypes are not the same.
    """
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}: "
            "must be the same"
        )
    return _SwiGLU.apply(gate, up)
