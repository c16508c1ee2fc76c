"""A run's metrics: one JSON object a line in `metrics.jsonl`, and the same numbers for people.

The records, told apart by `kind`; `step` counts the optimizer steps made:

- `train`, one per logging step: `step`, `loss` (nats per token, over the global batch),
  `learning_rate`, `grad_norm`, `tokens` (trained on so far), `tokens_per_s`, `step_s` (mean seconds
  per step since the last record), `elapsed_s`, `memory_bytes` (peak).
- `eval`, one per validation set each time: `step`, `set` (its name), `loss`, `perplexity`, `tokens`
  (of the set), `tokens_seen` (trained on so far). Step 0 is the model before any update: the base.
- `save`, one per training checkpoint: `step`, `blocked_s` (what training waited), `total_s`.
- `resume`, one per start that goes on: `step`, `changed` (settings), `world_size`.
- `bad_step`, one per step that was not applied (its gradient was not finite), and `spike`, one per
  step whose `loss` is far over the `median` of those before: `step`, and `sequences`, what its
  batch was made of: for each `source`, number of the `sequence` there and its `documents`, first
  and last.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import Any, Self

from llamapro.config import DataError

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
LAST_RECORDS = 10  # the final training loss is the mean of so many records: one batch is noise


class MetricsLog:
    """Appends records to a run's `metrics.jsonl`, and to `tensorboard/` if that is installed.

    One process writes (rank 0), line by line, so the file can be followed while training.
    """

    def __init__(self, run_dir: Path, resume_step: int, is_evaluated: bool = True) -> None:
        """Opens the log where the run continues.

        Args:
            run_dir: the run's directory, created if need be.
            resume_step: the checkpoint's step. Later records are of steps that will be done again
                and are dropped, as is a half-written last line. 0 starts a new log.
            is_evaluated: whether the evaluation of that step was done when it was saved; if not it
                will be done again, and its records are dropped, too.

        Raises:
            DataError: the existing log is damaged before its last line.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        kept: list[dict[str, Any]] = []
        # A run that starts at step 0 evaluates the base again; nothing is left to keep.
        if resume_step > 0 and path.exists():
            again = [] if is_evaluated else [("eval", resume_step)]
            kept = [
                record
                for record in read_metrics(run_dir)
                if record["step"] <= resume_step and (record["kind"], record["step"]) not in again
            ]
        _replace(path, "".join(map(_to_line, kept)))
        # Unbuffered: what could not be written is not tried again when the file is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._board = _open_tensorboard(
            run_dir / "tensorboard", resume_step + 1 if resume_step > 0 else 0
        )

    def log(self, record: dict[str, Any]) -> None:
        """Appends one record; NaN and infinity, which JSON does not have, are written as null.

        Raises:
            OSError: the disk is full, or fails; `filename` names the log, which ends with the
                record before.
        """
        start = self._file.tell()
        try:
            line = memoryview(_to_line(record).encode())
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)
            error.filename = self._file.name
            raise
        if self._board is not None:
            group = "/".join(str(record[key]) for key in ("kind", "set") if key in record)
            for key, value in record.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(f"{group}/{key}", value, record["step"])

    def close(self) -> None:
        """Closes the files; nothing can be logged afterwards."""
        self._file.close()
        if self._board is not None:
            with suppress(OSError):  # a full disk, which `log` has told
                self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns a run's records in the order they were written.

    A last line cut off in the middle is left out: its process was killed, or is writing just now.

    Raises:
        DataError: there is no log, or a line is not a record; names the file and the line.
    """
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{run_dir}: no {METRICS_FILE}; is this a run directory?") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not even UTF-8
            record = None
        if (
            isinstance(record, dict)
            and isinstance(record.get("step"), int)
            and isinstance(record.get("kind"), str)
        ):
            records.append(record)
        elif number < len(lines):  # only the line that no newline ends can be half-written
            shown = line[:60].decode("utf-8", errors="replace")
            raise DataError(
                f"{path}:{number}: expected a JSON object with 'kind' and 'step', found {shown!r}; "
                "remove this line"
            )
    return records


def _to_line(record: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Writes aside and renames: a kill in between leaves the old file as it was."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _open_tensorboard(directory: Path, purge_step: int) -> Any:
    """Returns a SummaryWriter that hides what was logged from `purge_step` on, or None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=purge_step)


@dataclass(frozen=True)
class Run:
    """One run directory, read.

    Attributes:
        name: told apart from the other runs' names.
        path: the directory.
        info: `run.json`.
        train: `train` records by step, in order of steps.
        evals: per validation set, `eval` records by step, in order of steps.
    """

    name: str
    path: Path
    info: dict[str, Any]
    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]

    def setting(self, *keys: str) -> Any:
        """Returns `run.json`'s value under these nested keys, None where it has none."""
        value: Any = self.info
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def losses(self, name: str) -> tuple[float | None, float | None]:
        """Returns a validation set's loss at step 0 and at the end, None where not evaluated."""
        records = self.evals.get(name, [])
        first = next((r.get("loss") for r in records if r["step"] == 0), None)
        last = records[-1].get("loss") if records and records[-1]["step"] > 0 else None
        return first, last


