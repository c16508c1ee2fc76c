"""The shift is counted in the base's ranks, up to the end of a text."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from llamapro.inference.distribution_shift import shift


class Table(nn.Module):
    """A base whose logits depend on the last token alone: one row of a table."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.lm_head = nn.Linear(1, 1)
        self.logits = logits

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


def ranked(
    prompts: list[list[int]], chosen: list[list[int]], ends: Collection[int] = ()
) -> dict[str, float]:
    # After token t, the likeliest is t, then t + 1, and so on around the five tokens.
    logits = torch.stack([-((torch.arange(5) - t) % 5).float() for t in range(5)])
    samples = (torch.tensor(prompts), torch.tensor(chosen))
    return shift(Table(logits), samples, ends)  # type: ignore[arg-type]


def test_shift_counts_ranks_in_the_base() -> None:
    """Ranks 1 2 3 4 and 1 1 5 2 by construction: 3 unshifted, 3 marginal, 2 shifted of 8."""
    found = ranked([[3, 0], [1, 4]], [[0, 1, 3, 1], [4, 4, 3, 4]])
    assert found == {"unshifted": 3 / 8, "marginal": 3 / 8, "shifted": 2 / 8, "positions": 8}


def test_shift_leaves_out_what_follows_the_end_of_a_document() -> None:
    """Ranks 1 2 and, at EOS, 3; the fourth token is of no text. The other row goes on."""
    found = ranked([[0], [0]], [[0, 1, 3, 2], [0, 0, 0, 0]], ends={3})
    assert found["positions"] == 7
    assert found["unshifted"] == 5 / 7 and found["marginal"] == 2 / 7


def test_equal_logits_share_the_best_rank() -> None:
    """A token as likely as the likeliest is not shifted."""
    samples = (torch.tensor([[0]]), torch.tensor([[4, 2]]))
    found = shift(Table(torch.zeros(5, 5)), samples, ())  # type: ignore[arg-type]
    assert found["unshifted"] == 1.0
