"""What a study computes, each in a process of its own: train one variant and measure it.

A function here takes what a task is about and its directory, and returns its result; both are
JSON-able. Models that `train.py` can make are trained by it, with the options a user would give.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparisons
import torch
from tqdm import tqdm

from llamapro import ops
from llamapro.checkpoint import Checkpoint
from llamapro.choices import baselines, measure_choices, read_choices
from llamapro.config import ModelConfig, UserError
from llamapro.data import batch
from llamapro.distributed import Ranks, process_group, shard
from llamapro.evaluate import read_text
from llamapro.expansion import select_trainable
from llamapro.job import Job, load_data
from llamapro.model import LlamaForCausalLM, build_on_meta, init_random, load_tensors
from llamapro.optim import FiniteGuard, build_adamw
from llamapro.preset import parse
from llamapro.replay import write_documents
from llamapro.runs import read_run, summarize
from llamapro.settings import ReplaySettings, Settings
from llamapro.shift import shift, write_greedily
from llamapro.stopping import StopRequest
from llamapro.streaming import merge_checkpoint
from llamapro.tokenizer import Tokenizer

RESULT_FILE, LOG_FILE = "result.json", "log.txt"
SHIFT = (8, 32, 32)  # prompts, tokens of each, tokens written after each
CALIBRATION_STEPS = 3
TEXT_FILE, HELD_OUT_SEED = "text.txt", 1 << 32


def execute(function: str, about: dict[str, Any], out: str, threads: int) -> None:
    """Runs a function of `FUNCTIONS` and writes its result; never returns.

    What it prints goes to its log. What training refuses, such as a gradient that is not finite, is
    a result; anything else ends the process with status 1.
    """
    directory = Path(out)
    shutil.rmtree(directory, ignore_errors=True)  # what a killed one left
    directory.mkdir(parents=True)
    log = os.open(directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # one between processes would be left behind by _exit
    status = 0
    try:
        try:
            result = FUNCTIONS[function](about, directory)
        except UserError as error:
            if function != "train":
                raise
            result = {"failed": str(error)}
        aside = directory / (RESULT_FILE + ".partial")
        aside.write_text(json.dumps({"about": about, "result": result}), encoding="utf-8")
        aside.rename(directory / RESULT_FILE)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without teardown, during which gloo's threads sometimes abort


# ---- One variant --------------------------------------------------------------------------------


def train(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains one variant at one learning rate and seed, and measures it.

    Args:
        about: `argv`, options of train.py; `built`, a model of comparisons.py, or None; and what
            `measure` takes.
        out: for the run's records; its weights are removed once they are measured.

    Returns:
        curves: validation set -> [tokens trained on, loss in nats per token] of each evaluation;
        trainable, total: parameters; tokens_per_s, memory_bytes: median and peak; train_s: seconds
        in training steps; choices, shift: as `measure`.
    """
    run_dir = out / "run"
    argv = [*about["argv"], "--run-dir", str(run_dir)]
    if about["built"] is None:
        sys.argv = ["train.py", *argv]
        comparisons.train_file().main()
        settings = parse(argv)
        merged = out / "merged"
        merge_checkpoint(Checkpoint.open(settings.model.path), run_dir, merged)
        model = Checkpoint.open(merged).load()
    else:
        model = comparisons.train(argv, lambda: comparisons.build(about["built"]))
    run = read_run(run_dir, about["variant"])
    if run.train[-1]["step"] != parse(argv).train.steps:
        raise SystemExit(f"stopped at step {run.train[-1]['step']}")
    found = summarize(run, list(run.evals))
    result = {
        "curves": {
            name: [[record["tokens_seen"], record["loss"]] for record in records]
            for name, records in run.evals.items()
        },
        "trainable": found["trainable_parameters"],
        "total": found["total_parameters"],
        "tokens_per_s": found["tokens_per_s"],
        "memory_bytes": found["memory_bytes"],
        "train_s": run.train[-1]["elapsed_s"],
    }
    result |= measure(model, about)
    shutil.rmtree(out / "merged", ignore_errors=True)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return result


