"""The reports of a run: lines for people on standard error, and records for `metrics.jsonl`.

Reporters read the run's state and never change it. A progress line comes after the steps 1, 2, 5
and 10 and after the last one, and in between by time.
"""

import dataclasses
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamapro.errors import DataError
from llamapro.formatting import format_bytes, format_count, format_duration, perplexity
from llamapro.text.mixture import Mixture
from llamapro.training.distributed import Ranks
from llamapro.training.metrics import RUN_FILE, MetricsLog
from llamapro.training.preemption import StopRequest
from llamapro.training.settings import Settings
from llamapro.training.state import OddStep, RunState

EARLY_STEPS = (1, 2, 5, 10)  # their progress lines show at once whether a run goes well
LINE_WIDTH = 80
HEADER_EVERY = 20  # progress lines
# Title -> width of the columns of progress lines.
COLUMNS = {"step": 13, "loss": 9, "ppl": 10, "grad norm": 11}
COLUMNS |= {"lr": 10, "tok/s": 8, "memory": 10, "eta": 8}


def say(ranks: Ranks, text: str) -> None:
    """Prints to standard error, where progress goes, on the main rank."""
    if ranks.is_main:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Mark:
    """Where the run stood at the last report; speeds are averages since then."""

    step: int
    tokens: int
    elapsed_s: float

    @classmethod
    def of(cls, state: RunState) -> "_Mark":
        return cls(state.step, state.tokens, state.elapsed_s)

    def speed_at(self, state: RunState) -> dict[str, float]:
        elapsed_s = state.elapsed_s - self.elapsed_s
        return {
            "tokens_per_s": (state.tokens - self.tokens) / elapsed_s,
            "step_s": elapsed_s / (state.step - self.step),
        }


