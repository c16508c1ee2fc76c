"""Trains the new blocks of an expanded LLaMA, or all weights. One file, read top to bottom.

    python train.py --config configs/demo.toml                          one process
    torchrun --nproc-per-node 8 train.py --config configs/llama2-7b.toml --data.train corpus/
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 train.py ...    two machines

A TOML preset sets everything; any option given beside it wins. `--dry-run` checks all input and
prints the plan. The same command run again resumes from the run directory.

The order matters and is the method: load, freeze by the checkpoint's record, shard, loop.
"""

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamapro import cli, ops
from llamapro.blocks import BlocksInfo, training_checkpoints
from llamapro.checkpoint import Checkpoint
from llamapro.config import ConfigError, DataError, ModelConfig, UserError
from llamapro.corpus import find_files, tokenize
from llamapro.data import Mixture, PackedSequences, TokenStore, batch, parse_named
from llamapro.distributed import Ranks, compile_blocks, process_group, shard, world_size
from llamapro.expansion import select_trainable
from llamapro.metrics import MetricsLog, format_count, perplexity, progress_line
from llamapro.model import LlamaForCausalLM, build_on_meta, init_random, load_tensors
from llamapro.optim import FiniteGuard, build_adamw, clip_gradients, learning_rate
from llamapro.plan import make_plan, render
from llamapro.resume import check_identity, find_resume_point, locked, make_identity
from llamapro.settings import Settings, check, flatten, parse
from llamapro.stopping import Stopped, StopRequest
from llamapro.tokenizer import Tokenizer
from llamapro.train_state import (
    check_settings,
    load_optimizer,
    load_trained,
    remove_old,
    save,
)


def main() -> None:
    settings = parse(sys.argv[1:])
    check(settings, world_size())
    job = Job.open(settings)
    t = settings.train
    plan = make_plan(settings, job.config, job.compute_dtype, job.run_dir, job.resume_from)
    if settings.dry_run:
        if os.environ.get("RANK", "0") == "0":
            cli.print_result(plan, settings.json, render(plan, settings))
        return
    stop = StopRequest()
    with (
        stop.listening(),
        process_group(t.device, t.shard_size) as ranks,
        ops.use(t.ops),
        locked(job.run_dir, ranks),
    ):
        found = train(job, plan, ranks, stop)
    if ranks.is_main:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in found["eval"].items())
        text = f"{job.run_dir}: {found['step']} steps done"
        if found["stopped"]:
            text += ", stopped by a signal: the same command continues"
        cli.print_result(found, settings.json, f"{text}; {losses}" if losses else text)


def say(ranks: Ranks, text: str) -> None:
    """Progress goes to standard error, from one process."""
    if ranks.is_main:
        print(text, file=sys.stderr, flush=True)


# ---- What is to be done: opened and checked before anything is computed ------------------------


@dataclass(frozen=True)
class Job:
    """The run's inputs, all found and fitting together."""

    settings: Settings
    run_dir: Path
    config: ModelConfig
    checkpoint: Checkpoint | None  # None: random weights from model.config
    tokenizer: Tokenizer
    val: dict[str, list[str]]
    resume_from: Path | None

    @classmethod
    def open(cls, settings: Settings) -> "Job":
        """Opens everything the settings name; raises a UserError for what is missing or wrong."""
        checkpoint, where = None, settings.model.path or settings.model.config
        if settings.model.path:
            checkpoint = Checkpoint.open(settings.model.path)
            config = checkpoint.config
        else:
            config = ModelConfig.from_file(settings.model.config)
        if settings.data.seq_len > config.max_position_embeddings:
            raise ConfigError(
                f"data.seq_len {settings.data.seq_len} is over max_position_embeddings "
                f"{config.max_position_embeddings} of {where}"
            )
        if settings.train.trainable == "new_blocks":
            select_trainable(build_on_meta(config), "new_blocks")  # raises without a record
        tokenizer = Tokenizer.load(settings.model.tokenizer or settings.model.path)
        tokenizer.check_fits(config.vocab_size, where)
        val = parse_named(settings.data.val)
        for patterns in [settings.data.train, *val.values()]:
            find_files(patterns)  # raises DataError for a pattern that matches nothing
        preset = Path(settings.config).stem or "run"
        run_dir = Path(settings.run_dir or f"runs/{preset}")
        earlier = training_checkpoints(run_dir)
        resume_from = earlier[-1] if earlier else None
        return cls(settings, run_dir, config, checkpoint, tokenizer, val, resume_from)

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.settings.train.dtype != "auto":
            return getattr(torch, self.settings.train.dtype)
        on_gpu = torch.cuda.is_available() and self.settings.train.device != "cpu"
        return torch.bfloat16 if on_gpu else torch.float32


