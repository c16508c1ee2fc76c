"""`ops.linear_kl`: the KL divergence of two models through one output embedding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamapro import ops
from llamapro.kernels import cpu

IGNORED = ops.IGNORE_INDEX
N, C, V = 37, 16, 50


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the teacher's, weight, targets of which every third is ignored."""
    generator = torch.Generator().manual_seed(0)
    x, teacher_x = (torch.randn(N, C, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(V, C, generator=generator).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::3] = IGNORED
    return x.requires_grad_(), teacher_x, weight.requires_grad_(), targets


def plain_kl(x: Tensor, teacher_x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """The formula, left to autograd."""
    kept = targets != IGNORED
    log_p = (x[kept] @ weight.T).log_softmax(-1)
    log_q = (teacher_x[kept] @ weight[:rows].detach().T).log_softmax(-1)
    return torch.nn.functional.kl_div(log_p[:, :rows], log_q, reduction="sum", log_target=True)


@pytest.mark.parametrize("chunk", [1, 7 * 2 * V, 1 << 20])
@pytest.mark.parametrize("teacher_rows", [None, 45])
def test_kl_and_its_gradient_are_those_of_autograd(
    chunk: int, teacher_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, whatever the chunks; the teacher gets none."""
    monkeypatch.setattr(cpu, "logits_at_once", lambda *_: chunk)
    x, teacher_x, weight, targets = draw()
    kl, count = ops.linear_kl(x, teacher_x.requires_grad_(), weight, targets, teacher_rows)
    expected = plain_kl(x, teacher_x.detach(), weight, targets, teacher_rows or V)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    assert count == (targets != IGNORED).sum() and kl.dtype == torch.float64
    inputs = (x, weight, teacher_x)
    grad_x, grad_weight, of_teacher = torch.autograd.grad(0.3 * kl, inputs, allow_unused=True)
    exact_x, exact_weight = torch.autograd.grad(0.3 * expected, (x, weight))
    torch.testing.assert_close(grad_x, exact_x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_weight, exact_weight, rtol=1e-10, atol=1e-12)
    assert of_teacher is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_is_computed_in_fp32(
    dtype: torch.dtype, assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    """Of logits rounded to the input's dtype, as PyTorch's in that dtype."""
    x, teacher_x, weight, targets = draw(dtype)
    kl, _ = ops.linear_kl(x, teacher_x, weight, targets)
    (grad_x,) = torch.autograd.grad(kl, x)
    kept = targets != IGNORED
    logits, teacher_logits = (h[kept] @ weight.T for h in (x, teacher_x))
    log_p, log_q = (part.double().log_softmax(-1) for part in (logits, teacher_logits))
    same_logits = (log_q.exp() * (log_q - log_p)).sum()
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(same_logits.item(), rel=1e-6)
    exact = [t.detach().double().requires_grad_() for t in (x, teacher_x, weight)]
    (exact_x,) = torch.autograd.grad(plain_kl(*exact, targets, V), exact[0])
    (plain_x,) = torch.autograd.grad(plain_kl(x, teacher_x, weight, targets, V), x)
    assert_as_exact_as_torch(grad_x, plain_x, exact_x)


def test_ignored_targets_count_nothing() -> None:
    """Whatever stands there, for model or teacher, changes neither KL nor gradient, which is 0."""
    x, teacher_x, weight, targets = draw()
    kl, count = ops.linear_kl(x, teacher_x, weight, targets)
    (grad_x,) = torch.autograd.grad(kl, x)
    ignored = targets == IGNORED
    assert not grad_x[ignored].any() and grad_x[~ignored].any(1).all()
    other_x, other_teacher = x.detach().clone(), teacher_x.clone()
    other_x[ignored], other_teacher[ignored] = 3.0, -3.0
    again, _ = ops.linear_kl(other_x, other_teacher, weight, targets)
    assert again.item() == kl.item()
    nothing, none = ops.linear_kl(x, teacher_x, weight, torch.full_like(targets, IGNORED))
    assert (nothing.item(), none.item(), count.item()) == (0, 0, int((~ignored).sum()))
    empty, _ = ops.linear_kl(x[:0], teacher_x[:0], weight, targets[:0])
    assert empty.item() == 0 and not torch.autograd.grad(empty, x)[0].any()


class Largest(TorchDispatchMode):
    """Knows the most elements that a tensor of a dtype made inside it has."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        sizes = [x.numel() for x in tensors if x.dtype == self.dtype]
        self.elements = max([self.elements, *sizes])
        return out


def test_the_logits_of_a_chunk_live_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many as of cross-entropy, because the teacher's are there as well."""
    at_once = 600 * V
    monkeypatch.setattr(cpu, "logits_at_once", lambda *_: at_once)
    x, teacher_x, weight, _ = draw(torch.float32)
    x, teacher_x = x.repeat(20, 1), teacher_x.repeat(20, 1)
    with Largest() as largest:
        ops.linear_kl(x, teacher_x, weight, torch.zeros(len(x), dtype=torch.int64))
    assert largest.elements == at_once // 2


@pytest.mark.parametrize("op", [ops.linear_kl, ops.linear_cross_entropy])
def test_a_cpu_widens_what_its_cache_holds(op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Statistics are in fp32, but never those of a whole product; its gradient is in its place."""
    x, teacher_x, weight, _ = draw(torch.bfloat16)
    x, teacher_x = x.detach().repeat(600, 1).requires_grad_(), teacher_x.repeat(600, 1)
    targets = torch.zeros(len(x), dtype=torch.int64)
    inputs = (x, teacher_x, weight) if op is ops.linear_kl else (x, weight)
    with Largest() as wide, Largest(torch.bfloat16) as rounded:
        op(*inputs, targets)
    assert 0 < wide.elements <= 1 << 18 < rounded.elements
