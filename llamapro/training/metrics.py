"""A run's metrics: one JSON object a line in `metrics.jsonl`, and the same numbers for people.

They also go to TensorBoard, W&B or trackio where `log_to` names them, as KIND/NUMBER or, of a
validation set, eval/SET/NUMBER.

The records, told apart by `kind`; `step` counts the optimizer steps made:

- `train`, one per logging step: `step`, `loss` (nats per token, over the global batch; of replayed
  tokens it is `replay.weight` times theirs, with `replay.distill` their KL divergence),
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

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llamapro.checkpoints.run import METRICS_FILE, read_metrics
from llamapro.files import write_file

RUN_FILE = "run.json"
PROJECT = "llamapro"  # at W&B and trackio


class MetricsLog:
    """Appends records to a run's `metrics.jsonl`, and sends their numbers to trackers.

    One process writes (rank 0), line by line, so the file can be followed while training. The file
    is what a run stands on; a tracker that fails is said once on standard error and left alone.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        is_evaluated: bool = True,
        log_to: Sequence[str] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        """Opens the log where the run continues.

        Args:
            run_dir: the run's directory, created if need be.
            resume_step: the checkpoint's step. Later records are of steps that will be done again
                and are dropped, as is a half-written last line. 0 starts a new log.
            is_evaluated: whether the evaluation of that step was done when it was saved; if not it
                will be done again, and its records are dropped, too.
            log_to: trackers, of "tensorboard" (files in `tensorboard/`), "wandb" and "trackio". A
                step that a resumed run does again replaces the old one in TensorBoard only.
            config: the run's settings, shown by the trackers that show such.

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
        write_file(path, "".join(map(_to_line, kept)))
        # Unbuffered: what could not be written is not tried again when the file is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._trackers = [
            _Tracker(name, run_dir, resume_step, config or {}) for name in dict.fromkeys(log_to)
        ]

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
        group = "/".join(str(record[key]) for key in ("kind", "set") if key in record)
        numbers = {
            f"{group}/{key}": value
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float))
        }
        for tracker in self._trackers:
            tracker.log(numbers, record["step"])

    def close(self) -> None:
        """Closes the files; nothing can be logged afterwards."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def is_installed(tracker: str) -> bool:
    """Returns whether the package of a tracker can be imported; imports nothing."""
    if tracker in sys.modules:
        return sys.modules[tracker] is not None
    spec = importlib.util.find_spec(tracker)
    # A mere folder of this name, as wandb leaves where it ran, is also a package, without a file.
    return spec is not None and spec.origin is not None


def _to_line(record: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class _Tracker:
    """Another place for the numbers. As a context it says and stops what its library raises."""

    def __init__(self, name: str, run_dir: Path, resume_step: int, config: dict[str, Any]) -> None:
        self._name = name
        self._run: Any = None  # has `log` and `finish`; None: not to be used (any more)
        with self, self._output():
            if name == "tensorboard":
                self._run = _Board(run_dir / "tensorboard", resume_step)
            else:
                self._run = _start_online(name, run_dir, config)

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self._run is not None and numbers:
            with self, self._output():
                self._run.log(numbers, step=step)

    def finish(self) -> None:
        if self._run is not None:
            with self, self._output():
                self._run.finish()

    def _output(self) -> AbstractContextManager[Any]:
        """Standard output is for the run's result, but trackio greets there."""
        return redirect_stdout(sys.stderr) if self._name == "trackio" else nullcontext()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        # Whatever it is: what these libraries raise, also from below them, has no base in common,
        # and none of it is worth a week of training. A signal is no `Exception` and goes on.
        if not isinstance(error, Exception):
            return False
        self._run = None
        problem = f"{type(error).__name__}: {error}"
        print(
            f"warning: {self._name} failed ({problem}); nothing more is logged there, "
            f"{METRICS_FILE} goes on",
            file=sys.stderr,
            flush=True,
        )
        return True


class _Board:
    """TensorBoard, with the methods of the other trackers' runs."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what was logged of the steps that are done again.
        purge_step = resume_step + 1 if resume_step > 0 else 0
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _start_online(name: str, run_dir: Path, config: dict[str, Any]) -> Any:
    """Starts the run at W&B or trackio, or goes on with the one of this directory."""
    place = os.path.abspath(run_dir)
    shown, key = os.path.basename(place), hashlib.sha256(place.encode()).hexdigest()[:16]
    if name == "trackio":
        import trackio

        # A name is all that tells its runs apart: directories of one name need two.
        name = f"{shown}-{key[:6]}"
        return trackio.init(project=PROJECT, name=name, config=config, resume="allow")
    import wandb

    return wandb.init(
        project=PROJECT,
        name=shown,
        id=key,
        resume="allow",
        dir=place,
        config=config,
        allow_val_change=True,  # some settings may differ when a run goes on
    )
