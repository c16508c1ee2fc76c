"""The rotary embedding's kernel against PyTorch and fp64, in every storage layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import backends, ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import rope as kernel

LAYOUTS = ("contiguous", "offset", "padded", "transposed", "every_other", "expanded")
Check = Callable[[list[Tensor], list[Tensor]], None]


def normal(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def table(
    *shape: int, size: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions that differ in every token of every batch."""
    positions = 3 + 5 * torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    return ops.rope_table(positions, ops.rope_frequencies(size, 10_000.0), dtype)


def by_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    with backends.use("torch"):
        return ops.rope(q, k, cos, sin)


def results(function: Any, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The outputs of a function and the gradients of q and k."""
    q, k = (x.detach().requires_grad_() for x in inputs[:2])
    outputs = function(q, k, *inputs[2:])
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, (q, k), gradients))


@pytest.fixture
def check(assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None]) -> Check:
    """`check([q, k, cos, sin], [dq, dk])`: outputs and gradients by the error rule."""

    def compare(inputs: list[Tensor], gradients: list[Tensor]) -> None:
        found = results(kernel.rope, inputs, gradients)
        assert all(x.is_contiguous() for x in found)
        expected = results(by_torch, inputs, gradients)
        wide = [x.double() for x in inputs], [x.double() for x in gradients]
        for ours, theirs, best in zip(found, expected, results(by_torch, *wide), strict=True):
            assert_as_exact_as_torch(ours, theirs, best)

    return compare


@pytest.mark.parametrize("size", [2, 34, 64, 128, 254, 1000])
def test_rope_is_as_exact_as_torch_in_every_layout(
    size: int,
    dtype: torch.dtype,
    device: str,
    layout: str,
    in_layout: Callable[[Tensor, str], Tensor],
    check: Check,
    guarded: None,
) -> None:
    """Outputs and gradients; q, k, table, dq, dk in layouts of their own; none written outside."""
    q, dq = (normal(2, 2, 3, size, seed=i, device=device, dtype=dtype) for i in range(2))
    k, dk = (normal(2, 2, 1, size, seed=i, device=device, dtype=dtype) for i in range(2, 4))
    cos, sin = table(2, 2, size=size, device=device, dtype=dtype)
    for i, other in enumerate(LAYOUTS):
        inputs = [in_layout(q, layout), in_layout(k, LAYOUTS[i - 1])]
        inputs += [in_layout(cos, LAYOUTS[i - 2]), in_layout(sin, LAYOUTS[i - 3])]
        check(inputs, [in_layout(dq, other), in_layout(dk, LAYOUTS[i - 4])])


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (5, 5), (2, 3)], ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["(T, D)", "(1, T, D)", "(B, T, D)"])
def test_heads_and_tables_of_every_kind(
    heads: tuple[int, int], batch: tuple[int, ...], device: str, check: Check, guarded: None
) -> None:
    """Grouped heads, heads that fill no block; one table for all batches, or one for each."""
    B = T = 3  # alike, so that a table's axes are told apart by their number
    q, dq = (normal(B, T, heads[0], 16, seed=i, device=device) for i in range(2))
    k, dk = (normal(B, T, heads[1], 16, seed=i, device=device) for i in range(2, 4))
    check([q, k, *table(*batch, T, size=16, device=device)], [dq, dk])


def test_backward_is_the_inverse_rotation(dtype: torch.dtype, device: str) -> None:
    """The gradient of what was rotated, given that, is what it was before, but for rounding."""
    q, k = (normal(2, 3, 4, 64, seed=i, device=device, dtype=dtype) for i in range(2))
    cos, sin = table(2, 3, size=64, device=device)
    cos, sin = cos.to(dtype), sin.to(dtype)
    q_out, k_out, q_back, k_back = results(
        lambda *inputs: kernel.rope(*inputs),
        [q, k, cos, sin],
        list(kernel.rope(q, k, cos, sin)),
    )
    assert not torch.allclose(q_out, q, atol=0.1) and not torch.allclose(k_out, k, atol=0.1)
    # Roundings of cos, sin, of what is rotated and of what comes back.
    bound = 4 * torch.finfo(dtype).eps * max(q.abs().max().item(), k.abs().max().item())
    assert (q_back - q).abs().max() <= bound and (k_back - k).abs().max() <= bound


@pytest.fixture
def launches(launches_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The kernel's launches, as they are made."""
    return launches_of(kernel, "rope_kernel")


@pytest.mark.parametrize("needs_q, needs_k", [(True, True), (True, False), (False, True)])
def test_one_launch_each_way_for_what_is_asked(
    needs_q: bool, needs_k: bool, device: str, launches: list[dict[str, Any]]
) -> None:
    """Forward rotates q and k at once; backward too, without the one that no one needs."""
    q = normal(2, 3, 4, 16, seed=0, device=device).requires_grad_(needs_q)
    k = normal(2, 3, 2, 16, seed=1, device=device).requires_grad_(needs_k)
    q_out, k_out = kernel.rope(q, k, *table(3, size=16, device=device))
    (q_out.sum() + k_out.sum()).backward()
    assert (q.grad is not None, k.grad is not None) == (needs_q, needs_k)
    _, backward = launches
    assert (backward["q_ptr"] is not None) == needs_q
    assert (backward["k_ptr"] is not None) == needs_k


def test_parts_of_a_fused_projection_are_not_copied(
    device: str, launches: list[dict[str, Any]], check: Check
) -> None:
    """q and k cut out of one tensor reach the kernel where they lie."""
    fused = normal(2, 3, (4 + 2 + 2) * 16, seed=0, device=device)
    q = fused[..., : 4 * 16].unflatten(-1, (4, 16))
    k = fused[..., 4 * 16 : 6 * 16].unflatten(-1, (2, 16))
    dq, dk = normal(2, 3, 4, 16, seed=1, device=device), normal(2, 3, 2, 16, seed=2, device=device)
    check([q, k, *table(3, size=16, device=device)], [dq, dk])
    assert launches[0]["q_ptr"].data_ptr() == q.data_ptr()
    assert launches[0]["k_ptr"].data_ptr() == k.data_ptr()


def test_nothing_is_changed_in_place(device: str) -> None:
    """Inputs and incoming gradients stay as they were; a second backward gives the same."""
    q, dq = (normal(2, 3, 4, 16, seed=i, device=device) for i in range(2))
    k, dk = (normal(2, 3, 2, 16, seed=i, device=device) for i in range(2, 4))
    cos, sin = table(3, size=16, device=device)
    kept = [x.clone() for x in (q, k, cos, sin, dq, dk)]
    q.requires_grad_(), k.requires_grad_()
    outputs = kernel.rope(q, k, cos, sin)
    first = torch.autograd.grad(outputs, (q, k), (dq, dk), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(outputs, (q, k), (dq, dk))))
    assert all(map(torch.equal, (q, k, cos, sin, dq, dk), kept))


