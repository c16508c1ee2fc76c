"""Where a run stands: what `state.json` keeps beside the weights and the optimizer.

The training loop advances the state; `Losses` reads what is still on the device.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from llamapro.errors import CheckpointError, DivergedError
from llamapro.training.distributed import Ranks
from llamapro.training.optim import FiniteGuard

RECENT = 64  # number of losses that a new one is compared with
ENOUGH = 16  # with fewer losses no spike is reported
# A quarter of a normal distribution lies further than this many standard deviations over its mean.
_QUARTILE = 0.6745


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps made.
        tokens: tokens trained on.
        samples: sequences read; the next step starts with the sequence of this number.
        elapsed_s: time spent on training steps, over all starts of the run.
        loss: nats per token of the latest step whose loss was read.
        eval: latest loss of each validation set, in nats per token.
        evaluated: step of the latest complete evaluation; -1 before the first.
        skipped: steps that were not applied because their gradient was not finite.
        recent_losses: the latest losses, for finding spikes.
        identity: hashes of what the run is made of (`resume.make_identity`).
        base_eval: loss of each validation set at step 0, which is the base's.
        stopped: whether a signal ended the run; not saved.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    elapsed_s: float = 0.0
    loss: float | None = None
    eval: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1
    skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    base_eval: dict[str, float] = field(default_factory=dict)
    stopped: bool = False

    @classmethod
    def from_json(cls, saved: dict[str, Any], path: Path) -> "RunState":
        """Reads the content of `state.json`; other keys, such as the settings, are left out.

        Raises:
            CheckpointError: a key is missing; names the training checkpoint `path`.
        """
        # Runs of earlier versions did not keep the base's evaluation.
        saved = {"base_eval": {}} | saved
        names = [f.name for f in dataclasses.fields(cls) if f.name != "stopped"]
        if missing := [name for name in names if name not in saved]:
            raise CheckpointError(f"{path}: state.json has no {', '.join(map(repr, missing))}")
        return cls(**{name: saved[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        saved = dataclasses.asdict(self)
        del saved["stopped"]
        return saved

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time of the body to `elapsed_s`, by a clock that nobody can set."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed_s += time.perf_counter() - started


@dataclass(frozen=True)
class OddStep:
    """A step to report: it was not applied, or its loss is far over the latest ones.

    Attributes:
        kind: as in `metrics.jsonl`.
        step: its number; 1 is the first.
        first_sample: number of the first sequence that it read.
        numbers: what else the record holds.
    """

    kind: Literal["bad_step", "spike"]
    step: int
    first_sample: int
    numbers: dict[str, float]


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
        report: Callable[[OddStep], object],
    ) -> None:
        """Starts without losses.

        Args:
            state: `read` updates its loss, skipped, recent_losses and elapsed_s.
            guard: knows which steps were applied.
            ranks: from `process_group`.
            threshold: for `find_spikes`.
            report: called with every odd step.
        """
        self._state, self._guard, self._ranks = state, guard, ranks
        self._threshold, self._report = threshold, report
        self._unread: list[tuple[int, int, Tensor, Tensor]] = []

    def add(self, step: int, first_sample: int, loss: Tensor, norm: Tensor) -> None:
        """Adds a step.

        Args:
            step: its number; 1 is the first.
            first_sample: number of the first sequence that it read.
            loss: this rank's part of the loss, (), in nats per token.
            norm: norm of the gradient before clipping, ().
        """
        self._unread.append((step, first_sample, loss, norm))

    def read(self) -> None:
        """Waits for the device and reads all losses; every rank must call it.

        Raises:
            DivergedError: too many steps in a row had a gradient that is not finite.
        """
        state = self._state
        with state.timed():
            skipped, is_stuck = self._guard.check()
            odd = self._settle(skipped) if self._unread else []
        self._unread = []
        for step in odd:
            self._report(step)
        if is_stuck:
            raise DivergedError(
                "the gradient is not finite; neither that step nor what followed was applied. "
                "Look at its data (metrics.jsonl in the run directory, kind bad_step), lower "
                "optim.lr or allow optim.skip_bad_steps; the last training checkpoint is intact"
            )

    def _settle(self, skipped: int) -> list[OddStep]:
        """Brings the state up to date; returns the odd steps."""
        state, odd = self._state, []
        steps, first_samples, parts, norms = zip(*self._unread, strict=True)
        losses = self._ranks.sum(*parts)
        state.loss = losses[-1]
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        for i in bad[: skipped - state.skipped]:
            state.skipped += 1
            odd.append(OddStep("bad_step", steps[i], first_samples[i], {"skipped": state.skipped}))
        numbered = zip(steps, losses, strict=True)
        for step, loss, median in find_spikes(numbered, state.recent_losses, self._threshold):
            first_sample = first_samples[steps.index(step)]
            odd.append(OddStep("spike", step, first_sample, {"loss": loss, "median": median}))
        return odd


def find_spikes(
    losses: Iterable[tuple[int, float]], recent: list[float], threshold: float
) -> list[tuple[int, float, float]]:
    """Finds losses far above those before them.

    Median and quartiles say what is usual: unlike mean and variance, a spike does not move them.

    Args:
        losses: (step, loss in nats per token), in order; losses that are not finite are skipped.
        recent: up to `RECENT` losses before them; the new ones are appended.
        threshold: in standard deviations; 0 finds nothing.

    Returns:
        (step, loss, median before it) of each spike.
    """
    found = []
    for step, loss in losses:
        if not math.isfinite(loss):
            continue
        if threshold and len(recent) >= ENOUGH:
            low, median, high = statistics.quantiles(recent, n=4)
            deviation = max((high - low) / (2 * _QUARTILE), 1e-3 * median)
            if loss > median + threshold * deviation:
                found.append((step, loss, median))
        recent.append(loss)
        del recent[:-RECENT]
    return found
