"""What the attention gradients promise beyond values: no work not asked for, the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import backends, ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import attention, tiles
from llamapro.kernels import attention_backward as backward

Compare = Callable[[Tensor, Tensor, Tensor], None]
KERNELS = ("delta", "key_value", "query")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 queries by 32 keys, so that short sequences take several tiles of either."""
    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(16, 32, 4, 2))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backward kernels that are launched from here on; the key_value kernel with its mode."""
    names: list[str] = []

    def noting(name: str, kernel: Any) -> Any:
        class Launcher:
            def __getitem__(self, grid: Any) -> Callable[..., Any]:
                def launch(*args: Any, **options: Any) -> Any:
                    names.append("single_pass" if options.get("ACCUMULATE_DQ") else name)
                    return kernel[grid](*args, **options)

                return launch

        return Launcher()

    kernels = {"delta": "_delta_kernel"} | {n: f"_attention_{n}_kernel" for n in KERNELS[1:]}
    for name, attribute in kernels.items():
        monkeypatch.setattr(backward, attribute, noting(name, getattr(backward, attribute)))
    return names


def inputs(
    T: int, S: int, device: str, dtype: torch.dtype = torch.float32, D: int = 16
) -> tuple[Tensor, ...]:
    """q of 4 heads, k and v of 2, and an output gradient."""
    generator = torch.Generator().manual_seed(T + S)
    sizes = [(1, T, 4, D), (1, S, 2, D), (1, S, 2, D), (1, T, 4, D)]
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in sizes)


def gradients(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(function(*leaves, *options), leaves, dout)


@pytest.mark.parametrize(
    "needed, expected",
    [
        ("q", ["delta", "query"]),
        ("k", ["delta", "key_value"]),
        ("v", ["delta", "key_value"]),
        ("kv", ["delta", "key_value"]),
        ("qk", ["delta", "key_value", "query"]),
        ("qkv", ["delta", "key_value", "query"]),
    ],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_only_gradients_asked_for_are_computed(
    needed: str, expected: list[str], deterministic: bool, device: str, launched: list[str]
) -> None:
    """One kernel less without dq, one less without dk and dv; what is asked for is the same."""
    *qkv, dout = inputs(20, 20, device)
    wanted = dict(zip("qkv", gradients(attention.attention, *qkv, dout), strict=True))
    launched.clear()
    leaves = {name: x.requires_grad_(name in needed) for name, x in zip("qkv", qkv, strict=True)}
    out = attention.attention(*leaves.values(), None, deterministic)
    out.backward(dout)
    in_one_pass = not deterministic and len(expected) == 3
    assert launched == (["delta", "single_pass"] if in_one_pass else expected)
    for name, x in leaves.items():
        assert (x.grad is not None) == (name in needed)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, wanted[name], rtol=1e-5, atol=1e-6)


def test_nothing_is_launched_backward_without_a_gradient(device: str, launched: list[str]) -> None:
    """Frozen inputs give an output without a graph."""
    q, k, v, _ = inputs(20, 20, device)
    assert not attention.attention(q, k, v).requires_grad and launched == []


@pytest.mark.parametrize("bounded", [False, True])
def test_gradients_are_the_same_bits_every_time(
    bounded: bool, device: str, launched: list[str]
) -> None:
    """Unless asked otherwise; and by kernels that add up nothing by atomics."""
    arguments = inputs(50, 50, device, torch.float16)
    bounds = ops.attention_bounds(50, 50, 20, device=device) if bounded else None
    once = gradients(attention.attention, *arguments, bounds)
    for x, again in zip(
        once, gradients(attention.attention, *arguments, bounds, True), strict=True
    ):
        assert torch.equal(x, again)
    assert "single_pass" not in launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T, window", [(70, None), (41, None), (70, 20), (41, 33)])
def test_single_pass_is_as_exact_as_torch(
    T: int,
    window: int | None,
    dtype: torch.dtype,
    device: str,
    launched: list[str],
    assert_as_exact_as_torch: Compare,
) -> None:
    """dq added up by atomics, of all tiles and heads, and dk and dv with it."""
    arguments = inputs(T, 70, device, dtype, D=24)
    bounds = None if window is None else ops.attention_bounds(T, 70, window, device=device)
    found = gradients(attention.attention, *arguments, bounds, False)
    assert launched == ["delta", "single_pass"]
    with backends.use("torch"):
        reference = gradients(ops.attention, *arguments, bounds)
        exact = gradients(ops.attention, *(x.double() for x in arguments), bounds)
    for kernel, torch_, fp64 in zip(found, reference, exact, strict=True):
        assert_as_exact_as_torch(kernel, torch_, fp64)


def test_wide_heads_take_the_split_kernels(device: str, launched: list[str]) -> None:
    """Beyond a head dim of 128 the single pass has no tile, and is not taken."""
    gradients(attention.attention, *inputs(20, 20, device, D=136), None, False)
    assert launched == ["delta", "key_value", "query"]
    assert not any(key[0] == "single_pass" and key[2] > 128 for key in tiles.TILES)


def test_inputs_and_output_gradient_are_left_alone(device: str) -> None:
    """Neither direction writes to what it is given, nor returns a view of it."""
    arguments = inputs(20, 20, device)
    before = [x.clone() for x in arguments]
    found = gradients(attention.attention, *arguments, None, False)
    for x, was in zip(arguments, before, strict=True):
        assert torch.equal(x, was)
        assert all(x.data_ptr() != y.data_ptr() for y in found)


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, True), (False, True, True), (True, True, False)]
)
def test_operator_is_registered_correctly(needs: tuple[bool, bool, bool], device: str) -> None:
    """torch.library.opcheck; what is not asked for has no elements, for fake tensors too."""
    q, k, v, dout = inputs(20, 20, device)
    first, last = ops.attention_bounds(20, 20, 7, device=device)
    out, lse = attention.attention_forward(q, k, v, first)
    arguments = (dout, q, k, v, out, lse, first, last, *needs)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward.attention_backward, arguments, test_utils=tests)
    dq, dk, dv = backward.attention_backward(*arguments)
    assert (dq.shape == q.shape) if needs[0] else (dq.numel() == 0)
    assert (dk.shape == dv.shape == k.shape) if needs[1] else (dk.numel() == dv.numel() == 0)
