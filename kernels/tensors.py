"""Operators of `torch.library`, their outputs, and the size of a kernel's programs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Operator:
    """A function that launches kernels, as the operator "llamapro::<name>" of `torch.library`.

    torch.compile and fake tensors need the operator. All others call the function: PyTorch's
    dispatcher would add 50 to 80 % to the host's time for a call, beside the launch.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self._function = function
        self._operator = torch.library.custom_op(f"llamapro::{name}", function, mutates_args=())
        self.register_fake = self._operator.register_fake

    def __call__(self, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or isinstance(args[0], FakeTensor):
            return self._operator(*args, **options)
        return self._function(*args, **options)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates a function that launches kernels."""
    return lambda function: Operator(name, function)


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
