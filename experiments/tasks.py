"""The tasks of a study, in options of train.py, and how long they take."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bases import Study, flags, pretrain_processes
from models import lora_rank
from options import ROOT, StudySettings
from schedule import Runner, Task
from trial import HELD_OUT_FILE, RESULT_FILE
from variants import Variant

from llamapro.errors import ConfigError
from llamapro.formatting import format_duration
from llamapro.training.preset import parse as parse_train

OVERHEAD_S = 5.0  # of a trial, for starting, loading and measuring
PREPARATION_S = 60.0  # corpus, tokenizer and merging of the small base
QUESTIONS_TOKENS = 20_000  # that a trial reads in questions


def train_options(study: Study, steps: int) -> list[str]:
    """Returns the options of train.py that all trials of a study share."""
    s, sets = study.s, {study.domain: list(study.val)} | study.general
    shared = {
        "data.seq-len": s.seq_len, "data.cache-dir": s.dir / "cache", "train.steps": steps,
        "train.batch-size": s.batch_size, "train.micro-batch-size": s.micro_batch_size,
        "train.device": s.device, "train.dtype": s.dtype, "eval.every": steps // s.evaluations,
        "eval.sequences": s.eval_sequences, "log-spikes": 0,
        "save.every": max(1, steps // s.evaluations), "save.keep": 1,
        "log-every": max(1, steps // 8),
    }  # fmt: skip
    val = [f"{name}={path}" for name, paths in sets.items() for path in paths]
    return [*flags(shared), "--data.train", *study.train, "--data.val", *val]


def variant_options(study: Study, variant: Variant, steps: int = 0) -> list[str]:
    """Returns the options of train.py for a variant, without learning rate and seed.

    Args:
        steps: of training; 0 for those of a trial that counts.
    """
    argv = train_options(study, steps or steps_of(study.s, variant))
    argv += ["--model.path", str(study.start(variant)), *variant.options, *variant.writing]
    return argv if variant.expand else [*argv, "--train.trainable", "all"]


def steps_of(s: StudySettings, variant: Variant) -> int:
    """Returns the optimizer steps of a variant's trials, a multiple of `evaluations`."""
    return max(1, round(s.steps * variant.longer / s.evaluations)) * s.evaluations


def rates(s: StudySettings, variant: Variant) -> list[float]:
    """Returns the learning rates that a variant tries."""
    return [lr * s.full_rate if variant.name == "full" else lr for lr in s.learning_rates]


def trial(study: Study, variant: Variant, lr: float, seed: int, is_search: bool = False) -> Task:
    """Returns the task of training and measuring one variant.

    With `is_search` it takes `search_steps`, if those are given, and measures nothing but losses.
    """
    steps = study.s.search_steps if is_search else 0
    argv = variant_options(study, variant, steps)
    argv += ["--optim.lr", f"{lr:g}", "--train.seed", str(seed)]
    built = None
    if variant.built is not None:
        built = variant.built | {"base": str(study.checkpoint), "seed": seed}
        if "like" in built:
            built["rank"] = lora_rank(study.checkpoint, built["like"])
    about = {"variant": variant.name, "argv": argv, "built": built, "only_losses": bool(steps)}
    about |= of_base(study) if steps else measured(study)
    about["text_sha256"] = study.text_sha256
    out = study.s.dir / study.name / variant.name / f"lr-{lr:g}-seed-{seed}"
    label = f"{study.name} · {variant.label} · lr {lr:g} · seed {seed}"
    if steps:
        out, label = out.with_name(f"search-lr-{lr:g}"), f"{label} · {steps} steps"
    return Task(label, "train", about, out)


def of_base(study: Study) -> dict[str, Any]:
    """Returns what tells a study's base from any other."""
    return {"base": str(study.checkpoint), "base_sha256": study.base_sha256}


def measured(study: Study) -> dict[str, Any]:
    """Returns the arguments of `trial.measure`."""
    s = study.s
    return of_base(study) | {
        "device": s.device,
        "choices": study.choices,
        "val": list(study.val),
        "held_out": str(held_out(study)) if s.abilities else "",
        "human_eval": s.human_eval,
    }


def held_out(study: Study) -> Path:
    """Returns the file of what the base wrote to be measured on."""
    return study.s.dir / "held-out" / study.base / HELD_OUT_FILE


def start_tasks(studies: Sequence[Study]) -> list[Task]:
    """Returns the tasks that make expanded checkpoints, and general text that a base writes."""
    tasks = {}
    for study in studies:
        s = study.s
        for variant in study.variants:
            about = of_base(study) | {"options": list(variant.expand)}
            out = study.expanded(variant)
            if variant.expand:
                tasks[out] = Task(f"{study.base} · expansion {out.name}", "expand", about, out)
        if study.is_written:
            about = {"tokens": s.replay_tokens, "length": s.seq_len, "device": s.device}
            out = s.dir / "written" / study.base
            tasks[out] = Task(f"text of {study.base}", "write", of_base(study) | about, out)
        if s.abilities:
            about = of_base(study) | {"length": s.seq_len, "device": s.device}
            out = held_out(study).parent
            tasks[out] = Task(f"held-out chats and texts of {study.base}", "keep", about, out)
    return list(tasks.values())


