"""Trackers: they get the log's numbers if asked for, a run goes on there, and their faults stay."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoints.run import read_metrics
from llamapro.errors import ConfigError
from llamapro.training.checks import check
from llamapro.training.metrics import MetricsLog, is_installed
from llamapro.training.preset import parse, read_toml
from llamapro.training.progress import Progress
from llamapro.training.resume import changes
from llamapro.training.settings import Settings
from llamapro.training.state import RunState

EVAL = {"kind": "eval", "step": 0, "set": "general", "loss": 1.5, "perplexity": 4.5}
TRAIN = {"kind": "train", "step": 2, "loss": 0.5, "memory_bytes": None}
NUMBERS = [
    ("log", {"eval/general/loss": 1.5, "eval/general/perplexity": 4.5}, 0),
    ("log", {"train/loss": 0.5}, 2),
]


class Fake(types.ModuleType):
    """Stands for wandb or trackio: notes what is called, and fails where it is told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []
        self.failing = ""
        self.failure: BaseException = RuntimeError("no network")

    def _note(self, *call: Any) -> None:
        print(f"{self.__name__} speaks")
        if call[0] == self.failing:
            raise self.failure
        self.calls.append(call)

    def init(self, **options: Any) -> "Fake":
        self._note("init", options)
        return self

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self._note("log", numbers, step)

    def finish(self) -> None:
        self._note("finish")


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """One of the two, installed."""
    made = Fake(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    yield made


def write(run_dir: Path, *log_to: str, step: int = 0, config: Any = None) -> None:
    with closing(MetricsLog(run_dir, step, log_to=log_to, config=config)) as log:
        log.log(EVAL)
        log.log(TRAIN)


def test_only_the_log_is_written_if_nothing_else_is_asked_for(tmp_path: Path) -> None:
    """TensorBoard is installed here and not even imported."""
    program = f"""
import sys
from contextlib import closing
from pathlib import Path
from llamapro.training.metrics import MetricsLog
with closing(MetricsLog(Path({str(tmp_path)!r}), 0)) as log:
    log.log({TRAIN})
print([name for name in ("tensorboard", "wandb", "trackio") if name in sys.modules])
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    """Scalars are named kind/key and kind/set/key; what a resume repeats replaces the old."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, "tensorboard")
    with closing(MetricsLog(tmp_path, 1, log_to=["tensorboard"])) as log:
        log.log(TRAIN | {"loss": 0.25})
    board = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = {"eval/general/loss", "eval/general/perplexity", "train/loss"}
    assert set(board.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in board.Scalars("eval/general/loss")] == [(0, 1.5)]
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 0.25)]


