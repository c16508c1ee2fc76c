"""The attention gradients beyond their values: no work that nobody asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import attention
from llamapro.kernels import attention_backward as backward

pytestmark = pytest.mark.usefixtures("small_tiles")
KEY_VALUE, QUERY = "_attention_key_value_kernel", "_attention_query_kernel"


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The launches of the two large backward kernels, as they are made."""
    return launches_of(backward, KEY_VALUE, QUERY)


@pytest.fixture
def inputs(normal: Callable[..., Tensor]) -> list[Tensor]:
    """q of 2 heads, k and v of 1, and an output gradient."""
    return [normal(1, 20, heads, 16, seed=i) for i, heads in enumerate((2, 1, 1, 2))]


@pytest.mark.parametrize(
    "needed, expected",
    [
        ("q", [QUERY]),
        ("k", [KEY_VALUE]),
        ("v", [KEY_VALUE]),
        ("kv", [KEY_VALUE]),
        ("qk", [KEY_VALUE, QUERY]),
        ("qkv", [KEY_VALUE, QUERY]),
    ],
)
def test_only_gradients_asked_for_are_computed(
    needed: str,
    expected: list[str],
    inputs: list[Tensor],
    launches: list[dict[str, Any]],
    results: Callable[..., list[Tensor]],
) -> None:
    """Without dq there is one kernel less, and without dk and dv another; the rest is the same."""
    *qkv, dout = inputs
    _, *all_three = results(attention.attention, qkv, [dout])
    launches.clear()
    leaves = [x.requires_grad_(name in needed) for name, x in zip("qkv", qkv, strict=True)]
    attention.attention(*leaves).backward(dout)
    assert [launch["kernel"] for launch in launches] == expected
    for name, x, wanted in zip("qkv", leaves, all_three, strict=True):
        assert (x.grad is not None) == (name in needed)
        assert x.grad is None or torch.equal(x.grad, wanted)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_operator_is_registered_correctly(
    needs: tuple[bool, bool], inputs: list[Tensor], device: str, opcheck: Callable[..., Any]
) -> None:
    """A gradient that is not asked for has no elements, for fake tensors too."""
    q, k, v, dout = inputs
    first, last = ops.attention_bounds(20, 20, 7, device=device)
    out, lse = attention.attention_forward(q, k, v, first)
    arguments = (dout, q, k, v, out, lse, first, last, *needs)
    opcheck(torch.ops.llamapro.attention_backward.default, arguments)
    dq, dk, dv = backward.attention_backward(*arguments)
    assert (dq.shape == q.shape) if needs[0] else (dq.numel() == 0)
    assert (dk.shape == dv.shape == k.shape) if needs[1] else (dk.numel() == dv.numel() == 0)
