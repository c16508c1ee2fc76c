"""The paper's comparisons, and ways to forget less, from one base under one budget.

    python experiments/study.py                                  its own small base, two domains
    python experiments/study.py --base DIR --train CORPUS --val FILE --general NAME=FILE ...
    python experiments/study.py --preset gpu                     a base of 100M parameters

The first pre-trains a base on English with train.py and teaches it code and arithmetic; a second
base is taken along with --more-bases. The second answers for your own base and data: which placement,
how many blocks, what is forgotten. Both write results.json, study.md and three pictures to --out.
The same command goes on where it was killed.
"""

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bases import Study, expand, expanded_dir, made_studies, own_study, pretrain
from comparisons import lora_rank
from domains import write_corpus
from findings import findings
from options import StudySettings, check, parse
from pictures import draw
from schedule import Progress, Task, run
from summary import tables
from variants import Variant

from llamapro import cli
from llamapro.config import ConfigError
from llamapro.metrics import format_duration

OVERHEAD_S = 6.0  # of a trial beside its steps: loading, questions, the shift
RESULTS = "results.json"


# ---- Tasks --------------------------------------------------------------------------------------


def options(s: StudySettings, out: Path, study: Study) -> list[str]:
    """Returns the options of train.py that all trials of a study share."""
    sets = {study.domain: list(study.val)} | study.general
    shared = {
        "data.seq-len": s.seq_len, "data.cache-dir": out / "cache", "train.steps": s.steps,
        "train.batch-size": s.batch_size, "train.micro-batch-size": s.micro_batch_size,
        "train.device": s.device, "eval.every": s.steps // s.evaluations,
        "eval.sequences": s.eval_sequences, "save.every": s.steps, "log-spikes": 0,
        "log-every": max(1, s.steps // 8),
    }  # fmt: skip
    words = [word for k, v in shared.items() for word in (f"--{k}", str(v))]
    val = [f"{name}={path}" for name, paths in sets.items() for path in paths]
    return [*words, "--data.train", *study.train, "--data.val", *val]


def trial(
    s: StudySettings, out: Path, study: Study, variant: Variant, lr: float, seed: int, step_s: float
) -> Task:
    """Returns the task of training and measuring one variant."""
    start = expanded_dir(out, study, variant)
    argv = [*options(s, out, study), "--model.path", str(start), "--optim.lr", f"{lr:g}"]
    argv += ["--train.seed", str(seed), *variant.options]
    built = None
    if variant.built is not None:
        built = variant.built | {"base": str(study.checkpoint), "seed": seed}
        if "like" in built:
            built["rank"] = lora_rank(study.checkpoint, built["like"])
    if not variant.expand:
        argv += ["--train.trainable", "all"]
    about = measured(study) | {"variant": variant.name, "argv": argv, "built": built}
    where = out / study.name / variant.name / f"lr-{lr:g}-seed-{seed}"
    label = f"{study.name} · {variant.label} · lr {lr:g} · seed {seed}"
    return Task(label, "train", about, where, trial_seconds(s, study, variant, step_s))


def measured(study: Study) -> dict[str, Any]:
    """Returns what `trial.measure` takes."""
    return {"base": str(study.checkpoint), "choices": study.choices, "val": list(study.val)}


def trial_seconds(s: StudySettings, study: Study, variant: Variant, step_s: float) -> float:
    """Estimates a trial from the seconds of a full training step of the base.

    Of a step's work forward is a third, and so are the gradients of inputs and those of weights:
    new blocks add to the first two with all layers, to the last with their own.
    """
    L, n = study.num_layers, variant.new_blocks or 0
    factor = (2 * (L + n) + (n or L)) / (3 * L)
    evaluated = (s.evaluations + 1) * (1 + len(study.general)) * s.eval_sequences / s.batch_size
    return OVERHEAD_S + step_s * (s.steps * factor + evaluated * (L + n) / L / 3)


def best(study: Study, variant: Variant, trials: Sequence[tuple[float, dict[str, Any]]]) -> float:
    """Returns the learning rate whose trial has the lowest loss on the domain; the first if all
    failed.
    """
    ends = [
        (result["curves"][study.domain][-1][1], lr) for lr, result in trials
        if "failed" not in result
    ]  # fmt: skip
    return min(ends)[1] if ends else trials[0][0]


def describe(task: Task, result: dict[str, Any]) -> str:
    """Returns what a finished task found, in a line."""
    if "failed" in result:
        return f"failed: {result['failed'][:80]}"
    if "curves" not in result:
        return "done"
    return ", ".join(
        f"{name} {points[-1][1]:.3f} ({points[-1][1] - points[0][1]:+.3f})"
        for name, points in result["curves"].items()
    )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuses a second study in the same directory."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another study is writing here; choose another --out") from None
        yield


