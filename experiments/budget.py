"""How long a study takes, from the first steps that are measured, before it starts."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bases import Study, pretrain_processes
from domains import ROOT
from options import StudySettings
from schedule import Task, run
from tasks import trial_seconds
from trial import RESULT_FILE, WRITTEN_AT_A_TIME

from llamapro.errors import ConfigError
from llamapro.formatting import format_duration

AROUND_S = 60.0  # corpus, tokenizer and merging of the small base
EXPAND_S = 5.0  # of one expanded checkpoint; beside it those that are measured write text
MEASURED_TOKENS, MEASURED_AT_A_TIME = 16384, 16  # which placements measure by themselves


@dataclass(frozen=True)
class Speed:
    """Of one base, with all workers busy, seconds: `step`, a training step of all its weights (or
    of new blocks, if all that is asked for is these); `write`, one token of each of
    `WRITTEN_AT_A_TIME` documents.
    """

    step: float
    write: float


def calibrate(s: StudySettings, out: Path, studies: Sequence[Study]) -> dict[str, Speed]:
    """Measures each base's speed on random weights, before there is a base."""
    argv = ["--data.seq-len", str(s.seq_len), "--train.batch-size", str(s.batch_size)]
    argv += ["--train.micro-batch-size", str(s.micro_batch_size), "--train.device", s.device]
    shutil.rmtree(out / "calibration", ignore_errors=True)  # of another day
    found = {}
    for study in {study.base: study for study in studies}.values():
        is_all = any(not v.expand for v in study.variants(s))
        new_blocks = 0 if is_all else study.compared(s)
        about = {"config": config_of(s, study), "argv": argv, "new_blocks": new_blocks}
        where = out / "calibration"
        tasks = [
            Task(f"first steps of {study.base}", "calibrate", about, where / f"{study.base}-{copy}")
            for copy in range(s.workers)
        ]
        results = run(tasks, s.workers, threads(s))
        found[study.base] = Speed(*(max(r[key] for r in results) for key in ("step_s", "write_s")))
    return found


def config_of(s: StudySettings, study: Study) -> str:
    """Returns the file that says what shape a study's base has, before there is a base."""
    is_small = study.base == "small"
    return str(ROOT / s.pretrain.config if is_small else study.checkpoint / "config.json")


def threads(s: StudySettings) -> int:
    """Returns how many threads each worker has."""
    return max(1, (os.cpu_count() or 1) // s.workers)


def left_to_do(
    s: StudySettings, out: Path, studies: Sequence[Study], speeds: dict[str, Speed]
) -> tuple[int, float]:
    """Returns how many trials have no result yet, and their seconds one after another."""
    count, seconds = 0, 0.0
    for study in studies:
        for variant in study.variants(s):
            wanted = len(s.seeds) + (0 if variant.varies else len(s.learning_rates) - 1)
            done = len(list((out / study.name / variant.name).glob(f"*/{RESULT_FILE}")))
            left = max(0, wanted - done)
            count += left
            seconds += left * trial_seconds(s, study, variant, speeds[study.base].step)
    return count, seconds


def preparation_seconds(
    s: StudySettings, out: Path, studies: Sequence[Study], speeds: dict[str, Speed]
) -> float:
    """Returns how long what comes before the trials takes: bases, expansions, written text."""
    seconds, seen = 0.0, set[tuple[str, tuple[str, ...]]]()
    for study in studies:
        speed = speeds[study.base]
        if study.base == "small" and not study.checkpoint.exists() and not seen:
            steps = s.pretrain.steps * s.pretrain.batch_size / s.batch_size
            seconds += AROUND_S + speed.step * steps / pretrain_processes(s)
        for variant in study.variants(s):
            start = (study.base, variant.expand)
            if variant.expand and start not in seen:
                rounds = math.ceil(MEASURED_TOKENS / s.seq_len / MEASURED_AT_A_TIME)
                seconds += EXPAND_S + ("--by" in variant.expand) * rounds * s.seq_len * speed.write
            written = (study.base, variant.writing)
            if variant.writing and written not in seen:
                rounds = math.ceil(s.replay_tokens / s.seq_len / WRITTEN_AT_A_TIME)
                seconds += rounds * s.seq_len * speed.write
            seen |= {start, written}
    return seconds


def check_budget(
    s: StudySettings, out: Path, studies: Sequence[Study], speeds: dict[str, Speed]
) -> str:
    """Returns what will be done and how long it takes, estimated from the first measured steps.

    Raises:
        ConfigError: it takes longer than `budget_minutes`.
    """
    count, seconds = left_to_do(s, out, studies, speeds)
    total = seconds / s.workers
    if count:
        total += preparation_seconds(s, out, studies, speeds)
    steps = ", ".join(f"{speed.step:.2f} s of {name}" for name, speed in speeds.items())
    text = (
        f"{count} trials, {s.workers} at a time: about {format_duration(total)} (a training step "
        f"takes {steps} here)"
    )
    if total > 60 * s.budget_minutes:
        raise ConfigError(
            f"{text}, more than --budget-minutes {s.budget_minutes:g}; raise it, lower --steps "
            f"{s.steps}, give fewer --seeds or --learning-rates, or name --variants"
        )
    return text
