"""How long a study takes, from the first steps that are measured, before it starts."""

import os
from collections.abc import Sequence
from pathlib import Path

from bases import Study
from domains import ROOT
from options import StudySettings
from schedule import Task, run
from tasks import trial_seconds

from llamapro.config import ConfigError
from llamapro.metrics import format_duration


def config_of(s: StudySettings, study: Study) -> str:
    """Returns the file that says what shape a study's base has, before there is a base."""
    return (
        str(ROOT / s.pretrain.config)
        if study.base == "small"
        else str(study.checkpoint / "config.json")
    )


def calibrate(s: StudySettings, out: Path, studies: Sequence[Study]) -> dict[str, float]:
    """Measures how long a full training step of each base takes with all workers busy, seconds."""
    argv = ["--data.seq-len", str(s.seq_len), "--train.batch-size", str(s.batch_size)]
    argv += ["--train.micro-batch-size", str(s.micro_batch_size), "--train.device", s.device]
    found = {}
    for study in {study.base: study for study in studies}.values():
        tasks = [
            Task(
                f"first steps of {study.base}",
                "calibrate",
                {"config": config_of(s, study), "argv": argv, "copy": copy},
                out / "calibration" / f"{study.base}-{copy}",
            )
            for copy in range(s.workers)
        ]
        found[study.base] = max(r["step_s"] for r in run(tasks, s.workers, threads(s)))
    return found


def threads(s: StudySettings) -> int:
    """Returns how many threads each worker has."""
    return max(1, (os.cpu_count() or 1) // s.workers)


def left_to_do(
    s: StudySettings, out: Path, studies: Sequence[Study], step_s: dict[str, float]
) -> tuple[int, float]:
    """Returns how many trials have no result yet, and how long they take one after another."""
    count, seconds = 0, 0.0
    for study in studies:
        for variant in study.variants(s):
            wanted = len(s.seeds) + (0 if variant.varies else len(s.learning_rates) - 1)
            done = len(list((out / study.name / variant.name).glob("*/result.json")))
            left = max(0, wanted - done)
            count += left
            seconds += left * trial_seconds(s, study, variant, step_s[study.base])
    return count, seconds


def check_budget(
    s: StudySettings, out: Path, studies: Sequence[Study], step_s: dict[str, float]
) -> str:
    """Returns what will be done and how long it takes, estimated from the first measured steps.

    Raises:
        ConfigError: it takes longer than `budget_minutes`.
    """
    count, seconds = left_to_do(s, out, studies, step_s)
    total = seconds / s.workers
    if any(study.base == "small" and not study.checkpoint.exists() for study in studies):
        sequences = s.pretrain.steps * s.pretrain.batch_size
        total += 60 + step_s["small"] * sequences / s.batch_size / s.workers
    steps = ", ".join(f"{t:.2f} s of {name}" for name, t in step_s.items())
    text = (
        f"{count} trials, {s.workers} at a time: about {format_duration(total)} (a full training "
        f"step takes {steps} here)"
    )
    if total > 60 * s.budget_minutes:
        raise ConfigError(
            f"{text}, more than --budget-minutes {s.budget_minutes:g}; raise it, lower --steps "
            f"{s.steps}, give fewer --seeds or --learning-rates, or name --variants"
        )
    return text
