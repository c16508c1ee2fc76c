"""Replay in a run: how much of an epoch it is, resuming with it, and its settings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llamapro.checkpoints.run import read_metrics, training_checkpoints
from llamapro.errors import ConfigError, DataError
from llamapro.scripts import train
from llamapro.text.mixture import Mixture
from llamapro.training.checks import check
from llamapro.training.settings import DataSettings, ModelSettings, ReplaySettings, Settings
from llamapro.training.settings import TrainSettings as Train

LENGTH, TOKENS = 24, 201


@pytest.fixture(scope="module")
def home(replay_home: Path) -> Path:
    """Two bases, their expansions, the first also with an added token; a corpus."""
    return replay_home


# ---- How much of it is read ----------------------------------------------------------------------


class Numbers:
    """A source of so many sequences."""

    seq_len = 4

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        return (np.full(4, index),)

    def documents(self, index: int) -> list[int | None]:
        return [index]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("length", [7, 1000])
def test_an_epoch_holds_the_share(share: float, length: int) -> None:
    """Counted; the other sources keep their samples, and each pass uses every sequence once."""
    sources = [Numbers(60), Numbers(40)]
    alone, mixture = (
        Mixture(sources, [1.0, 1.5], 3),
        Mixture(sources, [1.0, 1.5], 3, Numbers(length), share),
    )
    read = [mixture.locate(i) for i in range(mixture.samples_per_epoch)]
    replayed = [sequence for number, sequence in read if number == 2]
    assert mixture.samples_per_source[:2] == alone.samples_per_source == [60, 60]
    assert len(replayed) == round(120 * share / (1 - share))
    assert abs(len(replayed) / len(read) - share) < 1 / len(read)
    counts = np.bincount(replayed, minlength=length)
    assert counts.max() - counts.min() <= 1
    assert mixture.samples_per_source[2] == len(replayed)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.75])
def test_the_replay_is_dealt_out_evenly(share: float) -> None:
    """Any stretch of samples has its share, to within one; the others keep their own order."""
    sources = [Numbers(60), Numbers(40)]
    alone = Mixture(sources, [1.0, 1.5], 3)
    mixture = Mixture(sources, [1.0, 1.5], 3, Numbers(17), share)
    read = [mixture.locate(i) for i in range(500)]
    replayed = np.cumsum([number == 2 for number, _ in read])
    assert np.abs(replayed - share * np.arange(1, 501)).max() < 1
    others = [place for place in read if place[0] != 2]
    assert others == [alone.locate(i) for i in range(len(others))]
    passes = [place[1] for place in read if place[0] == 2]
    assert sorted(passes[:17]) == sorted(passes[17:34]) == list(range(17))
    assert passes[:17] != passes[17:34]


# ---- In a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(
    train_on: Callable[..., Any],
    words: Callable[..., list[str]],
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """`run(name, processes=1, **changes)` trains, in this process if it is one.

    Returns:
        The run directory.
    """
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, processes: int = 1, **changes: Any) -> Path:
        options = {
            "model.path": home / "pro0",
            "data.train": home / "train.txt",
            "data.val": f"general={home / 'general.txt'}",
            "data.seq_len": LENGTH,
            "data.cache_dir": folder / "cache",
            "replay.share": 0.25,
            "replay.tokens": TOKENS,
            "replay.batch_size": 4,
            "train.steps": 6,
            "train.batch_size": 4,
            "train.device": "cpu",
            "optim.lr": 1e-2,
            "eval.every": 3,
            "save.every": 3,
            "log_every": 1,
            "run_dir": folder / name,
        }
        if processes > 1:
            done = train_on(processes, words(options, **changes))
            assert done.stderr.count("that the base wrote") == 1
        else:
            train.main(words(options, **changes))
        return folder / name

    return run


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path]) -> Path:
    """The directory of a run that nothing disturbs."""
    return run("whole")


def losses(run_dir: Path, kind: str = "train") -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if r["kind"] == kind}


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())


def test_a_run_with_replay_resumes_exactly(run: Callable[..., Path], whole: Path) -> None:
    """From step 3, and its text written anew, to 6: every loss and every byte is the same."""
    assert state(whole)["identity"]["data"]["replay"]["tokens"] == TOKENS
    shutil.copytree(whole, whole.parent / "again")
    shutil.rmtree(training_checkpoints(whole.parent / "again")[1])
    again = run("again", data__cache_dir=whole.parent / "cache2")
    assert losses(again) == losses(whole) and len(losses(again)) == 6
    assert [r["step"] for r in read_metrics(again) if r["kind"] == "resume"] == [3]
    ours, theirs = (
        load_file(training_checkpoints(d)[-1] / "trainable.safetensors") for d in (again, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run("without", replay__share=0.0)) != losses(whole)


def test_two_processes_replay_the_same(
    run: Callable[..., Path], whole: Path, tmp_path: Path
) -> None:
    """One of them has the base write, the other waits; then they read as one does."""
    two = run("two", processes=2, data__cache_dir=tmp_path / "cache")
    assert losses(two) == pytest.approx(losses(whole), rel=1e-5)
    assert state(two)["identity"] == state(whole)["identity"]


def test_a_run_does_not_go_on_with_other_replayed_text(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    """Neither with other settings of it nor, under the same ones, with other text."""
    text = tmp_path / "mine.txt"
    text.write_text("It was the epoch of belief.\n" * 20)
    run("other", train__steps=3, replay__data=text)
    with pytest.raises(ConfigError, match=r"replay\.share 0\.25 -> 0\.5"):
        run("other", replay__data=text, replay__share=0.5)
    text.write_text("It was the epoch of incredulity.\n" * 20)
    with pytest.raises(ConfigError, match=r"data 'replay' was .*--resume\.allow replay\.data"):
        run("other", replay__data=text)


@pytest.mark.parametrize(("steps", "passes"), [(20, 10), (22, 11)])
def test_replayed_text_that_repeats_often_is_warned_of(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], steps: int, passes: int
) -> None:
    """A replayed sequence a step, of two; the passes are those of the whole run."""
    run(f"passes{steps}", train__steps=steps, replay__tokens=2 * LENGTH + 1)
    told = capsys.readouterr().err
    assert f"the run passes {passes} times over 2\n" in told
    assert ("learned by heart" in told) == (passes > 10)


def test_a_spike_names_replayed_text(run: Callable[..., Path], home: Path, tmp_path: Path) -> None:
    """The replay is a source like the others; and the text can be the user's own."""
    text = home / "general.txt"
    # Nothing is learned, and every loss over the median is a spike.
    changes = {"train__steps": 24, "optim__lr": 1e-9, "log_spikes": 1e-6, "replay__share": 0.5}
    changes |= {"train__batch_size": 2, "save__every": 24, "eval__every": 24}
    changes |= {"data__cache_dir": tmp_path / "cache"}
    path = run("spike", replay__data=text, **changes)
    named = {
        sequence["source"]
        for record in read_metrics(path)
        if record["kind"] == "spike"
        for sequence in record["sequences"]
    }
    assert named == {"replay", str(home / "train.txt")}
    assert not any('"replay"' in f.read_text() for f in tmp_path.glob("cache/*/index.json"))


