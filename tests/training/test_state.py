"""Spikes are found against the latest losses; the state keeps its keys."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamapro.errors import CheckpointError
from llamapro.training.state import ENOUGH, RECENT, Losses, RunState, find_spike

USUAL = [2.0 + 0.01 * (i % 5) for i in range(RECENT)]  # quartiles 2.01 and 2.03


def test_a_loss_far_over_the_median_is_a_spike() -> None:
    """Six standard deviations, estimated from the quartiles: (2.03 - 2.01) / 1.349 each."""
    limit = 2.02 + 6 * 0.02 / (2 * 0.6745)
    for loss, is_found in ((limit + 1e-3, True), (limit - 1e-3, False)):
        found = find_spike(loss, list(USUAL), 6.0)
        assert found == (pytest.approx(2.02) if is_found else None)


def test_a_spike_does_not_hide_the_next_one() -> None:
    """A mean would have moved to 100 after the first."""
    recent = list(USUAL)
    found = [find_spike(loss, recent, 6.0) for loss in (1e4, 2.02, 9.0)]
    assert [median is not None for median in found] == [True, False, True]
    assert len(recent) == RECENT and recent[-3:] == [1e4, 2.02, 9.0]


def test_nothing_is_said_too_early_or_when_not_asked() -> None:
    """Fewer than 16 losses say nothing of what is usual; 0 is off; NaN is another record's."""
    assert find_spike(50.0, USUAL[: ENOUGH - 1], 6.0) is None
    assert find_spike(50.0, list(USUAL), 0.0) is None
    recent = list(USUAL)
    assert find_spike(math.nan, recent, 6.0) is None and recent == USUAL


def test_a_loss_that_stands_still_may_move_a_little() -> None:
    """With quartiles equal, a thousandth of the median counts as a standard deviation."""
    still = [2.0] * RECENT
    assert find_spike(2.011, list(still), 6.0) is None
    assert find_spike(2.013, list(still), 6.0) == 2.0


def test_a_state_comes_back_from_its_json() -> None:
    """All of it but whether a signal ended the run; `state.json` holds other keys beside it."""
    state = RunState(step=3, tokens=90, samples=12, loss=2.5, eval={"code": 1.0}, evaluated=3)
    state.recent_losses, state.base_eval, state.identity = [2.0, 2.5], {"code": 2.0}, {"base": ""}
    saved = state.to_json()
    assert list(saved) == [
        *("step", "tokens", "samples", "elapsed_s", "loss", "eval", "evaluated", "skipped"),
        *("streak", "recent_losses", "identity", "base_eval", "control"),
    ]
    state.stopped = True
    found = RunState.from_json(saved | {"settings": {}}, Path("step"))
    assert found.stopped is False and found.to_json() == saved
    del saved["base_eval"]  # earlier versions did not keep it
    assert RunState.from_json(saved, Path("step")).base_eval == {}
    del saved["samples"]
    with pytest.raises(CheckpointError, match=r"^step: state\.json has no 'samples'$"):
        RunState.from_json(saved, Path("step"))


def test_a_step_of_replayed_sequences_alone_keeps_the_loss_before_it() -> None:
    """It has none of the domain; after a 0 the next one would be a spike."""
    state, found = RunState(loss=2.5), list[str]()
    guard = SimpleNamespace(check=lambda: (0, 0, False))
    ranks = SimpleNamespace(sum=lambda *numbers: [float(number) for number in numbers])
    objective = SimpleNamespace(control={})
    losses: Any = Losses(state, guard, ranks, 3.0, found.append, objective)  # type: ignore[arg-type]
    losses.add(1, 0, torch.tensor(0.0), torch.tensor(1.0))
    losses.read()
    assert state.loss == 2.5 and state.recent_losses == [2.5] and not found
