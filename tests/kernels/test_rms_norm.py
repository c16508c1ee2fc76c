"""The RMSNorm kernels against PyTorch and fp64, in every storage layout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import rms_norm as kernel

# Large enough to show in every value. With a small one, the gradient of a row of one element would
# be the rounding errors of a difference that cancels.
EPS = 0.5
SIZES = (1, 17, 64, 127, 128, 1000)
Function = Callable[..., Any]
Check = Callable[[list[Tensor], list[Tensor]], None]
Normal = Callable[..., Tensor]
Results = Callable[..., list[Tensor]]


def by_kernel(x: Tensor, weight: Tensor) -> Tensor:
    return kernel.rms_norm(x, weight, EPS)


def by_kernel_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return kernel.add_rms_norm(x, residual, weight, EPS)


def exactly(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def exactly_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + residual, exactly(x + residual, weight)


@pytest.fixture
def by_torch(in_torch: Function) -> Function:
    return partial(in_torch(ops.rms_norm), eps=EPS)


@pytest.fixture
def by_torch_added(in_torch: Function) -> Function:
    return partial(in_torch(ops.add_rms_norm), eps=EPS)


@pytest.fixture
def check(compare: Function, by_torch: Function) -> Check:
    """`check([x, weight], [dy])`: the output and both gradients by the error rule."""
    return partial(compare, by_kernel, by_torch, exact=exactly)


@pytest.fixture
def check_added(compare: Function, by_torch_added: Function) -> Check:
    """`check_added([x, residual, weight], [ds, dy])`: the same of `add_rms_norm`."""
    return partial(compare, by_kernel_added, by_torch_added, exact=exactly_added)


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The backward kernel's launches, as they are made."""
    return launches_of(kernel, "rms_norm_backward_kernel")


@pytest.mark.parametrize("size", SIZES)
def test_norm_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    layouts: tuple[str, ...],
    in_layout: Callable[[Tensor, str], Tensor],
    normal: Normal,
    check: Check,
    guarded: None,
) -> None:
    """Output, dx and dw; x and dy each in a layout of its own; nothing written outside."""
    x, dy = (normal(2, 2, size, seed=i, dtype=dtype) for i in (0, 2))
    weight = 1 + normal(size, seed=1, dtype=dtype)
    check([in_layout(x, layouts[0]), weight], [in_layout(dy, layouts[1])])


@pytest.mark.parametrize("size", SIZES)
def test_added_norm_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    layouts: tuple[str, ...],
    in_layout: Callable[[Tensor, str], Tensor],
    normal: Normal,
    check_added: Check,
    guarded: None,
) -> None:
    """Both outputs, dx, dresidual and dw; inputs and gradients each in a layout of its own."""
    plain = [normal(2, 2, size, seed=i, dtype=dtype) for i in range(4)]
    x, residual, ds, dy = map(in_layout, plain, layouts)
    weight = 1 + normal(size, seed=4, dtype=dtype)
    check_added([x, residual, weight], [ds, dy])


@pytest.mark.parametrize("shape", [(40,), (1, 40), (7, 40), (2, 2, 2, 40)], ids=str)
def test_any_number_of_axes_and_rows(shape: tuple[int, ...], check: Check, normal: Normal) -> None:
    """One row, fewer rows than programs, rows that do not divide among them, four axes."""
    x, dy = (normal(*shape, seed=i) for i in range(2))
    weight = normal(shape[-1], seed=2)
    check([x, weight], [dy])


def test_rows_without_elements_come_back_in_shape(device: str, results: Results) -> None:
    """Rows of C = 0 have no value and no gradient."""
    x, weight = torch.empty(3, 0, device=device), torch.empty(0, device=device)
    found = results(by_kernel, [x, weight], [x]) + results(by_kernel_added, [x, x, weight], [x, x])
    assert [tuple(y.shape) for y in found] == 2 * [(3, 0)] + [(0,)] + 4 * [(3, 0)] + [(0,)]


