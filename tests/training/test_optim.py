"""AdamW and its schedule: against the formulas worked out by hand."""

import math

import pytest
import torch
from torch import nn

from llamapro.training.optim import build_adamw, clip_gradients, learning_rate
from llamapro.training.settings import OptimSettings


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),  # 10 steps of warm-up: a tenth of the peak
        (4, 1.0),
        (9, 2.0),  # the last step of the warm-up
        (39, 0.2 + 1.8 * 0.75),  # a third of the way: cos(60 degrees) = 1/2
        (54, 0.2 + 1.8 * 0.5),  # half way
        (69, 0.2 + 1.8 * 0.25),
        (98, 0.2 + 1.8 * 0.5 * (1 - math.cos(math.radians(2)))),  # the last: one from the end
    ],
)
def test_schedule_has_the_values_worked_out_by_hand(step: int, rate: float) -> None:
    """99 steps, 10 of them warm-up, from 2.0 down to a tenth."""
    o = OptimSettings(lr=2.0, warmup_ratio=0.1, final_lr_ratio=0.1)
    assert learning_rate(step, 99, o) == pytest.approx(rate, rel=1e-12)


def test_schedule_rises_and_then_falls() -> None:
    """Strictly, on both sides of the one peak; no step is lost to a rate of 0."""
    rates = [learning_rate(step, 1000, OptimSettings()) for step in range(1000)]
    assert rates[:60] == sorted(set(rates[:60])) and rates[59:] == sorted(set(rates[59:]))[::-1]
    assert max(rates) == rates[59] == 2e-4 > rates[60]
    assert 0 < rates[-1] < 1e-8


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 3), (5, 4), (5, 0)])
def test_short_schedules_stay_within_the_peak(steps: int, warmup: int) -> None:
    """Runs as short as their warm-up never divide by zero, nor pass the peak, nor start at 0."""
    o = OptimSettings(lr=1.0, warmup_ratio=warmup / steps)
    rates = [learning_rate(step, steps, o) for step in range(steps)]
    assert all(math.isfinite(rate) and 0 < rate <= 1 for rate in rates)
    assert rates.count(1.0) == 1


def test_decay_applies_to_matrices_only() -> None:
    """With zero gradients a matrix shrinks by 1 - lr * decay, a norm's weight keeps its bits."""
    matrix, norm = parameter(4, 3), parameter(4)
    before, norm_before = matrix.detach().clone(), norm.detach().clone()
    optimizer = build_adamw([norm, matrix], OptimSettings())
    matrix.grad, norm.grad = torch.zeros_like(matrix), torch.zeros_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.5 * 0.1))
    assert torch.equal(norm.detach(), norm_before)


def test_two_steps_are_adamw_by_hand() -> None:
    """Loshchilov & Hutter (2019), in fp64, with the betas that were given."""
    weight = parameter(4, 3)
    expected = weight.detach().double()
    gradients = [torch.full((4, 3), 0.3), torch.full((4, 3), -0.7)]
    optimizer = build_adamw([weight], OptimSettings(betas=(0.8, 0.9)))
    m = v = torch.zeros(4, 3, dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 0.01 * step
        optimizer.step()
        g = gradient.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * step * 0.1) - 0.01 * step * update
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_are_not_in_the_optimizer() -> None:
    """Neither state nor decay can touch what is not there; a generator is read once and whole."""
    frozen, trained, norm = parameter(4, 3), parameter(3, 4), parameter(4)
    frozen.requires_grad_(False)
    optimizer = build_adamw(iter([frozen, trained, norm]), OptimSettings())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(trained), id(norm)}
    assert len(held) == 2


def test_nothing_moves_before_a_rate_is_set() -> None:
    """The placeholder rate is 0: a forgotten schedule shows as no progress, not as a wrong run."""
    weight = parameter(4, 3)
    before = weight.detach().clone()
    optimizer = build_adamw([weight], OptimSettings())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_clipping_is_that_of_one_long_vector(factor: float) -> None:
    """Norm and scaled gradients are those of all gradients in one tensor; none are left out."""
    parameters = [parameter(4, 3), parameter(4), parameter(2, 2, 2), parameter(5)]
    for seed, p in enumerate(parameters[:3]):
        p.grad = parameter(*p.shape, seed=seed + 10).detach()
    whole = torch.cat([p.grad.flatten() for p in parameters[:3] if p.grad is not None])
    limit = float(whole.norm()) * factor
    norm = clip_gradients(iter(parameters), limit)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(float(whole.norm()), rel=1e-6)
    after = torch.cat([p.grad.flatten() for p in parameters[:3] if p.grad is not None])
    torch.testing.assert_close(after, whole * min(1.0, factor), rtol=1e-5, atol=1e-7)
    assert parameters[3].grad is None
