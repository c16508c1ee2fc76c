"""A run's metrics: one JSON object per line of `metrics.jsonl`, written and read back.

The numbers also go to TensorBoard, W&B or trackio if `log_to` names them. Their names there are
KIND/NUMBER and eval/SET/NUMBER.

A record has a `kind` and a `step`, the number of optimizer steps made:

- `train`, one per logging step: `loss` (nats per token of the global batch, without replayed tokens
  where these have a loss or weight of their own), `learning_rate`, `grad_norm`, `tokens` (trained
  on so far), `tokens_per_s`, `step_s` (mean seconds per step since the last record), `elapsed_s`,
  `memory_bytes` (peak); with `replay.hold` also `replay_kl` (geometric moving average, nats per
  token) and `replay_weight`.
- `eval`, one per validation set and evaluation: `set` (its name), `loss`, `perplexity`, `tokens`
  (of the set), `tokens_seen` (trained on so far). At step 0 the model is still the base.
- `save`, one per training checkpoint: `blocked_s` (seconds that training waited), `total_s`.
- `resume`, one per resumed start: `changed` (settings), `world_size`.
- `bad_step`, one per step that was not applied because its gradient was not finite, and `spike`,
  one per step whose `loss` is far over the `median` of the latest ones. Both list the `sequences`
  of the batch: `source`, number of the `sequence` in it, and its first and last of `documents`.
"""

import errno
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

from llamapro.checkpoints.run import METRICS_FILE, RUN_FILE, read_metrics
from llamapro.errors import DataError, warn
from llamapro.files import make_directory, read_json, write_file
from llamapro.formatting import finite, flatten

LAST_RECORDS = 10  # the final training loss is a mean of this many records: one batch is noise
MEANWHILE = "while the run was writing it"
PROJECT = "llamapro"  # at W&B and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT is set


class MetricsLog:
    """Appends records to a run's `metrics.jsonl`, and sends their numbers to trackers.

    Rank 0 writes, line by line, so the file can be followed while training. A tracker that fails
    is reported once on standard error and not used again; the file goes on.
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

        Raises DataError if the existing log is damaged before its last line.

        Args:
            resume_step: the checkpoint's step. Records of later steps are dropped, because these
                will be done again, and so is a half-written last line. 0 starts a new log.
            is_evaluated: whether that step was evaluated before it was saved. If not, its
                evaluation will be done again, and its records are dropped too.
            log_to: trackers. Only TensorBoard replaces a step that a resumed run does again.
            config: the run's settings, for trackers that show them.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        kept: list[dict[str, Any]] = []
        # A run that starts at step 0 does everything again, so it keeps no record.
        if resume_step > 0 and path.exists():
            again = [] if is_evaluated else [("eval", resume_step)]
            kept = [
                record
                for record in read_metrics(run_dir)
                if record["step"] <= resume_step and (record["kind"], record["step"]) not in again
            ]
        write_file(path, "".join(map(_to_line, kept)))
        # A descriptor, because a Python file would keep what failed to be written and try it again.
        self._fd, self._path = os.open(path, os.O_WRONLY | os.O_APPEND), path
        self._end, self._unwritten = os.fstat(self._fd).st_size, b""
        self._trackers: dict[str, Any] = {}  # name -> its run, which has `log` and `finish`
        for name in dict.fromkeys(log_to):
            with self._told_once(name):
                if name == "tensorboard":
                    self._trackers[name] = _start_board(run_dir / name, resume_step)
                else:
                    self._trackers[name] = _start_online(name, run_dir, config or {})

    def log(self, record: dict[str, Any]) -> None:
        """Appends one record; NaN and infinity, which JSON does not have, are written as null.

        Raises:
            OSError: the disk is full, or fails; `filename` names the log, which ends with a whole
                record. This one is kept and written with the next, or when the log is closed. Or
                the log was removed: then it is put back, if there is no other.
        """
        self._unwritten += _to_line(record).encode()
        self._write()
        group = "/".join(str(record[key]) for key in ("kind", "set") if key in record)
        numbers = {
            f"{group}/{key}": value
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float))
        }
        for name, run in list(self._trackers.items()) if numbers else ():
            with self._told_once(name):
                run.log(numbers, step=record["step"])

    def _write(self) -> None:
        was_removed = self._check_place()
        try:
            if os.fstat(self._fd).st_size != self._end:
                os.ftruncate(self._fd, self._end)  # a part of a line
            line = memoryview(self._unwritten)
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
            error.filename = str(self._path)
            raise
        self._end += len(self._unwritten)
        self._unwritten = b""
        if was_removed:
            raise OSError(errno.ESTALE, f"was removed {MEANWHILE}", str(self._path))

    def _check_place(self) -> bool:
        """Puts the log back if it was removed, and returns whether it was."""
        try:
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                return False
        except FileNotFoundError:
            make_directory(self._path.parent)
            whole = Path(f"/proc/self/fd/{self._fd}").read_bytes()[: self._end]
            write_file(self._path, whole)
            # It may be removed again by now. Only then is the old file no longer needed.
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            os.close(self._fd)
            self._fd = fd
            return True
        raise OSError(errno.ESTALE, f"was replaced {MEANWHILE}", str(self._path))

    def close(self) -> None:
        """Closes the files; nothing can be logged afterwards."""
        with suppress(OSError):
            self._write()
        os.close(self._fd)
        for name, run in list(self._trackers.items()):
            with self._told_once(name):
                run.finish()

    @contextmanager
    def _told_once(self, tracker: str) -> Iterator[None]:
        """Reports an error of a tracker, which is then not used again.

        Keeps trackio's greeting off standard output, which is for the run's result.
        """
        try:
            with redirect_stdout(sys.stderr) if tracker == "trackio" else nullcontext():
                yield
        # The errors of these libraries have no base class in common, and none of them is worth a
        # week of training. A signal is not an `Exception` and passes.
        except Exception as error:
            self._trackers.pop(tracker, None)
            warn(
                f"{tracker} failed ({type(error).__name__}: {error}); nothing more is logged "
                f"there, {METRICS_FILE} goes on"
            )


def is_installed(tracker: str) -> bool:
    """Returns whether the package of a tracker can be imported; does not import it."""
    if tracker in sys.modules:
        return sys.modules[tracker] is not None
    spec = importlib.util.find_spec(tracker)
    # wandb leaves a folder of its name where it ran, which is also a package, but without a file.
    return spec is not None and spec.origin is not None


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _start_board(directory: Path, resume_step: int) -> Any:
    """Starts TensorBoard, with the methods of the other trackers' runs."""
    from torch.utils.tensorboard import SummaryWriter

    # Hides the old numbers of the steps that are done again.
    writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step > 0 else 0)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return SimpleNamespace(log=log, finish=writer.close)