@torch.inference_mode()
def measure(model: LlamaForCausalLM, about: dict[str, Any]) -> dict[str, Any]:
    """Measures what a trained model chooses and writes.

    Args:
        model: whole, on the CPU.
        about: `base`, its checkpoint; `choices`, a file of questions or ""; `val`, the new domain's
            held-out text, whose beginnings the model continues.

    Returns:
        choices: of `measure_choices` and `baselines`, or None; shift: of `shift`, or None.
    """
    base = Checkpoint.open(about["base"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.load(base.path)
    model = model.to(device)
    choices, context = None, base.config.max_position_embeddings
    if about["choices"]:
        questions = read_choices(about["choices"], tokenizer, context, 0)
        marks, _ = measure_choices(model, questions, 16, "choices")
        choices = marks | baselines(questions)
    documents = [
        ids for path in about["val"] for ids in read_text(path, tokenizer, "text").documents
    ]
    samples = write_greedily(model, documents, *SHIFT)
    moved = shift(base.load(device=device), samples) if samples is not None else None
    return {"choices": choices, "shift": moved}


# ---- Around it ----------------------------------------------------------------------------------


def base(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Measures the base itself: `losses` as training measures them, and as `measure`."""
    argv = [*about["argv"], "--run-dir", str(out / "run")]
    settings = parse(argv)
    with process_group(settings.train.device) as ranks:
        job = Job.open(settings)
        data = load_data(job, ranks, StopRequest())
        model = Checkpoint.open(about["base"]).load()
        shard(model, ranks, job.compute_dtype)
        evaluate = comparisons.train_file().evaluate
        losses = {
            name: evaluate(model, sequences, settings, ranks, StopRequest())[0]
            for name, sequences in data.val.items()
        }
    return {"losses": losses} | measure(Checkpoint.open(about["base"]).load(), about)


def replay(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Has the base write what is replayed, and says in how many seconds: `replay_s`."""
    settings = parse([*about["argv"], "--run-dir", str(out / "run")])
    job = Job.open(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    store = job.replay(device)
    return {"replay_s": time.perf_counter() - started, "tokens": store.tokens}


def write(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Has the base write held-out text, from BOS on, with a seed that no replay has."""
    checkpoint = Checkpoint.open(about["base"])
    tokenizer, model = Tokenizer.load(checkpoint.path), checkpoint.load()
    assert tokenizer.bos_id is not None
    how = ReplaySettings(seed=HELD_OUT_SEED, batch_size=32)
    ends = set(checkpoint.config.eos_token_ids)
    texts, tokens = [], 0
    for ids in write_documents(model, [[tokenizer.bos_id]], ends, about["length"], how):
        texts.append(tokenizer.decode(ids[1:]))
        tokens += len(ids)
        if tokens >= about["tokens"]:
            break
    (out / TEXT_FILE).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return {"tokens": tokens}


def gradients(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Returns `comparisons.first_gradients` of each kind of new block, on the domain's text."""
    argv = [*about["argv"], "--run-dir", str(out / "run")]
    settings = parse(argv)
    with process_group("cpu") as ranks:
        data = load_data(Job.open(settings), ranks, StopRequest())
        (inputs, targets), _ = batch(data.mixture, 0, 2, 0, 1)
    ids = torch.cat((inputs, targets[:, -1:].clamp(min=0)), 1)[:, :65]
    kinds = ("zero-outputs", "copies", "zero-norms")
    where = (Path(about["base"]), about["layers"])
    return {kind: comparisons.first_gradients(*where, kind, ids) for kind in kinds}


def calibrate(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Times a full training step of a random model of the base's shape: `step_s`, the shortest."""
    config = ModelConfig.from_file(Path(about["config"]))
    settings = parse(about["argv"])
    t = settings.train
    with process_group(t.device) as ranks, ops.use(t.ops):
        model = build_on_meta(config)
        names = select_trainable(model, "all")
        load_tensors(model, init_random(config, 0))
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        shard(model, ranks, dtype)
        guard = _guard(model, names, settings, ranks)
        shape = (t.batch_size, settings.data.seq_len)
        ids = torch.randint(0, config.vocab_size, shape)
        times = []
        for _ in range(CALIBRATION_STEPS):
            started = time.perf_counter()
            how = ((ids, ids), t.batch_size, float(ids.numel()), settings, ranks)
            loss, _ = comparisons.train_file().train_step(model, guard, *how)
            loss.item()  # waits for the device
            times.append(time.perf_counter() - started)
    return {"step_s": min(times)}


def _guard(
    model: LlamaForCausalLM, names: list[str], settings: Settings, ranks: Ranks
) -> FiniteGuard:
    parameters = dict(model.named_parameters())
    o = settings.optim
    optimizer = build_adamw([parameters[n] for n in names], o.betas, o.weight_decay)
    return FiniteGuard(optimizer, o.skip_bad_steps, ranks.device)


FUNCTIONS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "train": train,
    "base": base,
    "replay": replay,
    "write": write,
    "gradients": gradients,
    "calibrate": calibrate,
}
