"""The SwiGLU kernels against PyTorch and fp64, in every storage layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import backends, ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import swiglu as kernel

SIZES = (1, 17, 64, 127, 128, 1000)
LAYOUTS = ("contiguous", "offset", "padded", "transposed", "every_other", "expanded")
Check = Callable[[list[Tensor], Tensor], None]


def normal(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def by_torch(gate: Tensor, up: Tensor) -> Tensor:
    with backends.use("torch"):
        return ops.swiglu(gate, up)


def results(function: Any, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output of a function and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


@pytest.fixture
def check(assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None]) -> Check:
    """`check([gate, up], dy)`: the output and both gradients by the error rule."""

    def compare(inputs: list[Tensor], dy: Tensor) -> None:
        found = results(kernel.swiglu, inputs, dy)
        assert all(x.is_contiguous() for x in found)
        expected = results(by_torch, inputs, dy)
        exact = results(by_torch, [x.double() for x in inputs], dy.double())
        for ours, theirs, best in zip(found, expected, exact, strict=True):
            assert_as_exact_as_torch(ours, theirs, best)

    return compare


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The launches of both kernels, as they are made."""
    return launches_of(kernel, "swiglu_forward_kernel", "swiglu_backward_kernel")


@pytest.mark.parametrize("size", SIZES)
def test_swiglu_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    device: str,
    layout: str,
    in_layout: Callable[[Tensor, str], Tensor],
    check: Check,
    guarded: None,
) -> None:
    """Output and both gradients; gate, up and dy in layouts of their own; none written outside."""
    gate, up, dy = (normal(2, 3, size, seed=i, device=device, dtype=dtype) for i in range(3))
    for i, other in enumerate(LAYOUTS):
        check([in_layout(3 * gate, layout), in_layout(up, LAYOUTS[i - 1])], in_layout(dy, other))


def test_dense_tensors_are_one_long_row(
    device: str, check: Check, launches: list[dict[str, Any]], guarded: None
) -> None:
    """Blocks are filled across rows; here several, the last one in part."""
    gate, up, dy = (normal(3, 1900, seed=i, device=device) for i in range(3))
    check([gate, up], dy)
    assert [launch["F"] for launch in launches] == [3 * 1900, 3 * 1900]


def test_rows_longer_than_a_block(device: str, check: Check, guarded: None) -> None:
    """Strided rows of more than one block, the last one part full."""
    gate, up = normal(2, 3, 2 * 2100, seed=0, device=device).chunk(2, -1)
    check([gate, up], normal(2, 3, 2100, seed=1, device=device))


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 5)], ids=str)
def test_any_number_of_axes(shape: tuple[int, ...], device: str, check: Check) -> None:
    """From one axis to four."""
    gate, up, dy = (normal(*shape, seed=i, device=device) for i in range(3))
    check([gate, up], dy)


def test_halves_of_one_tensor_are_not_copied(device: str, launches: list[dict[str, Any]]) -> None:
    """gate and up of a fused projection reach the kernels where they lie."""
    both = normal(2, 3, 2 * 40, seed=0, device=device).requires_grad_()
    gate, up = both.chunk(2, -1)
    kernel.swiglu(gate, up).sum().backward()
    assert len(launches) == 2
    for launch in launches:
        assert launch["gate_ptr"].data_ptr() == gate.data_ptr()
        assert launch["up_ptr"].data_ptr() == up.data_ptr()


@pytest.mark.parametrize("needs_gate, needs_up", [(True, True), (True, False), (False, True)])
def test_only_what_is_asked_for_is_computed(
    needs_gate: bool, needs_up: bool, device: str, launches: list[dict[str, Any]]
) -> None:
    """One launch each way, without the gradient that no one needs."""
    gate = normal(5, 40, seed=0, device=device).requires_grad_(needs_gate)
    up = normal(5, 40, seed=1, device=device).requires_grad_(needs_up)
    kernel.swiglu(gate, up).sum().backward()
    assert (gate.grad is not None, up.grad is not None) == (needs_gate, needs_up)
    _, backward = launches
    assert (backward["dgate_ptr"] is not None) == needs_gate
    assert (backward["dup_ptr"] is not None) == needs_up


