"""What a study computes, each in a process of its own: train one variant and measure it.

A function here takes what a task is about and its directory, and returns its result; both are
JSON-able. Models that `train.py` can make are trained by it, with the options a user would give.
"""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Any

import comparisons
import torch
from tqdm import tqdm

from llamapro import backends, ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.merge import merge_checkpoint
from llamapro.errors import DivergedError, UserError
from llamapro.evaluate import read_text
from llamapro.expansion import expand_config, interleave, select_trainable
from llamapro.inference.distribution_shift import shift, write_greedily
from llamapro.inference.multiple_choice import baselines, measure_choices, read_choices
from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.text.mixture import batch
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.distributed import process_group, shard
from llamapro.training.job import Job, load_data
from llamapro.training.objective import NextToken
from llamapro.training.optim import set_learning_rate
from llamapro.training.preemption import StopRequest
from llamapro.training.preset import parse
from llamapro.training.records import read_run, summarize
from llamapro.training.replay import write_documents
from llamapro.training.settings import ReplaySettings
from llamapro.training.state import RunState
from llamapro.training.weights import init_random

RESULT_FILE, MESSAGE_FILE, LOG_FILE = "result.json", "message.txt", "log.txt"
SHIFT = (8, 32, 32)  # prompts, tokens of each, tokens written after each
CALIBRATION_STEPS, COST_ROUNDS = 3, 10
WRITTEN_AT_A_TIME = 64  # documents
TEXT_FILE, HELD_OUT_SEED = "text.txt", 1 << 32