@pytest.mark.parametrize("layout_of_weight", ["offset", "every_other", "expanded"])
def test_weight_in_any_layout(
    layout_of_weight: str, in_layout: Callable[[Tensor, str], Tensor], check: Check, normal: Normal
) -> None:
    """The weight is read by its strides too, and its gradient is dense."""
    x, dy = (normal(4, 40, seed=i) for i in range(2))
    weight = in_layout(normal(40, seed=2), layout_of_weight)
    check([x, weight], [dy])


def test_long_rows_take_dx_and_dw_from_two_launches(
    launches: list[dict[str, Any]], normal: Normal, check_added: Check
) -> None:
    """The registers do not hold both over 8192 elements; the numbers are the same."""
    size = 2 * kernel.MAX_FUSED_BLOCK + 16
    x, residual, ds, dy = (normal(3, size, seed=i) for i in range(4))
    weight = 1 + normal(size, seed=4)
    inputs = [x, residual, weight]
    check_added(inputs, [ds, dy])
    assert [(at["dx_ptr"] is None, at["dweight_ptr"] is None) for at in launches] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("needs_weight", [True, False])
def test_only_what_is_asked_for_is_computed(
    needs_x: bool, needs_weight: bool, launches: list[dict[str, Any]], normal: Normal
) -> None:
    """A frozen weight costs no dw and no buffer, an input without gradient no dx: one launch."""
    x = normal(5, 40, seed=0).requires_grad_(needs_x)
    weight = normal(40, seed=1).requires_grad_(needs_weight)
    y = by_kernel(x, weight)
    if not needs_x and not needs_weight:
        assert not y.requires_grad
        return
    y.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
    (launch,) = launches
    assert (launch["dx_ptr"] is not None) == needs_x
    assert (launch["dweight_ptr"] is not None) == needs_weight
    if not needs_weight:
        assert launch["grid"] == (5,)  # nothing is carried from row to row


@pytest.mark.parametrize("needs_x, needs_residual", [(True, False), (False, True), (False, False)])
def test_each_part_of_the_sum_can_be_without_gradient(
    needs_x: bool, needs_residual: bool, launches: list[dict[str, Any]], normal: Normal
) -> None:
    """The gradient of the sum goes to the part that needs it, and is left out if none does."""
    x = normal(5, 40, seed=0).requires_grad_(needs_x)
    residual = normal(5, 40, seed=1).requires_grad_(needs_residual)
    weight = normal(40, seed=2).requires_grad_()
    sum(out.sum() for out in by_kernel_added(x, residual, weight)).backward()
    assert (x.grad is not None, residual.grad is not None) == (needs_x, needs_residual)
    assert (launches[0]["dx_ptr"] is not None) == (needs_x or needs_residual)
    assert weight.grad is not None


def test_the_weight_multiplies_what_is_already_rounded(normal: Normal, by_torch: Function) -> None:
    """The cast is before the weight: in fp16 the values are PyTorch's, but for a bit of rstd."""
    x = normal(8, 500, seed=0, dtype=torch.float16)
    weight = 1 + normal(500, seed=1, dtype=torch.float16)
    differing = (by_kernel(x, weight) != by_torch(x, weight)).float().mean()
    assert differing < 0.01
    uncast = exactly(x.double(), weight.double()).half()
    assert (uncast != by_torch(x, weight)).float().mean() > 0.1  # what the test would see


def test_values_are_those_of_torch_to_the_bit_where_the_order_of_the_sum_does_not_matter(
    dtype: torch.dtype, device: str, normal: Normal, by_torch: Function, by_torch_added: Function
) -> None:
    """Small whole numbers, 128 of them: their squares add up exactly in any order."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randint(-8, 9, (50, 128), generator=generator).to(device, dtype) for _ in range(2)
    )
    weight = 1 + normal(128, seed=1, dtype=dtype)
    assert torch.equal(by_kernel(x, weight), by_torch(x, weight))
    expected = by_torch_added(x, residual, weight)
    for ours, theirs in zip(by_kernel_added(x, residual, weight), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_sum_is_rounded_before_it_is_normed(normal: Normal) -> None:
    """s is PyTorch's to the bit, and its norm that of s, as if it had been read again."""
    x, residual = (normal(8, 500, seed=i, dtype=torch.float16) for i in range(2))
    weight = 1 + normal(500, seed=2, dtype=torch.float16)
    total, normed = by_kernel_added(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, by_kernel(total, weight))


