"""Trains the new blocks of an expanded LLaMA, or all weights. One file, read top to bottom.

    python train.py --config demo                                        one process
    python train.py --processes 8 --config llama2-7b --data.train corpus/    8 processes
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 train.py ...    two machines

A preset sets everything; any option given beside it wins. `--dry-run` checks all input and prints
the plan. The same command run again resumes from the run directory.

The order matters and is the method: load, freeze by the checkpoint's record, shard, loop.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from llamapro import backends, cli
from llamapro.checkpoints.new_blocks import NEW_ROWS, BlocksInfo
from llamapro.model import build_on_meta, load_tensors
from llamapro.text.mixture import MicroBatch
from llamapro.training import launcher, lock, plan, resume
from llamapro.training.checkpoint import Saver
from llamapro.training.data import Data, load_data
from llamapro.training.distributed import Ranks, process_group, shard
from llamapro.training.job import Job, find_state
from llamapro.training.objective import NextToken, make_objective
from llamapro.training.optim import FiniteGuard, build_adamw, clip_gradients, set_learning_rate
from llamapro.training.preemption import Stopped
from llamapro.training.progress import Progress
from llamapro.training.settings import Settings
from llamapro.training.state import Losses, RunState
from llamapro.training.validation import evaluate, to_device
from llamapro.training.weights import freeze, init_random, mask_gradients


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Runs the command; its options are those of the command line if `argv` is None."""
    job = launcher.open_job(__file__, sys.argv[1:] if argv is None else argv, prog)
    is_main = os.environ.get("RANK", "0") == "0"
    if job.settings.dry_run and not is_main:
        return
    result, text = job.dry_run() if job.settings.dry_run else job.result(run(job))
    if is_main:
        cli.print_result(result, job.settings.json, text)


def run(job: Job, objective: NextToken | None = None) -> RunState:
    """Trains in this process, or among those that torchrun started; every one must call it.

    Raises DataError if the run had to end early, for example because the disk is full.

    Args:
        objective: minimised instead of the job's own. It holds a whole model on the CPU, with
            `requires_grad` set, which is sharded in place.

    Returns:
        The state at the end of the run; its last training checkpoint has the trained tensors.
    """
    t = job.settings.train
    if objective is not None:
        job = replace(job, plan=job.plan | {"parameters": plan.count_parameters(objective.model)})
    with (
        process_group(t.device, t.shard_size) as ranks,
        ranks.stop.listening(),
        backends.use(t.ops, t.deterministic_attention),
        lock.locked(job.run_dir, ranks),
    ):
        job, state, changed = find_state(job, ranks)
        try:
            data = load_data(job, state, ranks)
            if state.step >= data.steps and state.evaluated == state.step:
                ranks.say(f"{job.run_dir} is complete: nothing to do")
            else:
                train(job, data, state, changed, objective or build_objective(job), ranks)
        except Stopped:
            state.stopped = True
    ranks.stop.raise_failure(state.step)
    state.check_final()
    return state


# ---- Model and optimizer ----------------------------------------------------------------------


def build_objective(job: Job) -> NextToken:
    """Loads the weights on the CPU and freezes by the checkpoint's record."""
    t = job.settings.train
    torch.manual_seed(t.seed)  # data order and random weights have generators of their own
    model = build_on_meta(job.config)
    freeze(model, t.trainable, t.new_tokens)
    tensors = job.checkpoint and job.checkpoint.state_dict()  # mapped: read when first used
    load_tensors(model, tensors or init_random(job.config, t.seed))
    return make_objective(model, job.settings.replay)


def shard_objective(
    objective: NextToken, job: Job, state: RunState, ranks: Ranks
) -> dict[str, torch.nn.Parameter]:
    """Loads the resumed weights, then shards; returns the trained parameters by name."""
    t, model = job.settings.train, objective.model
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if job.resume_from is not None:
        resume.load_trained(job.resume_from, model, job.first_new_row)
        objective.resume(state.control)
    shard(objective, ranks, plan.compute_dtype(job.settings), t)
    parameters = {name: model.get_parameter(name) for name in trainable}
    if job.first_new_row:
        mask_gradients(parameters, job.first_new_row)
    return parameters


def build_optimizer(
    parameters: dict[str, torch.nn.Parameter], job: Job, state: RunState
) -> FiniteGuard:
    """Builds AdamW over the trained parameters, with the moments of a resumed run."""
    o, first_row = job.settings.optim, job.first_new_row
    # Weight decay would move the base's rows of embedding and head.
    undecayed = [parameters[name] for name in NEW_ROWS if first_row and name in parameters]
    optimizer = build_adamw(parameters.values(), o, undecayed)
    if job.resume_from is not None:
        applied = state.step - state.skipped
        resume.load_optimizer(job.resume_from, parameters, optimizer, applied, first_row)
    return FiniteGuard(optimizer, o.skip_bad_steps, state.skipped, state.streak)


