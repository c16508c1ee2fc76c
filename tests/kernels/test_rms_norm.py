"""The RMSNorm kernels against PyTorch and fp64, in every storage layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import backends, ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import rms_norm as kernel

# Large enough to show in every value. With a small one, the gradient of a row of one element would
# be the rounding errors of a difference that cancels.
EPS = 0.5
SIZES = (1, 17, 64, 127, 128, 1000)
LAYOUTS = ("contiguous", "offset", "padded", "transposed", "every_other", "expanded")


def normal(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    with backends.use("torch"):
        return ops.rms_norm(x, weight, EPS)


def by_torch_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with backends.use("torch"):
        return ops.add_rms_norm(x, residual, weight, EPS)


def by_kernel(x: Tensor, weight: Tensor) -> Tensor:
    return kernel.rms_norm(x, weight, EPS)


def by_kernel_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return kernel.add_rms_norm(x, residual, weight, EPS)


def exactly(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def exactly_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + residual, exactly(x + residual, weight)


def results(function: Any, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The outputs of a function and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, gradients))


Check = Callable[[Any, Any, Any, list[Tensor], list[Tensor]], None]


@pytest.fixture
def check(assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None]) -> Check:
    """`check(kernel, torch, exact, inputs, gradients)`: outputs and gradients of the three."""

    def compare(
        kernel: Any, reference: Any, exact: Any, inputs: list[Tensor], gradients: list[Tensor]
    ) -> None:
        found = results(kernel, inputs, gradients)
        assert all(x.is_contiguous() for x in found)
        for ours, theirs, best in zip(
            found,
            results(reference, inputs, gradients),
            results(exact, [x.double() for x in inputs], [x.double() for x in gradients]),
            strict=True,
        ):
            assert_as_exact_as_torch(ours.detach(), theirs.detach(), best.detach())

    return compare


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The backward kernel's launches, as they are made."""
    return launches_of(kernel, "rms_norm_backward_kernel")


@pytest.mark.parametrize("size", SIZES)
def test_norm_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    device: str,
    layout: str,
    in_layout: Callable[[Tensor, str], Tensor],
    check: Check,
    guarded: None,
) -> None:
    """Output, dx and dw, for every layout of x and of the gradient; nothing written outside."""
    x = in_layout(normal(2, 2, size, seed=0, device=device, dtype=dtype), layout)
    weight = 1 + normal(size, seed=1, device=device, dtype=dtype)
    dy = normal(2, 2, size, seed=2, device=device, dtype=dtype)
    for gradient_layout in LAYOUTS:
        check(by_kernel, by_torch, exactly, [x, weight], [in_layout(dy, gradient_layout)])


@pytest.mark.parametrize("size", SIZES)
def test_added_norm_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    device: str,
    layout: str,
    in_layout: Callable[[Tensor, str], Tensor],
    check: Check,
    guarded: None,
) -> None:
    """Both outputs, dx, dresidual and dw; inputs and gradients each in a layout of its own."""
    shape = (2, 2, size)
    x, residual, ds, dy = (normal(*shape, seed=i, device=device, dtype=dtype) for i in range(4))
    weight = 1 + normal(size, seed=4, device=device, dtype=dtype)
    x = in_layout(x, layout)
    for i, other in enumerate(LAYOUTS):
        inputs = [x, in_layout(residual, LAYOUTS[i - 1]), weight]
        gradients = [in_layout(ds, other), in_layout(dy, LAYOUTS[i - 2])]
        check(by_kernel_added, by_torch_added, exactly_added, inputs, gradients)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (7, 40), (2, 2, 2, 40)], ids=str)
def test_any_number_of_axes_and_rows(shape: tuple[int, ...], device: str, check: Check) -> None:
    """One row, fewer rows than programs, rows that do not divide among them, four axes."""
    x, dy = (normal(*shape, seed=i, device=device) for i in range(2))
    weight = normal(40, seed=2, device=device)
    check(by_kernel, by_torch, exactly, [x, weight], [dy])


@pytest.mark.parametrize("layout_of_weight", ["offset", "every_other", "expanded"])
def test_weight_in_any_layout(
    layout_of_weight: str,
    device: str,
    in_layout: Callable[[Tensor, str], Tensor],
    check: Check,
) -> None:
    """The weight is read by its strides too, and its gradient is dense."""
    x, dy = (normal(4, 40, seed=i, device=device) for i in range(2))
    weight = in_layout(normal(40, seed=2, device=device), layout_of_weight)
    check(by_kernel, by_torch, exactly, [x, weight], [dy])


