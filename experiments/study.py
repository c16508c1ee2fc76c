"""The paper's comparisons, and ways to forget less, from one base under one budget.

    python experiments/study.py                                  its own small base, two domains
    python experiments/study.py --base DIR --train CORPUS --val FILE --general NAME=FILE ...
    python experiments/study.py --preset gpu                     a base of 100M parameters

The first pre-trains a base on English with train.py and teaches it code and arithmetic, and with
--more-bases another one, too. The second answers for your own base and data: which placement, how
many blocks, what is forgotten. Both write results.json, study.md and three pictures to --out.
The same command goes on where it was killed.
"""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bases import Study, expand, made_studies, own_study, pretrain, written_task
from budget import Speed, calibrate, check_budget, left_to_do, threads
from domains import write_corpus
from findings import findings
from options import StudySettings, check, parse
from pictures import draw
from schedule import Progress, Task, run
from summary import tables
from tasks import base_tasks, cost_tasks, options, trial, writing_tasks
from trial import RESULT_FILE, write_json
from variants import Variant

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError, DataError
from llamapro.inference.multiple_choice import read_choices
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.job import Job
from llamapro.training.preset import parse as train_options
from llamapro.training.replay import read_prompts
from llamapro.training.settings import check as check_settings

RESULTS = "results.json"


def best(study: Study, trials: Sequence[tuple[float, dict[str, Any]]]) -> float:
    """Returns the learning rate whose trial ends with the lowest loss on the domain.

    Args:
        study: names the domain.
        trials: learning rate and result of each; of those that all failed it is the first.
    """
    ends = [
        (result["curves"][study.domain][-1][1], rate)
        for rate, result in trials
        if "failed" not in result and result["curves"][study.domain][-1][1] is not None
    ]
    return min(ends)[1] if ends else trials[0][0]


def describe(task: Task, result: dict[str, Any]) -> str:
    """Returns what a finished task found, in a line."""
    if "failed" in result:
        return f"failed: {result['failed'][:80]}"
    ends = {
        name: (points[0][1], points[-1][1]) for name, points in result.get("curves", {}).items()
    }
    return (
        ", ".join(
            f"{name} not finite" if None in end else f"{name} {end[1]:.3f} ({end[1] - end[0]:+.3f})"
            for name, end in ends.items()
        )
        or "done"
    )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuses a second study in the same directory."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out}: another study is writing here; choose another --out"
            ) from None
        yield


def study_all(
    s: StudySettings, out: Path, studies: Sequence[Study], speeds: dict[str, Speed]
) -> list[dict[str, Any]]:
    """Runs everything that has no result yet; returns what results.json has of each study."""
    bases = {study.name: base_tasks(s, out, study) for study in studies}
    # Of a base, once: what it writes for one domain it has for the other.
    writing = {study.base: writing_tasks(s, out, study) for study in reversed(studies)}
    costs = {study.name: cost_tasks(s, out, study) for study in studies}
    grids = {
        study.name: {
            v.name: [
                (lr, trial(s, out, study, v, lr, s.seeds[0], speeds[study.base].step))
                for lr in s.learning_rates
            ]
            for v in study.variants(s)
            if not v.varies
        }
        for study in studies
    }
    around = [task for tasks in bases.values() for task in tasks]
    timed = [task for tasks in writing.values() for task in tasks.values()]
    timed += [task for tasks in costs.values() for task in tasks.values()]
    count, seconds = left_to_do(s, out, studies, speeds)
    waiting = [task for task in (*timed, *around) if task.result() is None]
    seconds += sum(task.estimate_s for task in waiting)
    progress = Progress(count + len(waiting), seconds, s.workers)
    first = [task for grid in grids.values() for row in grid.values() for _, task in row]
    run(timed, 1, threads(s), progress, describe)  # with the machine to itself
    run([*around, *first], s.workers, threads(s), progress, describe)

    found, second = [], []
    for study in studies:
        rates = {
            name: best(study, [(lr, task.result() or {}) for lr, task in row])
            for name, row in grids[study.name].items()
        }
        trials = []
        for v in study.variants(s):
            rate, seeds = rates[v.varies or v.name], s.seeds if v.varies else s.seeds[1:]
            rows = [(lr, s.seeds[0], task) for lr, task in grids[study.name].get(v.name, [])]
            more = [
                (rate, seed, trial(s, out, study, v, rate, seed, speeds[study.base].step))
                for seed in seeds
            ]
            second += [task for _, _, task in more]
            writes = writing[study.base].get(v.writing)
            trials += [(v, lr == rate, lr, seed, task, writes) for lr, seed, task in rows + more]
        found.append((study, trials))
    run(second, s.workers, threads(s), progress, describe)
    return [
        collect(s, study, bases[study.name], trials)
        | {"step_ratios": {n: (t.result() or {})["step"] for n, t in costs[study.name].items()}}
        for study, trials in found
    ]


