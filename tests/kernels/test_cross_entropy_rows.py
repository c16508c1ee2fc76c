"""The kernel of cross-entropy alone: a row of logits at a time, with its loss and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import cross_entropy as ce


def launch(
    logits: Tensor, targets: list[int], block: int = 64, needs_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """The kernel alone: per-row losses, and the gradients it makes of the logits."""
    V, padding = logits.shape[1], 3
    padded = F.pad(logits, (0, padding), value=7.0)
    grads = padded[:, :V]
    losses = torch.full((len(targets),), math.nan, device=logits.device)
    ids = torch.tensor(targets, device=logits.device)
    ce._cross_entropy_kernel[(len(targets),)](
        grads, ids, losses, V, V + padding, NEEDS_GRAD=needs_grad, BLOCK=block
    )
    assert (padded[:, V:] == 7).all()  # what pads a row is not written to
    return losses, grads


@pytest.mark.parametrize("target", [-100, -1, -101, 97, 2**40])
def test_a_row_without_a_known_target_adds_nothing(
    target: int, dtype: torch.dtype, device: str
) -> None:
    """Not even infinite logits count, and nothing is read for the target."""
    logits = torch.full((2, 97), math.inf, dtype=dtype, device=device)
    losses, grads = launch(logits, [target] * 2)
    assert losses.count_nonzero() == 0 and grads.count_nonzero() == 0


@pytest.mark.parametrize("block", [16, 64, 256])
def test_blocks_of_classes_change_nothing(block: int, device: str) -> None:
    """The largest logit so far rises from block to block, or falls."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    slope = torch.linspace(-20, 20, 200)
    logits[0] += slope
    logits[1] -= slope
    targets = torch.tensor([0, 0, 199, 17])
    losses, grads = launch(logits.float().to(device), targets.tolist(), block)
    wide = logits.float().double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.cpu().double(), wide.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype, gap", [(torch.float32, 30.0), (torch.float16, 9.0)])
def test_the_true_class_keeps_its_gradient_when_the_model_is_sure(
    dtype: torch.dtype, gap: float, device: str
) -> None:
    """It is minus the sum of the other probabilities, even where its own rounds to 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 200, generator=generator)
    targets = [0, 63, 199]
    for row, target in enumerate(targets):
        logits[row, target] = logits[row].max() + gap
    logits = logits.to(dtype).to(device)
    _, grads = launch(logits, targets)
    wide = logits.double().softmax(-1)
    for row, target in enumerate(targets):
        wide[row, target] = 0
        wide[row, target] = -wide[row].sum()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        grads.double(), wide, rtol=4 * eps + 1e-5, atol=2**-24 * (eps > 1e-6)
    )
    if dtype == torch.float32:  # the case is one in which the plain formula gives 0
        assert logits.softmax(-1)[0, 0] == 1 and grads[0, 0] < 0


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, interpreting
def test_huge_and_infinite_logits_are_stable(device: str) -> None:
    """Losses and gradients as in fp64, with whole blocks of -inf before and after the others."""
    logits = torch.full((5, 200), -math.inf)
    logits[0, 100:110] = torch.linspace(-3, 3, 10) * 1e38
    logits[1] = torch.linspace(-1e4, 1e4, 200)
    logits[2] = -1e30
    logits[3, 150] = 2.0  # the true class alone has a probability
    logits[4, [3, 190]] = torch.tensor([88.0, 89.0])  # exp of either is all but infinite
    targets = [109, 199, 7, 150, 3]
    losses, grads = launch(logits.to(device), targets)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, torch.tensor(targets), reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.cpu().double(), wide.grad, rtol=1e-6, atol=1e-6)


def test_a_true_class_of_probability_zero_is_an_infinite_loss(device: str) -> None:
    """With a logit of -inf the gradient is -1 there and the softmax elsewhere, as in PyTorch."""
    logits = torch.zeros(1, 100, device=device)
    logits[0, :71] = -math.inf  # and a whole block of such
    losses, grads = launch(logits, [70])
    assert losses == math.inf and grads[0, 70] == -1 and grads[0, :70].count_nonzero() == 0
    torch.testing.assert_close(grads.sum(), torch.zeros((), device=device), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("where", [0, 70, 99], ids=["another", "true", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_logit_shows_in_the_loss(where: int, value: float, device: str) -> None:
    """NaN or +inf anywhere in the row makes its loss NaN, so that training stops."""
    logits = torch.zeros(2, 100, device=device)
    logits[0, where] = value
    losses, _ = launch(logits, [70, 70])
    assert losses[0].isnan() and losses[1].isfinite()


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31(device: str) -> None:
    """The last of 66,000 rows of 32,768 logits is found."""
    logits = torch.zeros(66000, 32768, dtype=torch.float16, device=device)
    logits[-1, 5] = 4.0
    targets = torch.full((66000,), 5, device=device)
    losses = torch.empty(66000, device=device)
    ce._cross_entropy_kernel[(66000,)](
        logits, targets, losses, 32768, 32768, NEEDS_GRAD=True, BLOCK=4096
    )
    wide = math.log(32767 + math.exp(4)) - 4
    torch.testing.assert_close(losses[-1].item(), wide, rtol=1e-6, atol=0)
    assert logits[-1, 5].item() == pytest.approx(-32767 / (32767 + math.exp(4)), rel=1e-3)
