"""Outputs of kernels, without the gradients that nobody needs, and the size of their programs."""

from typing import Any

import torch
from torch import Tensor


def dense_like(x: Tensor, is_needed: bool = True) -> Tensor:
    """Returns a contiguous output of x's shape and dtype, or one without elements.

    An operator of `torch.library` must return a tensor for every output, and a gradient that
    nobody asked for must cost nothing.
    """
    if not is_needed:
        return torch.empty((0,), dtype=x.dtype, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def needed(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the result of an autograd Function's backward, with None where nothing is needed.

    Args:
        ctx: the Function's context.
        gradients: those of its first inputs, in order. The inputs after them have none.
    """
    needs = ctx.needs_input_grad
    found = [g if is_needed else None for g, is_needed in zip(gradients, needs, strict=False)]
    return (*found, *[None] * (len(needs) - len(found)))


def num_warps(elements: int) -> int:
    """Returns the warps for a block, at most 32. A thread takes 16 elements, two loads in bf16."""
    return min(max(elements // (16 * 32), 1), 32)
