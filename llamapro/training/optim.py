"""AdamW and its schedule, as in the paper: decay on matrices, warm-up, cosine and clipping."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llamapro.training.settings import OptimSettings


def build_adamw(
    parameters: Iterable[nn.Parameter], o: OptimSettings, undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """Builds fused AdamW over the parameters with `requires_grad`.

    Decay applies to matrices (embeddings included) except the `undecayed` ones, and not to norms
    and biases, which it would pull to 0. The learning rate is 0 until `set_learning_rate`.
    """
    kept = {id(p) for p in undecayed}
    decayed, others = list[nn.Parameter](), list[nn.Parameter]()
    for p in parameters:
        if p.requires_grad:
            (decayed if p.ndim >= 2 and id(p) not in kept else others).append(p)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": o.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=o.betas, fused=True)


def learning_rate(step: int, steps: int, o: OptimSettings) -> float:
    """Linear warm-up, then cosine decay. One step has the peak, and none the end of the decay.

    `step` is the number of optimizer steps already made, 0 to steps - 1.
    """
    top = max(1, round(o.warmup_ratio * steps))  # the step of the peak, counted from 1
    if step < top:
        return o.lr * (step + 1) / top
    progress = (step + 1 - top) / (steps + 1 - top)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return o.lr * (o.final_lr_ratio + (1 - o.final_lr_ratio) * cosine)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, o: OptimSettings
) -> float:
    """Sets and returns the rate for the step after `step` of `steps` steps."""
    rate = learning_rate(step, steps, o)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients to a global norm of at most `max_norm`; returns the norm before, ()."""
    norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class FiniteGuard:
    """Makes optimizer steps, but skips those with a gradient that is not finite.

    The test stays on the device, where the fused optimizer skips its update, so no step waits for
    it. After more than `allowed` skipped steps in a row nothing is applied any more. The weights
    then stay as they were before the first of them, until `check` reports it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, allowed: int, skipped: int = 0, streak: int = 0
    ) -> None:
        """Guards a fused optimizer of a run that has skipped steps, the last `streak` in a row."""
        self.optimizer, self.allowed = optimizer, allowed
        device = optimizer.param_groups[0]["params"][0].device  # the CPU where it is offloaded
        self._streak = torch.tensor(streak, dtype=torch.int64, device=device)
        self._skipped = torch.full_like(self._streak, skipped)

    def step(self, norm: Tensor) -> None:
        """Updates the weights if `norm`, (), is finite and training is not stuck."""
        stuck = self._streak > self.allowed
        bad = ~norm.isfinite() & ~stuck
        self._streak = torch.where(stuck, self._streak, torch.where(bad, self._streak + 1, 0))
        self._skipped += bad
        self.optimizer.found_inf = (bad | stuck).float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def check(self) -> tuple[int, int, bool]:
        """Waits for the device; returns skipped steps, those in a row, and whether it is stuck."""
        skipped, streak = torch.stack((self._skipped, self._streak)).tolist()
        return skipped, streak, streak > self.allowed
