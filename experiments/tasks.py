"""The tasks of a study: what each trial is about, in options of train.py."""

from pathlib import Path
from typing import Any

from bases import Study, expanded_dir, flags
from comparisons import lora_rank
from options import StudySettings
from schedule import Task
from variants import Variant

from llamapro.expansion import interleave

OVERHEAD_S = 5.0  # of a trial beside what it computes: starting, loading, the shift
COST_S = 8.0  # of comparing steps
QUESTIONS_TOKENS = 20_000  # of the choices that a trial reads


def options(s: StudySettings, out: Path, study: Study, steps: int) -> list[str]:
    """Returns the options of train.py that trials of so many steps share."""
    sets = {study.domain: list(study.val)} | study.general
    shared = {
        "data.seq-len": s.seq_len, "data.cache-dir": out / "cache", "train.steps": steps,
        "train.batch-size": s.batch_size, "train.micro-batch-size": s.micro_batch_size,
        "train.device": s.device, "eval.every": steps // s.evaluations,
        "eval.sequences": s.eval_sequences, "save.every": steps, "log-spikes": 0,
        "log-every": max(1, steps // 8),
    }  # fmt: skip
    val = [f"{name}={path}" for name, paths in sets.items() for path in paths]
    return [*flags(shared), "--data.train", *study.train, "--data.val", *val]


def steps_of(s: StudySettings, variant: Variant) -> int:
    """Returns how many steps a variant trains."""
    return s.replay_steps if variant.group == "retention" else s.steps


def trial(
    s: StudySettings, out: Path, study: Study, variant: Variant, lr: float, seed: int, step_s: float
) -> Task:
    """Returns the task of training and measuring one variant."""
    start = expanded_dir(out, study, variant)
    argv = options(s, out, study, steps_of(s, variant))
    argv += ["--model.path", str(start), "--optim.lr", f"{lr:g}", "--train.seed", str(seed)]
    argv += [*variant.options, *variant.writing]
    if not variant.expand:
        argv += ["--train.trainable", "all"]
    built = None
    if variant.built is not None:
        built = variant.built | {"base": str(study.checkpoint), "seed": seed}
        if "like" in built:
            built["rank"] = lora_rank(study.checkpoint, built["like"])
    about = measured(s, study) | {"variant": variant.name, "argv": argv, "built": built}
    where = out / study.name / variant.name / f"lr-{lr:g}-seed-{seed}"
    label = f"{study.name} · {variant.label} · lr {lr:g} · seed {seed}"
    return Task(label, "train", about, where, trial_seconds(s, study, variant, step_s))


def measured(s: StudySettings, study: Study) -> dict[str, Any]:
    """Returns what `trial.measure` takes."""
    about = {"base": str(study.checkpoint), "base_sha256": study.identity(), "device": s.device}
    return about | {"choices": study.choices, "val": list(study.val)}


def trial_seconds(s: StudySettings, study: Study, variant: Variant, step_s: float) -> float:
    """Estimates a trial, s, from the seconds of a training step of all the base's weights.

    Of a step's work forward is a third, and so are the gradients of inputs and those of weights:
    new blocks add to the first two with all layers, to the last with their own.
    """
    L, n = study.num_layers, variant.new_blocks or 0
    factor = (2 * (L + n) + (n or L)) / (3 * L)
    evaluated = (s.evaluations + 1) * (1 + len(study.general)) * s.eval_sequences  # sequences
    read = evaluated + QUESTIONS_TOKENS / s.seq_len
    forward = read / s.batch_size * (L + n) / L / 3
    return OVERHEAD_S + step_s * (steps_of(s, variant) * factor + forward)


def base_tasks(s: StudySettings, out: Path, study: Study) -> list[Task]:
    """Returns what is measured of the base itself."""
    argv = options(s, out, study, s.steps)
    argv += ["--model.path", str(study.checkpoint), "--train.trainable", "all"]
    about, where = measured(s, study) | {"argv": argv}, out / study.name
    tasks = [Task(f"{study.name} · base", "base", about, where / "base")]
    if study.is_whole:
        layout = interleave(study.num_layers, study.compared(s))
        tops = [layout.sources[i] for i in layout.new_layers]
        about = {"base": str(study.checkpoint), "argv": argv, "layers": tops}
        label = f"{study.name} · first gradients"
        tasks.append(Task(label, "gradients", about, where / "gradients"))
    return tasks


def cost_tasks(s: StudySettings, out: Path, study: Study) -> dict[str, Task]:
    """Returns, by variant, the tasks of comparing its step with that of what it varies."""
    by_name = {variant.name: variant for variant in study.variants(s)}
    argv = {
        name: trial(s, out, study, variant, s.learning_rates[0], s.seeds[0], 0.0).about["argv"]
        for name, variant in by_name.items()
        if variant.varies or variant.group == "number"
    }
    found = {}
    for name, variant in by_name.items():
        if variant.varies:
            about = {"plain": argv[variant.varies], "other": argv[name]}
            label, where = f"{study.name} · a step of {variant.label}", study.name
            found[name] = Task(label, "cost", about, out / "cost" / where / name, COST_S)
    return found


def writing_tasks(s: StudySettings, out: Path, study: Study) -> dict[tuple[str, ...], Task]:
    """Returns, by `Variant.writing`, the tasks of writing what the studies of a base replay."""
    found = {}
    for variant in study.variants(s):
        if variant.writing and variant.writing not in found:
            argv = options(s, out, study, s.replay_steps)
            argv += ["--model.path", str(expanded_dir(out, study, variant))]
            argv += [*variant.options, *variant.writing]
            label, where = f"{study.base} writes for {variant.name}", f"{study.base}-{variant.name}"
            about = {"argv": argv, "base_sha256": study.identity()}
            found[variant.writing] = Task(label, "replay", about, out / "replay" / where)
    return found
