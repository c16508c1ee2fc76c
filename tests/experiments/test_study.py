"""experiments/study.py: one command that first says how long it takes and continues when killed."""

import dataclasses
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pictures
import pytest
import schedule
import study

from llamapro.errors import ConfigError, DataError

SETTINGS = """
workers = 2
steps = 4
batch_size = 2
micro_batch_size = 2
seq_len = 32
evaluations = 2
eval_sequences = 2
learning_rates = [1e-3]
seeds = [1]
new_blocks = [1]
compared = 1
replay_tokens = 128
replay_weights = [3.0]
pretrain = "{home}/base.toml"
"""
PRETRAIN = """
[train]
trainable = "all"
steps = 2
batch_size = 4
micro_batch_size = 2
"""
TEXT = "def usage(parser): return parser.usage\n"
STUDY = "experiments/study.py"


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable) -> Path:
    """A study of two layers and four steps."""
    home = tmp_path_factory.mktemp("preset")
    config = tiny_config(num_hidden_layers=2, hidden_size=32, max_position_embeddings=256)
    (home / "base.json").write_text(json.dumps(config.raw))
    (home / "base.toml").write_text(PRETRAIN)
    (home / "tiny.toml").write_text(SETTINGS.format(home=home))
    return home / "tiny.toml"


# ---- The whole of it ----------------------------------------------------------------------------