def test_only_the_inputs_wait_for_backward(device: str) -> None:
    """Nothing is saved that was not there before; SiLU is computed again."""
    gate, up = (normal(5, 40, seed=i, device=device).requires_grad_() for i in range(2))
    saved = []

    def see(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        kernel.swiglu(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


def test_nothing_is_changed_in_place(device: str) -> None:
    """Inputs and the incoming gradient stay as they were; a second backward gives the same."""
    gate, up, dy = (normal(4, 40, seed=i, device=device) for i in range(3))
    kept = [x.clone() for x in (gate, up, dy)]
    gate.requires_grad_(), up.requires_grad_()
    y = kernel.swiglu(gate, up)
    first = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (gate, up), dy)))
    assert all(map(torch.equal, (gate, up, dy), kept))


def test_silu_is_rounded_before_the_product(device: str) -> None:
    """In fp16 output and d up are PyTorch's, but for a last bit of the exponential."""
    inputs = [normal(8, 500, seed=i, device=device, dtype=torch.float16) for i in range(2)]
    dy = normal(8, 500, seed=2, device=device, dtype=torch.float16)
    found, expected = (results(f, inputs, dy) for f in (kernel.swiglu, by_torch))
    unrounded = results(by_torch, [x.double() for x in inputs], dy.double())
    for i in (0, 2):
        assert (found[i] != expected[i]).float().mean() < 0.01
        assert (unrounded[i].half() != expected[i]).float().mean() > 0.1  # what the test would see


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
def test_extreme_gates_saturate(dtype: torch.dtype, device: str, check: Check) -> None:
    """SiLU is the identity far above zero, 0 far below; no exponential that overflows is seen."""
    gate = torch.tensor([-6e4, -200.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 200.0, 6e4])
    gate = gate.to(device, dtype)
    check([gate, torch.full_like(gate, 0.5)], torch.ones_like(gate))
    y, dgate, dup = results(kernel.swiglu, [gate, torch.ones_like(gate)], torch.ones_like(gate))
    assert y[0] == 0 and dgate[0] == 0 and dup[0] == 0
    assert y[-1] == gate[-1] and dgate[-1] == 1 and dup[-1] == gate[-1]


@pytest.mark.parametrize("shape", [(0,), (2, 0, 8), (3, 0)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, ...], device: str) -> None:
    """Tensors without elements come back in shape."""
    gate, up = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    y = kernel.swiglu(gate, up)
    assert y.shape == shape
    y.sum().backward()
    assert gate.grad.shape == up.grad.shape == shape


def test_the_ops_describe_themselves_truthfully(device: str) -> None:
    """Schema, shapes and strides for tracing, aliasing: PyTorch's own check of a custom op."""
    gate, up = normal(4, 3, 80, seed=0, device=device).transpose(0, 1).chunk(2, -1)
    dy = normal(3, 4, 40, seed=1, device=device)
    torch.library.opcheck(torch.ops.llamapro.swiglu.default, (gate, up))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.llamapro.swiglu_backward.default, (dy, gate, up, *needs))


def test_compiles_to_one_graph(device: str) -> None:
    """torch.compile takes it without a break, for two lengths, and gives the same."""

    def block(gate: Tensor, up: Tensor) -> Tensor:
        return kernel.swiglu(gate.sin(), up) * 2

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for length in (3, 5):
        gate, up, dy = (normal(length, 40, seed=i, device=device) for i in range(3))
        found, expected = (results(f, [gate, up], dy) for f in (compiled, block))
        assert all(map(torch.equal, found, expected))


def test_says_what_it_cannot_take(device: str) -> None:
    """`unsupported` gives the reason, or None; misfits raise before anything is launched."""
    assert kernel.unsupported(torch.device(device), torch.float16, 1 << 20) is None
    assert "float64" in str(kernel.unsupported(torch.device(device), torch.float64, 64))
    gate = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"up is \(8,\)"):
        kernel.swiglu(gate, gate[0])
    with pytest.raises(ValueError, match=r"up is \(2, 8\) torch\.float16"):
        kernel.swiglu(gate, gate.half())
