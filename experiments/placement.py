"""Places new blocks by measurement: each on top of a base layer that a text shows to be suited.

    python experiments/placement.py BASE_DIR [OUT_DIR] --num-new-blocks N --by similar|unimportant
                                    [--text FILE ...] [--tokens 16384]

The paper spaces new blocks evenly. Two follow-ups measure the base first. They choose the layers
whose output is most like their input ("similar": Yi-9B, 01.AI 2024), or without which the loss
rises least ("unimportant": ADEPT, Zhang et al. 2025). Without --text, the base writes the text.
The command prints a table of all layers and the list for `convert.py expand --after`. Given
OUT_DIR, it also writes the expanded checkpoint.

Shapes: B rows of text, T context, C hidden size, V vocabulary.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.expansion import insert_after
from llamapro.inference.options import ComputeOptions
from llamapro.inference.sampling import end_ids
from llamapro.model import LlamaForCausalLM
from llamapro.text.corpus import encode_pieces
from llamapro.text.documents import Counts, read_pieces
from llamapro.text.source_files import find_files
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.replay import Opening, write_documents
from llamapro.training.settings import ReplaySettings

SCORES = {"similar": "cosine", "unimportant": "loss increase"}  # what each choice measures
TOKENS, MAX_CONTEXT = 16_384, 512  # a longer context takes the base longer to write
BATCH_TOKENS = 4096  # per forward pass


@torch.inference_mode()
def block_similarity(model: LlamaForCausalLM, ids: Tensor) -> list[float]:
    """Returns for each block the cosine of the hidden states that enter and leave it (Yi-9B).

    The cosine is computed in fp64 and averaged over all tokens. It is 1 for the identity.

    Args:
        model: in evaluation mode.
        ids: (B, T) token ids; rows do not see one another.
    """
    sums = [0.0] * len(model.model.layers)

    def add(index: int, x: Tensor, y: Tensor) -> None:  # (B, T, C) each
        x, y = x.double(), y.double()
        # The square root of a rounded square is exact: where y equals x to the bit, this is 1.
        xy, xx, yy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)  # (B, T)
        cosine = xy / (xx * yy).sqrt().clamp(min=torch.finfo(xy.dtype).tiny)
        sums[index] += cosine.sum().item()

    hooks = [
        layer.register_forward_hook(lambda _, taken, given, i=i: add(i, taken[0], given))
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        for rows in _batches(model, ids):
            model.model(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / ids.numel() for total in sums]


@torch.inference_mode()
def block_importance(model: LlamaForCausalLM, ids: Tensor) -> list[float]:
    """Returns for each block the increase of the loss without it, in nats per token (ADEPT).

    The model runs once as it is and once without each of its blocks.

    Args:
        model: in evaluation mode.
        ids: (B, T) token ids, T >= 2; rows do not see one another.
    """
    skipped: list[tuple[int, ...]] = [(), *((i,) for i in range(len(model.model.layers)))]
    losses = [0.0] * len(skipped)
    for rows in _batches(model, ids):
        for i, skip in enumerate(skipped):
            logits = model(rows, skip=skip)[:, :-1].flatten(0, 1).float()  # (B * (T - 1), V)
            targets = rows[:, 1:].flatten()
            losses[i] += F.cross_entropy(logits, targets, reduction="sum").item()
    return [(loss - losses[0]) / ids[:, 1:].numel() for loss in losses[1:]]


def _batches(model: LlamaForCausalLM, ids: Tensor) -> tqdm:
    rows = max(1, BATCH_TOKENS // ids.shape[1])
    batches = ids.to(model.lm_head.weight.device).split(rows)
    return tqdm(batches, desc="measure layers", unit="batch", disable=None)


def choose(scores: Sequence[float], number: int, by: str) -> list[int]:
    """Returns the `number` layers with the highest "similar" or lowest "unimportant" scores.

    The order is from bottom to top, and the lower of two equal layers is preferred.
    """
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=by == "similar")
    return sorted(order[:number])  # sorting is stable, reversed too


def measure(
    base: Checkpoint, by: str, number: int, text: Sequence[str], tokens: int = TOKENS
) -> dict[str, Any]:
    """Measures a checkpoint's layers and chooses some. The same call gives the same choice.

    Args:
        base: the checkpoint to expand, with its tokenizer; it may be expanded already.
        by: a key of `SCORES`.
        number: how many layers to choose.
        text: files, globs or folders. Without any, the base writes documents at temperature 1.
        tokens: how many are measured, at least 2, in rows of min(max_position_embeddings, 512).

    Returns:
        JSON-able: by, text, tokens, context, scores (cosine, or nats per token), chosen.

    Raises:
        ConfigError: the base has too few layers, or no token starts a document.
        DataError: files or tokenizer cannot be used, or there is no text.
        CheckpointError: logits or scores are not finite.
    """
    layers = base.config.num_hidden_layers
    if not 1 <= number <= layers:
        raise ConfigError(f"--num-new-blocks {number}: --by {by} chooses 1 to {layers} layers")
    if tokens < 2:
        raise ConfigError(f"--tokens {tokens}: expected 2 or more")
    tokenizer = Tokenizer.load(base.path)
    tokenizer.check_fits(base.config.vocab_size, str(base.path))
    if not text and not tokenizer.document_start():
        raise ConfigError(f"--by {by}: {tokenizer.path} has no BOS or EOS to start; give --text")
    context = min(base.config.max_position_embeddings, MAX_CONTEXT, tokens)
    read = _read(text, tokenizer, tokens)
    model = ComputeOptions().load(base)
    flat = torch.tensor(read if text else _write(model, tokenizer, tokens, context))
    context = min(context, len(flat))
    ids = flat[: len(flat) // context * context].view(-1, context)  # full rows only
    scores = (block_similarity if by == "similar" else block_importance)(model, ids)
    if wrong := [layer for layer, score in enumerate(scores) if not math.isfinite(score)]:
        raise CheckpointError(f"{base.path}: NaN or infinity where layers {wrong} are measured")
    result = {"by": by, "text": list(text), "tokens": ids.numel(), "context": context}
    return result | {"scores": scores, "chosen": choose(scores, number, by)}


def _read(patterns: Sequence[str], tokenizer: Tokenizer, tokens: int) -> list[int]:
    """Returns the ids of documents, an equal part from each pattern."""
    ids: list[int] = []
    for pattern in patterns:
        pieces = read_pieces(find_files([pattern]), "text", Counts(), pattern)
        stream = (i for piece in pieces for i in encode_pieces([piece], tokenizer))
        ids += islice(stream, max(2, tokens // len(patterns)))
    if patterns and len(ids) < 2:
        raise DataError(f"--text {' '.join(patterns)}: no text in it")
    return ids


def _write(model: LlamaForCausalLM, tokenizer: Tokenizer, tokens: int, context: int) -> list[int]:
    """Returns the ids of documents that the model writes, none longer than the context."""
    start = tokenizer.document_start()
    if (
        not model(torch.tensor([start], device=model.lm_head.weight.device)).isfinite().all()
    ):  # no token could be drawn
        raise CheckpointError(f"{tokenizer.path.parent}: NaN or infinity in the logits after BOS")
    ends = end_ids(model.config, tokenizer)
    settings = ReplaySettings(temperature=1.0, seed=0)
    stream = chain.from_iterable(write_documents(model, [Opening(start)], ends, context, settings))
    return list(tqdm(islice(stream, tokens), "write text", tokens, unit="tok", disable=None))


def render(result: dict[str, Any]) -> str:
    """Returns the result of `measure` as a table, and the chosen layers as `--after` takes them."""
    name, text = SCORES[result["by"]], ", ".join(result["text"]) or "text that the base wrote"
    lines = [f"measured on {result['tokens']:,} tokens, {result['context']} at a time, of {text}"]
    lines.append(f"layer  {name:>8}")
    for layer, score in enumerate(result["scores"]):
        mark = "  new block on top" * (layer in result["chosen"])
        lines.append(f"{layer:>5}  {score:>{max(8, len(name))}.5f}{mark}")
    return "\n".join([*lines, f"--after {','.join(map(str, result['chosen']))}"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; its options are those of the command line if `argv` is None."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("base_dir", type=Path, help="checkpoint directory to expand")
    parser.add_argument("out_dir", type=Path, nargs="?", help="expanded checkpoint to create")
    parser.add_argument("--num-new-blocks", type=int, required=True, help="new blocks to add")
    parser.add_argument("--by", choices=SCORES, required=True, help="measure that chooses layers")
    parser.add_argument("--text", nargs="+", default=[], help="files, globs or folders to measure")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    base = Checkpoint.open(args.base_dir)
    result = measure(base, args.by, args.num_new_blocks, args.text, args.tokens)
    text = render(result)
    if args.out_dir is not None:
        layout = insert_after(base.config.num_hidden_layers, result["chosen"])
        result["expanded"] = expand_checkpoint(base, args.out_dir, layout)
        text += f"\n{args.out_dir}: {result['expanded']['layers']} layers, logits equal the base's"
    cli.print_result(result, args.json, text)


if __name__ == "__main__":
    cli.run(main)