# ---- Settings ------------------------------------------------------------------------------------

VALID = Settings(
    model=ModelSettings(path="m"), data=DataSettings(train=("t",)), replay=ReplaySettings(share=0.1)
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"replay": ReplaySettings(share=1.0)}, "replay.share is 1.0, expected 0 to below 1"),
        ({"replay": ReplaySettings(share=-0.1)}, "replay.share is -0.1, expected 0 to below 1"),
        ({"replay": ReplaySettings(data=("x",))}, "needs replay.share"),
        ({"replay": ReplaySettings(share=0.1, tokens=-1)}, "replay.tokens is -1"),
        ({"replay": ReplaySettings(share=0.1, temperature=0.0)}, "replay.temperature is 0.0"),
        ({"replay": ReplaySettings(share=0.1, batch_size=-1)}, "replay.batch_size is -1"),
        ({"replay": ReplaySettings(share=0.1, seed=-1)}, "replay.seed is -1"),
        ({"replay": ReplaySettings(share=0.1, seed=1 << 64)}, "0 to 2^64 - 1"),
        ({"train": Train(trainable="all")}, "replay goes with train.trainable 'new_blocks'"),
        ({"data": DataSettings(train=("t",), format="chat")}, "'chat' has no replay"),
        (
            {"model": ModelSettings(config="c", tokenizer="t"), "train": Train(trainable="all")},
            "replay goes with train.trainable 'new_blocks'",
        ),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], told: str) -> None:
    """Random weights and full fine-tuning have no base inside; nothing else is complained about."""
    check(VALID, 1)
    with pytest.raises(ConfigError) as caught:
        check(replace(VALID, **changes), 1)
    assert told in str(caught.value) and "expected finite" not in str(caught.value)


def test_a_model_without_a_record_cannot_replay(run: Callable[..., Path], home: Path) -> None:
    """It was not expanded."""
    with pytest.raises(ConfigError, match="no 'llamapro' record"):
        run("none", model__path=home / "base0")


def test_text_that_is_not_there_is_found_before_the_run(run: Callable[..., Path]) -> None:
    """By --dry-run already, as for any corpus; and so is a text that would fill no sequence."""
    with pytest.raises(DataError, match="nowhere"):
        run("none", replay__data="nowhere.txt", dry_run="")
    with pytest.raises(ConfigError, match=r"replay\.tokens is 24, expected more than .* raise it"):
        run("none", replay__tokens=LENGTH, dry_run="")


def test_prompts_beside_text_of_ones_own_are_a_mistake() -> None:
    """The text is there; there is nothing to begin. And without a share both say nothing."""
    s = Settings(model=ModelSettings(path="x"), data=DataSettings(train=("x",)))
    both = replace(s, replay=ReplaySettings(share=0.1, data=("a",), prompts="b"))
    with pytest.raises(ConfigError, match=r"replay\.prompts is for text that the base writes"):
        check(both, 1)
    alone = replace(s, replay=ReplaySettings(prompts="b"))
    with pytest.raises(ConfigError, match=r"replay\.prompts b needs replay\.share"):
        check(alone, 1)
