"""The paper's comparisons, and ways to forget less, from one base under one budget.

    python experiments/study.py                                  its own small base, two domains
    python experiments/study.py --base DIR --train CORPUS --val FILE --general NAME=FILE ...
    python experiments/study.py --preset gpu                     a base of 100M parameters
    make smollm-study                                            a real base, SmolLM2-135M-Instruct

The first command pre-trains a base on English with train.py and teaches it, and every one of
--more-bases, code and arithmetic. The second finds, for your own base and data, the best number and
place of new blocks and what is forgotten. Both write results.json, study.md and three pictures to
--out. The same command continues where it was killed.
"""

import fcntl
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tasks
import torch
from bases import Study, made_studies, own_study, pretrain, with_variants
from findings import findings
from options import StudySettings, check, parse
from pictures import draw
from schedule import Runner, Task
from summary import tables
from trial import write_json

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError, DataError
from llamapro.inference.multiple_choice import read_choices
from llamapro.inference.sampling import end_ids
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.checks import check as check_train
from llamapro.training.job import Job
from llamapro.training.preset import parse as parse_train
from llamapro.training.replay import read_openings

RESULTS = "results.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; its options are those of the command line if `argv` is None."""
    s = parse(sys.argv[1:] if argv is None else argv)
    check(s)
    studies = with_variants([own_study(s)] if s.base else made_studies(s))
    check_inputs(s, studies)
    runner = Runner(s.workers)
    try:
        with locked(s.dir):
            step_s = tasks.calibrate(s, studies, runner)
            print(tasks.check_budget(s, studies, step_s), file=sys.stderr, flush=True)
            if s.dry_run:
                return
            if not s.base:
                pretrain(s)
            runner.run(tasks.start_tasks(studies))
            results = {"studies": run_all(s, studies, runner), "about": about_machine(s)}
            write_json(s.dir / RESULTS, results)
            page = write_page(results, s.dir)
    except OSError as error:
        where = error.filename or s.dir
        raise DataError(f"{where}: cannot be written: {error.strerror}") from None
    cli.print_result(results, s.json, page)


def check_inputs(s: StudySettings, studies: Sequence[Study]) -> None:
    """Opens the inputs of all studies of existing bases; raises a UserError for a mistake."""
    for study in studies:
        if not study.checkpoint.exists():
            continue
        base = Checkpoint.open(study.checkpoint)
        argv = [*tasks.train_options(study, s.steps), "--model.path", str(base.path)]
        settings = parse_train([*argv, "--train.trainable", "all"])
        check_train(settings, 1)
        if s.base:  # the text of the other bases is not made yet
            Job.open(settings)
        tokenizer, context = Tokenizer.load(base.path), base.config.max_position_embeddings
        if any(v.writing for v in study.variants):
            ends = end_ids(base.config, tokenizer)
            read_openings("", base.path, tokenizer, ends, s.seq_len)
        if s.abilities:
            ChatTemplate.load(base.path, tokenizer)
        if s.choices:
            read_choices(s.choices, tokenizer, context, 0)
        if s.seq_len > context:
            raise ConfigError(f"--seq-len {s.seq_len}: {base.path} takes up to {context}")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Refuses a second study in the same directory."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out}: another study is writing here; choose another --out"
            ) from None
        yield


# ---- Running ------------------------------------------------------------------------------------


