"""The work of a study: every function of `FUNCTIONS` is run as a task, in a process of its own.

A function takes what the task is about and the task's directory, and returns a result. Argument and
result are JSON-able. All training is `train.run` with options that a user could give.
"""

import json
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Any

import abilities
import models
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import TRAINABLE_FILE, training_checkpoints
from llamapro.config import ModelConfig
from llamapro.conversion.merge import merge_checkpoint
from llamapro.errors import DivergedError, UserError
from llamapro.evaluate import read_text
from llamapro.expansion import expand_config, interleave, select_trainable
from llamapro.files import write_file
from llamapro.inference.distribution_shift import shift, write_greedily
from llamapro.inference.multiple_choice import baselines, measure_choices, read_choices
from llamapro.inference.sampling import end_ids
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.scripts import convert
from llamapro.scripts import train as script
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.checks import check
from llamapro.training.job import Job
from llamapro.training.metrics import Run, read_run, summarize
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw
from llamapro.training.plan import compute_dtype
from llamapro.training.preset import parse
from llamapro.training.replay import Opening, write_documents
from llamapro.training.settings import OptimSettings, ReplaySettings
from llamapro.training.weights import init_random

RESULT_FILE, LOG_FILE = "result.json", "log.txt"
CHECKPOINT = "checkpoint"  # the directory that `expand` makes
SHIFT = {"prompts": 8, "prompt_tokens": 32, "new_tokens": 32}
CALIBRATION_STEPS, COST_ROUNDS, COST_STEPS = 3, 2, 8
TEXT_FILE, HELD_OUT_FILE, HELD_OUT_SEED = "text.txt", "held-out.json", 1 << 32