# ---- Data and model ---------------------------------------------------------------------------


def load_data(
    job: Job, ranks: Ranks, stop: StopRequest
) -> tuple[Mixture, dict[str, PackedSequences], dict[str, Any]]:
    """Tokenises on the main process what is not yet in the cache; then every process maps it.

    Raises:
        DataError: on every rank, if the main one could not.
        Stopped: on every rank, if a signal came to the main one meanwhile.
    """
    s = job.settings

    def tokenized(patterns: list[str], label: str) -> Path:
        stores[label] = tokenize(
            patterns, job.tokenizer, s.data.cache_dir, s.data.text_key, s.data.workers, label
        )
        return stores[label].path

    stores: dict[str, TokenStore] = {}
    error, sources, val, identity, stopped = None, [], {}, {}, False
    if ranks.is_main:
        try:
            with stop.interrupting():
                sources = [tokenized([path], f"train {path}") for path in s.data.train]
                val = {name: tokenized(paths, f"val {name}") for name, paths in job.val.items()}
                trainable = select_trainable(build_on_meta(job.config), s.train.trainable)
                fingerprint = job.tokenizer.fingerprint
                identity = make_identity(job.checkpoint, trainable, fingerprint, stores)
        except UserError as failure:
            error = str(failure)
        except Stopped:
            stopped = True
    found = (error, sources, val, identity, stopped)
    error, sources, val, identity, stopped = ranks.from_main(found)
    if stopped:
        raise Stopped
    if error:
        raise DataError(error)

    def packed(path: Path) -> PackedSequences:
        return PackedSequences(TokenStore(path, job.tokenizer.fingerprint), s.data.seq_len)

    weights = s.data.weights or [1.0] * len(sources)
    mixture = Mixture([packed(path) for path in sources], weights, s.train.seed)
    return mixture, {name: packed(path) for name, path in val.items()}, identity


def build_model(job: Job, ranks: Ranks) -> tuple[LlamaForCausalLM, dict[str, torch.nn.Parameter]]:
    """Loads, puts the resumed weights in, freezes, and only then shards.

    Returns:
        The sharded model, and by name the parameters that train.
    """
    s = job.settings
    model = build_on_meta(job.config)
    if job.checkpoint is None:
        tensors = init_random(job.config, s.train.seed)
    else:
        tensors = job.checkpoint.state_dict()  # mapped: read when first used
    trainable = select_trainable(model, s.train.trainable)
    if job.resume_from is not None:
        shapes = {name: tuple(model.get_parameter(name).shape) for name in trainable}
        tensors |= load_trained(job.resume_from, job.config, shapes)
    load_tensors(model, tensors)
    for layer in model.model.layers:
        layer.recompute = s.train.recompute  # type: ignore[assignment]
    if s.train.compile:
        compile_blocks(model)
    shard(model, ranks, job.compute_dtype, s.train.frozen, s.train.offload)
    parameters = dict(model.named_parameters())
    return model, {name: parameters[name] for name in trainable}


