"""replay.hold: the weight of distillation follows from what the model may forget."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamapro.checkpoints.run import read_metrics, training_checkpoints
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.model import build_on_meta
from llamapro.scripts import train
from llamapro.training.checks import check
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.objective import Hold, allowed, make_objective
from llamapro.training.preset import parse
from llamapro.training.settings import DataSettings, ModelSettings, ReplaySettings, Settings
from llamapro.training.settings import TrainSettings as Train

SEQ_LEN = 24


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group("cpu") as ranks:
        yield ranks


@pytest.fixture
def rule(ranks: Ranks, pro: Path) -> Callable[[str], Hold]:
    """`rule(hold)`: a new objective, whose model is never run."""
    model = build_on_meta(ModelConfig.from_file(pro / "config.json"))

    def make(hold: str) -> Hold:
        objective = make_objective(model, ReplaySettings(hold=hold))
        assert isinstance(objective, Hold)
        return objective

    return make


def measure(
    rule: Hold, kl: float, tokens: int = 100, rate: float = 0.0, loss: float = 4.0
) -> float:
    """One step with this KL and loss per token; returns the weight that follows."""
    counts = torch.tensor(300), torch.tensor(tokens)
    sums = torch.tensor(loss) * counts[0], torch.tensor(kl) * counts[1]
    rule.combine((sums[0], counts[0]), (sums[1], counts[1]))
    rule.adapt(rate)
    weight = rule.control["weight"]
    assert weight is not None
    return weight


# ---- The rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hold", "allowed"), [("0.02", 0.02), ("0.1", 0.1), ("2%", 0.04)])
def test_the_kl_settles_at_what_may_be_forgotten(
    rule: Callable[[str], Hold], hold: str, allowed: float
) -> None:
    """For a model that forgets in proportion to rate / weight and learns 2 nats, both slowly."""
    objective, kl, loss, weight, steps = rule(hold), 0.0, 5.0, Hold.FIRST, 300
    for step in range(steps):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        weight = measure(objective, kl, rate=rate, loss=loss)
        kl += 0.2 * (1.5 * (0.1 + rate) / (1 + weight) - kl)
        loss += 0.05 * (3.0 - loss)
    assert 0.6 * allowed < kl < 1.1 * allowed


def test_the_weight_rises_over_the_bound_and_falls_under_it(rule: Callable[[str], Hold]) -> None:
    """And a high learning rate allows more: the same KL is over the bound only at a low one."""
    weights = [measure(rule("0.02"), kl, rate=rate) for kl, rate in ((0.5, 0), (0.01, 0), (0.5, 5))]
    over, under, allowed = weights
    assert over > Hold.FIRST > under and over > allowed


def test_the_weight_rests_between_the_bound_and_what_the_rate_allows(
    rule: Callable[[str], Hold],
) -> None:
    """And follows again when the rate is so low that the same KL is over the band."""
    objective = rule("0.02")
    weights = [measure(objective, 0.05, rate=rate) for rate in [1.0] * 20 + [0.0]]
    assert len(set(weights[:-1])) == 1 and weights[-1] > weights[0]


def test_one_odd_batch_hardly_moves_the_average(rule: Callable[[str], Hold]) -> None:
    """The average is a geometric one."""
    objective = rule("0.02")
    for kl in (0.02, 0.02, 0.64):
        measure(objective, kl)
    assert objective.control["kl"] == pytest.approx(0.04)


def test_a_share_allows_more_the_more_is_learned(rule: Callable[[str], Hold]) -> None:
    """3 % of the fall of the loss since the first step, whatever the loss was."""
    little, much = rule("3%"), rule("3%")
    for step in range(40):
        first = measure(little, 0.05, loss=4.0 - 0.4 * (step > 0))
        other = measure(much, 0.05, loss=9.0 - 4.0 * (step > 0))
    assert first > Hold.FIRST > other


def test_the_loss_has_the_weight_of_the_steps_before(rule: Callable[[str], Hold]) -> None:
    """In fp32, and without replayed sequences it is the domain's alone."""
    objective = rule("0.02")
    weight = measure(objective, 1.0)
    pair, other = (torch.tensor(2.0), torch.tensor(7)), (torch.tensor(0.5), torch.tensor(10))
    loss, count = objective.combine(pair, other)
    assert loss.item() == pytest.approx(2 + 0.5 * weight) and loss.dtype == torch.float32
    assert count == 17 and objective.combine(pair, None) == pair


def test_a_bound_may_be_tiny(rule: Callable[[str], Hold]) -> None:
    """What a share allows at least is no floor for a bound in nats."""
    assert measure(rule("0.0001"), 0.0005) > Hold.FIRST