# ---- The study ----------------------------------------------------------------------------------


def config_of(s: StudySettings, study: Study) -> str:
    """Returns the file that says what shape a study's base has, before there is a base."""
    return s.pretrain.config if study.base == "small" else str(study.checkpoint / "config.json")


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


def first_tasks(
    s: StudySettings, out: Path, study: Study, step_s: float
) -> tuple[list[Task], dict[Variant, list[tuple[float, Task]]]]:
    """Returns what is measured of the base, and the grid: variant -> (learning rate, trial)."""
    argv = [*options(s, out, study), "--model.path", str(study.checkpoint)]
    argv += ["--train.trainable", "all"]
    about = measured(study) | {"argv": argv}
    where = out / study.name
    tasks = [Task(f"{study.name} · base", "base", about, where / "base")]
    variants = study.variants(s)
    if study.is_whole:
        tops = next((v.built["layers"] for v in variants if v.name == "zero-norms" and v.built), None)
        if tops is not None:
            about = {"base": str(study.checkpoint), "argv": argv, "layers": tops}
            label = f"{study.name} · first gradients"
            tasks.append(Task(label, "gradients", about, where / "gradients"))
    grid = {
        v: [(lr, trial(s, out, study, v, lr, s.seeds[0], step_s)) for lr in s.learning_rates]
        for v in variants
        if not v.varies
    }
    return tasks, grid


def replay_task(s: StudySettings, out: Path, study: Study) -> Task | None:
    """Returns the task of writing what is replayed; None if nothing is."""
    writing = [v for v in study.variants(s) if v.name in ("self-replay", "distill", "distill-1")]
    if not writing:
        return None
    start = str(expanded_dir(out, study, writing[0]))
    words = [w for w in writing[0].options if not w.startswith("--replay.distill")]
    argv = [*options(s, out, study), "--model.path", start, *words]
    about = {"argv": argv}
    return Task(f"{study.name} · replay", "replay", about, out / study.name / "replay", 20.0)


def study_all(
    s: StudySettings, out: Path, studies: Sequence[Study], step_s: dict[str, float]
) -> list[dict[str, Any]]:
    """Runs everything that has no result yet; returns what results.json has of each study."""
    count, seconds = left_to_do(s, out, studies, step_s)
    around: dict[str, list[Task]] = {}
    grids: dict[str, dict[Variant, list[tuple[float, Task]]]] = {}
    for study in studies:
        around[study.name], grids[study.name] = first_tasks(s, out, study, step_s[study.base])
        if (task := replay_task(s, out, study)) is not None:
            around[study.name].append(task)
    first = [task for tasks in around.values() for task in tasks]
    first += [task for grid in grids.values() for row in grid.values() for _, task in row]
    waiting = [t for tasks in around.values() for t in tasks if t.result() is None]
    seconds += sum(task.estimate_s for task in waiting)
    progress = Progress(count + len(waiting), seconds, s.workers)
    run(first, s.workers, threads(s), progress, describe)

    second: dict[str, dict[Variant, list[tuple[float, int, Task]]]] = {}
    for study in studies:
        rates = {
            v: best(study, v, [(lr, task.result() or {}) for lr, task in row])
            for v, row in grids[study.name].items()
        }
        by_name = {v.name: rate for v, rate in rates.items()}
        second[study.name] = {}
        for v in study.variants(s):
            lr, seeds = by_name[v.varies or v.name], s.seeds if v.varies else s.seeds[1:]
            second[study.name][v] = [
                (lr, seed, trial(s, out, study, v, lr, seed, step_s[study.base])) for seed in seeds
            ]
    tasks = [task for rows in second.values() for row in rows.values() for _, _, task in row]
    run(tasks, s.workers, threads(s), progress, describe)
    return [
        collect(s, study, around[study.name], grids[study.name], second[study.name])
        for study in studies
    ]