def execute(function: str, about: dict[str, Any], out: str, threads: int) -> None:
    """Runs a function of `FUNCTIONS` and writes its result; never returns.

    What it prints goes to its log. Exit status 2: a mistake of the user's, whose message is in
    `MESSAGE_FILE`; 1: anything else. It ends with the process that started it.
    """
    directory = Path(out)
    shutil.rmtree(directory, ignore_errors=True)  # what a killed one left
    directory.mkdir(parents=True)
    log = os.open(directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # one between processes would be left behind by _exit
    started, status = time.perf_counter(), 0
    try:
        result = FUNCTIONS[function](about, directory)
        seconds = time.perf_counter() - started
        write_json(directory / RESULT_FILE, {"about": about, "result": result, "seconds": seconds})
    except UserError as error:
        (directory / MESSAGE_FILE).write_text(str(error), encoding="utf-8")
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without teardown, during which gloo's threads sometimes abort


def _end_with_parent() -> None:
    """Leaves nobody behind who would write where the next one does."""
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def write_json(file: Path, value: Any) -> None:
    """Writes a file that is there whole or not at all."""
    aside = file.with_name(file.name + ".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.rename(file)


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
    run_dir, merged = out / "run", out / "merged"
    argv = [*about["argv"], "--run-dir", str(run_dir)]
    try:
        if about["built"] is None:
            sys.argv = ["train.py", *argv]
            comparisons.train_file().main()
            merge_checkpoint(Checkpoint.open(parse(argv).model.path), run_dir, merged)
            model = Checkpoint.open(merged).load()
        else:
            model = comparisons.train(argv, lambda: comparisons.build(about["built"]))
        result = records(run_dir, parse(argv).train.steps)
        return result | measure(model, about)
    except DivergedError as error:
        return {"failed": str(error)}
    except torch.OutOfMemoryError:
        return {"failed": f"does not fit in the GPU's memory; to try again, remove {out}"}
    finally:
        shutil.rmtree(merged, ignore_errors=True)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def records(run_dir: Path, steps: int) -> dict[str, Any]:
    """Returns what a run's records say of it: all of `train`'s result but what is measured after.

    Raises:
        SystemExit: it was stopped before its last step was evaluated.
    """
    run = read_run(run_dir, run_dir.name)
    if any(of_a_set[-1]["step"] != steps for of_a_set in run.evals.values()):
        raise SystemExit(f"{run_dir}: stopped before step {steps} was evaluated")
    found = summarize(run, list(run.evals))
    return {
        "curves": {
            name: [[record["tokens_seen"], record["loss"]] for record in of_a_set]
            for name, of_a_set in run.evals.items()
        },
        "trainable": found["trainable_parameters"],
        "total": found["total_parameters"],
        "tokens_per_s": found["tokens_per_s"],
        "memory_bytes": found["memory_bytes"],
        "train_s": run.train[-1]["elapsed_s"],
    }


@torch.inference_mode()
def measure(model: LlamaForCausalLM, about: dict[str, Any]) -> dict[str, Any]:
    """Measures what a trained model chooses and writes.

    Args:
        model: whole, on the CPU.
        about: `base`, its checkpoint; `device`; `choices`, a file of questions or ""; `val`, text
            of the new domain that was held out, pieces of which the model continues.

    Returns:
        choices: of `measure_choices` and `baselines`, or None; shift: of `shift`, or None.
    """
    base = Checkpoint.open(about["base"])
    device, tokenizer = device_of(about["device"]), Tokenizer.load(base.path)
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


def device_of(name: str) -> torch.device:
    """Returns what "auto", "cpu" or "cuda" stands for: where a run computes."""
    has_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


# ---- Around it ----------------------------------------------------------------------------------


def base(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Measures the base itself: `losses` as training measures them, and as `measure`."""
    argv = [*about["argv"], "--run-dir", str(out / "run")]
    settings = parse(argv)
    with process_group(settings.train.device) as ranks:
        job = Job.open(settings)
        data = load_data(job, RunState(), ranks, StopRequest())
        model = Checkpoint.open(about["base"]).load()
        objective = NextToken(model)
        shard(objective, ranks, job.compute_dtype)
        mean_loss = comparisons.train_file().mean_loss
        losses = {
            name: mean_loss(objective, sequences, settings, ranks, StopRequest())[0]
            for name, sequences in data.val.items()
        }
    return {"losses": losses} | measure(Checkpoint.open(about["base"]).load(), about)


def cost(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Times steps of two runs in turn, so that what else the machine does slows both alike.

    Args:
        about: `plain` and `other`, options of train.py.
        out: for what they would write.

    Returns:
        step: the other's seconds per step, over the plain one's; the median of rounds.
    """
    file, rounds = comparisons.train_file(), []
    with ExitStack() as stack:
        sides: list[Any] = []
        for name in ("plain", "other"):
            settings = parse([*about[name], "--run-dir", str(out / name)])
            job = Job.open(settings)
            if not sides:
                ranks = stack.enter_context(process_group(settings.train.device))
                stack.enter_context(backends.use(settings.train.ops))
            data = load_data(job, RunState(), ranks, StopRequest())
            objective = file.build_objective(job)
            parameters = file.shard_objective(objective, job, ranks)
            guard = comparisons.guarded_adamw(list(parameters.values()), settings)
            set_learning_rate(guard.optimizer, 1, 2, settings.optim)
            sides.append((settings, data, objective, guard))
        for at in range(COST_ROUNDS + 1):
            took = []
            for settings, data, objective, guard in sides:
                count = settings.train.batch_size
                columns, others = batch(data.mixture, at * count, count, 0, 1, data.apart)
                valid = float((columns[1] != ops.IGNORE_INDEX).sum())
                started = time.perf_counter()
                loss, _ = file.train_step(objective, guard, columns, others, valid, settings, ranks)
                loss.item()  # waits for the device
                took.append(time.perf_counter() - started)
            rounds.append(took[1] / took[0])
    return {"step": median(rounds[1:])}  # the first warms up


def replay(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Has the base write what is replayed, and says in how many seconds: `replay_s`."""
    settings = parse([*about["argv"], "--run-dir", str(out / "run")])
    job = Job.open(settings)
    started = time.perf_counter()
    store = job.replay(device_of(settings.train.device))
    return {"replay_s": time.perf_counter() - started, "tokens": store.tokens}


def write(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Has the base write held-out text, from BOS on, with a seed that no replay has."""
    checkpoint = Checkpoint.open(about["base"])
    tokenizer = Tokenizer.load(checkpoint.path)
    model = checkpoint.load(device=device_of(about["device"]))
    assert tokenizer.bos_id is not None
    how = ReplaySettings(seed=HELD_OUT_SEED, batch_size=WRITTEN_AT_A_TIME)
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
        data = load_data(Job.open(settings), RunState(), ranks, StopRequest())
        (inputs, targets), _ = batch(data.mixture, 0, 2, 0, 1)
    ids = torch.cat((inputs, targets[:, -1:].clamp(min=0)), 1)[:, :65]
    kinds = ("zero-outputs", "copies", "zero-norms")
    where = (Path(about["base"]), about["layers"])
    return {kind: comparisons.first_gradients(*where, kind, ids) for kind in kinds}


def calibrate(about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Times a training step and a step of writing of a random model of the base's shape.

    Args:
        about: `config`, a file; `argv`, options of train.py; `new_blocks`: how many are added and
            train alone, or 0: all weights train.
        out: unused.

    Returns:
        step_s, write_s: seconds of each, the shortest of a few.
    """
    config = ModelConfig.from_file(Path(about["config"]))
    settings = parse(about["argv"])
    t = settings.train
    if about["new_blocks"]:
        layout = interleave(config.num_hidden_layers, about["new_blocks"])
        config = expand_config(config, layout, "")
    with process_group(t.device) as ranks, backends.use(t.ops):
        model = build_on_meta(config)
        names = select_trainable(model, "new_blocks" if about["new_blocks"] else "all")
        load_tensors(model, init_random(config, 0))
        objective = NextToken(model)
        shard(objective, ranks, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
        parameters = dict(model.named_parameters())
        guard = comparisons.guarded_adamw([parameters[n] for n in names], settings)
        ids = torch.randint(0, config.vocab_size, (t.batch_size, settings.data.seq_len))
        how = ((ids, ids), t.batch_size, float(ids.numel()), settings, ranks)
        step_s = shortest(
            lambda: comparisons.train_file().train_step(objective, guard, *how)[0].item()
        )
        row, length = torch.zeros(WRITTEN_AT_A_TIME, 1, dtype=torch.int64), 8
        write_s = shortest(lambda: list(generate(model, row.to(ranks.device), length))) / length
    return {"step_s": step_s, "write_s": write_s}


def shortest(work: Callable[[], Any]) -> float:
    """Returns how long it takes, the shortest of a few times."""
    times = []
    for _ in range(CALIBRATION_STEPS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


FUNCTIONS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "train": train,
    "base": base,
    "cost": cost,
    "replay": replay,
    "write": write,
    "gradients": gradients,
    "calibrate": calibrate,
}
