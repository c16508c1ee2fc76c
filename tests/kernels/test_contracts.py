"""The promises of every kernel's public function, whatever it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamapro import ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu

pytestmark = pytest.mark.usefixtures("small_tiles", "small_chunks")


class Seen(TorchDispatchMode):
    """Notes the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Call(NamedTuple):
    """A function, the inputs it has gradients of, and the arguments after those."""

    function: Callable[..., Any]
    inputs: list[Tensor]
    constants: list[Any]


def loss_sum(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy.linear_cross_entropy(x, weight, targets)[0]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm.rms_norm(x, weight, 1e-5)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm.add_rms_norm(x, residual, weight, 1e-5)


def call_of(name: str, batch: int, length: int, normal: Callable[..., Tensor]) -> Call:
    """A small call of an op, by its name and how it is called."""
    op, *words = name.split(", ")
    x, y, weight = (normal(batch, length, 40, seed=i) for i in range(3))
    weight = weight.flatten(0, 1)
    if op == "rms_norm":
        return Call(norm, [x, normal(40, seed=3)], [])
    if op == "add_rms_norm":
        return Call(add_norm, [x, y, normal(40, seed=3)], [])
    if op == "swiglu":
        return Call(swiglu.swiglu, [x, y], [])
    if op == "rope":
        positions = torch.arange(length, device=x.device)
        frequencies = ops.rope_frequencies(16, 1e4, device=x.device)
        table = ops.rope_table(positions, frequencies, x.dtype)
        return Call(rope.rope, [normal(batch, length, 3, 16, seed=0)], list(table))
    if op == "linear_cross_entropy":
        x, weight = x.flatten(0, 1), normal(97, 40, seed=3)
        targets = torch.arange(batch * length, device=x.device) % 97
        if "frozen" in words:
            return Call(loss_sum, [x], [weight, targets])
        return Call(loss_sum, [x, weight], [targets])
    qkv = [normal(batch, length, heads, 16, seed=i) for i, heads in enumerate((2, 1, 1))]
    bounds = ops.attention_bounds(length, length, 7, device=x.device)
    return Call(attention.attention, qkv, [bounds] if "windowed" in words else [])


@pytest.fixture(
    params=[
        "rms_norm",
        "add_rms_norm",
        "rope",
        "swiglu",
        "linear_cross_entropy",
        "linear_cross_entropy, frozen",
        "attention",
        "attention, windowed",
    ]
)
def call(request: pytest.FixtureRequest, normal: Callable[..., Tensor]) -> Callable[..., Call]:
    """`call(batch, length)`: a small call of the op that the test is run for."""
    return lambda batch, length: call_of(request.param, batch, length, normal)


def outputs_of(call: Call, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = call.function(*inputs, *call.constants)
    return out if isinstance(out, tuple) else (out,)


def test_gradients_are_the_same_bits_every_time_and_nothing_is_changed(
    call: Callable[..., Call], results: Callable[..., list[Tensor]]
) -> None:
    """One graph gives them twice and a second one again; inputs and gradients are unchanged."""
    made = call(1, 20)
    leaves = [x.detach().requires_grad_() for x in made.inputs]
    outputs = outputs_of(made, leaves)
    gradients = [torch.randn_like(x) for x in outputs]
    kept = [x.clone() for x in (*made.inputs, *gradients)]
    first = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
    again = torch.autograd.grad(outputs, leaves, gradients)
    anew = results(made.function, made.inputs, gradients, made.constants)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, (*outputs, *first), anew))
    assert all(map(torch.equal, (*made.inputs, *gradients), kept))
    given = {x.data_ptr() for x in (*made.inputs, *gradients)}
    assert not given & {x.data_ptr() for x in (*outputs, *first)}


def test_frozen_inputs_give_an_output_without_a_graph(call: Callable[..., Call]) -> None:
    """Nothing is kept for a backward that cannot come."""
    made = call(1, 5)
    assert not any(x.requires_grad for x in outputs_of(made, made.inputs))


def test_op_compiles_into_one_graph(
    call: Callable[..., Call], results: Callable[..., list[Tensor]]
) -> None:
    """torch.compile takes it without a break, for two lengths, and gives the same bits."""

    def block(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        out = function(x.sin(), *others)
        return tuple(2 * y for y in (out if isinstance(out, tuple) else (out,)))

    function = call(1, 1).function
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for length in (9, 20):
        made = call(1, length)
        gradients = [torch.ones_like(x) for x in outputs_of(made, made.inputs)]
        found, expected = (
            results(f, made.inputs, gradients, made.constants) for f in (compiled, block)
        )
        assert all(map(torch.equal, found, expected))


def test_a_call_takes_no_way_through_the_dispatcher(
    call: Callable[..., Call], results: Callable[..., list[Tensor]]
) -> None:
    """Neither forward nor backward: that way costs time of the host."""
    made = call(1, 5)
    gradients = [torch.ones_like(x) for x in outputs_of(made, made.inputs)]
    with Seen() as seen:
        results(made.function, made.inputs, gradients, made.constants)
    assert seen.names and not any("llamapro" in name for name in seen.names)


def test_a_second_derivative_is_refused(call: Callable[..., Call]) -> None:
    """The kernels of backward have none, and a wrong one must not pass for right."""
    made = call(1, 5)
    leaves = [x.requires_grad_() for x in made.inputs]
    total = sum(x.square().sum() for x in outputs_of(made, leaves))
    found = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(x.sum() for x in found).backward()


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0)])
def test_no_elements_give_outputs_of_the_right_shape_and_zero_gradients(
    batch: int, length: int, call: Callable[..., Call], results: Callable[..., list[Tensor]]
) -> None:
    """Without a batch or a token, a weight's gradient is 0."""
    made = call(batch, length)
    full = call(2, 3)
    outputs = outputs_of(made, made.inputs)
    for x, like in zip(outputs, outputs_of(full, full.inputs), strict=True):
        assert x.shape[2:] == like.shape[2:] and x.dim() == like.dim()
        assert x.numel() == 0 or x.item() == 0
    gradients = [torch.ones_like(x) for x in outputs]
    found = results(made.function, made.inputs, gradients, made.constants)[len(outputs) :]
    for x, gradient in zip(made.inputs, found, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("module", [attention, cross_entropy, rms_norm, rope, swiglu])
def test_unsupported_says_why(module: Any, device: str) -> None:
    """fp64 and a device without Triton have a reason."""
    assert module.unsupported(torch.device(device), torch.float16, 128) is None
    assert "float64" in module.unsupported(torch.device(device), torch.float64, 128)
    assert "device" in module.unsupported(torch.device("meta"), torch.float32, 128)
