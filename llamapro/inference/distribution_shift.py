"""The paper's token-distribution shift (Appendix G): how a base ranks what a tuned model writes."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM


def write_greedily(
    model: LlamaForCausalLM,
    documents: Sequence[list[int]],
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[Tensor, Tensor] | None:
    """Returns prompts (B, P) cut evenly from documents, and their greedy continuations (B, N).

    None if no document is long enough.
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
    return ids, torch.cat(steps, dim=1).cpu()


@torch.inference_mode()
def shift(
    base: LlamaForCausalLM, samples: tuple[Tensor, Tensor], ends: Collection[int]
) -> dict[str, float]:
    """Ranks each token that the tuned model chose, up to the first of `ends`, by the base.

    Returns:
        shares of unshifted (rank 1), marginal (2 or 3), shifted (over 3) positions; their number
    """
    device = base.lm_head.weight.device
    ranks: list[int] = []
    for prompt, chosen in zip(*samples, strict=True):
        ids = torch.cat((prompt, chosen))[None, :-1].to(device)  # (1, P + N - 1)
        logits = base(ids)[0, -len(chosen) :].float().cpu()  # (N, V)
        above = logits > logits.gather(1, chosen[:, None])
        for token_id, rank in zip(chosen.tolist(), (1 + above.sum(1)).tolist(), strict=True):
            ranks.append(rank)
            if token_id in ends:
                break
    return {
        "unshifted": sum(rank == 1 for rank in ranks) / len(ranks),
        "marginal": sum(rank in (2, 3) for rank in ranks) / len(ranks),
        "shifted": sum(rank > 3 for rank in ranks) / len(ranks),
        "positions": len(ranks),
    }