def base_task(study: Study) -> Task:
    """Returns the task that measures the base itself."""
    argv = [*train_options(study, 1), "--eval.every", "1", "--model.path", str(study.checkpoint)]
    argv += ["--train.trainable", "all"]
    about = measured(study) | {"argv": argv, "text_sha256": study.text_sha256}
    return Task(f"{study.name} · base", "base", about, study.s.dir / study.name / "base")


def cost_tasks(study: Study) -> dict[str, Task]:
    """Returns, by variant, the tasks that compare its step with that of plain expansion."""
    variants = {variant.name: variant for variant in study.variants}
    tasks = {}
    for variant in variants.values():
        if variant.varies:
            about = {"plain": variant_options(study, variants[variant.varies])}
            about |= {"other": variant_options(study, variant)}
            label = f"{study.name} · a step of {variant.label}"
            out = study.s.dir / "cost" / study.name / variant.name
            tasks[variant.name] = Task(label, "cost", about, out)
    return tasks


def writing_tasks(study: Study) -> dict[tuple[str, ...], Task]:
    """Returns, by `Variant.writing`, the tasks that write the text which studies replay."""
    tasks: dict[tuple[str, ...], Task] = {}
    for variant in study.variants:
        if variant.writing and variant.writing not in tasks:
            about = {"argv": variant_options(study, variant), "base_sha256": study.base_sha256}
            label = f"{study.base} writes for {variant.name}"
            out = study.s.dir / "replay" / f"{study.base}-{variant.name}"
            tasks[variant.writing] = Task(label, "replay", about, out)
    return tasks


# ---- How long it takes --------------------------------------------------------------------------


def calibrate(s: StudySettings, studies: Sequence[Study], runner: Runner) -> dict[str, float]:
    """Returns, by base, the seconds of a training step of plain expansion with all workers busy.

    The models have random weights, as the small base may not exist yet.
    """
    argv = ["--data.seq-len", str(s.seq_len), "--train.batch-size", str(s.batch_size)]
    argv += ["--train.micro-batch-size", str(s.micro_batch_size), "--train.device", s.device]
    argv += ["--train.dtype", s.dtype]
    out, step_s = s.dir / "calibration", {}
    shutil.rmtree(out, ignore_errors=True)  # of an earlier start
    for study in {study.base: study for study in studies}.values():
        is_small = study.base == "small"
        config = s.pretrain_config if is_small else study.checkpoint / "config.json"
        about = {"config": str(config), "argv": argv, "new_blocks": study.compared}
        copies = [
            Task(study.base, "calibrate", about, out / f"{study.base}-{copy}")
            for copy in range(s.workers)
        ]
        step_s[study.base] = max(result["step_s"] for result in runner.run(copies))
    return step_s


def trials_left(study: Study, variant: Variant) -> tuple[int, int]:
    """Returns the numbers of trials of a variant without a result: of searches, and of others."""
    s = study.s
    seeds, rates = len(s.seeds), 0 if variant.varies else len(s.learning_rates)
    wanted = (rates, seeds) if s.search_steps else (0, seeds + max(0, rates - 1))
    files = [*(s.dir / study.name / variant.name).glob(f"*/{RESULT_FILE}")]
    searches = sum(file.parent.name.startswith("search") for file in files)
    return max(0, wanted[0] - searches), max(0, wanted[1] - (len(files) - searches))


def trial_seconds(study: Study, variant: Variant, step_s: float, steps: int = 0) -> float:
    """Estimates the seconds of a trial from those of a training step, a third of it forward."""
    s = study.s
    evaluated = (s.evaluations + 1) * (1 + len(study.general)) * s.eval_sequences  # sequences
    passes = (evaluated + QUESTIONS_TOKENS / s.seq_len) / s.batch_size
    return OVERHEAD_S + step_s * ((steps or steps_of(s, variant)) + passes / 3)


def check_budget(s: StudySettings, studies: Sequence[Study], step_s: dict[str, float]) -> str:
    """Returns the number of trials to do and their estimated duration.

    Raises:
        ConfigError: they take longer than `budget_minutes`.
    """
    left = [(study, v, trials_left(study, v)) for study in studies for v in study.variants]
    seconds = sum(
        number * trial_seconds(study, v, step_s[study.base], steps)
        for study, v, numbers in left
        for number, steps in zip(numbers, (s.search_steps, 0), strict=True)
    )
    seconds /= s.workers
    if "small" in step_s and not (s.dir / "bases" / "small").exists():
        t = parse_train(["--config", str(ROOT / s.pretrain)]).train
        seconds += PREPARATION_S
        seconds += step_s["small"] * t.steps * t.batch_size / s.batch_size / pretrain_processes(s)
    steps = ", ".join(f"{step:.2f} s with {name}" for name, step in step_s.items())
    count, duration = sum(sum(numbers) for *_, numbers in left), format_duration(seconds)
    text = (
        f"{count} trials, {s.workers} at a time: about {duration} (a training step takes {steps})"
    )
    if seconds > 60 * s.budget_minutes:
        raise ConfigError(
            f"{text}, more than --budget-minutes {s.budget_minutes:g}; raise it, lower --steps "
            f"{s.steps}, give fewer --seeds or --learning-rates, or name --variants"
        )
    return text


def seconds_taken(out: Path) -> float:
    """Returns the seconds of all finished tasks, one after another."""
    files = out.rglob(RESULT_FILE)
    return sum(json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files)
