"""The reports of a run: lines for people on standard error, and records for `metrics.jsonl`.

Reporters read the run's state and never change it. A progress line comes after the steps 1, 2, 5,
10 and the last one, and in between by time.
"""

import dataclasses
import errno
import json
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamapro.checkpoints.run import RUN_FILE
from llamapro.formatting import format_bytes, format_count, format_duration, perplexity
from llamapro.text.mixture import Mixture
from llamapro.training.distributed import Ranks
from llamapro.training.metrics import MetricsLog
from llamapro.training.settings import Settings
from llamapro.training.state import RunState

EARLY_STEPS = (1, 2, 5, 10)  # their progress lines show at once whether a run goes well
LINE_WIDTH = 80
STEPS_AT_BOUND = 50  # the weight of replay.hold this long at its bound is worth a warning
HEADER_EVERY = 20  # progress lines
# Title -> width of the columns of progress lines.
COLUMNS = {"step": 13, "loss": 9, "ppl": 10, "grad norm": 11}
COLUMNS |= {"lr": 10, "tok/s": 8, "memory": 10, "eta": 8}


def speed(since: RunState, now: RunState) -> dict[str, float]:
    """Returns tokens per second and seconds per step, averaged between two states of a run."""
    elapsed_s = now.elapsed_s - since.elapsed_s
    return {
        "tokens_per_s": (now.tokens - since.tokens) / elapsed_s,
        "step_s": elapsed_s / (now.step - since.step),
    }


class Progress:
    """Reports one run; every rank has one, and the main one prints and writes."""

    def __init__(
        self, settings: Settings, mixture: Mixture, steps: int, state: RunState, ranks: Ranks
    ) -> None:
        """Writes nothing yet. When the log cannot be written, the run is asked to stop."""
        self._settings, self._mixture, self._steps = settings, mixture, steps
        self._state, self._ranks = state, ranks
        self._metrics: MetricsLog | None = None
        self._logged = self._shown = replace(state)  # the state at the last report
        self._shown_at = time.monotonic()
        self._lines = 0
        self._has_warned = False

    @contextmanager
    def writing(self, run_dir: Path, plan: dict[str, Any], changed: list[str]) -> Iterator[None]:
        """Writes the plan to `run.json`, opens the log and logs settings changed on resuming.

        Raises DataError on every rank if the main one cannot write or the log is damaged.
        """
        about = plan | {
            "settings": dataclasses.asdict(self._settings),
            "world_size": self._ranks.world_size,
            "device": str(self._ranks.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

        def open_log() -> None:
            state, log_to = self._state, self._settings.log_to
            is_evaluated = state.evaluated == state.step
            run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(about, indent=2) + "\n"
            (run_dir / RUN_FILE).write_text(text, encoding="utf-8")
            self._metrics = MetricsLog(run_dir, state.step, is_evaluated, log_to, about["settings"])

        self._ranks.on_main(open_log)
        if plan["resume_from"]:
            record = {"kind": "resume", "step": self._state.step, "changed": changed}
            self._log(record | {"world_size": self._ranks.world_size})
        try:
            yield
        finally:
            if self._metrics is not None:
                self._metrics.close()

    def _log(self, record: dict[str, Any]) -> None:
        """Appends a record; if that fails, asks the run to stop."""
        if self._metrics is None:
            return
        try:
            self._metrics.log(record)
        except OSError as error:
            problem = "" if error.errno == errno.ESTALE else "cannot be written: "
            self._ranks.stop.fail(f"{error.filename or 'the log'}: {problem}{error.strerror}")

    def is_logged(self, step: int) -> bool:
        """Whether a step has a record in `metrics.jsonl`."""
        return step % self._settings.log_every == 0 or step == self._steps

    def is_due(self, step: int) -> bool:
        """Whether a step has a record or a progress line, apart from those by time."""
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
        if state.control:
            record |= {f"replay_{key}": state.control[key] for key in ("kl", "weight")}
            self._warn_at_bound()
        times = {"elapsed_s": state.elapsed_s, "memory_bytes": peak_memory(self._ranks.device)}
        if self.is_logged(state.step):
            self._log(record | speed(self._logged, state) | times)
            self._logged = replace(state)
        if is_time or state.step in EARLY_STEPS or state.step == self._steps:
            if self._lines % HEADER_EVERY == 0:
                self._ranks.say(header())
            record |= speed(self._shown, state) | times
            self._ranks.say(progress_line(record, self._steps))
            self._lines += 1
            self._shown, self._shown_at = replace(state), time.monotonic()

    def _warn_at_bound(self) -> None:
        """Prints once that `replay.hold` is out of reach."""
        control, hold = self._state.control, self._settings.replay.hold
        if (control["steps_at_bound"] or 0) < STEPS_AT_BOUND or self._has_warned:
            return
        self._has_warned = True
        self._ranks.say(
            f"replay.hold {hold} is out of reach: the weight has been at its bound of "
            f"{control['weight']:g} for {control['steps_at_bound']:.0f} steps, and the KL is "
            f"{control['kl']:.3f}. Raise replay.hold or replay.share, or lower optim.lr"
        )

    def odd(self, kind: str, step: int, first_sample: int, numbers: dict[str, float]) -> None:
        """Logs a step that `Losses` reports with the documents of its batch, and prints it."""
        text = "gradient not finite, not applied"
        if kind == "spike":
            text = f"the loss jumped to {numbers['loss']:.4f} from {numbers['median']:.4f}"
        self._ranks.say(f"step {step}: {text}")
        if self._metrics is None:
            return
        read = []
        sources = (*self._settings.data.train, "replay")
        for index in range(first_sample, first_sample + self._settings.train.batch_size):
            number, sequence = self._mixture.locate(index)
            documents = self._mixture.sources[number].documents(sequence)
            read.append({"source": sources[number], "sequence": sequence, "documents": documents})
        self._log({"kind": kind, "step": step} | numbers | {"sequences": read})

    def evaluation(self, name: str, loss: float, tokens: int) -> None:
        """Logs one validation set's loss, in nats per token."""
        record = {"kind": "eval", "step": self._state.step, "set": name, "loss": loss}
        record |= {"perplexity": perplexity(loss), "tokens": tokens}
        self._log(record | {"tokens_seen": self._state.tokens})

    def evaluated(self) -> None:
        """Prints all validation losses, with their changes from the base."""
        state = self._state
        self._ranks.say(evaluation_line(state.step, self._steps, state.eval, state.base_eval))
        if state.control and state.step:
            kl, weight = state.control["kl"] or 0.0, state.control["weight"]
            hold = self._settings.replay.hold
            text = f"replay KL {kl:.4f}, replay.hold {hold}, weight {weight:.3g}"
            self._ranks.say(f"{'':>{COLUMNS['step']}}        {text}")

    def saved(self, report: dict[str, Any] | None) -> None:
        """Logs and prints the report of `Saver.finish`; does nothing with None."""
        if report is None:
            return
        keys = ("step", "blocked_s", "total_s")
        self._log({"kind": "save", **{key: report[key] for key in keys}})
        blocked, total = (format_duration(report[key]) for key in ("blocked_s", "total_s"))
        waited = "" if blocked == total else f", training waited {blocked}"
        place = _place(report["step"], self._steps)
        self._ranks.say(f"{place}  saved {Path(report['path']).name} in {total}{waited}")


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
    """Returns the peak of this process in bytes: of GPU memory, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
