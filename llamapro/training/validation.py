"""Validation: the loss of held-out sequences, computed by all ranks together."""

from collections.abc import Sequence

import numpy as np
import torch

from llamapro import ops
from llamapro.text.mixture import Source, stack
from llamapro.training.distributed import Ranks
from llamapro.training.objective import NextToken
from llamapro.training.progress import Progress
from llamapro.training.settings import Settings
from llamapro.training.state import RunState


def to_device(columns: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Moves the columns of a batch to the device; to a GPU without waiting for its work."""
    if device.type != "cuda":
        return list(columns)
    # A copy from pageable memory would wait until the GPU has done everything before it.
    return [column.pin_memory().to(device, non_blocking=True) for column in columns]


def evaluate(
    objective: NextToken,
    val: dict[str, Source],
    settings: Settings,
    ranks: Ranks,
    state: RunState,
    progress: Progress,
) -> None:
    """Puts the loss of every validation set into the state, and reports it.

    Raises Stopped on every rank if a signal came to one of them.
    """
    losses = {}
    for name, sequences in val.items():
        losses[name], tokens = mean_loss(objective, sequences, settings, ranks)
        progress.evaluation(name, losses[name], tokens)
    ranks.raise_stopped()  # also if the log could not be written: it is evaluated again
    state.eval, state.evaluated = losses, state.step
    if state.step == 0:
        state.base_eval = dict(state.eval)
    progress.evaluated()


@torch.no_grad()
def mean_loss(
    objective: NextToken, sequences: Source, settings: Settings, ranks: Ranks
) -> tuple[float, int]:
    """Returns the mean loss per token (nats) of a validation set and its number of tokens."""
    count = min(settings.eval.sequences or len(sequences), len(sequences))
    chosen = [i * len(sequences) // count for i in range(count)]
    rows = settings.train.micro_batch_size
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    tokens = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for start in range(0, count, rows * ranks.world_size):
        # All ranks make the same number of passes, because they gather sharded weights together.
        ranks.raise_stopped()
        mine = [sequences[i] for i in chosen[start + ranks.rank * rows :][:rows]]
        ids, targets, *more = sequences[0]
        padding = (ids, np.full_like(targets, ops.IGNORE_INDEX), *more)
        columns = stack(mine + [padding] * (rows - len(mine)))
        part_sum, part_count = objective(*to_device(columns, ranks.device))
        loss_sum += part_sum
        tokens += part_count
    total, valid = ranks.sum(loss_sum, tokens)
    return total / max(1.0, valid), int(valid)
