"""Trains the new blocks of an expanded LLaMA, or all weights. One file, read top to bottom.

    python train.py --config configs/demo.toml                          one process
    torchrun --nproc-per-node 8 train.py --config configs/llama2-7b.toml --data.train corpus/
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 train.py ...    two machines

A TOML preset sets everything; any option given beside it wins. `--dry-run` checks all input and
prints the plan. The same command run again resumes from the run directory.

The order matters and is the method: load, freeze by the checkpoint's record, shard, loop.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llamapro import backends, cli, ops
from llamapro.checkpoints.new_blocks import NEW_ROWS, BlocksInfo
from llamapro.checkpoints.run import load_state, newest_intact
from llamapro.errors import DataError, DivergedError
from llamapro.formatting import format_count
from llamapro.model import build_on_meta, load_tensors
from llamapro.text.mixture import Source, batch, stack
from llamapro.training.checkpoint import Saver, load_optimizer, load_trained
from llamapro.training.distributed import Ranks, compile_blocks, process_group, shard, world_size
from llamapro.training.job import Job, load_data
from llamapro.training.objective import NextToken, make_objective
from llamapro.training.optim import FiniteGuard, build_adamw, clip_gradients, learning_rate
from llamapro.training.plan import make_plan, render
from llamapro.training.preemption import Stopped, StopRequest
from llamapro.training.preset import parse
from llamapro.training.progress import Progress, say
from llamapro.training.replay import split_replayed
from llamapro.training.resume import check_identity, find_resume_point, locked
from llamapro.training.rng import load_rng, seed_all
from llamapro.training.settings import OptimSettings, Settings, changes, check, flatten
from llamapro.training.weights import (
    init_random,
    mask_gradients,
    put_new_rows,
    select_trainable,
    stored_name,
    stored_shape,
)


def main() -> None:
    settings = parse(sys.argv[1:])
    check(settings, world_size())
    job = Job.open(settings)
    t = settings.train
    plan = make_plan(settings, job.config, job.compute_dtype, job.run_dir, job.resume_from)
    if settings.dry_run:
        if os.environ.get("RANK", "0") == "0":
            earlier, _ = newest_intact(job.run_dir)
            if earlier is not None:  # what resuming would refuse
                changes(load_state(earlier)["settings"], settings, str(job.run_dir))
            if settings.data.format == "chat":
                job.tokenize()  # finds every conversation that cannot be used
            cli.print_result(plan, settings.json, render(plan, settings))
        return
    stop = StopRequest()
    with (
        stop.listening(),
        process_group(t.device, t.shard_size) as ranks,
        backends.use(t.ops),
        locked(job.run_dir, ranks),
    ):
        state = train(job, plan, ranks, stop)
    if stop.failure:
        raise DataError(f"{stop.failure}; stopped in order at step {state['step']}")
    if ranks.is_main:
        found = {key: state[key] for key in ("step", "tokens", "loss", "eval", "elapsed_s")}
        found |= {"run_dir": str(job.run_dir), "stopped": bool(state.get("stopped"))}
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in state["eval"].items())
        text = f"{job.run_dir}: {state['step']} steps done"
        if found["stopped"]:
            text += ", stopped by a signal: the same command continues"
        cli.print_result(found, settings.json, f"{text}; {losses}" if losses else text)


# ---- Model ------------------------------------------------------------------------------------


def build_objective(job: Job, ranks: Ranks) -> tuple[NextToken, dict[str, torch.nn.Parameter]]:
    """Loads, puts the resumed weights in, freezes, and only then shards.

    Returns:
        The objective, which holds the sharded model, and by name the parameters that train.
    """
    s, config = job.settings, job.config
    model = build_on_meta(config)
    if job.checkpoint is None:
        tensors = init_random(config, s.train.seed)
    else:
        tensors = job.checkpoint.state_dict()  # mapped: read when first used
    trainable = select_trainable(model, s.train.trainable, s.train.new_tokens)
    if job.resume_from is not None:
        shapes = {
            stored_name(name, job.first_new_row): stored_shape(
                name, model.get_parameter(name), job.first_new_row
            )
            for name in trainable
        }
        trained = load_trained(job.resume_from, config, shapes)
        tensors = put_new_rows(tensors, trained) | {n: trained[n] for n in trained.keys() & tensors}
    load_tensors(model, tensors)
    objective = make_objective(model, s.replay)
    if s.train.compile:
        compile_blocks(model)
    shard(objective, ranks, job.compute_dtype, s.train.frozen, s.train.offload, s.train.recompute)
    parameters = dict(model.named_parameters())
    trained_parameters = {name: parameters[name] for name in trainable}
    if job.first_new_row:
        mask_gradients(trained_parameters, job.first_new_row)
    return objective, trained_parameters


# ---- Training ---------------------------------------------------------------------------------


def forward(
    objective: NextToken,
    columns: Sequence[torch.Tensor],
    device: torch.device,
    replayed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns loss sum (nats), (), and number of targets, (), of inputs, targets [, documents]."""
    inputs, targets, *documents = (column.to(device) for column in columns)
    return objective(inputs, targets, documents[0] if documents else None, replayed)


