"""Spikes are found against the latest losses; the state keeps its keys."""

import math
from pathlib import Path

import pytest

from llamapro.errors import CheckpointError
from llamapro.training.state import ENOUGH, RECENT, RunState, find_spikes

USUAL = [2.0 + 0.01 * (i % 5) for i in range(RECENT)]  # quartiles 2.01 and 2.03


def test_a_loss_far_over_the_median_is_a_spike() -> None:
    """Six standard deviations, estimated from the quartiles: (2.03 - 2.01) / 1.349 each."""
    limit = 2.02 + 6 * 0.02 / (2 * 0.6745)
    for loss, is_found in ((limit + 1e-3, True), (limit - 1e-3, False)):
        found = find_spikes([(7, loss)], list(USUAL), 6.0)
        assert found == ([(7, loss, pytest.approx(2.02))] if is_found else [])


def test_a_spike_does_not_hide_the_next_one() -> None:
    """A mean would have moved to 100 after the first."""
    recent = list(USUAL)
    found = find_spikes([(1, 1e4), (2, 2.02), (3, 9.0)], recent, 6.0)
    assert [step for step, _, _ in found] == [1, 3]
    assert len(recent) == RECENT and recent[-3:] == [1e4, 2.02, 9.0]


def test_what_is_found_does_not_depend_on_when_one_looks() -> None:
    """All at once, or one by one with what is recent kept in between, as over a resume."""
    losses = [(i, 2.0 + math.sin(i) / 50 + 3 * (i == 40)) for i in range(60)]
    at_once = find_spikes(losses, [], 6.0)
    recent: list[float] = []
    one_by_one = [spike for loss in losses for spike in find_spikes([loss], recent, 6.0)]
    assert at_once == one_by_one and [step for step, _, _ in at_once] == [40]


def test_nothing_is_said_too_early_or_when_not_asked() -> None:
    """Fewer than 16 losses say nothing of what is usual; 0 is off; NaN is another record's."""
    assert find_spikes([(1, 50.0)], USUAL[: ENOUGH - 1], 6.0) == []
    assert find_spikes([(1, 50.0)], list(USUAL), 0.0) == []
    recent = list(USUAL)
    assert find_spikes([(1, math.nan)], recent, 6.0) == [] and recent == USUAL


def test_a_loss_that_stands_still_may_move_a_little() -> None:
    """With quartiles equal, a thousandth of the median counts as a standard deviation."""
    still = [2.0] * RECENT
    assert find_spikes([(1, 2.011)], list(still), 6.0) == []
    assert len(find_spikes([(1, 2.013)], list(still), 6.0)) == 1


def test_a_state_comes_back_from_its_json() -> None:
    """All of it but whether a signal ended the run; `state.json` holds other keys beside it."""
    state = RunState(step=3, tokens=90, samples=12, loss=2.5, eval={"code": 1.0}, evaluated=3)
    state.recent_losses, state.base_eval, state.identity = [2.0, 2.5], {"code": 2.0}, {"base": ""}
    saved = state.to_json()
    assert list(saved) == [
        *("step", "tokens", "samples", "elapsed_s", "loss", "eval", "evaluated", "skipped"),
        *("recent_losses", "identity", "base_eval"),
    ]
    state.stopped = True
    found = RunState.from_json(saved | {"settings": {}}, Path("step"))
    assert found.stopped is False and found.to_json() == saved
    del saved["base_eval"]  # earlier versions did not keep it
    assert RunState.from_json(saved, Path("step")).base_eval == {}
    del saved["samples"]
    with pytest.raises(CheckpointError, match=r"^step: state\.json has no 'samples'$"):
        RunState.from_json(saved, Path("step"))