def test_sixteen_bit_products_are_not_rounded(
    device: str,
) -> None:
    """One rounding, of the result: fp16 in is fp16 of what fp32 gives."""
    q, k = (normal(1, 9, 4, 64, seed=i, device=device, dtype=torch.float16) for i in range(2))
    cos, sin = table(9, size=64, device=device, dtype=torch.float16)
    wide = by_torch(q.float(), k.float(), cos.float(), sin.float())
    for ours, theirs in zip(kernel.rope(q, k, cos, sin), wide, strict=True):
        # A GPU fuses a product with the sum, which can turn a tie the other way.
        assert (ours != theirs.half()).float().mean() < 0.002


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, int], device: str) -> None:
    """No batch or no token: tensors of the right shape come back."""
    q = torch.empty(*shape, 4, 16, device=device, requires_grad=True)
    k = torch.empty(*shape, 2, 16, device=device, requires_grad=True)
    q_out, k_out = kernel.rope(q, k, *table(shape[1], size=16, device=device))
    assert q_out.shape == q.shape and k_out.shape == k.shape
    (q_out.sum() + k_out.sum()).backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_the_op_describes_itself_truthfully(device: str) -> None:
    """Schema, shapes and strides for tracing, aliasing: PyTorch's own check of a custom op."""
    q = normal(2, 4, 3, 16, seed=0, device=device).transpose(1, 2)
    k = normal(2, 3, 2, 16, seed=1, device=device)
    cos, sin = table(3, size=16, device=device)
    for flags in ((False, True, True), (True, True, False), (True, False, True)):
        torch.library.opcheck(torch.ops.llamapro.rope.default, (q, k, cos, sin, *flags))


def test_compiles_to_one_graph(device: str) -> None:
    """torch.compile takes it without a break, for two lengths, and gives the same."""

    def block(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = kernel.rope(q.sin(), k, cos, sin)
        return q * 2, k * 3

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for length in (3, 5):
        q, dq = (normal(2, length, 4, 16, seed=i, device=device) for i in range(2))
        k, dk = (normal(2, length, 2, 16, seed=i, device=device) for i in range(2, 4))
        inputs = [q, k, *table(length, size=16, device=device)]
        found, expected = (results(f, inputs, [dq, dk]) for f in (compiled, block))
        assert all(map(torch.equal, found, expected))


def test_says_what_it_cannot_take(device: str) -> None:
    """`unsupported` gives the reason, or None; misfits raise before anything is launched."""
    where = torch.device(device)
    assert kernel.unsupported(where, torch.float16, 80) is None
    assert "15 is odd" in str(kernel.unsupported(where, torch.float16, 15))
    assert "float64" in str(kernel.unsupported(where, torch.float64, 64))
    q, k = torch.ones(2, 3, 4, 16, device=device), torch.ones(2, 3, 2, 16, device=device)
    cos, sin = table(3, size=16, device=device)
    with pytest.raises(ValueError, match="15 is odd"):
        kernel.rope(q[..., :15], k[..., :15], cos[..., :15], sin[..., :15])
    with pytest.raises(ValueError, match=r"k is \(2, 2, 2, 16\)"):
        kernel.rope(q, k[:, :2], cos, sin)
    with pytest.raises(ValueError, match=r"cos is \(2, 16\)"):
        kernel.rope(q, k, cos[:2], sin[:2])
    with pytest.raises(ValueError, match=r"sin is \(3, 8\)"):
        kernel.rope(q, k, cos, sin[:, :8])
    with pytest.raises(ValueError, match=r"cos torch\.float16"):
        kernel.rope(q, k, cos.half(), sin)
