"""The state of a run, which `state.json` keeps beside the weights and the optimizer.

The training loop advances the state. `Losses` adds the numbers that are still on the device.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from llamapro.errors import CheckpointError, DivergedError
from llamapro.training.distributed import Ranks
from llamapro.training.objective import NextToken
from llamapro.training.optim import FiniteGuard

RECENT = 64  # number of losses that a new one is compared with
ENOUGH = 16  # with fewer losses no spike is reported
_QUARTILE = 0.6745  # upper quartile of a normal distribution, in standard deviations over its mean


@dataclass
class RunState:
    """Where a run stands; losses are in nats per token."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # sequences read; the next step starts with the sequence of this number
    elapsed_s: float = 0.0  # time spent on training steps, over all starts of the run
    loss: float | None = None  # of the latest step whose loss was read
    eval: dict[str, float] = field(default_factory=dict)  # latest of each validation set
    evaluated: int = -1  # step of the latest complete evaluation
    skipped: int = 0  # steps that were not applied because their gradient was not finite
    streak: int = 0  # the latest of them, in a row up to now
    recent_losses: list[float] = field(default_factory=list)  # for finding spikes
    identity: dict[str, Any] = field(default_factory=dict)  # `resume.make_identity`
    base_eval: dict[str, float] = field(default_factory=dict)  # at step 0, of the base itself
    control: dict[str, float | None] = field(default_factory=dict)  # `objective.Hold`
    stopped: bool = False  # by a signal; not saved

    @classmethod
    def from_json(cls, saved: dict[str, Any], path: Path) -> "RunState":
        """Reads the content of `state.json` of a training checkpoint; raises CheckpointError."""
        # Earlier versions did not keep these.
        new: dict[str, Any] = {"base_eval": {}, "control": {}, "streak": 0}
        saved = new | saved
        names = [f.name for f in dataclasses.fields(cls) if f.name != "stopped"]
        if missing := [name for name in names if name not in saved]:
            raise CheckpointError(f"{path}: state.json has no {', '.join(map(repr, missing))}")
        return cls(**{name: saved[name] for name in names})

    def check_final(self) -> None:
        """Raises DivergedError if the run has ended with a validation loss that is not finite."""
        wrong = [f"{name} {loss}" for name, loss in self.eval.items() if not math.isfinite(loss)]
        if wrong and not self.stopped and self.evaluated == self.step:
            raise DivergedError(
                f"the last evaluation, at step {self.step}, is not finite: {', '.join(wrong)}; the "
                "model is of no use. Look at metrics.jsonl for the step where it began, and train "
                "from a checkpoint before it with a lower optim.lr"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        saved = dataclasses.asdict(self)
        del saved["stopped"]
        return saved

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time of the body to `elapsed_s`, by a monotonic clock."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed_s += time.perf_counter() - started


class Losses:
    """Losses of the latest steps, which stay on the device until a report needs them.

    So no step waits for the one before it. `read` brings the state up to date.
    """

    def __init__(
        self,
        state: RunState,
        guard: FiniteGuard,
        ranks: Ranks,
        threshold: float,
        report: Callable[[Literal["bad_step", "spike"], int, int, dict[str, float]], object],
        objective: NextToken,
    ) -> None:
        """Starts without losses.

        `report` is called for a step that was not applied or has a loss far over the latest ones,
        with kind, step, first sample and the numbers of its record.
        """
        self._objective, self._state, self._guard, self._ranks = objective, state, guard, ranks
        self._threshold, self._report = threshold, report
        self._unread: list[tuple[int, int, Tensor, Tensor]] = []

    def add(self, step: int, first_sample: int, loss: Tensor, norm: Tensor) -> None:
        """Adds a step, counted from 1, with the first sequence that it read.

        Args:
            loss: this rank's part of the loss, (), in nats per token.
            norm: norm of the gradient before clipping, ().
        """
        self._unread.append((step, first_sample, loss, norm))

    def read(self) -> None:
        """Waits for the device and reads all losses; every rank must call it.

        Raises DivergedError if too many steps in a row had a gradient that is not finite.
        """
        state, unread, self._unread = self._state, self._unread, []
        with state.timed():
            skipped, state.streak, is_stuck = self._guard.check()
            losses = self._ranks.sum(*(loss for _, _, loss, _ in unread)) if unread else []
            state.control = self._objective.control
        for (step, first_sample, _, norm), loss in zip(unread, losses, strict=True):
            loss = loss or state.loss or 0.0  # 0: all sequences of the step were replayed
            state.loss = loss
            if state.skipped < skipped and not math.isfinite(norm):
                state.skipped += 1
                self._report("bad_step", step, first_sample, {"skipped": state.skipped})
            median = find_spike(loss, state.recent_losses, self._threshold)
            if median is not None:
                self._report("spike", step, first_sample, {"loss": loss, "median": median})
        if is_stuck:
            raise DivergedError(
                "the gradient is not finite; neither that step nor what followed was applied. "
                "Look at its data (metrics.jsonl in the run directory, kind bad_step), lower "
                "optim.lr or allow optim.skip_bad_steps; training checkpoints are intact"
            )


def find_spike(loss: float, recent: list[float], threshold: float) -> float | None:
    """Compares a loss with the latest ones and adds it to them.

    The comparison is with median and quartiles, which a spike moves less than mean and variance.

    A loss that is not finite is neither a spike nor added.

    Args:
        recent: up to `RECENT` losses before it.
        threshold: in standard deviations; 0 finds nothing.

    Returns:
        The median of the latest losses if the new one is a spike, else None.
    """
    if not math.isfinite(loss):
        return None
    found = None
    if threshold and len(recent) >= ENOUGH:
        low, median, high = statistics.quantiles(recent, n=4)
        deviation = max((high - low) / (2 * _QUARTILE), 1e-3 * median)
        found = median if loss > median + threshold * deviation else None
    recent.append(loss)
    del recent[:-RECENT]
    return found