def test_nothing_measured_teaches_nothing(rule: Callable[[str], Hold]) -> None:
    """Neither evaluation, nor a step without replay, nor one whose loss is not finite."""
    objective = rule("0.02")
    for _ in range(5):
        measure(objective, 0.1)
    kl = objective.control["kl"]
    measure(objective, math.nan)
    measure(objective, 0.0, tokens=0)
    with torch.no_grad():
        million = torch.tensor(1e6), torch.tensor(1)
        objective.combine(million, million)
    objective.adapt(0.0)
    assert objective.control["kl"] == kl and (objective.control["weight"] or 0) > 0
    unread = rule("0.02")
    assert measure(unread, 0.0, tokens=0) == pytest.approx(Hold.FIRST)
    measure(unread, math.inf)
    assert unread.control["kl"] is None
    measure(unread, 0.1)
    assert unread.control["kl"] == pytest.approx(0.1)


def test_the_weight_has_bounds(rule: Callable[[str], Hold]) -> None:
    """It counts the steps at the upper one, and leaves both again."""
    objective = rule("0.02")
    for _ in range(200):
        highest = measure(objective, 10.0)
    stuck = objective.control["steps_at_bound"]
    assert highest == pytest.approx(Hold.HIGHEST) and 50 < stuck < 200
    for _ in range(500):
        lowest = measure(objective, 0.0)
    assert lowest == pytest.approx(Hold.LOWEST) and objective.control["steps_at_bound"] == 0
    for _ in range(20):
        risen = measure(objective, 10.0)
    assert risen > lowest


def test_it_goes_on_to_the_bit(rule: Callable[[str], Hold]) -> None:
    """From its numbers as state.json keeps them."""
    first, second = rule("0.02"), rule("0.02")
    for step in range(7):
        measure(first, 0.01 * step, rate=1 - step / 20)
    second.resume(json.loads(json.dumps(first.control)))
    for step in range(7, 20):
        assert measure(first, 0.01 * step) == measure(second, 0.01 * step)
    assert first.control == second.control


