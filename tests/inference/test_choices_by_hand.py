"""Multiple choice by numbers worked out by hand: scores, baselines and tables."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamapro.inference.multiple_choice import (
    Question,
    baselines,
    log_likelihoods,
    measure_choices,
    render_choices,
)


class Table(nn.Module):
    """Probabilities of the next token that depend on the last token alone: one row of a table."""

    config = SimpleNamespace(num_hidden_layers=0, num_key_value_heads=1, head_dim=1)

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        size = len(probabilities)
        self.model = lambda ids, *_: F.one_hot(ids, size).float()
        self.lm_head = nn.Linear(size, size, bias=False)
        self.lm_head.weight = nn.Parameter(probabilities.log().T.contiguous())


def test_best_per_token_wins_and_the_sum_is_told_apart() -> None:
    """One token of 0.3, or two of 0.5: 0.25 in all, but 0.5 a token; the answers differ."""
    table = torch.full((4, 4), 0.25)
    table[0] = torch.tensor([0.1, 0.3, 0.5, 0.1])
    table[2] = torch.tensor([0.2, 0.2, 0.1, 0.5])
    stub: Any = Table(table)
    questions = [Question([3, 0], [[1], [2, 3]], frozenset({which}), False) for which in (1, 0, 1)]
    (scores, *_) = log_likelihoods(stub, questions, 2)
    assert scores == pytest.approx([math.log(0.3), math.log(0.25)], rel=1e-6)
    found, correct = measure_choices(stub, questions, 2, "")
    assert correct == [True, False, True]
    assert found["accuracy"] == 2 / 3 and found["accuracy_sum"] == 1 / 3
    # The sample's deviation, sqrt(1/3), over the root of three questions.
    assert found["stderr"] == pytest.approx(1 / 3)


def test_any_of_several_right_choices_counts() -> None:
    """An answer is right if its option is in the label set, as in the paper."""
    stub: Any = Table(torch.full((4, 4), 0.25))
    questions = [Question([0], [[1], [2]], frozenset(right), False) for right in ({1}, {0, 1})]
    assert measure_choices(stub, questions, 1, "")[1] == [False, True]  # equal: the first is taken


def test_baselines_are_chance_and_the_position_right_most_often() -> None:
    """There are 2, 4 and 4 choices with 1, 1 and 2 right ones; the second is right twice."""
    sizes = [(2, {1}), (4, {3}), (4, {0, 1})]
    questions = [Question([0], [[1]] * n, frozenset(right), False) for n, right in sizes]
    found = baselines(questions)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 4 + 2 / 4) / 3)
    assert (found["majority"], found["questions"], found["cut"]) == (2 / 3, 3, 0)


def test_table_shows_base_change_and_what_was_cut() -> None:
    """Two rows and the change in points; without a base one row."""
    this = {"accuracy": 0.75, "accuracy_sum": 0.5, "stderr": 0.25}
    this |= {"questions": 4, "cut": 3, "chance": 0.2, "majority": 0.4}
    base = {"accuracy": 0.5, "accuracy_sum": 0.25, "stderr": 0.3}
    against = this | {"base": base, "gained": 2, "lost": 1}
    head, first, second, change, cut = render_choices({"law.jsonl": against})
    assert head.split()[:3] == ["file", "model", "questions"]
    shared = ["20.00%", "40.00%"]
    assert first.split() == ["law.jsonl", "base", "4", "50.00%", "±", "30.00%", "25.00%", *shared]
    assert second.split() == ["law.jsonl", "this", "4", "75.00%", "±", "25.00%", "50.00%", *shared]
    assert change.strip() == "+25.00 points: 2 wrong -> right, 1 right -> wrong"
    assert cut.strip().startswith("3 prompts were too long")
    assert len(head) == len(first) == len(second)
    assert len(render_choices({"law.jsonl": this | {"cut": 0}})) == 2
