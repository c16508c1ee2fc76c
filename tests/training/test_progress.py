"""Progress lines stand in columns of 80 characters; evaluations show the change from the base."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamapro.errors import note
from llamapro.training import progress
from llamapro.training.preemption import StopRequest
from llamapro.training.progress import Progress, evaluation_line, header, progress_line
from llamapro.training.settings import Settings, TrainSettings
from llamapro.training.state import RunState

RECORD = {
    "kind": "train",
    "step": 1200,
    "loss": 1.8423,
    "grad_norm": 0.6123,
    "learning_rate": 2e-4,
    "tokens_per_s": 41234.5,
    "memory_bytes": 61.2 * 2**30,
    "tokens": 1_258_291_200,
    "step_s": 18720 / 15800,
}


def test_a_progress_line_stands_under_its_header() -> None:
    """Every number with its unit; the time left is the steps left times the seconds per step."""
    assert header() == (
        "         step     loss       ppl  grad norm        lr   tok/s    memory     eta"
    )
    assert progress_line(RECORD, 17000) == (
        "   1200/17000   1.8423     6.311      0.612  2.00e-04   41.2k  61.2 GiB   5h12m"
    )


@pytest.mark.parametrize("loss", [1e-6, 12.3456, 300.0, 1e4, math.nan, math.inf])
def test_a_progress_line_fits_80_columns(loss: float) -> None:
    """Whatever the numbers are, and with a space between them."""
    for step, steps, numbers in ((1, 2, 1e-9), (15_900, 99_999, 123_456.0), (7, 9, math.inf)):
        record = RECORD | {"step": step, "loss": loss, "grad_norm": numbers, "step_s": 300.0}
        line = progress_line(record | {"tokens_per_s": 1e7, "memory_bytes": 1023 * 2**30}, steps)
        assert len(line) <= 80 and len(line.split()) == 9  # the unit of the memory is a word


def test_evaluations_show_the_change_from_the_base() -> None:
    """Not at step 0, which is the base, nor for a set that was not evaluated there."""
    losses, base = {"general": 1.6771, "code": 0.9}, {"general": 0.93, "code": 1.0}
    first = evaluation_line(0, 250, base, base)
    assert first == "        0/250  eval  general 0.930  code 1.000"
    line = evaluation_line(50, 250, losses, base)
    assert line == "       50/250  eval  general 1.677 (+0.747)  code 0.900 (-0.100)"
    assert evaluation_line(50, 250, losses, {}).endswith("general 1.677  code 0.900")
    assert evaluation_line(50, 250, {}, {}).endswith("eval  no validation set")


def test_many_validation_sets_wrap_at_80_columns() -> None:
    """Names are not broken, and stand under the first one."""
    losses = {f"set number {i}": 1.0 for i in range(7)}
    lines = evaluation_line(50, 250, losses, dict.fromkeys(losses, 2.0)).splitlines()
    assert len(lines) > 1 and all(len(line) <= 80 for line in lines)
    assert all(line.index("set number") == lines[0].index("set number") for line in lines)
    assert sum(line.count("set number") for line in lines) == 7


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Progress, RunState, list[float]]]:
    """`make(**settings) -> progress, state, clock`: of a run of 40 steps that logs every 4."""

    def make(**changes: Any) -> tuple[Progress, RunState, list[float]]:
        clock = [0.0]
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        settings = replace(Settings(log_every=4, train=TrainSettings(batch_size=1)), **changes)
        state = RunState()
        cpu = torch.device("cpu")
        ranks: Any = SimpleNamespace(
            is_main=True, world_size=1, device=cpu, stop=StopRequest(), say=note
        )
        mixture: Any = SimpleNamespace(locate=lambda i: (0, i))
        return Progress(settings, mixture, 40, state, ranks), state, clock

    return make


def test_lines_come_at_first_steps_and_then_by_time(
    make: Callable[..., tuple[Progress, RunState, list[float]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """1, 2, 5, 10, then every `log_seconds`, and the last; records come every `log_every`."""
    reporter, state, clock = make(log_seconds=30.0)
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(reporter, "_log", logged.append)
    for _ in range(40):
        clock[0] += 4  # seconds
        state.step, state.tokens = state.step + 1, state.tokens + 100
        state.elapsed_s += 4
        state.loss = 2.0
        is_time = reporter.is_time
        if is_time or reporter.is_due(state.step):
            reporter.step(1.0, 1e-3, is_time)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == header() and lines.count(header()) == 1
    shown = [int(line.split("/")[0]) for line in lines[1:]]
    assert shown == [1, 2, 5, 10, 18, 26, 34, 40]
    assert [record["step"] for record in logged] == list(range(4, 41, 4))
    # Speeds are averages since the last record, whatever was shown in between.
    assert all(r["tokens_per_s"] == 25 and r["step_s"] == 4 for r in logged)


def test_a_long_run_repeats_the_header(
    make: Callable[..., tuple[Progress, RunState, list[float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With `log_seconds` 0 every step has a line."""
    reporter, state, _ = make(log_seconds=0.0)
    for _ in range(39):
        state.step, state.elapsed_s, state.loss = state.step + 1, state.elapsed_s + 1, 2.0
        assert reporter.is_time
        reporter.step(1.0, 1e-3, True)
    lines = capsys.readouterr().err.splitlines()
    assert [i for i, line in enumerate(lines) if line == header()] == [0, 21]


def test_reporters_leave_the_state_alone(
    make: Callable[..., tuple[Progress, RunState, list[float]]],
) -> None:
    """The loop alone advances it."""
    reporter, state, _ = make()
    state.step, state.elapsed_s, state.loss, state.eval = 5, 2.0, 2.0, {"code": 1.5}
    before = replace(state)
    reporter.step(1.0, 1e-3, True)
    reporter.evaluation("code", 1.5, 9)
    reporter.evaluated()
    reporter.odd("spike", 4, 3, {"loss": 9.0, "median": 2.0})
    reporter.saved({"path": "run/checkpoints/step-00000005", "step": 5} | SAVED)
    assert state == before


SAVED = {"blocked_s": 0.1, "total_s": 3.0}