def execute(function: str, about: dict[str, Any], out: Path, threads: int) -> float:
    """Runs a function of `FUNCTIONS`, writes its result and log, and returns its seconds."""
    if function != "train":  # which continues its run
        shutil.rmtree(out, ignore_errors=True)  # left by a process that was killed
    out.mkdir(parents=True, exist_ok=True)
    log = os.open(out / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    try:
        result = FUNCTIONS[function](about, out)
    except UserError:
        raise
    except BaseException:
        traceback.print_exc()
        raise
    seconds = time.perf_counter() - started
    write_json(out / RESULT_FILE, {"about": about, "result": result, "seconds": seconds})
    return seconds


def _end_with_parent() -> None:
    """Ends this process with the study, because the next study writes to the same place."""
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def write_json(file: Path, value: Any) -> None:
    write_file(file, json.dumps(value, indent=1) + "\n")


def device_of(name: str) -> torch.device:
    """Returns the device that "auto", "cpu" or "cuda" stands for."""
    has_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


# ---- One variant --------------------------------------------------------------------------------


def run_training(argv: list[str], run_dir: Path, model: LlamaForCausalLM | None = None) -> Run:
    """Trains as train.py does with these options, a model if one is given; returns the records.

    Raises:
        SystemExit: training was stopped before the evaluation of its last step.
    """
    settings = parse([*argv, "--run-dir", str(run_dir)])
    check(settings, 1)
    script.run(Job.open(settings), objective=None if model is None else NextToken(model))
    run = read_run(run_dir, run_dir.name)
    if any(records[-1]["step"] != settings.train.steps for records in run.evals.values()):
        raise SystemExit(f"{run_dir}: stopped before step {settings.train.steps} was evaluated")
    return run


def train(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains one variant at one learning rate and seed, and measures it.

    Args:
        about: `argv`, options of train.py; `built`, arguments of `models.build`, or None; and the
            arguments of `measure`; or `only_losses`, to leave its results out.
        out: directory of the run. Its weights are removed after they were measured.

    Returns:
        `curves`; `trainable` and `total` parameters; `tokens_per_s`, the median; `memory_bytes`,
        the peak; `train_s`, in training steps; the results of `measure`. Or `failed`, the reason.
    """
    run_dir, merged, built = out / "run", out / "merged", about["built"]
    try:
        run = run_training(about["argv"], run_dir, models.build(built) if built else None)
        summary = summarize(run, list(run.evals))
        result = {
            "curves": curves(run),
            "trainable": summary["trainable_parameters"],
            "total": summary["total_parameters"],
            "tokens_per_s": summary["tokens_per_s"],
            "memory_bytes": summary["memory_bytes"],
            "train_s": run.train[-1]["elapsed_s"],
        }
        if about["only_losses"]:
            result |= {"choices": None, "shift": None}
        else:
            if built:
                model = trained(built, run_dir)
            else:
                base = Checkpoint.open(parse(about["argv"]).model.path)
                merge_checkpoint(base, run_dir, merged, force=True)
                model = Checkpoint.open(merged).load()
            result |= measure(model.requires_grad_(False).eval(), about)
    except DivergedError as error:
        result = {"failed": str(error)}
    except torch.OutOfMemoryError:
        result = {"failed": f"does not fit in the GPU's memory; to try again, remove {out}"}
    shutil.rmtree(merged, ignore_errors=True)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return result


def trained(built: dict[str, Any], run_dir: Path) -> LlamaForCausalLM:
    """Returns the built model with the weights that its run has trained, on the CPU."""
    model = models.build(built)
    tensors = load_file(training_checkpoints(run_dir)[-1] / TRAINABLE_FILE)
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unknown, unknown
    return model


def curves(run: Run) -> dict[str, list[list[float]]]:
    """Returns [tokens trained on, loss in nats per token] of each evaluation, by validation set."""
    return {
        name: [[record["tokens_seen"], record["loss"]] for record in records]
        for name, records in run.evals.items()
    }


@torch.inference_mode()
def measure(model: LlamaForCausalLM, about: dict[str, Any]) -> dict[str, Any]:
    """Measures a trained model: its `choices` and the `shift` of its text, each None if impossible.

    `about` has `base`, its checkpoint; `device`; `choices`, a file of questions or ""; `val`,
    held-out text of the new domain, which the model continues; `held_out`, a file of `keep` or "",
    which adds the results `kl` (by set) and `instructed`; and `human_eval`, whether to add that.
    """
    base = Checkpoint.open(about["base"])
    device, tokenizer, choices = device_of(about["device"]), Tokenizer.load(base.path), None
    dtype = torch.float32 if device.type == "cpu" else None  # few processors are good at bf16
    model, teacher = model.to(device=device, dtype=dtype), base.load(dtype, device)
    if about["choices"]:
        context = base.config.max_position_embeddings
        questions = read_choices(about["choices"], tokenizer, context, 0)
        choices = measure_choices(model, questions, 16, "choices")[0] | baselines(questions)
    samples = write_greedily(model, documents(about, tokenizer), **SHIFT)
    ends = end_ids(base.config, tokenizer)
    shifted = None if samples is None else shift(teacher, samples, ends)
    found: dict[str, Any] = {"choices": choices, "shift": shifted}
    if about["held_out"]:
        sets = json.loads(Path(about["held_out"]).read_text(encoding="utf-8"))
        found["kl"] = {name: abilities.divergence(teacher, model, sets[name]) for name in sets}
        template = ChatTemplate.load(base.path, tokenizer)
        found["instructed"] = abilities.instructed(model, template, tokenizer)
    if about["human_eval"]:
        found["human_eval"] = abilities.human_eval(model, tokenizer)
    return found


def documents(about: dict[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of the new domain's held-out documents."""
    return [ids for path in about["val"] for ids in read_text(path, tokenizer, "text").documents]


# ---- The other tasks ----------------------------------------------------------------------------


def expand(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Makes an expanded checkpoint."""
    convert.main(["expand", about["base"], str(out / CHECKPOINT), *about["options"]])
    return {}


def base(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Measures the base itself: `losses`, as in training, and the results of `measure`."""
    model = models.base_model(Path(about["base"]))
    model.model.norm.weight.requires_grad_()  # a step has to train something, however small
    run = run_training(about["argv"], out / "run", model)
    losses = {name: curve[0][1] for name, curve in curves(run).items()}  # before that step
    shutil.rmtree(out / "run" / "checkpoints")
    return {"losses": losses} | measure(Checkpoint.open(about["base"]).load(), about)


def cost(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Times short runs of two variants in turn, so that other load slows both alike.

    `about` has the options of train.py for `plain` and `other`. The result is `step`, the ratio of
    the other's median seconds per step to those of the plain one.
    """
    seconds: dict[str, list[float]] = {"plain": [], "other": []}
    short = ["--train.steps", str(COST_STEPS), "--log-every", "1", "--data.val"]
    for number in range(COST_ROUNDS):
        for side, times in seconds.items():
            run = run_training([*about[side], *short], out / f"{side}-{number}")
            times += [record["step_s"] for record in run.train[1:]]  # the first step warms up
            shutil.rmtree(run.path)
    return {"step": median(seconds["other"]) / median(seconds["plain"])}


def replay(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Lets the base write text for replay, within `replay_s` seconds."""
    settings = parse([*about["argv"], "--run-dir", str(out / "run")])
    started = time.perf_counter()
    store = Job.open(settings).write_replay(device_of(settings.train.device), 0, {})
    return {"replay_s": time.perf_counter() - started, "tokens": store.tokens}


def write(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Lets the base write held-out documents, with a seed that no replay uses."""
    checkpoint = Checkpoint.open(about["base"])
    tokenizer = Tokenizer.load(checkpoint.path)
    model = checkpoint.load(device=device_of(about["device"]))
    settings = ReplaySettings(seed=HELD_OUT_SEED, batch_size=64)
    ends = end_ids(checkpoint.config, tokenizer)
    texts, tokens = [], 0
    starts = [Opening(tokenizer.document_start())]
    for ids in write_documents(model, starts, ends, about["length"], settings):
        texts.append(tokenizer.decode(ids))
        tokens += len(ids)
        if tokens >= about["tokens"]:
            break
    (out / TEXT_FILE).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return {"tokens": tokens}


def keep(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Lets a base with a chat template write the chats and texts on which trials are measured."""
    base = Checkpoint.open(about["base"])
    tokenizer, device = Tokenizer.load(base.path), device_of(about["device"])
    model = base.load(torch.float32 if device.type == "cpu" else None, device)
    template = ChatTemplate.load(base.path, tokenizer)
    sets = abilities.write_held_out(model, template, tokenizer, about["length"], HELD_OUT_SEED)
    (out / HELD_OUT_FILE).write_text(json.dumps(sets), encoding="utf-8")
    return {name: len(documents) for name, documents in sets.items()}


def calibrate(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Returns the seconds of a training step of plain expansion, with random weights, as `step_s`.

    `about` has `config`, a file; `new_blocks`, their number; and `argv`, options of train.py.
    """
    config, settings = ModelConfig.from_file(Path(about["config"])), parse(about["argv"])
    config = expand_config(config, interleave(config.num_hidden_layers, about["new_blocks"]), "")
    device, model = device_of(settings.train.device), build_on_meta(config)
    dtype = compute_dtype(settings)
    select_trainable(model, "new_blocks")
    load_tensors(model, init_random(config, 0))
    optimizer = build_adamw(model.to(device).parameters(), OptimSettings())
    shape = (settings.train.batch_size, settings.data.seq_len)
    ids, times = torch.randint(config.vocab_size, shape, device=device), []
    for _ in range(CALIBRATION_STEPS):
        started = time.perf_counter()
        for rows in ids.split(settings.train.micro_batch_size):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(rows).flatten(0, 1)
            loss = cross_entropy(logits.float(), rows.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return {"step_s": min(times)}


FUNCTIONS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (train, expand, base, cost, replay, write, keep, calibrate)
}