def test_long_rows_take_dx_and_dw_from_two_launches(
    device: str, check: Check, launches: list[dict[str, Any]]
) -> None:
    """Over 8192 elements the registers do not hold both; the numbers are the same."""
    size = 2 * kernel.MAX_FUSED_BLOCK + 16
    x, residual, ds, dy = (normal(3, size, seed=i, device=device) for i in range(4))
    weight = 1 + normal(size, seed=4, device=device)
    inputs = [x, residual, weight]
    check(by_kernel_added, by_torch_added, exactly_added, inputs, [ds, dy])
    assert [(at["dx_ptr"] is None, at["dweight_ptr"] is None) for at in launches] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("needs_weight", [True, False])
def test_only_what_is_asked_for_is_computed(
    needs_x: bool, needs_weight: bool, device: str, launches: list[dict[str, Any]]
) -> None:
    """A frozen weight costs no dw and no buffer, an input without gradient no dx: one launch."""
    x = normal(5, 40, seed=0, device=device).requires_grad_(needs_x)
    weight = normal(40, seed=1, device=device).requires_grad_(needs_weight)
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
    needs_x: bool, needs_residual: bool, device: str, launches: list[dict[str, Any]]
) -> None:
    """The gradient of the sum goes to the part that needs it, and is left out if none does."""
    x = normal(5, 40, seed=0, device=device).requires_grad_(needs_x)
    residual = normal(5, 40, seed=1, device=device).requires_grad_(needs_residual)
    weight = normal(40, seed=2, device=device).requires_grad_()
    sum(out.sum() for out in by_kernel_added(x, residual, weight)).backward()
    assert (x.grad is not None, residual.grad is not None) == (needs_x, needs_residual)
    assert (launches[0]["dx_ptr"] is not None) == (needs_x or needs_residual)
    assert weight.grad is not None


def test_gradients_are_neither_changed_nor_shared(device: str) -> None:
    """One tensor as the gradient of both outputs stays as it was; dx and dresidual are two."""
    inputs = [normal(4, 40, seed=i, device=device) for i in range(2)]
    inputs.append(normal(40, seed=2, device=device))
    gradient = normal(4, 40, seed=3, device=device)
    kept = [x.clone() for x in (*inputs, gradient)]
    for x in inputs:
        x.requires_grad_()
    outputs = by_kernel_added(*inputs)
    torch.autograd.backward(outputs, [gradient, gradient], retain_graph=True)
    first = [x.grad for x in inputs]
    again = torch.autograd.grad(outputs, inputs, [gradient, gradient])  # of the same saved tensors
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, (*inputs, gradient), kept))
    first[0].zero_()
    assert torch.equal(first[1], again[1])


def test_the_weight_multiplies_what_is_already_rounded(device: str) -> None:
    """The cast is before the weight: in fp16 the values are PyTorch's, but for a bit of rstd."""
    x = normal(8, 500, seed=0, device=device, dtype=torch.float16)
    weight = 1 + normal(500, seed=1, device=device, dtype=torch.float16)
    differing = (by_kernel(x, weight) != by_torch(x, weight)).float().mean()
    assert differing < 0.01
    uncast = exactly(x.double(), weight.double()).half()
    assert (uncast != by_torch(x, weight)).float().mean() > 0.1  # what the test would see


def test_values_are_those_of_torch_to_the_bit_where_the_order_of_the_sum_does_not_matter(
    dtype: torch.dtype, device: str
) -> None:
    """Small whole numbers, 128 of them: their squares add up exactly in any order."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randint(-8, 9, (50, 128), generator=generator).to(device, dtype) for _ in range(2)
    )
    weight = 1 + normal(128, seed=1, device=device, dtype=dtype)
    assert torch.equal(by_kernel(x, weight), by_torch(x, weight))
    with backends.use("torch"):
        expected = ops.add_rms_norm(x, residual, weight, EPS)
    for ours, theirs in zip(by_kernel_added(x, residual, weight), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_sum_is_rounded_before_it_is_normed(device: str) -> None:
    """s is PyTorch's to the bit, and its norm that of s, as if it had been read again."""
    x, residual = (normal(8, 500, seed=i, device=device, dtype=torch.float16) for i in range(2))
    weight = 1 + normal(500, seed=2, device=device, dtype=torch.float16)
    total, normed = by_kernel_added(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, by_kernel(total, weight))


