"""Runs read back: the numbers of the report, and what is missing or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import DataError
from llamapro.training import records as runs


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 4.0 - step / 100, **more}


def write_run(run_dir: Path, records: list[dict[str, Any]], info: Any = None) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({} if info is None else info))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run_dir


def test_summary_holds_the_runs_numbers(tmp_path: Path) -> None:
    """Losses at step 0 and at the end, the mean of the last ten, the median speed, the tokens."""
    records = [
        {"kind": "eval", "step": step, "set": "general", "loss": loss, "tokens_seen": step * 100}
        for step, loss in ((0, 2.0), (6, 1.0), (12, 1.5))
    ]
    records += [
        train(s, loss=float(s), tokens=s * 100, tokens_per_s=float(s * s), elapsed_s=s / 2)
        for s in range(1, 13)
    ]
    info = {"settings": {"train": {"trainable": "all"}}, "parameters": {"total": 8, "trainable": 2}}
    run = runs.read_run(write_run(tmp_path, records, info), "pro")
    assert runs.summarize(run, ["general", "absent"]) == {
        "run": "pro",
        "path": str(tmp_path),
        "trains": "all",
        "trainable_parameters": 2,
        "total_parameters": 8,
        "steps": 12,
        "tokens": 1200,
        "sets": {
            "general": {"initial_loss": 2.0, "final_loss": 1.5, "change": -0.5},
            "absent": {"initial_loss": None, "final_loss": None, "change": None},
        },
        "final_train_loss": 7.5,
        "tokens_per_s": 42.5,
        "elapsed_s": 6.0,
        "memory_bytes": None,
    }


def test_only_step_0_is_no_final_loss(tmp_path: Path) -> None:
    """A run that has not trained yet neither learned nor kept anything."""
    base = {"kind": "eval", "step": 0, "set": "general", "loss": 2.0, "tokens_seen": 0}
    run = runs.read_run(write_run(tmp_path, [base]), "pro")
    assert run.losses("general") == (2.0, None)


def test_without_step_0_there_is_no_base(tmp_path: Path) -> None:
    """The first evaluation there is does not stand in for the base."""
    later = {"kind": "eval", "step": 5, "set": "general", "loss": 2.0, "tokens_seen": 5}
    run = runs.read_run(write_run(tmp_path, [later]), "pro")
    assert run.losses("general") == (None, 2.0)


def test_the_later_of_two_records_of_a_step_counts(tmp_path: Path) -> None:
    """A resumed run that evaluates its first step again is not shown twice."""
    again = [
        {"kind": "eval", "step": 4, "set": "general", "loss": loss, "tokens_seen": 4}
        for loss in (3.0, 2.0)
    ]
    run = runs.read_run(write_run(tmp_path, [*again, train(5), train(5, loss=1.0)]), "pro")
    assert [record["loss"] for record in run.evals["general"]] == [2.0]
    assert [record["loss"] for record in run.train] == [1.0]


def test_time_adds_up_over_resumes(tmp_path: Path) -> None:
    """A clock that starts again at each resume is added to the time before it."""
    clocks = [10.0, 20.0, 5.0, 15.0]
    records = [train(step, elapsed_s=clock) for step, clock in enumerate(clocks, 1)]
    run = runs.read_run(write_run(tmp_path, records), "pro")
    assert runs.summarize(run, [])["elapsed_s"] == 35.0


def test_run_json_must_be_a_readable_object(tmp_path: Path) -> None:
    """A missing, damaged or odd run.json is named."""
    write_run(tmp_path, [], ["not", "an", "object"])
    with pytest.raises(DataError, match=r"run\.json: expected an object, found list"):
        runs.read_run(tmp_path, "pro")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: not readable as JSON"):
        runs.read_run(tmp_path, "pro")
    (tmp_path / "run.json").unlink()
    with pytest.raises(DataError, match=r"no run\.json; is this a run directory\?"):
        runs.read_run(tmp_path, "pro")
