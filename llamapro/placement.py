"""Where new blocks go, by measurement: each on top of a base layer that a text shows to be suited.

The paper spaces them evenly. Follow-ups measure first, and choose the layers whose output is most
like their input ("similar": Yi-9B, 01.AI 2024), or without which the loss rises least
("unimportant": ADEPT, Zhang et al. 2025). The text is the user's, or what the base itself writes.

Shapes: B rows of text, T context, C hidden size.
"""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.inference.options import ComputeOptions
from llamapro.model import LlamaForCausalLM
from llamapro.text.corpus import encode_pieces
from llamapro.text.documents import Counts, find_files, read_pieces
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.replay import write_documents
from llamapro.training.settings import ReplaySettings

SCORES = {"similar": "cosine", "unimportant": "loss_increase"}  # what each placement measures
MAX_CONTEXT = 512  # tokens in a row; longer ones take the base longer to write
_BATCH_TOKENS = 4096  # that pass through a block at a time


@torch.inference_mode()
def block_similarity(model: LlamaForCausalLM, ids: Tensor) -> list[float]:
    """Returns for each block how alike its input and output are (Yi-9B, 01.AI 2024).

    That is the cosine of the hidden states (C,) that enter and leave it, in fp64, averaged over all
    tokens: 1 for the identity. One forward pass.

    Args:
        model: in evaluation mode.
        ids: (B, T) token ids, on any device; rows do not see one another.
    """
    sums = [0.0] * len(model.model.layers)
    for _, x, around in _batches(model, ids):
        for index, layer in enumerate(model.model.layers):
            below, x = x, layer(x, *around)
            sums[index] += _cosine(below.double(), x.double()).sum().item()
    return [total / ids.numel() for total in sums]


@torch.inference_mode()
def block_importance(model: LlamaForCausalLM, ids: Tensor) -> list[float]:
    """Returns for each block how much higher the loss is without it (ADEPT, Zhang et al. 2025).

    In nats per token, over the B x (T - 1) that follow another; below 0 where the loss falls. What
    enters a skipped block is computed once, so that L blocks take L / 2 + 1 forward passes.

    Args:
        model: in evaluation mode.
        ids: (B, T) token ids, on any device, T >= 2; rows do not see one another.
    """
    layers = list(model.model.layers)
    without, whole = [0.0] * len(layers), 0.0
    for rows, x, around in _batches(model, ids):
        for index, layer in enumerate(layers):
            skipping = x
            for above in layers[index + 1 :]:
                skipping = above(skipping, *around)
            without[index] += _loss_sum(model, skipping, rows)
            x = layer(x, *around)
        whole += _loss_sum(model, x, rows)
    return [(loss - whole) / ids[:, 1:].numel() for loss in without]