def test_zero_rows_are_zero_with_finite_gradients(
    dtype: torch.dtype, check: Check, normal: Normal, results: Results
) -> None:
    """A new block adds exactly 0; eps keeps a row of zeros from 0 / 0, forward and backward."""
    x, dy = (normal(4, 64, seed=i, dtype=dtype) for i in range(2))
    x[1] = 0
    weight = 1 + normal(64, seed=2, dtype=dtype)
    check([x, weight], [dy])
    small_eps = results(lambda x, weight: kernel.rms_norm(x, weight, 1e-6), [x, weight], [dy])
    assert (small_eps[0][1] == 0).all()
    assert all(gradient.isfinite().all() for gradient in small_eps)
    total, normed = by_kernel_added(x, -x, weight)
    assert (total == 0).all() and (normed == 0).all()


def test_squares_of_large_values_do_not_overflow(check: Check, normal: Normal) -> None:
    """fp16's largest values, whose squares are beyond it, have the norm they should."""
    x = normal(4, 64, seed=0).sign() * 6e4
    dy = normal(4, 64, seed=1)
    weight = 1 + normal(64, seed=2)
    x, dy, weight = x.half(), dy.half(), weight.half()
    check([x, weight], [dy])
    assert by_kernel(x, weight).abs().max() > 1


def test_weight_gradient_is_summed_in_fp32(device: str) -> None:
    """Small terms count beside large ones that cancel: in fp16, 4096 + 1/4 is 4096."""
    x = torch.ones(4, 3, device=device, dtype=torch.float16)
    dy = torch.tensor([4096, -4096, 0.25, 0.25], device=device, dtype=torch.float16)
    weight = torch.ones(3, device=device, dtype=torch.float16, requires_grad=True)
    kernel.rms_norm(x, weight, 0.0).backward(dy[:, None].expand(4, 3))
    assert (weight.grad == 0.5).all()


def test_the_ops_describe_themselves_truthfully(
    device: str, normal: Normal, opcheck: Function
) -> None:
    """PyTorch's check passes with and without a residual, for each choice of gradients."""
    x = normal(4, 3, 40, seed=0).transpose(0, 1)
    weight = normal(40, seed=1)
    rstd = torch.ones(3, 4, device=device)
    forward = torch.ops.llamapro.rms_norm.default
    backward = torch.ops.llamapro.rms_norm_backward.default
    for residual in (None, x):
        opcheck(forward, (x, residual, weight, EPS))
        for needs in ((True, True), (True, False), (False, True)):
            opcheck(backward, (x, residual, x, weight, rstd, *needs))


def test_gradients_of_the_sum_are_two_tensors(normal: Normal) -> None:
    """One tensor can be the gradient of both outputs, and dx and dresidual never share memory."""
    x, residual, gradient = (normal(4, 40, seed=i) for i in range(3))
    kept = gradient.clone()
    outputs = by_kernel_added(x.requires_grad_(), residual.requires_grad_(), normal(40, seed=3))
    torch.autograd.backward(outputs, [gradient, gradient])
    assert torch.equal(gradient, kept) and torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.count_nonzero()


def test_wrong_shapes_and_dtypes_are_refused(device: str) -> None:
    """They raise before anything is launched; rows can be longer than registers hold."""
    where = torch.device(device)
    assert kernel.unsupported(where, torch.float16, kernel.MAX_SIZE) is None
    assert "65537" in str(kernel.unsupported(where, torch.float16, kernel.MAX_SIZE + 1))
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"weight is \(7,\)"):
        kernel.rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        kernel.rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match=r"residual is \(8,\)"):
        kernel.add_rms_norm(x, weight, weight, EPS)
    with pytest.raises(ValueError, match=r"residual is .* torch\.float16"):
        kernel.add_rms_norm(x, x.half(), weight, EPS)