def test_an_online_tracker_gets_the_numbers_and_the_settings(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names and steps as in TensorBoard, once though named twice; text and null stay out."""
    write(tmp_path / "pro", fake.__name__, fake.__name__, config={"seed": 3})
    (_, options), *others = fake.calls
    assert others == [*NUMBERS, ("finish",)]
    assert options["project"] == "llamapro" and options["config"] == {"seed": 3}
    assert options["name"].startswith("pro") and options["resume"] == "allow"
    monkeypatch.setenv(f"{fake.__name__.upper()}_PROJECT", "mine")
    write(tmp_path / "other", fake.__name__)
    assert next(call for call in fake.calls[::-1] if call[0] == "init")[1]["project"] == "mine"
    assert read_metrics(tmp_path / "pro") == [EVAL, TRAIN]


def test_a_resumed_run_goes_on_and_another_does_not_join_it(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is the run, however it is written: W&B knows it by id, trackio by name."""
    write(tmp_path / "a" / "pro", fake.__name__)
    monkeypatch.chdir(tmp_path)
    write(Path("a/pro"), fake.__name__, step=2)
    write(Path("b/pro"), fake.__name__)
    key = "id" if fake.__name__ == "wandb" else "name"
    first, again, other = (call[1][key] for call in fake.calls if call[0] == "init")
    assert first == again != other
    if fake.__name__ == "wandb":
        place = str(tmp_path / "a" / "pro")
        options = fake.calls[0][1]
        assert options["id"] == hashlib.sha256(place.encode()).hexdigest()[:16]
        assert (options["name"], options["dir"]) == ("pro", place)
        assert options["allow_val_change"] is True  # train.steps may be another on resuming


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_left_alone(
    tmp_path: Path, fake: Fake, failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every record is in metrics.jsonl, and the failed tracker is not called again."""
    fake.failing = failing
    write(tmp_path, fake.__name__)
    assert read_metrics(tmp_path) == [EVAL, TRAIN]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"{fake.__name__} failed (RuntimeError: no network)" in warnings[0]
    kinds = [call[0] for call in fake.calls]
    assert kinds == {"init": [], "log": ["init"], "finish": ["init", "log", "log"]}[failing]


def test_one_failing_tracker_does_not_silence_another(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is on its own."""
    other = "trackio" if fake.__name__ == "wandb" else "wandb"
    broken = Fake(other)
    broken.failing = "log"
    monkeypatch.setitem(sys.modules, other, broken)
    write(tmp_path, other, fake.__name__)
    assert fake.calls[1:] == [*NUMBERS, ("finish",)]


def test_a_signal_is_no_fault_of_a_tracker(tmp_path: Path, fake: Fake) -> None:
    """Ctrl-C while numbers are sent stops the run as anywhere else."""
    fake.failing, fake.failure = "log", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, fake.__name__)


def test_trackio_does_not_speak_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the result is there: `train.py --json` stays one object."""
    monkeypatch.setitem(sys.modules, "trackio", Fake("trackio"))
    write(tmp_path, "trackio")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("trackio speaks") == 4


def settings_with(*log_to: Any) -> Settings:
    return dataclasses.replace(parse(["--model.path", "m", "--data.train", "d"]), log_to=log_to)


def test_missing_packages_are_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed, and all of them at once."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", Fake("trackio"))
    check(settings_with("trackio"), 1)
    check(settings_with(), 1)
    with pytest.raises(ConfigError) as error:
        check(settings_with("tensorboard", "wandb", "trackio"), 1)
    assert str(error.value) == (
        "log_to: tensorboard is not installed: pip install -e '.[tensorboard]'; "
        "log_to: wandb is not installed: pip install -e '.[wandb]'"
    )


def test_a_folder_of_the_packages_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb leaves `wandb/` where it ran, and Python would import that."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_tracker").mkdir()
    assert not is_installed("a_tracker")
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "__init__.py").touch()
    assert is_installed("another")


def test_log_to_is_set_by_preset_or_option_and_may_change(tmp_path: Path) -> None:
    """Where a run is shown does not decide what it computes; an unknown place is refused."""
    preset = tmp_path / "x.toml"
    preset.write_text('log_to = ["wandb", "tensorboard"]')
    assert read_toml(preset).log_to == ("wandb", "tensorboard")
    assert parse(["--config", str(preset), "--log-to", "trackio"]).log_to == ("trackio",)
    preset.write_text('log_to = ["mlflow"]')
    with pytest.raises(ConfigError, match="expected 'tensorboard' or 'wandb' or 'trackio'"):
        read_toml(preset)
    before = json.loads(json.dumps(settings_with().flat()))
    found = changes(before, settings_with("wandb"), "run")
    assert found == ['log_to [] -> ["wandb"]']


def test_a_run_logs_where_its_settings_say(tmp_path: Path, fake: Fake) -> None:
    """Also the kinds of records that `Progress` makes; the settings are the tracker's config."""
    settings = settings_with(fake.__name__)
    ranks = types.SimpleNamespace(
        is_main=True, world_size=1, device=torch.device("cpu"), on_main=lambda work: work()
    )
    state = RunState(tokens=7)
    progress = Progress(settings, None, 1, state, ranks)  # type: ignore[arg-type]
    with progress.writing(tmp_path, {"resume_from": None}, []):
        progress.evaluation("code", 0.5, 9)
    (_, options), (_, numbers, step), _ = fake.calls
    assert options["config"] == dataclasses.asdict(settings)
    assert step == 0 and numbers["eval/code/loss"] == 0.5 and numbers["eval/code/tokens"] == 9