def collect(
    s: StudySettings,
    study: Study,
    around: Sequence[Task],
    trials: Sequence[tuple[Variant, bool, float, int, Task, Task | None]],
) -> dict[str, Any]:
    """Returns a study's results, JSON-able: every trial, those that were not chosen and those that
    failed as well.

    Args:
        s, study: which.
        around: what was measured of the base.
        trials: variant, whether its rate was chosen, learning rate, seed, task, and who wrote what
            it replays.
    """
    beside = {task.function: task.result() for task in around}
    rows = []
    for v, is_chosen, lr, seed, task, writing in trials:
        result = task.result() or {}
        wrote = writing.result() if writing is not None else None
        rows.append(
            {"variant": v.name, "lr": lr, "seed": seed, "failed": None}
            | result
            | {"chosen": is_chosen and "failed" not in result}
            | {"replay_s": wrote["replay_s"] if wrote else 0.0}
        )
    names = ("name", "label", "group", "new_blocks", "varies")
    return {
        "name": study.name,
        "base": study.base,
        "domain": study.domain,
        "layers": study.num_layers,
        "compared": f"new-{study.compared(s)}",
        "general": list(study.general),
        "domain_set": study.domain,
        "base_result": beside["base"],
        "variants": [{key: getattr(v, key) for key in names} for v in study.variants(s)],
        "gradients": beside.get("gradients"),
        "trials": rows,
    }


def about_machine(s: StudySettings, out: Path) -> dict[str, Any]:
    """Returns where and with what a study ran, and the seconds that its tasks took together, over
    all times it was started: `elapsed_s`, as if the workers were never idle.
    """
    files = out.rglob(RESULT_FILE)
    took = sum(json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files)
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
    return {
        "machine": machine,
        "versions": versions,
        "settings": settings,
        "elapsed_s": took / s.workers,
    }


def write_page(results: dict[str, Any], out: Path) -> str:
    """Writes study.md and the pictures; returns what they say, without the list of all trials."""
    said = findings(results)
    pictures = draw(results, out)
    shown = "\n\n".join(f"![{file.stem}]({file.name})" for file in pictures)
    page = out / "study.md"
    page.write_text(f"# Study\n\n{said}\n\n{shown}\n\n{tables(results)}\n", encoding="utf-8")
    return f"{said}\n\n" + "\n".join(str(file) for file in (page, *pictures))


def check_inputs(s: StudySettings, out: Path, studies: Sequence[Study]) -> None:
    """Opens what the studies of bases that are there need; raises a UserError for what is wrong."""
    for study in (study for study in studies if study.checkpoint.exists()):
        base = Checkpoint.open(study.checkpoint)
        argv = [*options(s, out, study, s.steps), "--model.path", str(base.path)]
        settings = train_options([*argv, "--train.trainable", "all"])
        check_settings(settings, 1)
        if s.base:  # the text of the others is not made yet
            Job.open(settings)
        tokenizer = Tokenizer.load(base.path)
        if any(v.writing for v in study.variants(s)):
            read_prompts("", tokenizer, s.seq_len)
        if s.choices:
            read_choices(s.choices, tokenizer, base.config.max_position_embeddings, 0)
        if s.seq_len > base.config.max_position_embeddings:
            raise ConfigError(
                f"--seq-len {s.seq_len}: {base.path} takes up to "
                f"{base.config.max_position_embeddings}"
            )


def main() -> None:
    s = parse(sys.argv[1:])
    check(s)
    out = Path(s.out)
    studies = [own_study(s)] if s.base else made_studies(s, out)
    check_inputs(s, out, studies)
    with alone(out):
        speeds = calibrate(s, out, studies)
        print(check_budget(s, out, studies, speeds), file=sys.stderr, flush=True)
        if s.dry_run:
            return
        try:
            if not s.base:
                write_corpus(out / "corpus")
                pretrain(s, out)
            expand(s, out, studies)
            written = {t.base: written_task(s, out, t) for t in studies if t.is_written}
            run(list(written.values()), s.workers, threads(s))
            found = study_all(s, out, studies, speeds)
            results = {"studies": found, "about": about_machine(s, out)}
            write_json(out / RESULTS, results)
            page = write_page(results, out)
        except OSError as error:
            where = error.filename or out
            raise DataError(f"{where}: cannot be written: {error.strerror}") from None
    cli.print_result(results, s.json, page)


if __name__ == "__main__":
    cli.run(main)
