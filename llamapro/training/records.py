"""Run directories, read for the report: `run.json`, `metrics.jsonl`, and their numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from llamapro.checkpoints.run import read_metrics
from llamapro.errors import DataError
from llamapro.training.metrics import RUN_FILE

LAST_RECORDS = 10  # the final training loss is the mean of so many records: one batch is noise


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