# ---- Training ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM,
    sequences: PackedSequences,
    settings: Settings,
    ranks: Ranks,
    stop: StopRequest,
) -> tuple[float, int]:
    """Returns the mean token loss (nats) over a validation set and how many tokens it has.

    Raises:
        Stopped: on every rank, if a signal came to one of them.
    """
    count = min(settings.eval.sequences or len(sequences), len(sequences))
    chosen = [i * len(sequences) // count for i in range(count)]
    rows = settings.train.micro_batch_size
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    tokens = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for start in range(0, count, rows * ranks.world_size):
        # Every process makes the same number of passes: sharded weights are gathered together.
        if any(ranks.sum(bool(stop.signal))):
            raise Stopped
        mine = chosen[start + ranks.rank * rows :][:rows]
        inputs = torch.zeros(rows, settings.data.seq_len, dtype=torch.int64)
        targets = torch.full_like(inputs, ops.IGNORE_INDEX)
        for row, index in enumerate(mine):
            ids, following = sequences[index]
            inputs[row], targets[row] = torch.from_numpy(ids), torch.from_numpy(following)
        part_sum, part_count = model(inputs.to(ranks.device), targets.to(ranks.device))
        loss_sum += part_sum
        tokens += part_count
    total, valid = ranks.sum(loss_sum, tokens)
    return total / max(1.0, valid), int(valid)


def train_step(
    model: LlamaForCausalLM,
    mixture: Mixture,
    guard: FiniteGuard,
    step: int,
    steps: int,
    settings: Settings,
    ranks: Ranks,
    stop: StopRequest,
) -> tuple[dict[str, Any], int]:
    """One optimizer step on the global batch of this step number, which is all it depends on.

    Returns:
        This rank's part of the loss, (), in nats per token of the global batch; grad_norm, (),
        before clipping; learning_rate; and the number of tokens that were predicted.

    Raises:
        Stopped: on every rank and before anything is computed, if a signal came to one of them.
    """
    t, o = settings.train, settings.optim
    inputs, targets = batch(
        mixture, step * t.batch_size, t.batch_size, ranks.rank, ranks.world_size
    )
    # The loss is the mean over the valid tokens of the *global* batch, so it does not depend on how
    # the batch is split. FSDP averages gradients over the ranks, hence the factor world_size.
    valid, stopping = ranks.sum((targets != ops.IGNORE_INDEX).sum(), bool(stop.signal))
    if stopping:
        raise Stopped
    scale = ranks.world_size / max(1.0, valid)
    loss_sum = torch.zeros((), device=ranks.device)
    for ids, following in zip(
        inputs.split(t.micro_batch_size), targets.split(t.micro_batch_size), strict=True
    ):
        loss, _ = model(ids.to(ranks.device), following.to(ranks.device))
        (loss * scale).backward()
        loss_sum += loss.detach()
    grad_norm = clip_gradients(model.parameters(), o.clip)
    rate = learning_rate(step, steps, o.lr, round(o.warmup_ratio * steps), o.final_lr_ratio)
    for group in guard.optimizer.param_groups:
        group["lr"] = rate
    guard.step(grad_norm, step)  # not applied if the norm is not finite
    guard.optimizer.zero_grad()
    part = loss_sum / max(1.0, valid)
    return {"loss": part, "grad_norm": grad_norm, "learning_rate": rate}, int(valid)


def train(job: Job, plan: dict[str, Any], ranks: Ranks, stop: StopRequest) -> dict[str, Any]:
    """Runs the job to its last step, or to where a signal stops it; returns the result."""
    s, run_dir = job.settings, job.run_dir
    resume_from, found, damaged = find_resume_point(run_dir, ranks)
    job = dataclasses.replace(job, resume_from=resume_from)
    plan = plan | {"resume_from": str(resume_from) if resume_from else None}
    say(ranks, render(plan, s))
    for text in damaged:
        say(ranks, f"warning          {text}; resuming from the one before it")
    # Where the run stands: with the weights and the optimizer, all there is to resume from.
    state: dict[str, Any] = {"step": 0, "tokens": 0, "elapsed_s": 0.0, "loss": None, "eval": {}}
    state |= {"evaluated": -1, "skipped": 0}
    if found is not None:
        state = found
        check_settings(state, s, run_dir)
    try:
        mixture, val, identity = load_data(job, ranks, stop)
    except Stopped:
        return result(run_dir, state, stopped=True)
    if found is not None:
        check_identity(state, identity, run_dir)
    state["identity"] = identity
    steps = s.steps(mixture.samples_per_epoch)
    say(ranks, f"steps            {steps} ({format_count(steps * plan['tokens_per_step'])} tokens)")
    if state["step"] >= steps and state["evaluated"] == state["step"]:
        say(ranks, f"{run_dir} is complete: nothing to do")
        return result(run_dir, state)

    model, parameters = build_model(job, ranks)
    optimizer = build_adamw(parameters.values(), s.optim.betas, s.optim.weight_decay)
    skipped_before = state["skipped"]
    if job.resume_from is not None:
        load_optimizer(job.resume_from, parameters, optimizer, state["step"] - skipped_before)
    guard = FiniteGuard(optimizer, s.optim.skip_bad_steps, ranks.device)
    with open_metrics(run_dir, plan, state["step"], s, ranks) as metrics:
        window = {"s": 0.0, "tokens": 0, "steps": 0}  # since the last progress line
        latest: dict[str, Any] = {}  # the last step's numbers, still on the device

        def log(record: dict[str, Any]) -> None:
            if metrics is not None:
                metrics.log(record)

        def settle() -> None:
            """Waits for the device: notes the loss, and steps that it did not apply."""
            started = time.perf_counter()
            if latest:
                (state["loss"],) = ranks.sum(latest["loss"])
            skipped, bad, is_stuck = guard.check()
            if skipped_before + skipped > state["skipped"]:
                state["skipped"] = skipped_before + skipped
                where = [
                    mixture.locate(bad * s.train.batch_size + i) for i in range(s.train.batch_size)
                ]
                sequences = [f"{s.data.train[source]}:{number}" for source, number in where]
                record = {"kind": "bad_step", "step": bad + 1, "skipped": state["skipped"]}
                log(record | {"sequences": sequences})
                say(
                    ranks, f"step {bad + 1}: gradient not finite, not applied ({sequences[0]}, ...)"
                )
            if is_stuck:
                raise ConfigError(
                    f"step {bad + 1}: the gradient is not finite; neither it nor what followed was "
                    f"applied. Look at its data ({run_dir}/metrics.jsonl, kind bad_step), lower "
                    "optim.lr or allow optim.skip_bad_steps; the last training checkpoint is intact"
                )
            elapsed = time.perf_counter() - started
            state["elapsed_s"] += elapsed
            window["s"] += elapsed

        def evaluate_all() -> None:
            for name, sequences in val.items():
                loss, tokens = evaluate(model, sequences, s, ranks, stop)
                state["eval"][name] = loss
                record = {"kind": "eval", "step": state["step"], "set": name, "loss": loss}
                record |= {"perplexity": perplexity(loss), "tokens": tokens}
                log(record | {"tokens_seen": state["tokens"]})
            state["evaluated"] = state["step"]
            shown = " · ".join(f"{name} {loss:.4f}" for name, loss in state["eval"].items())
            say(ranks, f"eval {state['step']}/{steps} · {shown or 'no validation set'}")

        saved, stopped = state["step"], False
        while True:
            step, is_last = state["step"], state["step"] == steps
            is_due = is_last or step % s.eval.every == 0
            if is_due and state["evaluated"] != step and not stopped:
                settle()
                try:
                    evaluate_all()
                except Stopped:
                    stopped = True
            if step > saved and (stopped or is_last or step % s.save.every == 0):
                settle()
                info = BlocksInfo.of(job.config, s.train.trainable, step)
                kept = state | {"settings": flatten(s)}
                say(ranks, f"saved {save(run_dir, step, parameters, optimizer, info, kept, ranks)}")
                saved = step
                if ranks.is_main:
                    remove_old(run_dir, s.save.keep, s.save.keep_every)
            if stopped or is_last:
                break

            started = time.perf_counter()
            try:
                latest, valid = train_step(model, mixture, guard, step, steps, s, ranks, stop)
            except Stopped:
                stopped = True
                continue
            state["step"] += 1
            state["tokens"] += valid
            elapsed = time.perf_counter() - started
            state["elapsed_s"] += elapsed
            window = {
                "s": window["s"] + elapsed,
                "tokens": window["tokens"] + valid,
                "steps": window["steps"] + 1,
            }
            if state["step"] % s.log_every == 0 or state["step"] == steps:
                settle()
                record = {"kind": "train", "step": state["step"], "loss": state["loss"]}
                record |= {"grad_norm": latest["grad_norm"].item()}
                record |= {"learning_rate": latest["learning_rate"], "tokens": state["tokens"]}
                record |= {"tokens_per_s": window["tokens"] / window["s"]}
                record |= {"step_s": window["s"] / window["steps"]}
                record |= {"elapsed_s": state["elapsed_s"], "memory_bytes": peak_memory(ranks)}
                log(record)
                say(ranks, progress_line(record, steps))
                window = {"s": 0.0, "tokens": 0, "steps": 0}
    return result(run_dir, state, stopped)


def result(run_dir: Path, state: dict[str, Any], stopped: bool = False) -> dict[str, Any]:
    """Returns what the command answers."""
    kept = {key: state[key] for key in ("step", "tokens", "loss", "eval", "elapsed_s")}
    return {"run_dir": str(run_dir), **kept, "stopped": stopped}


@contextmanager
def open_metrics(
    run_dir: Path, plan: dict[str, Any], step: int, settings: Settings, ranks: Ranks
) -> Iterator[MetricsLog | None]:
    """Writes `run.json`, for the report, and opens the metrics log, on the main process."""
    if not ranks.is_main:
        yield None
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    about = plan | {
        "settings": dataclasses.asdict(settings),
        "world_size": ranks.world_size,
        "device": str(ranks.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (run_dir / "run.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    with MetricsLog(run_dir, step) as metrics:
        yield metrics


def peak_memory(ranks: Ranks) -> int:
    """Returns the most bytes this process has held: of the GPU, else resident."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