# ---- Training ---------------------------------------------------------------------------------


def train_step(
    objective: NextToken,
    guard: FiniteGuard,
    batch: Sequence[MicroBatch],
    valid: float,
    own: float,
    settings: Settings,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on this rank's part of a global batch.

    Raises Stopped on every rank if a signal came to one of them; the step is dropped.

    Args:
        batch: its micro-batches.
        valid: number of targets of the *global* batch. What is minimised is a mean over them, so
            it does not depend on how the batch is split.
        own: those of them that are not of sequences with a loss of their own (replay).

    Returns:
        This rank's part of the mean loss of the latter, (), in nats per token, and the norm of the
        gradient before clipping, (); both stay on the device.
    """
    # FSDP averages gradients over the ranks, hence the factor world_size.
    scale = ranks.world_size / max(1.0, valid)
    loss_sum = torch.zeros((), device=ranks.device)
    for number, (columns, replayed) in enumerate(batch, 1):
        if number > 1:
            ranks.raise_stopped()
        # Within a group of shards gradients are reduced every time, between groups (HSDP) once.
        objective.set_requires_all_reduce(number == len(batch))  # type: ignore[operator]
        loss, _ = objective(*to_device(columns, ranks.device), replayed=replayed)
        (loss * scale).backward()
        loss_sum += objective.own_loss(loss).detach()
    norm = clip_gradients(objective.parameters(), settings.optim.clip)
    guard.step(norm)  # not applied if the norm is not finite
    guard.optimizer.zero_grad()
    return loss_sum / max(1.0, own), norm


def train(
    job: Job, data: Data, state: RunState, changed: list[str], objective: NextToken, ranks: Ranks
) -> None:
    """Trains to the last step, or until a signal stops the run; advances the state."""
    s = job.settings
    parameters = shard_objective(objective, job, state, ranks)
    guard = build_optimizer(parameters, job, state)
    progress = Progress(s, data.mixture, data.steps, state, ranks)
    losses = Losses(state, guard, ranks, s.log_spikes, progress.odd, objective)
    saver = Saver(job.run_dir, s.save, ranks, job.first_new_row, state.step)

    def save() -> None:
        losses.read()
        info = BlocksInfo.of(job.config, s.train.trainable, state.step)
        kept = state.to_json() | {"settings": s.flat()}
        kept["chat_template"] = job.template and job.template.source  # merge hands it on
        progress.saved(saver.save(state.step, parameters, guard.optimizer, info, kept))

    with progress.writing(job.run_dir, job.plan, changed), saver:
        try:
            while True:
                # At step 0 an expanded model still is its base: forgetting is measured from here.
                is_last = state.step >= data.steps
                if (is_last or state.step % s.eval.every == 0) and state.evaluated != state.step:
                    losses.read()
                    evaluate(objective, data.val, s, ranks, state, progress)
                if is_last:
                    break
                if state.step > saver.step and state.step % s.save.every == 0:
                    save()
                with state.timed():
                    batch = data.batch(state.samples, ranks)
                    counts = map(sum, zip(*(part.targets for part in batch), strict=True))
                    # All ranks agree here, at the same step, on events that one of them has seen.
                    valid, own, is_stopping, is_written, is_time = ranks.sum(
                        *counts, ranks.stop.is_asked, saver.is_done, progress.is_time
                    )
                    if is_stopping:
                        raise Stopped
                    rate = set_learning_rate(guard.optimizer, state.step, data.steps, s.optim)
                    loss, norm = train_step(objective, guard, batch, valid, own, s, ranks)
                    # Nothing here waits for the device: losses are read when a report needs them.
                    objective.adapt(rate / s.optim.lr)
                    losses.add(state.step + 1, state.samples, loss, norm)
                    state.step += 1
                    state.tokens += int(valid)
                    state.samples += s.train.batch_size
                if is_written:
                    progress.saved(saver.finish())
                if is_time or progress.is_due(state.step):
                    losses.read()
                    progress.step(norm.item(), rate, bool(is_time))
        except Stopped:
            state.stopped = True
        # However the loop ended, its last step is saved.
        progress.saved(saver.finish())
        for _ in range(3):  # again, if the run directory was removed meanwhile
            ranks.stop.settle()
            if not state.step or saver.has(state.step):
                break
            save()
            progress.saved(saver.finish())


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
