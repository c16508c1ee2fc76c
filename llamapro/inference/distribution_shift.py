"""The paper's token-distribution shift (Appendix G): how a base ranks what a tuned model writes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM


@dataclass(frozen=True)
class ShiftSamples:
    """Prompts (B, P) and the continuations (B, N) that the tuned model wrote greedily."""

    prompts: Tensor
    continuations: Tensor


def write_greedily(
    model: LlamaForCausalLM,
    documents: Sequence[list[int]],
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
) -> ShiftSamples | None:
    """Continues prompts cut evenly from documents (token ids).

    Returns:
        The prompts and continuations, or None if no document is long enough.
    """
    places = [
        (document, start)
        for document, ids in enumerate(documents)
        for start in range(0, len(ids) - prompt_tokens + 1, prompt_tokens)
    ]
    count = min(prompts, len(places))
    if not count:
        return None
    chosen = [places[i * len(places) // count] for i in range(count)]
    ids = torch.tensor([documents[d][s : s + prompt_tokens] for d, s in chosen])
    steps = list(generate(model, ids, new_tokens))
    return ShiftSamples(ids, torch.cat(steps, dim=1).cpu())


@torch.inference_mode()
def shift(base: LlamaForCausalLM, samples: ShiftSamples) -> dict[str, float]:
    """Ranks each token that the tuned model chose by the base's probabilities (Appendix G).

    Returns:
        The shares of unshifted (rank 1), marginal (2 or 3) and shifted (over 3) positions, and the
        number of positions. Positions after an end of document do not count.
    """
    device = base.lm_head.weight.device
    ids = torch.cat((samples.prompts, samples.continuations), dim=1)  # (B, P + N)
    ranks: list[int] = []
    new_tokens = samples.continuations.shape[1]
    for row in ids:
        logits = base(row[None, :-1].to(device))[0, -new_tokens:].float().cpu()  # (N, V)
        chosen = row[-new_tokens:]
        above = logits > logits.gather(1, chosen[:, None])
        row_ranks = (1 + above.sum(1)).tolist()
        ends = [i for i, t in enumerate(chosen.tolist()) if t in base.config.eos_token_ids]
        ranks += row_ranks[: ends[0] + 1 if ends else None]
    return {
        "unshifted": sum(rank == 1 for rank in ranks) / len(ranks),
        "marginal": sum(rank in (2, 3) for rank in ranks) / len(ranks),
        "shifted": sum(rank > 3 for rank in ranks) / len(ranks),
        "positions": len(ranks),
    }