def test_zero_rows_are_zero_with_finite_gradients(
    dtype: torch.dtype, device: str, check: Check
) -> None:
    """A new block adds exactly 0; eps keeps a row of zeros from 0 / 0, forward and backward."""
    x, dy = (normal(4, 64, seed=i, device=device, dtype=dtype) for i in range(2))
    x[1] = 0
    weight = 1 + normal(64, seed=2, device=device, dtype=dtype)
    check(by_kernel, by_torch, exactly, [x, weight], [dy])
    small_eps = results(lambda x, weight: kernel.rms_norm(x, weight, 1e-6), [x, weight], [dy])
    assert (small_eps[0][1] == 0).all()
    assert all(gradient.isfinite().all() for gradient in small_eps)
    total, normed = by_kernel_added(x, -x, weight)
    assert (total == 0).all() and (normed == 0).all()


def test_squares_of_large_values_do_not_overflow(device: str, check: Check) -> None:
    """fp16's largest values, whose squares are beyond it, have the norm they should."""
    x = normal(4, 64, seed=0, device=device).sign() * 6e4
    dy = normal(4, 64, seed=1, device=device)
    weight = 1 + normal(64, seed=2, device=device)
    x, dy, weight = x.half(), dy.half(), weight.half()
    check(by_kernel, by_torch, exactly, [x, weight], [dy])
    assert by_kernel(x, weight).abs().max() > 1


def test_weight_gradient_is_summed_in_fp32(device: str) -> None:
    """Small terms count beside large ones that cancel: in fp16, 4096 + 1/4 is 4096."""
    x = torch.ones(4, 3, device=device, dtype=torch.float16)
    dy = torch.tensor([4096, -4096, 0.25, 0.25], device=device, dtype=torch.float16)
    weight = torch.ones(3, device=device, dtype=torch.float16, requires_grad=True)
    kernel.rms_norm(x, weight, 0.0).backward(dy[:, None].expand(4, 3))
    assert (weight.grad == 0.5).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, ...], device: str) -> None:
    """Tensors without elements come back in shape; dw is 0."""
    x = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1], device=device, requires_grad=True)
    y = by_kernel(x, weight)
    total, normed = by_kernel_added(x, x, weight)
    assert y.shape == total.shape == normed.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_ops_describe_themselves_truthfully(device: str) -> None:
    """Schema, shapes and strides for tracing, aliasing: PyTorch's own check of a custom op."""
    x = normal(4, 3, 40, seed=0, device=device).transpose(0, 1)
    weight = normal(40, seed=1, device=device)
    rstd = torch.ones(3, 4, device=device)
    forward = torch.ops.llamapro.rms_norm.default
    backward = torch.ops.llamapro.rms_norm_backward.default
    for residual in (None, x):
        torch.library.opcheck(forward, (x, residual, weight, EPS))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(backward, (x, residual, x, weight, rstd, *needs))


def test_compiles_to_one_graph(device: str) -> None:
    """torch.compile takes both norms without a break, for two lengths, and gives the same."""

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total, normed = by_kernel_added(by_kernel(x, weight), residual, weight)
        return total * normed

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    weight = normal(40, seed=0, device=device)
    for length in (3, 5):
        inputs = [normal(length, 40, seed=i, device=device) for i in (1, 2)]
        dy = [normal(length, 40, seed=3, device=device)]
        for ours, eager in zip(
            results(compiled, [*inputs, weight], dy),
            results(block, [*inputs, weight], dy),
            strict=True,
        ):
            assert torch.equal(ours, eager)


def test_says_what_it_cannot_take(device: str) -> None:
    """`unsupported` gives the reason, or None; misfits raise before anything is launched."""
    where = torch.device(device)
    assert kernel.unsupported(where, torch.float16, kernel.MAX_SIZE) is None
    assert "65537" in str(kernel.unsupported(where, torch.float16, kernel.MAX_SIZE + 1))
    assert "float64" in str(kernel.unsupported(where, torch.float64, 64))
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"weight is \(7,\)"):
        kernel.rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        kernel.rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match=r"residual is \(8,\)"):
        kernel.add_rms_norm(x, weight, weight, EPS)
    with pytest.raises(ValueError, match=r"residual is .* torch\.float16"):
        kernel.add_rms_norm(x, x.half(), weight, EPS)
