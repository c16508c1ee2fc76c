"""The fused output projection and cross-entropy against plain PyTorch and fp64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamapro import ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import cross_entropy as ce

C, V, N = 16, 97, 23
IGNORED = [0, 5, 6, 7, 8, 9, 22]  # in chunks of 5 tokens: a whole one, and the first and last row
Check = Callable[[Tensor, Tensor, Tensor], None]
Gradients = tuple[Tensor | None, Tensor | None]


def inputs(
    device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (N, C, V)
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, targets, some of which are ignored; logits up to about 10 in size."""
    n, c, v = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, generator=generator).to(dtype)
    weight = torch.randn(v, c, generator=generator).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[[i for i in IGNORED if i < n - 1]] = ops.IGNORE_INDEX
    return x.to(device), weight.to(device), targets.to(device)


def run(
    function: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    trains: str = "xw",
) -> tuple[Tensor, Tensor, Gradients]:
    """Loss, count, and the gradients of x and weight where they train, of scale * loss."""
    x, weight = x.detach(), weight.detach()
    x.requires_grad_("x" in trains)
    weight.requires_grad_("w" in trains)
    loss_sum, count = function(x, weight, targets)
    wanted = [t for t in (x, weight) if t.requires_grad]
    found = list(torch.autograd.grad(loss_sum * scale, wanted)) if wanted else []
    gradients = (found.pop(0) if "x" in trains else None, found.pop(0) if "w" in trains else None)
    return loss_sum.detach(), count, gradients