def _start_online(name: str, run_dir: Path, config: dict[str, Any]) -> Any:
    """Starts the run at W&B or trackio, or continues the one of this directory."""
    place = os.path.abspath(run_dir)
    shown, key = os.path.basename(place), hashlib.sha256(place.encode()).hexdigest()[:16]
    project = os.environ.get(f"{name.upper()}_PROJECT") or PROJECT
    if name == "trackio":
        import trackio

        # It knows runs by their names alone, and two directories may have the same name.
        name = f"{shown}-{key[:6]}"
        return trackio.init(project=project, name=name, config=config, resume="allow")
    import wandb

    return wandb.init(
        project=project,
        name=shown,
        id=key,
        resume="allow",
        dir=place,
        config=config,
        allow_val_change=True,  # a resumed run may change some settings
    )


# ---- Run directories, read for the report --------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run directory, read; records are in order, one per step."""

    name: str  # unique among the runs that are compared
    path: Path
    info: dict[str, Any]  # `run.json`, with dotted names such as settings.train.steps
    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]  # by validation set

    def losses(self, name: str) -> tuple[float | None, float | None]:
        """Returns a validation set's loss at step 0 and its last after that; None if there is none.

        The last is None, too, if the set was taken out of the run, the first if it was changed and
        has another number of tokens.
        """
        at = {bool(record["step"]): record for record in self.evals.get(name, [])}
        first, last = at.get(False, {}), at.get(True, {})
        if isinstance(sets := self.info.get("settings.data.val"), list):
            is_there = name in {str(value).partition("=")[0].strip() for value in sets}
            last = last if is_there else {}
        if last and first.get("tokens") != last.get("tokens"):
            first = {}
        return first.get("loss"), last.get("loss")


def read_run(path: Path, name: str) -> Run:
    """Reads a run directory.

    Raises DataError if `run.json` or `metrics.jsonl` is missing or damaged.
    """
    if not (path / RUN_FILE).exists():
        raise DataError(f"{path}: no {RUN_FILE}; is this a run directory?")
    run = Run(name, path, flatten(read_json(path / RUN_FILE, error=DataError)), [], {})
    for key in ("parameters.trainable", "parameters.total"):
        if type(count := run.info.get(key)) not in (int, type(None)):
            raise DataError(f"{path / RUN_FILE}: {key} is {count!r:.80}, not a number")
    for record in read_metrics(path):  # in order, and each step once: see `MetricsLog`
        if record["kind"] == "train":
            run.train.append(record)
        elif record["kind"] == "eval":
            run.evals.setdefault(record.get("set", ""), []).append(record)
    return run


def summarize(run: Run, sets: Sequence[str]) -> dict[str, Any]:
    """Returns a run's numbers: losses in nats per token, times in seconds, None if unknown."""
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
        "trains": run.info.get("settings.train.trainable"),
        "trainable_parameters": run.info.get("parameters.trainable"),
        "total_parameters": run.info.get("parameters.total"),
        "steps": max((record["step"] for record in run.train + evals), default=None),
        "tokens": max(tokens, default=None),
        "sets": results,
        "final_train_loss": fmean(losses) if losses else None,
        "tokens_per_s": median(speeds) if speeds else None,
        "elapsed_s": max(_values(run.train, "elapsed_s"), default=None),
        "memory_bytes": max(_values(run.train, "memory_bytes"), default=None),
    }


def _values(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [record[key] for record in records if record.get(key) is not None]