@contextmanager
def forked(function: Callable[[], object]) -> Iterator[tuple[int, TextIO]]:
    """Runs a function in a process and session of its own, which has everything imported.

    Yields its number, and what it and its children print.
    """
    output, input_ = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setsid()
            os.dup2(input_, 1)
            os.dup2(input_, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            forkserver._forkserver._forkserver_pid = None  # one of its own, as in a new process
            function()
        finally:
            os._exit(1)
    os.close(input_)
    with os.fdopen(output) as text:
        yield pid, text


@dataclasses.dataclass
class Ended:
    """What a study left that was killed in the middle and started again."""

    out: Path
    before: dict[Path, int]  # results that were there when it was killed, and when they were made
    first: str
    second: str
    results: dict[str, Any]


@pytest.fixture(scope="module")
def ended(preset: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A study of a base of one's own, every kind of variant in it; SIGKILL after two trials."""
    home = tmp_path_factory.mktemp("study")
    (home / "text.txt").write_text(TEXT * 100)
    text, out = str(home / "text.txt"), home / "out"
    words = ["--preset", str(preset), "--out", str(out), "--base", str(base), "--train", text]
    words += ["--val", text, "--general", f"wiki={text}"]
    words += ["--variants", "new-1", "suffix", "full", "originals", "distill-3"]
    with forked(lambda: study.main(words)) as (pid, output):
        said = []
        for line in output:  # it says when a trial is done
            said.append(line)
            if len([line for line in said if "· seed" in line]) == 2:
                break
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL, "".join(said)
    before = {file: file.stat().st_mtime_ns for file in out.glob("own/*/*/result.json")}
    second = io.StringIO()
    with redirect_stdout(second), redirect_stderr(second), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 50)
        study.main(words)
    results = json.loads((out / "results.json").read_text())
    return Ended(out, before, "".join(said), second.getvalue(), results)


def test_it_says_first_how_long_it_takes(ended: Ended) -> None:
    """Estimated from a measured step, before anything is made: one of each of 5 variants."""
    first = next(line for line in ended.first.splitlines() if "trials" in line)
    assert re.match(
        r"5 trials, 2 at a time: about \d.* \(a training step takes .* s with own", first
    )


def test_a_killed_study_continues_without_repeating_what_is_done(ended: Ended) -> None:
    """Results that were there keep their files; the second run says how many are left."""
    assert len(ended.before) >= 2
    assert all(file.stat().st_mtime_ns == made for file, made in ended.before.items())
    assert f"{5 - len(ended.before)} trials, 2 at a time" in ended.second
    assert "[1/" in ended.second and " left\n" in ended.second


def check_trials(found: dict[str, Any], general: str) -> None:
    """Every trial has its curves, shift, speed and memory, and starts where the base is."""
    tried = [(t["variant"], t["lr"], t["seed"]) for t in found["trials"]]
    assert len(set(tried)) == len(tried)
    base_loss = found["base_result"]["losses"][general]
    for trial in found["trials"]:
        assert trial["failed"] is None and trial["chosen"] is True
        curve = trial["curves"][general]
        steps = 4  # of 2 x 32 tokens; a source's last sequence is shorter
        assert [p[0] for p in curve] == pytest.approx([0, steps * 32, steps * 64], rel=0.1)
        assert curve[0][1] == pytest.approx(base_loss, abs=1e-3)
        assert trial["tokens_per_s"] > 0 and trial["memory_bytes"] > 1 << 20
        assert trial["shift"]["positions"] > 0
    assert set(found["step_ratios"]) == {"distill-3"} and found["step_ratios"]["distill-3"] > 0
    written = {t["variant"]: t["replay_s"] for t in found["trials"]}
    assert written["distill-3"] > 0 == written["new-1"]


def test_every_trial_is_in_the_results_with_its_measures(ended: Ended) -> None:
    """Of all variants, from the same base; a new block has as many parameters wherever it is."""
    (own,) = ended.results["studies"]
    check_trials(own, "wiki")
    sizes = {t["variant"]: (t["trainable"], t["total"]) for t in own["trials"]}
    assert set(sizes) == {"new-1", "suffix", "full", "originals", "distill-3"}
    assert sizes["new-1"] == sizes["suffix"] == sizes["distill-3"]
    assert sizes["new-1"][1] - sizes["new-1"][0] == sizes["full"][0] == sizes["full"][1]
    assert sizes["originals"] == (sizes["new-1"][0], sizes["full"][0])


def test_the_page_has_everything(ended: Ended) -> None:
    """Table, verdicts, pictures and settings lie in --out; weights do not."""
    page = (ended.out / "study.md").read_text()
    for word in ("own", "self-distillation, weight 3", "full fine-tuning", "suffix stacking"):
        assert word in page
    for picture in ("curves.png", "pareto.png", "blocks.png"):
        assert (ended.out / picture).stat().st_size > 10_000 and picture in page
    assert ended.results["about"]["settings"]["replay_weights"] == [3.0]
    assert not list(ended.out.glob("own/*/*/run/checkpoints"))


@pytest.mark.slow
def test_a_study_makes_its_own_base_and_text(root: Path, preset: Path, tmp_path: Path) -> None:
    """It pre-trains a base, and teaches it code and arithmetic, with questions of both."""
    command = [sys.executable, STUDY, "--preset", str(preset), "--out", str(tmp_path / "out")]
    command += ["--variants", "new-1", "originals", "distill-3", "--seeds", "1", "2", "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    studies = json.loads(done.stdout)["studies"]
    assert [found["name"] for found in studies] == ["small-code", "small-math"]
    for found in studies:
        check_trials(found, "packages")
        assert all(trial["choices"]["questions"] == 64 for trial in found["trials"])
    trials = {trial["variant"]: trial for trial in studies[0]["trials"]}
    assert trials["originals"]["trainable"] == trials["new-1"]["trainable"]


# ---- Tasks --------------------------------------------------------------------------------------


def test_a_task_runs_once_and_a_failed_one_names_its_log(base: Path, tmp_path: Path) -> None:
    """A result is kept; one that was made otherwise, or is damaged, is refused."""
    runner = schedule.Runner(1)
    about = {"base": str(base), "tokens": 16, "length": 8, "device": "cpu"}
    task = schedule.Task("text", "write", about, tmp_path / "text")
    assert runner.run([task])[0]["tokens"] >= 16
    made = (tmp_path / "text" / "text.txt").stat().st_mtime_ns
    assert runner.run([task])[0]["tokens"] >= 16
    assert (tmp_path / "text" / "text.txt").stat().st_mtime_ns == made
    other = dataclasses.replace(task, about=about | {"length": 9})
    with pytest.raises(ConfigError, match=r"made with other settings \(length\): choose another"):
        runner.run([other])
    (tmp_path / "text" / "result.json").write_text("{")
    with pytest.raises(DataError, match="damaged; remove it"):
        task.result()
    broken = dataclasses.replace(
        task, about=about | {"base": str(tmp_path)}, out=tmp_path / "broken"
    )
    with pytest.raises(DataError, match=r"text: .*no weights found"):  # the mistake itself
        runner.run([broken])
    crashed = dataclasses.replace(task, about={}, out=tmp_path / "crashed")
    with pytest.raises(DataError, match=r"text: failed \(KeyError\): see .*crashed/log\.txt"):
        runner.run([crashed])
    assert "KeyError" in (tmp_path / "crashed" / "log.txt").read_text()


def test_a_worker_ends_with_the_study(tmp_path: Path) -> None:
    """Even if the study alone is killed: it would write where the next one does."""
    preset = tmp_path / "preset.toml"
    os.mkfifo(preset)  # its reader waits, and is seen to end
    about = {"argv": ["--config", str(preset)]}

    def run() -> None:
        schedule.PRELOADED = []  # one process computes nothing: it needs no libraries early
        schedule.Runner(1).run([schedule.Task("text", "replay", about, tmp_path / "out")])

    with forked(run) as (pid, _):
        writer = None
        while writer is None:
            with suppress(OSError):  # until a worker reads
                writer = os.open(preset, os.O_WRONLY | os.O_NONBLOCK)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the study ended"
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    reader = select.poll()
    reader.register(writer, 0)
    assert reader.poll(60_000), "the worker still reads"
    os.close(writer)


def test_workers_share_the_threads_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was given fewer than the machine's cores takes no more."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    assert [schedule.Runner(workers)._threads for workers in (1, 2, 8)] == [6, 3, 1]


def test_the_time_left_follows_what_trials_really_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One took 20 s, so three more take 60, and two at a time 30."""
    task, runner = schedule.Task("trial", "train", {}, tmp_path), schedule.Runner(2)
    runner.expect(4)
    runner.note(task, 20.0, "code 3.9")
    assert capsys.readouterr().err == "[1/4] trial: code 3.9 · 20s · about 30s left\n"


def test_a_second_study_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    """While the first runs; then it may."""
    second = study.locked(tmp_path)
    with study.locked(tmp_path), pytest.raises(ConfigError, match="another study is writing here"):
        second.__enter__()
    with study.locked(tmp_path):
        pass


def test_a_trial_that_diverged_is_shown_and_never_chosen() -> None:
    """The best learning rate is of those that ended; if all failed, the first."""
    good = {"curves": {"code": [[0, 4.0], [10, 3.0]]}}
    failed = {"failed": "the gradient is not finite"}
    null = {"curves": {"code": [[0, 4.0], [10, None]]}}  # JSON's for a loss that is not finite

    def best(*results: dict[str, Any]) -> float:
        grid = {lr: SimpleNamespace(result=lambda r=r: r) for lr, r in enumerate(results, 1)}
        return study.best_rate(SimpleNamespace(domain="code"), grid)

    assert best(good, null) == best(good, failed) == best(failed, failed) == 1
    assert best(failed, good) == 2
    assert schedule.describe(null) == "code: NaN"
    assert schedule.describe(failed) == "failed: the gradient is not finite"
