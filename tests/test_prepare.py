"""`llamapro prepare` fills the cache with what a run of the same settings will look for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro.prepare import main
from llamapro.text import corpus
from llamapro.training import checks, preset
from llamapro.training.job import Job

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Run) -> Run:
    """`run(*words) -> (exit status, stdout, stderr)`."""
    return lambda *words: run_command(main, *words)


@pytest.fixture
def words(tmp_path: Path, expand: Callable[..., tuple[Path, Path]]) -> list[object]:
    """The preset of a run on two GPUs, with training, validation and replayed text."""
    _, model = expand()
    for name in ("train", "general"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i} " * (3 + i))
    (tmp_path / "run.toml").write_text(
        f"""
        [model]
        path = "{model}"
        [data]
        train = ["{tmp_path}/train"]
        val = ["held-out={tmp_path}/general/0.txt"]
        cache_dir = "{tmp_path}/cache"
        [replay]
        share = 0.5
        data = ["{tmp_path}/general"]
        [train]
        device = "cuda"
        shard_size = 2
        batch_size = 4
        """
    )
    return ["--config", tmp_path / "run.toml"]


def test_a_run_finds_what_was_prepared_in_parts(
    words: list[object], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is tokenised, and no setting was given twice; no GPU is needed to prepare."""
    for number in (2, 1, 3):
        status, out, err = run(*words, "--shard", f"{number}/3", "--json")
        assert status == 0, err
        assert json.loads(out)["shard"] == f"{number}/3"
    status, out, err = run(*words, "--json")
    assert status == 0, err
    labels = {"train", "val held-out", "replay"}
    stores = json.loads(out)["stores"]
    assert {label.split(" /")[0] for label in stores} == labels
    assert all(Path(store["path"]).is_dir() and store["tokens"] for store in stores.values())
    monkeypatch.setattr(corpus, "_encode_all", None)
    settings = preset.parse([*map(str, words), "--train.device", "cpu", "--train.shard-size", "0"])
    checks.check(settings, 1)
    job = Job.open(settings)
    found = job.tokenize()
    assert {k: str(store.path) for k, store in found.items()} == {
        k: store["path"] for k, store in stores.items()
    }


def test_a_run_takes_parts_that_nobody_has_put_together(words: list[object], run: Run) -> None:
    """The last call of `prepare` is not needed, and one that comes too early changes nothing."""
    assert run(*words, "--shard", "1/2")[0] == 0
    status, _, err = run(*words)
    assert status == 2 and "missing 2/2" in err and "llamapro prepare --shard I/N" in err
    status, out, err = run(*words, "--shard", "2/2")
    assert status == 0 and "run the same command without --shard" in out
    settings = preset.parse([*map(str, words), "--train.device", "cpu", "--train.shard-size", "0"])
    assert all(store.tokens > 2 for store in Job.open(settings).tokenize().values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "4/3"], "--shard 4/3: expected I/N"),
        (["--dry-run"], "--dry-run: is of 'llamapro train'"),
        (["--shard", "1/2", "--data.format", "chat"], "--shard 1/2: conversations are not"),
        (["--shards", "1/2"], "--shards: no such option (did you mean --shard?)"),
        (["--data.workers", "-1"], "data.workers is -1, expected 0 or more"),
        (["--data.train", "nothing.txt"], "nothing.txt: no such file"),
    ],
)
def test_a_mistake_is_one_message(
    words: list[object], run: Run, more: list[str], message: str, tmp_path: Path
) -> None:
    status, out, err = run(*words, *more)
    assert (status, out) == (2, "") and message in err
    assert not (tmp_path / "cache").exists()