def _batches(model: LlamaForCausalLM, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Yields ids (B, T), what enters the first block (B, T, C), and cos, sin, bounds for blocks."""
    T, embed, window = ids.shape[1], model.model.embed_tokens, model.config.sliding_window
    device, dtype, bounds = embed.weight.device, embed.weight.dtype, None
    if window is not None and window < T:
        bounds = ops.attention_bounds(T, T, window, device=device)
    around = (ops.rotary_table(model.config, torch.arange(T, device=device), dtype), bounds)
    batches = ids.to(device).split(max(1, _BATCH_TOKENS // T))
    for rows in tqdm(batches, desc="measure layers", unit="batch", disable=None):
        yield rows, embed(rows), around


def _cosine(x: Tensor, y: Tensor) -> Tensor:  # (B, T, C) -> (B, T)
    # The root of a rounded square is exact: where y is x, to the bit, this is 1, to the bit.
    xy, xx, yy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)
    return xy / (xx * yy).sqrt().clamp(min=torch.finfo(xy.dtype).tiny)


def _loss_sum(model: LlamaForCausalLM, x: Tensor, ids: Tensor) -> float:
    targets = F.pad(ids[:, 1:], (0, 1), value=ops.IGNORE_INDEX).flatten()
    normed = model.model.norm(x).flatten(0, 1)
    return ops.linear_cross_entropy(normed, model.lm_head.weight, targets)[0].item()


def choose(scores: Sequence[float], number: int, placement: str) -> list[int]:
    """Returns the layers, bottom to top, that new blocks go on top of; of equal ones, the lower.

    Args:
        scores: of each layer.
        number, placement: how many; "similar" takes the highest scores, "unimportant" the lowest.
    """
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=placement == "similar")
    return sorted(order[:number])  # a stable sort, reversed or not: the lower of equal ones


def measure(
    base: Checkpoint, placement: str, number: int, text: Sequence[str], tokens: int, text_key: str
) -> dict[str, Any]:
    """Measures a checkpoint's layers and chooses some: the same ones each time.

    The model is in memory whole, in its own dtype, on a GPU if one is visible. The text is cut,
    wherever documents end, into rows of min(max_position_embeddings, 512) tokens, the context.

    Args:
        base: the checkpoint to expand, itself expanded or not, with its tokenizer.
        placement, number: as for `choose`.
        text: files, globs, folders: equal parts of each, its files in an order drawn once for all.
            None: the base writes documents from BOS on, at temperature 1.
        tokens: how much text at most, 2 or more.
        text_key: key of the text in a JSON line, or name of its column.

    Returns:
        JSON-able: placement, text, tokens, context; layers: layer, cosine or loss_increase (nats
        per token) and chosen of each.

    Raises:
        ConfigError: so many layers do not exist, there is no BOS, or the GPU is too small.
        DataError: files or tokenizer cannot be used, or there is no text.
        CheckpointError: what the model computes is not finite.
    """
    if not 1 <= number <= base.config.num_hidden_layers:
        most = f"{placement} placement chooses 1 to {base.config.num_hidden_layers} layers"
        raise ConfigError(f"--num-new-blocks {number}: {most}")
    tokenizer = Tokenizer.load(base.path)
    tokenizer.check_fits(base.config.vocab_size, str(base.path))
    if not text and tokenizer.bos_id is None:
        fix = "no BOS token that the base could write from; name text with --measure-on"
        raise ConfigError(f"--placement {placement}: {tokenizer.path} has {fix}")
    context = min(base.config.max_position_embeddings, MAX_CONTEXT, tokens)
    read = _read(text, tokenizer, text_key, tokens)
    try:
        model = ComputeOptions().load(base)
        flat = torch.tensor(read if text else _write(model, tokenizer, tokens, context))
        T = min(context, len(flat))
        ids = flat[: len(flat) // T * T].view(-1, T)  # only full rows
        scores = (block_similarity if placement == "similar" else block_importance)(model, ids)
    except torch.OutOfMemoryError:
        fix = "does not fit the GPU; set CUDA_VISIBLE_DEVICES= to measure on the CPU"
        raise ConfigError(f"--placement {placement}: {base.path} {fix}") from None
    if wrong := [layer for layer, score in enumerate(scores) if not math.isfinite(score)]:
        raise CheckpointError(f"{base.path}: NaN or infinity where layers {wrong} are measured")
    chosen, name = choose(scores, number, placement), SCORES[placement]
    rows = [{"layer": i, name: score, "chosen": i in chosen} for i, score in enumerate(scores)]
    return dict(placement=placement, text=list(text), tokens=ids.numel(), context=T, layers=rows)


def _read(patterns: Sequence[str], tokenizer: Tokenizer, text_key: str, tokens: int) -> list[int]:
    """Returns the ids of documents, as much of each pattern; what one lacks, the next give."""
    ids: list[int] = []
    for done, pattern in enumerate(patterns):
        part = max(MAX_CONTEXT, (tokens - len(ids)) // (len(patterns) - done))
        files = find_files([pattern])
        random.Random(0).shuffle(files)  # a folder's first files may be all of one kind
        pieces = read_pieces(files, text_key, Counts(), pattern)
        stream = (i for piece in pieces for i in encode_pieces([piece], tokenizer))
        ids += islice(stream, min(part, tokens - len(ids)))
    if patterns and len(ids) < 2:
        raise DataError(f"--measure-on {' '.join(patterns)}: no text in it")
    return ids


def _write(model: LlamaForCausalLM, tokenizer: Tokenizer, tokens: int, context: int) -> list[int]:
    """Returns the ids of documents that the model writes: the same each time."""
    start = torch.tensor([[tokenizer.bos_id]], device=model.lm_head.weight.device)
    if not model(start).isfinite().all():  # there would be nothing to draw from
        raise CheckpointError(f"{tokenizer.path.parent}: NaN or infinity in the logits after BOS")
    ends = {i for i in (*model.config.eos_token_ids, tokenizer.eos_id) if i is not None}
    drawn = ReplaySettings(temperature=1.0, seed=0)
    stream = chain.from_iterable(write_documents(model, [[int(start)]], ends, context, drawn))
    return list(tqdm(islice(stream, tokens), "write text", tokens, unit="tok", disable=None))


def render(found: dict[str, Any]) -> str:
    """Returns what `measure` found as a table."""
    name, text = SCORES[found["placement"]], ", ".join(found["text"]) or "text that the base wrote"
    lines = [f"measured on {found['tokens']:,} tokens, {found['context']} at a time, of {text}"]
    lines.append(f"layer  {name.replace('_', ' '):>8}")
    for row in found["layers"]:
        mark = "  new block on top" * row["chosen"]
        lines.append(f"{row['layer']:>5}  {row[name]:>{max(8, len(name))}.5f}{mark}")
    return "\n".join(lines)
