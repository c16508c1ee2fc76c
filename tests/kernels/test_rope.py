"""The rotary embedding's kernel against PyTorch and fp64, in every storage layout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import rope as kernel

Function = Callable[..., Any]
Check = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]
Normal = Callable[..., Tensor]
Results = Callable[..., list[Tensor]]


def table(*shape: int, size: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """cos and sin of positions that differ in every token of every batch."""
    positions = 3 + 5 * torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    return list(ops.rope_table(positions, ops.rope_frequencies(size, 10_000.0), dtype))


@pytest.fixture
def by_torch(in_torch: Function) -> Function:
    return in_torch(ops.rope)


@pytest.fixture
def check(compare: Function, by_torch: Function) -> Check:
    """`check([x], [dy], [cos, sin])`: the output and the gradient by the error rule."""
    return partial(compare, kernel.rope, by_torch)


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The kernel's launches, as they are made."""
    return launches_of(kernel, "rope_kernel")


@pytest.mark.parametrize("size", [2, 34, 64, 128, 254, 1000])
def test_rope_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    device: str,
    layouts: tuple[str, ...],
    in_layout: Callable[[Tensor, str], Tensor],
    normal: Normal,
    check: Check,
    guarded: None,
) -> None:
    """Output and gradient; x, table and dy in layouts of their own; none written outside."""
    x, dy = (normal(2, 2, 3, size, seed=i, dtype=dtype) for i in range(2))
    cos, sin = table(2, 2, size=size, device=device, dtype=dtype)
    x, dy, cos, sin = map(in_layout, (x, dy, cos, sin), layouts)
    check([x], [dy], [cos, sin])


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["(T, D)", "(1, T, D)", "(B, T, D)"])
def test_heads_and_tables_of_every_kind(
    heads: int, batch: tuple[int, ...], device: str, check: Check, guarded: None, normal: Normal
) -> None:
    """Heads that fill their block and that do not; one table for all batches, or one for each."""
    B = T = 3  # alike, so that a table's axes are told apart by their number
    x, dy = (normal(B, T, heads, 16, seed=i) for i in range(2))
    check([x], [dy], table(*batch, T, size=16, device=device))


def test_backward_is_the_inverse_rotation(
    dtype: torch.dtype, device: str, normal: Normal, results: Results
) -> None:
    """The gradient of a rotated tensor, given that tensor, is the original but for rounding."""
    x = normal(2, 3, 4, 64, seed=0, dtype=dtype)
    constants = table(2, 3, size=64, device=device, dtype=dtype)
    y, back = results(kernel.rope, [x], [kernel.rope(x, *constants)], constants)
    assert not torch.allclose(y, x, atol=0.1)
    # Roundings of cos, sin, of what is rotated and of what comes back.
    assert (back - x).abs().max() <= 4 * torch.finfo(dtype).eps * x.abs().max()


def test_one_launch_each_way_without_a_copy(
    device: str, launches: list[dict[str, Any]], check: Check, normal: Normal
) -> None:
    """Queries or keys reach the kernel where they lie."""
    x = normal(2, 3, 2, 16, seed=0)
    check([x], [normal(2, 3, 2, 16, seed=1)], table(3, size=16, device=device))
    assert launches[0]["x_ptr"].data_ptr() == x.data_ptr()
    assert [launch["INVERSE"] for launch in launches] == [False, True]


def test_sixteen_bit_products_are_not_rounded(
    device: str, normal: Normal, by_torch: Function
) -> None:
    """Only the result is rounded: the output is fp32's, rounded to fp16."""
    x = normal(2, 9, 4, 64, seed=0, dtype=torch.float16)
    cos, sin = table(9, size=64, device=device, dtype=torch.float16)
    wide = by_torch(x.float(), cos.float(), sin.float())
    # A GPU fuses a product with the sum, which can turn a tie the other way.
    assert (kernel.rope(x, cos, sin) != wide.half()).float().mean() < 0.002


def test_the_op_describes_itself_truthfully(device: str, normal: Normal, opcheck: Function) -> None:
    """PyTorch's check passes in both directions."""
    x = normal(2, 4, 3, 16, seed=0).transpose(1, 2)
    cos, sin = table(3, size=16, device=device)
    for inverse in (False, True):
        opcheck(torch.ops.llamapro.rope.default, (x, cos, sin, inverse))


def test_wrong_shapes_and_dtypes_are_refused(device: str) -> None:
    """They raise before anything is launched."""
    where = torch.device(device)
    assert kernel.unsupported(where, torch.float16, 80) is None
    assert "15 is odd" in str(kernel.unsupported(where, torch.float16, 15))
    x = torch.ones(2, 3, 4, 16, device=device)
    cos, sin = table(3, size=16, device=device)
    with pytest.raises(ValueError, match="15 is odd"):
        kernel.rope(x[..., :15], cos[..., :15], sin[..., :15])
    with pytest.raises(ValueError, match=r"cos is \(2, 16\)"):
        kernel.rope(x, cos[:2], sin[:2])
    with pytest.raises(ValueError, match=r"sin is \(3, 8\)"):
        kernel.rope(x, cos, sin[:, :8])
    with pytest.raises(ValueError, match=r"cos torch\.float16"):
        kernel.rope(x, cos.half(), sin)