# ---- In a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(
    words: Callable[..., list[str]], pro: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`run(name, **changes)` trains in this process; returns the run directory."""
    home = tmp_path_factory.mktemp("hold")
    (home / "train.txt").write_text("def usage(parser): print(parser.usage)\n" * 60)

    def run(name: str, **changes: Any) -> Path:
        options = {
            "model.path": pro,
            "data.train": home / "train.txt",
            "data.val": f"code={home / 'train.txt'}",
            "data.seq_len": SEQ_LEN,
            "data.cache_dir": home / "cache",
            "replay.hold": 0.02,
            "replay.share": 0.5,
            "replay.batch_size": 4,
            "train.steps": 6,
            "train.batch_size": 4,
            "train.device": "cpu",
            "optim.lr": 3e-2,
            "eval.every": 6,
            "eval.sequences": 2,
            "save.every": 3,
            "log_every": 1,
            "run_dir": home / name,
        }
        train.main(words(options, **changes))
        return home / name

    return run


def records(run_dir: Path) -> list[dict[str, Any]]:
    keys = ("step", "loss", "replay_kl", "replay_weight")
    return [{k: r[k] for k in keys} for r in read_metrics(run_dir) if r["kind"] == "train"]


def test_a_stopped_run_goes_on_with_its_weight(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 3 to 6 every number and byte is that of an undisturbed run; both are shown."""
    whole = run("whole")
    shown = capsys.readouterr().err
    assert "hold 0.02" in shown and "replay KL" in shown
    assert len({r["replay_weight"] for r in records(whole)}) > 3
    shutil.copytree(whole, whole.parent / "again")
    shutil.rmtree(training_checkpoints(whole.parent / "again")[1])
    again = run("again")
    assert records(again) == records(whole) and len(records(again)) == 6
    ours, theirs = (
        load_file(training_checkpoints(d)[-1] / "trainable.safetensors") for d in (again, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_base_writes_half_of_what_is_replayed(run: Callable[..., Path]) -> None:
    """Steps x batch x share sequences are; a run that goes on for longer keeps the text it had."""

    def written(run_dir: Path) -> dict[str, Any]:
        state = json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())
        return state["identity"]["data"]["replay"]

    first = run("short", train__steps=4, replay__share=0.25)
    assert written(first)["tokens"] == 2 * SEQ_LEN
    before = written(first)
    assert written(run("short", train__steps=5, replay__share=0.25)) == before


def test_a_run_may_begin_to_replay_when_it_goes_on(run: Callable[..., Path]) -> None:
    """If the user allows it: there is no earlier text to keep."""
    run("later", train__steps=3, replay__hold=None, replay__share=None, replay__batch_size=None)
    allowed = "replay.hold replay.share replay.distill replay.batch_size replay.data"
    later = run("later", resume__allow=allowed)
    assert [r["step"] for r in read_metrics(later) if "replay_kl" in r] == [4, 5, 6]


def test_a_bound_out_of_reach_is_told_once(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the numbers, and what to change."""
    monkeypatch.setattr(Hold, "HIGHEST", 3.0)
    monkeypatch.setattr("llamapro.training.progress.STEPS_AT_BOUND", 2)
    run("far", replay__hold="1e-9")
    out, shown = capsys.readouterr()
    assert shown.count("replay.hold 1e-9 is out of reach") == 1
    assert "Raise replay.hold or replay.share, or lower optim.lr" in shown
    assert re.search(r"replay.hold 1e-9 is not met: KL \S+ where 1e-09 is allowed", out)
    assert "what lowers it: a lower optim.lr, or a higher replay.share" in out


@pytest.mark.parametrize(
    ("hold", "loss", "bound"),
    [("0.02", 1.0, 0.02), ("5%", 1.0, 0.1), ("5%", 3.5, Hold.LEAST), ("5%", None, Hold.LEAST)],
)
def test_what_is_allowed_is_said_at_the_end(hold: str, loss: float | None, bound: float) -> None:
    """Nats per token, or a share of the fall of the loss, and never less than the rule's least."""
    control = {"first_loss": None if loss is None else 3.0, "loss": loss}
    assert allowed(ReplaySettings(hold=hold), control) == pytest.approx(bound)


def test_a_bound_that_is_met_is_not_spoken_of(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("wide", train__steps=3, replay__hold="50")
    assert "is not met" not in capsys.readouterr().out


def test_hold_says_it_all(tmp_path: Path) -> None:
    """It sets share and distillation; a share of the user's own stays. Presets take both forms."""
    for hold in ("0.02", "3%"):
        (tmp_path / "preset.toml").write_text(f'[replay]\nhold = "{hold}"\n')
        assert parse(["--config", str(tmp_path / "preset.toml")]).replay.hold == hold
        settings = parse(["--replay.hold", hold])
        assert str(settings.replay.hold) == hold and settings.replay.share == 0.125
    assert ReplaySettings(hold="0.02") == ReplaySettings(hold="0.02", share=0.125, distill=True)
    assert ReplaySettings(hold="0.02", share=0.3).share == 0.3
    assert ReplaySettings().share == 0


@pytest.mark.parametrize("share", [0.0, 0.125])
def test_the_command_line_takes_the_bound_of_a_preset_away(tmp_path: Path, share: float) -> None:
    """And with it what follows from it; a share of the preset's own stays."""
    preset = tmp_path / "preset.toml"
    preset.write_text(f'[replay]\nhold = "3%"\nshare = {share}\n')
    given = ["--config", str(preset), "--replay.hold"]
    assert parse([*given, ""]).replay == ReplaySettings(share=share)
    assert parse([*given, "0.1"]).replay == ReplaySettings(hold="0.1")


@pytest.mark.parametrize(
    ("replay", "trained", "told"),
    [
        (ReplaySettings(hold="-0.1"), {}, "replay.hold is '-0.1', expected nats per token"),
        (ReplaySettings(hold="nan"), {}, "replay.hold is 'nan', expected nats per token"),
        (ReplaySettings(hold="0%"), {}, "replay.hold is '0%', expected nats per token"),
        (ReplaySettings(hold="-3%"), {}, "replay.hold is '-3%', expected nats per token"),
        (ReplaySettings(hold="much"), {}, "replay.hold is 'much', expected nats per token"),
        (ReplaySettings(hold="0.02", weight=3.0), {}, "replay.weight is 3.0: the weight follows"),
        (
            ReplaySettings(hold="0.02"),
            {"trainable": "all"},
            "replay.hold is 0.02: replay goes with",
        ),
        (ReplaySettings(hold="0.02", tokens=-1), {}, "replay.tokens is -1, expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(
    replay: ReplaySettings, trained: dict[str, Any], told: str
) -> None:
    """In the message that names every mistake."""
    settings = Settings(
        model=ModelSettings(path="x"),
        data=DataSettings(train=("x",)),
        replay=replay,
        train=Train(**trained),
    )
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        check(settings, 1)