@torch.no_grad()
def evaluate(
    objective: NextToken,
    sequences: Source,
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
        if any(ranks.sum(stop.is_asked)):
            raise Stopped
        mine = [sequences[i] for i in chosen[start + ranks.rank * rows :][:rows]]
        ids, following, *more = sequences[0]
        nothing = (ids, np.full_like(following, ops.IGNORE_INDEX), *more)
        columns = stack(mine + [nothing] * (rows - len(mine)))
        part_sum, part_count = forward(objective, columns, ranks.device)
        loss_sum += part_sum
        tokens += part_count
    total, valid = ranks.sum(loss_sum, tokens)
    return total / max(1.0, valid), int(valid)


def train_step(
    objective: NextToken,
    guard: FiniteGuard,
    columns: Sequence[torch.Tensor],
    others: int,
    valid: float,
    settings: Settings,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on this rank's part of a global batch.

    Args:
        columns: inputs, targets and, of conversations, documents, each (n, T) int64.
        others: the first so many samples of the global batch are not replayed, or not apart.
        valid: tokens that are predicted in the *global* batch. The loss is their mean, so it does
            not depend on how the batch is split.

    Returns:
        This rank's part of the loss, (), in nats per token, and the norm of the gradient before
        clipping, (); both still on the device.
    """
    rows = settings.train.micro_batch_size
    # FSDP averages gradients over the ranks, hence the factor world_size.
    scale = ranks.world_size / max(1.0, valid)
    loss_sum = torch.zeros((), device=ranks.device)
    micro_batches = list(zip(*(column.split(rows) for column in columns), strict=True))
    replayed = split_replayed(others, len(micro_batches), rows, ranks.rank, ranks.world_size)
    for number, micro_batch in enumerate(micro_batches, 1):
        # Within a group of shards gradients are reduced every time, between groups (HSDP) once.
        objective.set_requires_all_reduce(number == len(micro_batches))  # type: ignore[operator]
        loss, _ = forward(objective, micro_batch, ranks.device, replayed[number - 1])
        (loss * scale).backward()
        loss_sum += loss.detach()
    norm = clip_gradients(objective.parameters(), settings.optim.clip)
    guard.step(norm)  # not applied if the norm is not finite
    guard.optimizer.zero_grad()
    return loss_sum / max(1.0, valid), norm


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, o: OptimSettings
) -> float:
    """Sets and returns the rate of this step number."""
    rate = learning_rate(step, steps, o.lr, round(o.warmup_ratio * steps), o.final_lr_ratio)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def train(job: Job, plan: dict[str, Any], ranks: Ranks, stop: StopRequest) -> dict[str, Any]:
    """Runs the job to its last step or to where a signal stops it; returns where it then stands."""
    s, t, run_dir = job.settings, job.settings.train, job.run_dir
    resume_from, found, damaged = find_resume_point(run_dir, ranks)
    job = dataclasses.replace(job, resume_from=resume_from)
    plan = plan | {"resume_from": str(resume_from) if resume_from else None}
    say(ranks, render(plan, s))
    for text in damaged:
        say(ranks, f"warning          {text}; resuming from the one before it")
    # Where the run stands: with the weights and the optimizer, all there is to resume from.
    state: dict[str, Any] = {"step": 0, "tokens": 0, "samples": 0, "elapsed_s": 0.0, "loss": None}
    state |= {"eval": {}, "evaluated": -1, "skipped": 0, "recent_losses": []}
    changed: list[str] = []
    if found is not None:
        state = found
        changed = changes(state["settings"], s, str(run_dir))
    for text in changed:
        say(ranks, f"changed          {text}")
    try:
        data = load_data(job, ranks, stop)
    except Stopped:
        return state | {"stopped": True}
    if found is not None:
        check_identity(state, data.identity, run_dir, s.resume.allow)
    state["identity"] = data.identity
    for text in data.about:
        say(ranks, text)
    steps = s.steps(data.mixture.samples_per_epoch)
    say(ranks, f"steps            {steps} ({format_count(steps * plan['tokens_per_step'])} tokens)")
    if state["step"] >= steps and state["evaluated"] == state["step"]:
        say(ranks, f"{run_dir} is complete: nothing to do")
        return state

    objective, parameters = build_objective(job, ranks)
    undecayed = [parameters[n] for n in NEW_ROWS.keys() & parameters] if job.first_new_row else []
    optimizer = build_adamw(
        parameters.values(), s.optim.betas, s.optim.weight_decay, undecayed=undecayed
    )
    if job.resume_from is not None:
        applied = state["step"] - state["skipped"]
        load_optimizer(job.resume_from, parameters, optimizer, applied, job.first_new_row)
        load_rng(job.resume_from, ranks, s.train.seed, state["step"])
    else:
        seed_all(s.train.seed, ranks.rank)
    progress = Progress(s, data.mixture, steps, state, ranks, stop)
    of_gradients = next(iter(parameters.values())).device  # the CPU, of those that are offloaded
    guard = FiniteGuard(optimizer, s.optim.skip_bad_steps, of_gradients)
    in_background = s.save.background == "yes" or (
        s.save.background == "auto" and ranks.device.type == "cuda"
    )
    saved, stopped = state["step"], False
    with (
        progress.writing(run_dir, plan, changed),
        Saver(
            run_dir, s.save.keep, s.save.keep_every, ranks, in_background, job.first_new_row
        ) as saver,
    ):

        def settle() -> None:
            """Waits for the device, to learn whether all steps so far were applied."""
            with progress.timed():
                skipped, is_stuck = guard.check()
                progress.settle(skipped)
            if is_stuck:
                raise DivergedError(
                    "the gradient is not finite; neither that step nor what followed was applied. "
                    f"Look at its data ({run_dir}/metrics.jsonl, kind bad_step), lower optim.lr or "
                    "allow optim.skip_bad_steps; the last training checkpoint is intact"
                )

        while True:
            step, is_last = state["step"], state["step"] >= steps
            is_due = is_last or step % s.eval.every == 0
            if is_due and state["evaluated"] != step and not stopped:
                settle()
                try:
                    for name, sequences in data.val.items():
                        progress.evaluation(name, *evaluate(objective, sequences, s, ranks, stop))
                    progress.evaluated()
                except Stopped:
                    stopped = True
            if step > saved and (stopped or is_last or step % s.save.every == 0):
                settle()
                progress.saved(saver.finish())
                info = BlocksInfo.of(job.config, s.train.trainable, step)
                kept = state | {"settings": flatten(s)}
                saver.start(step, parameters, optimizer, info, kept)
                saved = step
                if not in_background:
                    progress.saved(saver.finish())
            if stopped or is_last:
                break
            with progress.timed():
                where = (state["samples"], t.batch_size, ranks.rank, ranks.world_size)
                columns, others = batch(data.mixture, *where, data.apart)
                # What one rank knows, all learn here, at the same step.
                valid, stopping, is_written = ranks.sum(
                    (columns[1] != ops.IGNORE_INDEX).sum(), stop.is_asked, saver.is_done
                )
                if stopping:
                    stopped = True
                    continue
                rate = set_learning_rate(optimizer, step, steps, s.optim)
                loss, norm = train_step(objective, guard, columns, others, valid, s, ranks)
                progress.step(int(valid), loss, norm)
            if is_written:
                progress.saved(saver.finish())
            if state["step"] % s.log_every == 0 or state["step"] == steps:
                settle()
                progress.line(norm.item(), rate)
        progress.saved(saver.finish())
    return state | {"stopped": stopped}


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
