"""What a run says while it goes: lines for people, records for `metrics.jsonl`, and what is odd.

Losses and gradient norms stay on the device until there is something to say: nobody waits for them
at every step.
"""

import dataclasses
import json
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamapro.errors import DataError
from llamapro.text.mixture import Mixture
from llamapro.training.distributed import Ranks
from llamapro.training.metrics import (
    RUN_FILE,
    MetricsLog,
    format_duration,
    perplexity,
    progress_line,
)
from llamapro.training.preemption import StopRequest
from llamapro.training.settings import Settings

RECENT = 64  # how many losses a step's is compared with
ENOUGH = 16  # with fewer nothing is said
# A quarter of a normal distribution lies further than this many standard deviations over its mean.
_QUARTILE = 0.6745


def say(ranks: Ranks, text: str) -> None:
    """Progress goes to standard error, from one process."""
    if ranks.is_main:
        print(text, file=sys.stderr, flush=True)


def find_spikes(
    losses: Iterable[tuple[int, float]], recent: list[float], threshold: float
) -> list[tuple[int, float, float]]:
    """Finds losses far above those before them.

    Median and quartiles say what is usual: unlike mean and variance, a spike does not move them.

    Args:
        losses: (step, loss in nats per token), in order; what is not finite is passed over.
        recent: the latest losses before them, `RECENT` at most; these are added to it.
        threshold: in standard deviations; 0 finds nothing.

    Returns:
        (step, loss, median before it) of each.
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


class Progress:
    """One run's reports, on every rank; the main one prints and writes.

    Attributes:
        state: where the run stands; `loss`, `elapsed_s`, `skipped` and `recent_losses` are kept up
            to date here.
    """

    def __init__(
        self,
        settings: Settings,
        mixture: Mixture,
        steps: int,
        state: dict[str, Any],
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        self.state = state
        self._settings, self._mixture, self._steps = settings, mixture, steps
        self._ranks, self._stop = ranks, stop
        self._metrics: MetricsLog | None = None
        self._unread: list[tuple[int, int, Tensor, Tensor]] = []  # step, samples, loss, norm
        self._window = {"s": 0.0, "tokens": 0, "steps": 0}  # since the last progress line
        self._skipped_before = state["skipped"]

    @contextmanager
    def writing(self, run_dir: Path, plan: dict[str, Any], changed: list[str]) -> Iterator[None]:
        """Writes `run.json`, for the report, and opens the log.

        Args:
            run_dir: of the run, locked.
            plan: goes into `run.json`.
            changed: the settings that differ from those the run had.

        Raises:
            DataError: on every rank, if the main one cannot write or the log is damaged.
        """
        error = None
        if self._ranks.is_main:
            about = plan | {
                "settings": dataclasses.asdict(self._settings),
                "world_size": self._ranks.world_size,
                "device": str(self._ranks.device),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            }
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                text = json.dumps(about, indent=2) + "\n"
                (run_dir / RUN_FILE).write_text(text, encoding="utf-8")
                step = self.state["step"]
                is_evaluated = self.state["evaluated"] == step
                log_to, config = self._settings.log_to, about["settings"]
                self._metrics = MetricsLog(run_dir, step, is_evaluated, log_to, config)
            except OSError as failure:
                error = f"{failure.filename or run_dir}: cannot be written: {failure.strerror}"
            except DataError as failure:
                error = str(failure)
        if error := self._ranks.from_main(error):
            raise DataError(error)
        if plan["resume_from"]:
            record = {"kind": "resume", "step": self.state["step"], "changed": changed}
            self._log(record | {"world_size": self._ranks.world_size})
        try:
            yield
        finally:
            if self._metrics is not None:
                self._metrics.close()

    def _log(self, record: dict[str, Any]) -> None:
        """Appends a record; where that fails the run is asked to stop in order."""
        if self._metrics is None or self._stop.failure:
            return
        try:
            self._metrics.log(record)
        except OSError as error:
            self._stop.fail(f"{error.filename or 'the log'}: cannot be written: {error.strerror}")

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time of the body to the run's; the clock is one that nobody can set."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.state["elapsed_s"] += elapsed
            self._window["s"] += elapsed

    def step(self, valid: int, loss: Tensor, norm: Tensor) -> None:
        """Notes a step on `valid` tokens: this rank's part of its loss, (), and the norm, ()."""
        state = self.state
        self._unread.append((state["step"], state["samples"], loss, norm))
        state["step"] += 1
        state["tokens"] += valid
        state["samples"] += self._settings.train.batch_size
        self._window["tokens"] += valid
        self._window["steps"] += 1

    def settle(self, skipped: int) -> None:
        """Reads the latest losses, which waits for the device; tells of odd steps among them.

        Args:
            skipped: how many steps this process has not applied: `FiniteGuard.check`.
        """
        if not self._unread:
            return
        steps, samples, parts, norms = zip(*self._unread, strict=True)
        losses = self._ranks.sum(*parts)
        self._unread = []
        self.state["loss"] = losses[-1]
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        bad = bad[: self._skipped_before + skipped - self.state["skipped"]]
        for i in bad:
            self.state["skipped"] += 1
            self._log_odd("bad_step", steps[i], samples[i], {"skipped": self.state["skipped"]})
            say(self._ranks, f"step {steps[i] + 1}: gradient not finite, not applied")
        recent = self.state["recent_losses"]
        spikes = find_spikes(zip(steps, losses, strict=True), recent, self._settings.log_spikes)
        for step, loss, usual in spikes:
            first = samples[steps.index(step)]
            self._log_odd("spike", step, first, {"loss": loss, "median": usual})
            say(self._ranks, f"step {step + 1}: the loss jumped to {loss:.4f} from {usual:.4f}")

    def _log_odd(self, kind: str, step: int, first: int, numbers: dict[str, Any]) -> None:
        """Logs a step with what its batch was made of."""
        if self._metrics is None:
            return
        read = []
        sources = (*self._settings.data.train, "replay")
        for index in range(first, first + self._settings.train.batch_size):
            number, sequence = self._mixture.locate(index)
            documents = self._mixture.sources[number].documents(sequence)
            read.append({"source": sources[number], "sequence": sequence, "documents": documents})
        self._log({"kind": kind, "step": step + 1} | numbers | {"sequences": read})

    def line(self, norm: float, rate: float) -> None:
        """Logs and prints the latest step's numbers, and the speed since the last line."""
        state, window = self.state, self._window
        record = {"kind": "train", "step": state["step"], "loss": state["loss"]}
        record |= {"grad_norm": norm, "learning_rate": rate, "tokens": state["tokens"]}
        record |= {"tokens_per_s": window["tokens"] / window["s"]}
        record |= {"step_s": window["s"] / window["steps"], "elapsed_s": state["elapsed_s"]}
        record |= {"memory_bytes": peak_memory(self._ranks.device)}
        self._log(record)
        say(self._ranks, progress_line(record, self._steps))
        self._window = {"s": 0.0, "tokens": 0, "steps": 0}

    def evaluation(self, name: str, loss: float, tokens: int) -> None:
        """Logs one validation set's loss, in nats per token."""
        self.state["eval"][name] = loss
        record = {"kind": "eval", "step": self.state["step"], "set": name, "loss": loss}
        record |= {"perplexity": perplexity(loss), "tokens": tokens}
        self._log(record | {"tokens_seen": self.state["tokens"]})

    def evaluated(self) -> None:
        """Prints all validation losses."""
        self.state["evaluated"] = self.state["step"]
        shown = " · ".join(f"{name} {loss:.4f}" for name, loss in self.state["eval"].items())
        say(
            self._ranks, f"eval {self.state['step']}/{self._steps} · {shown or 'no validation set'}"
        )

    def saved(self, record: dict[str, Any] | None) -> None:
        """Logs and prints what `Saver.finish` gives; None says nothing."""
        if record is None:
            return
        self._log(
            {"kind": "save", **{key: record[key] for key in ("step", "blocked_s", "total_s")}}
        )
        blocked, total = (format_duration(record[key]) for key in ("blocked_s", "total_s"))
        waited = "" if blocked == total else f", training waited {blocked}"
        say(self._ranks, f"saved {record['path']} in {total}{waited}")


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes this process has held: of the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