class Progress:
    """Reports one run; every rank has one, and the main one prints and writes."""

    def __init__(
        self,
        settings: Settings,
        mixture: Mixture,
        steps: int,
        state: RunState,
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        """Sets up; nothing is written yet.

        Args:
            settings: of the run.
            mixture: names the documents of odd steps.
            steps: number of steps of the whole run.
            state: where the run stands; read at every report.
            ranks: from `process_group`.
            stop: asked to stop the run in order when the log cannot be written.
        """
        self._settings, self._mixture, self._steps = settings, mixture, steps
        self._state, self._ranks, self._stop = state, ranks, stop
        self._metrics: MetricsLog | None = None
        self._logged = self._shown = _Mark.of(state)
        self._shown_at = time.monotonic()
        self._lines = 0

    @contextmanager
    def writing(self, run_dir: Path, plan: dict[str, Any], changed: list[str]) -> Iterator[None]:
        """Writes `run.json`, for the report, and opens the log.

        Args:
            run_dir: the run directory, locked.
            plan: goes into `run.json`.
            changed: settings that differ from those the run had.

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
                step = self._state.step
                is_evaluated = self._state.evaluated == step
                log_to, config = self._settings.log_to, about["settings"]
                self._metrics = MetricsLog(run_dir, step, is_evaluated, log_to, config)
            except OSError as failure:
                error = f"{failure.filename or run_dir}: cannot be written: {failure.strerror}"
            except DataError as failure:
                error = str(failure)
        if error := self._ranks.from_main(error):
            raise DataError(error)
        if plan["resume_from"]:
            record = {"kind": "resume", "step": self._state.step, "changed": changed}
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

    def is_logged(self, step: int) -> bool:
        """Whether a step has a record in `metrics.jsonl`."""
        return step % self._settings.log_every == 0 or step == self._steps

    def is_due(self, step: int) -> bool:
        """Whether a step has a record or a progress line, whatever the time is."""
        return self.is_logged(step) or step in EARLY_STEPS

    @property
    def is_time(self) -> bool:
        """Whether a progress line is due by time; only the main rank's answer counts."""
        return time.monotonic() - self._shown_at >= self._settings.log_seconds

    def step(self, norm: float, rate: float, is_time: bool) -> None:
        """Logs or prints the latest step's numbers, and the speed since the last time."""
        state = self._state
        record = {"kind": "train", "step": state.step, "loss": state.loss}
        record |= {"grad_norm": norm, "learning_rate": rate, "tokens": state.tokens}
        times = {"elapsed_s": state.elapsed_s, "memory_bytes": peak_memory(self._ranks.device)}
        if self.is_logged(state.step):
            self._log(record | self._logged.speed_at(state) | times)
            self._logged = _Mark.of(state)
        if is_time or state.step in EARLY_STEPS or state.step == self._steps:
            if self._lines % HEADER_EVERY == 0:
                say(self._ranks, header())
            say(
                self._ranks,
                progress_line(record | self._shown.speed_at(state) | times, self._steps),
            )
            self._lines += 1
            self._shown, self._shown_at = _Mark.of(state), time.monotonic()

    def odd(self, found: OddStep) -> None:
        """Logs a step with what its batch was made of, and prints what is odd about it."""
        if found.kind == "spike":
            loss, median = (found.numbers[key] for key in ("loss", "median"))
            text = f"the loss jumped to {loss:.4f} from {median:.4f}"
        else:
            text = "gradient not finite, not applied"
        say(self._ranks, f"step {found.step}: {text}")
        if self._metrics is None:
            return
        read = []
        sources = (*self._settings.data.train, "replay")
        first = found.first_sample
        for index in range(first, first + self._settings.train.batch_size):
            number, sequence = self._mixture.locate(index)
            documents = self._mixture.sources[number].documents(sequence)
            read.append({"source": sources[number], "sequence": sequence, "documents": documents})
        self._log({"kind": found.kind, "step": found.step} | found.numbers | {"sequences": read})

    def evaluation(self, name: str, loss: float, tokens: int) -> None:
        """Logs one validation set's loss, in nats per token."""
        record = {"kind": "eval", "step": self._state.step, "set": name, "loss": loss}
        record |= {"perplexity": perplexity(loss), "tokens": tokens}
        self._log(record | {"tokens_seen": self._state.tokens})

    def evaluated(self) -> None:
        """Prints all validation losses, with their changes from the base."""
        state = self._state
        say(self._ranks, evaluation_line(state.step, self._steps, state.eval, state.base_eval))

    def saved(self, report: dict[str, Any] | None) -> None:
        """Logs and prints what `Saver.finish` returned; None reports nothing."""
        if report is None:
            return
        keys = ("step", "blocked_s", "total_s")
        self._log({"kind": "save", **{key: report[key] for key in keys}})
        blocked, total = (format_duration(report[key]) for key in ("blocked_s", "total_s"))
        waited = "" if blocked == total else f", training waited {blocked}"
        place = _place(report["step"], self._steps)
        say(self._ranks, f"{place}  saved {Path(report['path']).name} in {total}{waited}")


def header() -> str:
    """Returns the titles of the columns of progress lines."""
    return "".join(f"{title:>{width}}" for title, width in COLUMNS.items())


def progress_line(record: dict[str, Any], steps: int) -> str:
    """Returns a `train` record in columns, with the time left at the present pace."""
    loss, ppl = record["loss"], perplexity(record["loss"])
    cells = [
        f"{record['step']}/{steps}",
        f"{loss:.4f}" if loss < 1000 else f"{loss:.4g}",
        f"{ppl:.4g}" if ppl < 1e6 else f"{ppl:.2e}",
        f"{record['grad_norm']:.3g}",
        f"{record['learning_rate']:.2e}",
        format_count(record["tokens_per_s"]),
        format_bytes(record["memory_bytes"]),
        format_duration(record["step_s"] * (steps - record["step"])),
    ]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def evaluation_line(step: int, steps: int, losses: dict[str, float], base: dict[str, float]) -> str:
    """Returns validation losses with their changes from the base, wrapped to the line width."""
    lines = [f"{_place(step, steps)}  eval"]
    indent = " " * len(lines[0])
    if not losses:
        lines[0] += "  no validation set"
    for name, loss in losses.items():
        text = f"  {name} {loss:.3f}"
        if step and name in base:
            text += f" ({loss - base[name]:+.3f})"
        if lines[-1] != indent and len(lines[-1] + text) > LINE_WIDTH:
            lines.append(indent)
        lines[-1] += text
    return "\n".join(lines)


def _place(step: int, steps: int) -> str:
    return f"{f'{step}/{steps}':>{COLUMNS['step']}}"


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has held, of the GPU or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