def collect(
    s: StudySettings,
    study: Study,
    around: Sequence[Task],
    grid: dict[Variant, list[tuple[float, Task]]],
    more: dict[Variant, list[tuple[float, int, Task]]],
) -> dict[str, Any]:
    """Returns a study's results, JSON-able: every trial, those that were not chosen and those that
    failed as well.
    """
    beside = {task.function: task.result() or {} for task in around}
    trials = []
    for v in study.variants(s):
        rate = more[v][0][0] if more[v] else None
        rows = [(lr, s.seeds[0], task) for lr, task in grid.get(v, [])] + more[v]
        if rate is None:
            rate = best(study, v, [(lr, task.result() or {}) for lr, _, task in rows])
        writes = "--replay.tokens" in v.options
        for lr, seed, task in rows:
            result = task.result() or {}
            about = {"variant": v.name, "lr": lr, "seed": seed}
            about["chosen"] = lr == rate and "failed" not in result
            about["failed"] = result.get("failed")
            about["replay_s"] = beside["replay"]["replay_s"] if writes else 0.0
            trials.append(about | {k: x for k, x in result.items() if k != "failed"})
    return {
        "name": study.name,
        "base": study.base,
        "domain": study.domain,
        "layers": study.num_layers,
        "compared": f"new-{study.compared(s)}",
        "general": list(study.general),
        "domain_set": study.domain,
        "base_result": beside["base"],
        "variants": [
            {k: getattr(v, k) for k in ("name", "label", "group", "new_blocks", "varies")}
            for v in study.variants(s)
        ],
        "gradients": beside.get("gradients"),
        "trials": trials,
    }


def about_machine(s: StudySettings, elapsed_s: float) -> dict[str, Any]:
    """Returns where and with what a study ran."""
    import torch

    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        machine = f"{os.cpu_count()} cores of {models[0]}" if models else machine
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "llamapro")}
    settings = {k: v for k, v in asdict(s).items() if k not in ("dry_run", "json")}
    return {"machine": machine, "versions": versions, "settings": settings, "elapsed_s": elapsed_s}


def write_page(results: dict[str, Any], out: Path) -> str:
    """Writes study.md and the pictures; returns what they say, without the list of all trials."""
    said = findings(results)
    pictures = draw(results, out)
    shown = "\n\n".join(f"![{file.stem}]({file.name})" for file in pictures)
    page = out / "study.md"
    page.write_text(f"# Study\n\n{said}\n\n{shown}\n\n{tables(results)}\n", encoding="utf-8")
    return f"{said}\n\n" + "\n".join(str(file) for file in (page, *pictures))


def main() -> None:
    started = time.perf_counter()
    s = parse(sys.argv[1:])
    check(s)
    out = Path(s.out)
    studies = [own_study(s)] if s.base else made_studies(s, out)
    with alone(out):
        step_s = calibrate(s, out, studies)
        text = check_budget(s, out, studies, step_s)
        print(text, file=sys.stderr, flush=True)
        if s.dry_run:
            return
        if not s.base:
            write_corpus(out / "corpus")
            pretrain(s, out)
        expand(s, out, studies)
        results = {"studies": study_all(s, out, studies, step_s)}
        results["about"] = about_machine(s, time.perf_counter() - started)
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        page = write_page(results, out)
    cli.print_result(results, s.json, page)


if __name__ == "__main__":
    cli.run(main)