def exact(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = x.double() @ weight.double().T
    loss_sum = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss_sum, (targets != -100).sum()


@pytest.fixture
def plain(in_torch: Callable[..., Any]) -> Callable[..., Any]:
    return in_torch(ops.linear_cross_entropy)


@pytest.fixture
def check(assert_as_exact_as_torch: Check, plain: Callable[..., Any]) -> Callable[..., None]:
    """`check(x, weight, targets, **options of run)`: loss, count, gradients by the error rule."""

    def compare(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> None:
        ours, count, gradients = run(ce.linear_cross_entropy, x, weight, targets, **options)
        theirs, their_count, their_gradients = run(plain, x, weight, targets, **options)
        true, _, true_gradients = run(exact, x.double(), weight.double(), targets, **options)
        assert ours.dtype == torch.float32 and count.dtype == torch.int64 and ours.shape == ()
        assert torch.equal(count, their_count) and not count.requires_grad
        assert_as_exact_as_torch(ours, theirs, true)
        for found, plains, wanted in zip(gradients, their_gradients, true_gradients, strict=True):
            if wanted is None:
                assert found is None
                continue
            assert found is not None and found.is_contiguous()
            assert_as_exact_as_torch(found, plains, wanted)

    return compare


# ---- Values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1 / 17])
@pytest.mark.parametrize(
    "shape",
    [(N, C, V), (1, 3, 2), (3, 5, 1), (7, 33, 4096), (3, 8, 2 * 4096 + 5)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_loss_and_gradients_are_as_exact_as_torch(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    scale: float,
    device: str,
    check: Callable[..., None],
) -> None:
    """One class, one block of classes and several with a rest; upstream gradients of 1 and less."""
    check(*inputs(device, dtype, shape), scale=scale)


@pytest.mark.parametrize("limit", [1, 5 * V, 23 * V - 1, 23 * V], ids=["1", "5", "12", "all"])
def test_chunks_change_nothing(
    limit: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[..., None],
) -> None:
    """A token at a time, chunks with a smaller last one, and one chunk of all."""
    monkeypatch.setattr(ce, "CHUNK_LOGITS", limit)
    check(*inputs(device, dtype), scale=0.1)


def test_logits_are_held_for_equal_chunks_only(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 11 of 23 tokens makes three chunks of 8, 8 and 7, in one buffer of 8 padded rows."""
    monkeypatch.setattr(ce, "CHUNK_LOGITS", 11 * V)
    empty, made, rows = torch.empty, [], []

    def seen_empty(size: tuple[int, ...], **options: Any) -> Tensor:
        made.append(tuple(size))
        return empty(size, **options)

    class Seen:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            rows.append(grid[0])
            return kernel[grid]

    kernel = ce._cross_entropy_kernel
    monkeypatch.setattr(torch, "empty", seen_empty)
    monkeypatch.setattr(ce, "_cross_entropy_kernel", Seen())
    ce.linear_cross_entropy(*inputs(device))
    assert V % ce.ALIGNED and [size for size in made if len(size) == 2 and size[1] >= V] == [
        (8, math.ceil(V / ce.ALIGNED) * ce.ALIGNED)
    ]
    assert rows == [8, 8, 7]


def test_any_layout_is_right(
    dtype: torch.dtype,
    layouts: tuple[str, ...],
    device: str,
    small_chunks: None,
    in_layout: Callable[[Tensor, str], Tensor],
    check: Callable[..., None],
) -> None:
    """Unaligned, padded, transposed, strided and expanded inputs; the gaps in them are not read."""
    x, weight, targets = inputs(device, dtype)
    targets = targets.roll(-1)  # expanded repeats the first: not ignored
    x, weight, targets = map(in_layout, (x, weight, targets), layouts)
    check(x, weight, targets)


def test_nothing_is_written_outside_and_all_inside(
    dtype: torch.dtype, device: str, small_chunks: None, guarded: None
) -> None:
    """Margins around logits, losses and gradients stay as they were, and no gap stays NaN."""
    loss_sum, _, gradients = run(ce.linear_cross_entropy, *inputs(device, dtype))
    for tensor in (loss_sum, *gradients):
        assert tensor is not None and tensor.isfinite().all()


# ---- Targets -----------------------------------------------------------------------------------


def test_ignored_tokens_are_as_if_left_out(device: str, small_chunks: None) -> None:
    """They add no loss and no count, and their gradient is exactly 0."""
    x, weight, targets = inputs(device)
    is_counted = targets != ops.IGNORE_INDEX
    loss_sum, count, (grad_x, grad_weight) = run(ce.linear_cross_entropy, x, weight, targets)
    assert grad_x is not None and grad_weight is not None
    assert count == N - len(IGNORED[:-1]) and grad_x[~is_counted].count_nonzero() == 0
    kept = run(ce.linear_cross_entropy, x[is_counted], weight, targets[is_counted])
    torch.testing.assert_close(loss_sum, kept[0], rtol=1e-6, atol=0)
    torch.testing.assert_close((grad_x[is_counted], grad_weight), kept[2], rtol=1e-5, atol=1e-6)


def test_all_ignored_is_no_loss_and_zero_gradients(dtype: torch.dtype, device: str) -> None:
    """Nothing is divided by the number of targets."""
    x, weight, targets = inputs(device, dtype)
    targets.fill_(ops.IGNORE_INDEX)
    loss_sum, count, gradients = run(ce.linear_cross_entropy, x, weight, targets)
    assert loss_sum == 0 and count == 0
    for gradient in gradients:
        assert gradient is not None and gradient.count_nonzero() == 0
    assert ce.linear_cross_entropy(x[:0], weight, targets[:0]) == (0, 0)


@pytest.mark.parametrize("target", [-1, -101, V, 2**40])
def test_a_target_outside_the_vocabulary_is_an_error(target: int, device: str) -> None:
    """PyTorch raises it too."""
    if device != "cpu":
        pytest.skip("a GPU's assertion would end the process")
    x, weight, targets = inputs(device)
    targets[3] = target
    with pytest.raises(RuntimeError, match=r"below 97 or -100"):
        ce.linear_cross_entropy(x, weight, targets)


# ---- Numerics ----------------------------------------------------------------------------------


def test_zero_hidden_states_give_the_uniform_loss(dtype: torch.dtype, device: str) -> None:
    """The loss is ln V per token."""
    x, weight, targets = inputs(device, dtype)
    loss_sum, count, _ = run(ce.linear_cross_entropy, torch.zeros_like(x), weight, targets)
    torch.testing.assert_close(loss_sum, count * math.log(V), rtol=1e-6, atol=0, check_dtype=False)


def test_the_upstream_gradient_is_not_rounded(dtype: torch.dtype, device: str) -> None:
    """1/100003, far below what fp16 has digits for, scales in fp32; one rounding follows."""
    x, weight, targets = inputs(device, dtype)
    scale = 1 / 100003
    _, _, (unscaled, _) = run(ce.linear_cross_entropy, x, weight, targets)
    _, _, (scaled, _) = run(ce.linear_cross_entropy, x, weight, targets, scale=scale)
    assert unscaled is not None and scaled is not None
    exactly = (unscaled.float() * torch.tensor(scale, device=device)).to(dtype)
    assert torch.equal(scaled, exactly)
    rounded = (unscaled.float() * torch.tensor(scale, dtype=dtype, device=device)).to(dtype)
    assert dtype == torch.float32 or not torch.equal(scaled, rounded)


def test_the_weights_gradient_is_summed_in_fp32(device: str, small_chunks: None) -> None:
    """Sums over tokens that fp16 could not hold are scaled first; small chunks are not lost."""
    x = torch.full((20, 1), 30000.0, dtype=torch.float16, device=device)
    weight = torch.zeros(V, 1, dtype=torch.float16, device=device)
    targets = torch.zeros(20, dtype=torch.int64, device=device)
    _, _, (_, gradient) = run(ce.linear_cross_entropy, x, weight, targets, scale=1 / 20)
    assert gradient is not None and gradient.dtype == torch.float16
    expected = torch.full((V, 1), 30000.0 / V, dtype=torch.float64)
    expected[0] -= 30000
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-3, atol=0)


# ---- What is not asked for is not computed -----------------------------------------------------


@pytest.mark.parametrize(
    "trains, products",
    [("", ["xW"]), ("x", ["xW", "gW"]), ("w", ["xW", "gx"]), ("xw", ["xW", "gW", "gx"])],
)
def test_only_gradients_asked_for_are_computed(
    trains: str,
    products: list[str],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[..., None],
) -> None:
    """A frozen embedding costs no product and no V x C buffer; the other gradient stays right."""
    done = []
    mm, product = torch.mm, ce._product_in_fp32

    def seen_mm(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        done.append("xW" if b.shape == (C, V) else "gW" if b.shape == (V, C) else "?")
        return mm(a, b, **options)

    def seen_product(a: Tensor, b: Tensor) -> Tensor:
        done.append("gx")
        return a.float() @ b.float()

    monkeypatch.setattr(ce, "_product_in_fp32", seen_product)
    monkeypatch.setattr(torch, "mm", seen_mm)
    x, weight, targets = inputs(device)
    run(ce.linear_cross_entropy, x, weight, targets, trains=trains)
    assert done == products
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(ce, "_product_in_fp32", product)
    check(x, weight, targets, trains=trains)
    outputs = ce._forward(x, weight, targets, "x" in trains, "w" in trains)
    sizes = [N * C * ("x" in trains), V * C * ("w" in trains)]
    assert [t.numel() for t in outputs[2:]] == sizes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_but_the_loss_is_computed(
    context: Callable[[], Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even if both inputs require gradients; the loss is the same."""
    x, weight, targets = inputs(device)
    expected, _, _ = run(ce.linear_cross_entropy, x, weight, targets)
    asked = []
    forward = ce._forward
    monkeypatch.setattr(ce, "_forward", lambda *args: asked.append(args[3:5]) or forward(*args))
    with context():
        loss_sum, _ = ce.linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    assert asked == [(False, False)] and torch.equal(loss_sum, expected)
    assert not loss_sum.requires_grad


# ---- As part of a graph ------------------------------------------------------------------------


def test_a_tied_embedding_gets_both_gradients(
    device: str, plain: Callable[..., Any], assert_as_exact_as_torch: Check
) -> None:
    """The weight is input embedding and output embedding at once."""
    _, weight, targets = inputs(device)
    ids = targets.abs() % V

    def gradient(function: Callable[..., Any], weight: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()
        function(F.embedding(ids, weight), weight, targets)[0].backward()
        assert weight.grad is not None
        return weight.grad

    assert_as_exact_as_torch(
        gradient(ce.linear_cross_entropy, weight),
        gradient(plain, weight),
        gradient(exact, weight.double()),
    )


@pytest.mark.parametrize("need_x, need_weight", [(False, False), (True, False), (True, True)])
def test_ops_keep_their_contracts(
    need_x: bool, need_weight: bool, device: str, opcheck: Callable[..., Any]
) -> None:
    """They do for transposed inputs too."""
    x, weight, targets = inputs(device, torch.float16)
    for hidden in (x, x.T.contiguous().T):
        opcheck(
            torch.ops.llamapro.linear_cross_entropy.default,
            (hidden, weight, targets, need_x, need_weight),
        )
