"""SwiGLU's elementwise part, SiLU(gate) * up (Shazeer, 2020).

Forward, for one element:

    s = gate * sigmoid(gate)
    y = round(s) * up

Backward computes s again instead of keeping it:

    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dup   = dy * round(s)

Grid: (size / BLOCK,). One program owns BLOCK consecutive elements. Forward reads gate and up and
writes y; backward reads gate, up and dy and writes those of dgate and dup that are needed.

Precision: values are read in the tensors' dtype, computed in fp32, and rounded once, when they are
stored. s is also rounded to that dtype, because PyTorch stores it between its two operations.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamapro.kernels.device import cannot_run
from llamapro.kernels.tensors import dense_like, needed, operator

BLOCK = 2048
NUM_WARPS = 4  # 16 elements per thread: in bf16 two 16-byte loads from each tensor
unsupported = cannot_run  # every size is taken


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # size can pass 2^31
    mask = i < size
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    # For a very negative gate, exp overflows to inf and the quotient is the -0 that it should be.
    silu = (gate / (1.0 + tl.exp(-gate))).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + i, silu * up, mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr,
    dgate_ptr, dup_ptr,  # None: not needed
    size, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    dy = tl.load(dy_ptr + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    # Computing this again is cheaper than reading it from memory.
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if dgate_ptr is not None:  # up is read for dgate only
        up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
        dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dgate_ptr + i, dgate, mask=mask)
    if dup_ptr is not None:
        silu = (gate * sigmoid).to(dup_ptr.dtype.element_ty).to(tl.float32)
        tl.store(dup_ptr + i, dy * silu, mask=mask)


@operator("swiglu")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = dense_like(gate)
    grid = (triton.cdiv(gate.numel(), BLOCK),)  # nothing is launched on an empty one
    with torch.cuda.device_of(gate):  # Triton launches on the current device, wherever gate is
        swiglu_forward_kernel[grid](
            gate.contiguous(), up.contiguous(), y, gate.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return y


_forward.register_fake(lambda gate, up: dense_like(gate))


@operator("swiglu_backward")
def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, needs_dgate: bool, needs_dup: bool
) -> tuple[Tensor, Tensor]:
    """Returns dgate and dup, without elements where they are not needed."""
    dgate, dup = dense_like(gate, needs_dgate), dense_like(up, needs_dup)
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            dy.contiguous(), gate.contiguous(), up.contiguous(),
            dgate if needs_dgate else None, dup if needs_dup else None,
            gate.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS,
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
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return needed(ctx, *_backward(dy, *ctx.saved_tensors, *ctx.needs_input_grad))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `ops.swiglu`: (..., F) twice, copied if they are not contiguous -> (..., F).

    Only the two inputs are kept for backward. Raises ValueError if their shapes or dtypes differ.
    """
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}"
        )
    return _SwiGLU.apply(gate, up)