def read_run(path: Path, name: str) -> Run:
    """Reads a run directory.

    Raises:
        DataError: `run.json` or `metrics.jsonl` is missing or damaged.
    """
    try:
        info = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no {RUN_FILE}; is this a run directory?") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path / RUN_FILE}: not readable as JSON: {error}") from None
    if not isinstance(info, dict):
        raise DataError(f"{path / RUN_FILE}: expected an object, found {type(info).__name__}")
    train: dict[int, dict[str, Any]] = {}
    evals: dict[str, dict[int, dict[str, Any]]] = {}
    for record in read_metrics(path):
        # A resumed run may evaluate its first step again: the later record counts.
        if record["kind"] == "train":
            train[record["step"]] = record
        elif record["kind"] == "eval":
            evals.setdefault(str(record.get("set", "")), {})[record["step"]] = record
    return Run(
        name,
        path,
        info,
        [record for _, record in sorted(train.items())],
        {key: [r for _, r in sorted(records.items())] for key, records in evals.items()},
    )


def summarize(run: Run, sets: Sequence[str]) -> dict[str, Any]:
    """Returns a run's numbers: losses in nats per token, times in seconds, None where unknown."""
    results = {}
    for name in sets:
        first, last = run.losses(name)
        results[name] = {
            "initial_loss": first,
            "final_loss": last,
            "change": None if first is None or last is None else last - first,
        }
    evals = [record for records in run.evals.values() for record in records]
    tokens = _values(run.train, "tokens") + _values(evals, "tokens_seen")
    losses = _values(run.train, "loss")[-LAST_RECORDS:]
    speeds = _values(run.train, "tokens_per_s")
    return {
        "run": run.name,
        "path": str(run.path),
        "trains": run.setting("settings", "train", "trainable"),
        "trainable_parameters": run.setting("parameters", "trainable"),
        "total_parameters": run.setting("parameters", "total"),
        "steps": max((record["step"] for record in run.train + evals), default=None),
        "tokens": max(tokens, default=None),
        "sets": results,
        "final_train_loss": fmean(losses) if losses else None,
        "tokens_per_s": median(speeds) if speeds else None,
        "elapsed_s": _total_time(_values(run.train, "elapsed_s")),
        "memory_bytes": max(_values(run.train, "memory_bytes"), default=None),
    }


def _values(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [record[key] for record in records if record.get(key) is not None]


def _total_time(elapsed: Sequence[float]) -> float | None:
    """Adds up the processes of a resumed run: where the clock falls back, another one began."""
    if not elapsed:
        return None
    ends = [a for a, b in pairwise(elapsed) if b < a]
    return sum(ends) + elapsed[-1]


def progress_line(record: dict[str, Any], total_steps: int) -> str:
    """Returns a `train` record as one line for people, with the time left at the present pace.

    What the record lacks is left out: `memory_bytes`, for example, on a CPU.
    """
    shown = {
        "loss": lambda loss: f"loss {loss:.4f} · ppl {perplexity(loss):.2f}",
        "grad_norm": lambda norm: f"grad norm {norm:.2f}",
        "learning_rate": lambda rate: f"lr {rate:.2e}",
        "tokens_per_s": lambda rate: f"{format_count(rate)} tok/s",
        "memory_bytes": lambda size: f"mem {format_bytes(size)}",
        "tokens": lambda tokens: f"seen {format_count(tokens)} tok",
        "step_s": lambda s: f"eta {format_duration(s * (total_steps - record['step']))}",
    }
    parts = [f"step {record['step']}/{total_steps}"]
    parts += [show(record[key]) for key, show in shown.items() if record.get(key) is not None]
    return " · ".join(parts)


def perplexity(loss: float) -> float:
    """Returns exp(loss in nats per token), infinity where that overflows."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def format_count(n: float) -> str:
    """Returns a count in three digits: `512`, `41.2k`, `1.26B`."""
    return _three_digits(n, 1000, ("", "k", "M", "B", "T"))


def format_bytes(n: float) -> str:
    """Returns a size in three digits and binary units: `512 B`, `61.2 GiB`."""
    return _three_digits(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _three_digits(value: float, base: int, units: tuple[str, ...]) -> str:
    unit = 0
    # 999.5 would be rounded to four digits.
    while abs(value) >= 999.5 and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    if unit == 0 and float(value).is_integer():
        return f"{value:.0f}{units[0]}"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}{units[unit]}"


def format_duration(seconds: float) -> str:
    """Returns a duration by its two largest units: `4.2s`, `42s`, `3m07s`, `5h12m`, `2d03h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(minutes / 60)
    return f"{hours // 24}d{hours % 24:02d}h"