def run_all(s: StudySettings, studies: Sequence[Study], runner: Runner) -> list[dict[str, Any]]:
    """Runs all tasks that have no result yet; returns each study's part of results.json.

    Every variant trains with the first seed at all learning rates, and then with the other seeds at
    the best of them. If a search has a length of its own, the first seed trains again at full
    length.
    """
    bases = {study.name: tasks.base_task(study) for study in studies}
    costs = {study.name: tasks.cost_tasks(study) for study in studies}
    # A base writes once for all domains.
    writing = {study.base: tasks.writing_tasks(study) for study in reversed(studies)}
    grids = {
        (study.name, v.name): {
            lr: tasks.trial(study, v, lr, s.seeds[0], is_search=True) for lr in tasks.rates(s, v)
        }
        for study in studies
        for v in study.variants
        if not v.varies
    }
    timed = [task for by_base in writing.values() for task in by_base.values()]
    timed += [task for by_base in costs.values() for task in by_base.values()]
    first = [task for grid in grids.values() for task in grid.values()]
    waiting = [task for task in (*timed, *bases.values()) if task.result() is None]
    left = sum(sum(tasks.trials_left(study, v)) for study in studies for v in study.variants)
    runner.expect(left + len(waiting))
    runner.run(timed, workers=1)  # with the machine to itself
    runner.run([*bases.values(), *first])

    rows: dict[str, list[dict[str, Any]]] = {study.name: [] for study in studies}
    for study in studies:
        for v in study.variants:
            best = best_rate(study, grids[study.name, v.varies or v.name])
            grid = grids.get((study.name, v.name), {})
            trials = [(lr, s.seeds[0], task) for lr, task in grid.items()]
            for seed in s.seeds if v.varies or s.search_steps else s.seeds[1:]:
                trials.append((best, seed, tasks.trial(study, v, best, seed)))
            wrote = writing[study.base].get(v.writing)
            rows[study.name] += [
                {"variant": v.name, "lr": lr, "seed": seed, "task": task, "writing": wrote}
                | {"chosen": lr == best and not task.about["only_losses"]}
                for lr, seed, task in trials
            ]
    runner.run([row["task"] for study in studies for row in rows[study.name]])
    return [
        collect(study, bases[study.name], costs[study.name], rows[study.name]) for study in studies
    ]


def best_rate(study: Study, grid: dict[float, Task]) -> float:
    """Returns the learning rate with the lowest last domain loss; the first if all failed."""
    ends = []
    for lr, task in grid.items():
        result = task.result() or {"failed": ""}
        if "failed" not in result and result["curves"][study.domain][-1][1] is not None:
            ends.append((result["curves"][study.domain][-1][1], lr))
    return min(ends)[1] if ends else next(iter(grid))


def collect(
    study: Study, base_task: Task, costs: dict[str, Task], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns a study's results, JSON-able, with all trials: chosen, not chosen and failed.

    `costs` measured the steps by variant. A row has variant, lr, seed, chosen, task, and writing
    (the task that wrote its replay, or None).
    """
    base, trials = base_task.result() or {}, []
    if study.s.abilities:  # what a base wrote is its general text: a change is KL(base || model)
        base["losses"] |= dict.fromkeys(base["kl"], 0.0)
    for row in rows:
        result, wrote = row["task"].result() or {}, row["writing"] and row["writing"].result()
        kept = {key: row[key] for key in ("variant", "lr", "seed")} | {"failed": None} | result
        kept["chosen"] = row["chosen"] and "failed" not in result
        kept["only_losses"] = row["task"].about["only_losses"]
        for name, found in kept.get("kl", {}).items():
            kept["curves"][name] = [[0, 0.0], [kept["curves"][study.domain][-1][0], found["kl"]]]
        trials.append(kept | {"replay_s": wrote["replay_s"] if wrote else 0.0})
    names = ("name", "label", "group", "new_blocks", "varies")
    return {
        "name": study.name,
        "base": study.base,
        "domain": study.domain,
        "layers": study.num_layers,
        "compared": f"new-{study.compared}",
        "general": list(base.get("kl", study.general)),
        "domain_set": study.domain,
        "base_result": base,
        "variants": [{key: getattr(v, key) for key in names} for v in study.variants],
        "trials": trials,
        "step_ratios": {name: (task.result() or {})["step"] for name, task in costs.items()},
    }


def about_machine(s: StudySettings) -> dict[str, Any]:
    """Returns machine, versions and settings of a study, and its seconds if no worker idled."""
    machine, cpus = f"{os.cpu_count()} cores, {platform.machine()}", Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    elif cpus.exists() and (name := re.search(r"model name\s*: (.+)", cpus.read_text("utf-8"))):
        machine = f"{os.cpu_count()} cores of {name[1]}"
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "llamapro")}
    settings = {k: v for k, v in asdict(s).items() if k not in ("dry_run", "json")}
    about = {"machine": machine, "versions": versions, "settings": settings}
    return about | {"elapsed_s": tasks.seconds_taken(s.dir) / s.workers}


def write_page(results: dict[str, Any], out: Path) -> str:
    """Writes study.md and the pictures; returns the findings and the names of the files."""
    text, pictures, page = findings(results), draw(results, out), out / "study.md"
    shown = "\n\n".join(f"![{file.stem}]({file.name})" for file in pictures)
    page.write_text(f"# Study\n\n{text}\n\n{shown}\n\n{tables(results)}\n", encoding="utf-8")
    return f"{text}\n\n" + "\n".join(str(file) for file in (page, *pictures))


if __name__ == "__main__":
    cli.run(main)
