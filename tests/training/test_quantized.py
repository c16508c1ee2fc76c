"""A frozen matrix in 8 bits: how far it is rounded, and its products."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llamapro.model import Linear
from llamapro.training import quantized
from llamapro.training.quantized import QuantizedLinear, to_float8, to_int8
from llamapro.training.settings import FrozenDtype

KINDS: tuple[FrozenDtype, ...] = ("int8", "float8")


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers whose rows differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.logspace(-6, 3, shape[0])[:, None]).to(dtype)


def test_float8_is_off_by_half_a_unit_of_three_bits() -> None:
    """2^-4 of each number, or half the smallest step, 2^-10, of its row's scale."""
    for x in (rows(40, 96), rows(40, 96, dtype=torch.bfloat16)):
        rounded, scale = to_float8(x)
        error = (rounded.double() * scale.double() - x.double()).abs()
        bound = torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10)
        assert (error <= bound * (1 + 2**-20)).all()  # x / scale is rounded to fp32 before
        assert (rounded.float().abs().amax(-1) == 448).all()  # the whole range is used


def test_a_row_of_zeros_is_zero_and_one_that_is_not_finite_is_nan() -> None:
    """The first has no scale to divide by; the second must reach the check of the gradient."""
    x = torch.tensor([[0.0, 0.0], [1.0, torch.inf], [1.0, torch.nan], [1.0, -2.0]])
    rounded, scale = to_float8(x)
    found = (rounded.float() * scale).tolist()
    assert found[0] == [0.0, 0.0] and found[3] == [1.0, -2.0]
    assert math.isnan(found[1][1]) and math.isnan(found[2][1])
    whole, scale = to_int8(x[[0, 3]], torch.float32)
    assert (whole * scale)[0].tolist() == [0.0, 0.0] and whole[1].tolist() == [64, -127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_off_by_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    """A step is a 127th of the row's largest number, also where the scale itself is rounded."""
    weight = rows(40, 96)
    rounded, scale = to_int8(weight, dtype)
    assert scale.dtype == dtype
    step = scale.double()
    error = (rounded.double() * step - weight.double()).abs()
    assert (error <= step / 2 * (1 + 2**-20)).all()
    largest = weight.double().abs().amax(-1, keepdim=True)
    assert (step <= largest / 127 * (1 + 2**-8)).all()


def linear_of(kind: str, dtype: torch.dtype) -> tuple[Linear, QuantizedLinear]:
    linear = Linear(96, 48).requires_grad_(False)
    linear.weight.data = rows(48, 96, seed=1)
    linear.bias.data = torch.linspace(-1, 1, 48).to(dtype)
    return linear, QuantizedLinear(linear, kind, dtype, has_backward=True)


def exact_product(x: Tensor, kind: str, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T of the rounded matrices in fp64, and the sum of its terms' sizes, (M, N) both."""
    wide = weight.double() * scale.double()
    if kind == "float8":
        rounded, row_scale = to_float8(x)
        x = rounded.double() * row_scale.double()
    else:
        wide = (weight * scale).double()  # rounded to the dtype that multiplies
    x = x.double()
    return x @ wide.t(), x.abs() @ wide.abs().t()


def assert_rounded_like(found: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    """Within sums of `count` terms in fp32, three products, and one rounding to the dtype."""
    bound = (count + 3) * 2.0**-24 * terms + torch.finfo(found.dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_rounded_matrices(kind: str, dtype: torch.dtype) -> None:
    """Forward x W^T + b and backward g W, written out in fp64; W has no gradient."""
    linear, found = linear_of(kind, dtype)
    x = rows(40, 96, dtype=dtype).requires_grad_()
    y = found(x.view(4, 10, 96))
    assert y.shape == (4, 10, 48) and y.dtype == dtype
    exact, terms = exact_product(x.detach(), kind, found.weight, found.scale)
    with torch.no_grad():
        found.bias, bias = None, found.bias
        assert_rounded_like(found(x), exact, terms, 96)
        assert torch.equal(found(x) + bias, y.view(40, 48))
    gradient = rows(40, 48, dtype=dtype, seed=2)
    y.backward(gradient.view(4, 10, 48))
    if kind == "float8":
        copies = (found.transposed, found.transposed_scale)
        assert torch.equal(copies[0].float(), to_float8(linear.weight.t())[0].float())
        exact, terms = exact_product(gradient, kind, *copies)
    else:
        wide = (found.weight * found.scale).double()
        exact, terms = gradient.double() @ wide, gradient.double().abs() @ wide.abs()
    assert x.grad is not None and x.grad.dtype == dtype
    assert_rounded_like(x.grad, exact, terms, 48)
    assert not list(found.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_rounded_matrix_is_kept_for_backward(kind: str) -> None:
    """So activations take what the plan counts for a frozen block of before: no input is kept."""
    _, linear = linear_of(kind, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear(rows(40, 96, dtype=torch.bfloat16).requires_grad_())
    stored = {buffer.data_ptr() for buffer in linear.buffers()}
    assert saved and {x.data_ptr() for x in saved} <= stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_emulated_product_is_that_of_scaled_mm(dtype: torch.dtype) -> None:
    """PyTorch has the operator for CPUs too: the same numbers but for the order of the sums."""
    (a, a_scale), (b, b_scale) = to_float8(rows(40, 96)), to_float8(rows(48, 96, seed=1))
    operator: Any = torch._scaled_mm
    found = operator(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype)
    wide = (a.double() * a_scale.double(), b.double() * b_scale.double())
    exact, terms = wide[0] @ wide[1].t(), wide[0].abs() @ wide[1].abs().t()
    emulated = quantized.scaled_product(a, a_scale, b, b_scale, dtype)
    assert_rounded_like(emulated, exact, terms, 96)
    assert_rounded_like(found, exact, terms, 96)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_gpu_would_take_both_products(tokens: int) -> None:
    """PyTorch's own checks of layouts, sizes and scales, on tensors that only say "cuda"."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        return FakeTensor(mode, x.to("meta"), torch.device("cuda", 0))

    _, found = linear_of("float8", torch.bfloat16)
    for weight, scale in ((found.weight, found.scale), (found.transposed, found.transposed_scale)):
        a, a_scale = to_float8(rows(tokens, weight.shape[1]))
        with mode:
            copies = [fake(x) for x in (a, a_scale, weight, scale)]
            y = quantized.scaled_product(*copies, torch.bfloat16)
        assert y.shape == (tokens, weight.shape[0]) and y.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 1024, 2048), (1, 4096, 4096), (4096, 11008, 4096)])
def test_a_gpu_computes_what_is_emulated(shape: tuple[int, int, int]) -> None:
    """The GPU's own rounding, with fast accumulation, is small beside that of the numbers."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU with float8")
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to("cuda", torch.bfloat16)
    weight = torch.randn(N, K, generator=generator).cuda()
    (a, a_scale), (b, b_scale) = to_float8(x), to_float8(weight)
    found = quantized.scaled_product(a, a_scale, b, b_scale, torch.bfloat16).double()
    emulated = (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).t()
    unrounded = x.double() @ weight.double().t()
    assert (found - emulated).norm() <= (emulated - unrounded).norm() / 4
    on_cpu = to_float8(x.cpu())
    assert torch.equal(a.cpu().float(), on_cpu[0].float()) and torch.equal(a_scale.cpu(), on_cpu[1])
