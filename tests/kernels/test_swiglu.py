"""The SwiGLU kernels against PyTorch and fp64, in every storage layout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import swiglu as kernel

Check = Callable[[list[Tensor], list[Tensor]], None]
Normal = Callable[..., Tensor]
Results = Callable[..., list[Tensor]]


@pytest.fixture
def by_torch(in_torch: Callable[..., Any]) -> Callable[..., Tensor]:
    return in_torch(ops.swiglu)


@pytest.fixture
def check(compare: Callable[..., None], by_torch: Callable[..., Tensor]) -> Check:
    """`check([gate, up], [dy])`: the output and both gradients by the error rule."""
    return partial(compare, kernel.swiglu, by_torch)


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The launches of both kernels, as they are made."""
    return launches_of(kernel, "swiglu_forward_kernel", "swiglu_backward_kernel")


@pytest.mark.parametrize("size", [1, 17, 64, 127, 128, 1000])
def test_swiglu_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    layouts: tuple[str, ...],
    in_layout: Callable[[Tensor, str], Tensor],
    normal: Normal,
    check: Check,
    guarded: None,
) -> None:
    """Output and both gradients; gate, up and dy in layouts of their own; none written outside."""
    gate, up, dy = (normal(2, 3, size, seed=i, dtype=dtype) for i in range(3))
    gate, up, dy = map(in_layout, (3 * gate, up, dy), layouts[:3])
    check([gate, up], [dy])


def test_blocks_are_filled_across_rows(
    check: Check, launches: list[dict[str, Any]], guarded: None, normal: Normal
) -> None:
    """Several blocks, the last one in part."""
    gate, up, dy = (normal(3, 1900, seed=i) for i in range(3))
    check([gate, up], [dy])
    assert [launch["grid"] for launch in launches] == [(3,), (3,)]


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 5), (0,), (3, 0)], ids=str)
def test_any_number_of_axes(shape: tuple[int, ...], check: Check, normal: Normal) -> None:
    """There may be one to four axes, no rows, and rows of no elements."""
    gate, up, dy = (normal(*shape, seed=i) for i in range(3))
    check([gate, up], [dy])


@pytest.mark.parametrize("needs_gate, needs_up", [(True, True), (True, False), (False, True)])
def test_only_what_is_asked_for_is_computed(
    needs_gate: bool, needs_up: bool, launches: list[dict[str, Any]], normal: Normal
) -> None:
    """One launch each way, without the gradient that no one needs."""
    gate = normal(5, 40, seed=0).requires_grad_(needs_gate)
    up = normal(5, 40, seed=1).requires_grad_(needs_up)
    kernel.swiglu(gate, up).sum().backward()
    assert (gate.grad is not None, up.grad is not None) == (needs_gate, needs_up)
    _, backward = launches
    assert (backward["dgate_ptr"] is not None) == needs_gate
    assert (backward["dup_ptr"] is not None) == needs_up


def test_only_the_inputs_wait_for_backward(normal: Normal) -> None:
    """Nothing is saved that was not there before; SiLU is computed again."""
    gate, up = (normal(5, 40, seed=i).requires_grad_() for i in range(2))
    saved = []

    def see(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        kernel.swiglu(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


def test_silu_is_rounded_before_the_product(
    normal: Normal, results: Results, by_torch: Callable[..., Tensor]
) -> None:
    """The output and d up in fp16 are PyTorch's, but for a last bit of the exponential."""
    inputs = [normal(8, 500, seed=i, dtype=torch.float16) for i in range(2)]
    dy = normal(8, 500, seed=2, dtype=torch.float16)
    found, expected = (results(f, inputs, [dy]) for f in (kernel.swiglu, by_torch))
    unrounded = results(by_torch, [x.double() for x in inputs], [dy.double()])
    for i in (0, 2):
        assert (found[i] != expected[i]).float().mean() < 0.01
        assert (unrounded[i].half() != expected[i]).float().mean() > 0.1  # what the test would see


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
def test_extreme_gates_saturate(
    dtype: torch.dtype, device: str, check: Check, results: Results
) -> None:
    """SiLU is the identity far above zero, 0 far below; no exponential that overflows is seen."""
    gate = torch.tensor([-6e4, -200.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 200.0, 6e4])
    gate = gate.to(device, dtype)
    ones = torch.ones_like(gate)
    check([gate, 0.5 * ones], [ones])
    y, dgate, dup = results(kernel.swiglu, [gate, ones], [ones])
    assert y[0] == 0 and dgate[0] == 0 and dup[0] == 0
    assert y[-1] == gate[-1] and dgate[-1] == 1 and dup[-1] == gate[-1]


def test_the_ops_describe_themselves_truthfully(
    normal: Normal, opcheck: Callable[..., Any]
) -> None:
    """PyTorch's check passes for each choice of gradients."""
    gate, up = normal(4, 3, 80, seed=0).transpose(0, 1).chunk(2, -1)
    dy = normal(3, 4, 40, seed=1)
    opcheck(torch.ops.llamapro.swiglu.default, (gate, up))
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(torch.ops.llamapro.swiglu_backward.default, (dy, gate, up, *needs))


def test_wrong_shapes_and_dtypes_are_refused(device: str) -> None:
    """They raise before anything is launched; every size is taken."""
    assert kernel.unsupported(torch.device(device), torch.float16, 1 << 20) is None
    gate = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"up is \(8,\)"):
        kernel.swiglu(gate, gate[0])
    with pytest.raises(ValueError, match=r"up is \(2, 8\) torch\.float16"):
        kernel.swiglu(gate, gate.half())
