"""experiments/study.py: one command that first says how long it takes and continues when killed."""

import dataclasses
import io
import json
import os
import re
import select
import shutil
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

import bases
import models
import options
import pictures
import pytest
import schedule
import study
import summary
import tasks
from trial import keep, measure, train, write_json

from llamapro.errors import ConfigError, DataError, UserError

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
    first = ended.first.splitlines()[0]
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


# ---- Mistakes -----------------------------------------------------------------------------------


def settings(*words: str) -> options.StudySettings:
    return options.parse(list(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: expected more than 0"),
        (["--search-steps", "-1"], "--search-steps -1: expected 0 or more"),
        (["--abilities"], "--abilities needs --base"),
        (["--steps", "70"], "--steps 70 is not a multiple of --evaluations 4"),
        (["--replay-share", "1"], "--replay-share 1.0: expected more than 0 and less than 1"),
        (["--replay-weights", "0"], "--replay-weights 0.0: expected more than 0"),
        (["--learning-rates", "-1"], "--learning-rates -1.0: expected more than 0"),
        (["--variants", "new-3"], "--variants new-3: not possible here; possible are new-1, new-2"),
        (["--train", "a.txt"], "--train needs --base"),
        (["--seeds", "1", "2", "1"], "--seeds (1, 2, 1): one is named twice"),
        (["--learning-rates", "0.1", "0.1"], "--learning-rates (0.1, 0.1): one is named twice"),
        (["--new-blocks", "0"], "--new-blocks 0: expected more than 0"),
        (["--batch-size", "6"], "--batch-size 6: not a multiple of 4"),
        (["--device", "cuda"], "--device cuda: no GPU is visible"),
        (["--base", "x", "--train", "a"], "--base needs --val; --base needs --general"),
        (["--base", "x", "--more-bases", "y=z"], "--more-bases goes with the study's own base"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words: list[str], message: str) -> None:
    """All at once, by the option."""
    s = settings(*words)
    with pytest.raises(ConfigError, match=re.escape(message)):
        options.check(s)
        bases.with_variants(bases.made_studies(s))


@pytest.mark.parametrize("missing", ["matplotlib", "peft"])
def test_a_missing_extra_is_named_with_its_pip_command(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT only if LoRA is asked for."""
    found = options.find_spec
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == missing else found(name))
    message = re.escape(f"{missing} is not installed: pip install -e '.[study]'")
    with pytest.raises(ConfigError, match=message):
        options.check(settings())
    if missing == "peft":
        options.check(settings("--variants", "new-4"))


def test_an_unknown_key_of_a_preset_is_told(tmp_path: Path) -> None:
    """With the nearest that exists."""
    (tmp_path / "mine.toml").write_text("step = 4\nbudget_minutes = 'high'\n")
    with pytest.raises(ConfigError, match=r"unknown key 'step'.*steps.*budget_minutes is 'high'"):
        settings("--preset", str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match="no such preset"):
        settings("--preset", "huge")


def test_the_preset_of_a_real_base_is_possible() -> None:
    """Its base is made by `make smollm`."""
    s = settings("--preset", "smollm")
    options.check(s)
    assert s.abilities and s.steps * s.batch_size * s.seq_len >= 300_000


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_presets_are_possible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their base exists, and its layers take the numbers of new blocks."""
    monkeypatch.setattr(options.torch.cuda, "is_available", lambda: True)
    s = settings("--preset", name)
    options.check(s)
    studies = bases.with_variants(bases.made_studies(s))
    assert [found.name for found in studies] == ["small-code", "small-math"]
    numbers = [v.new_blocks for v in studies[0].variants if v.group == "number"]
    assert numbers == list(s.new_blocks) and studies[0].compared == s.compared


def test_a_study_over_its_budget_does_not_start(tmp_path: Path) -> None:
    """The message has the estimate, the limit and what to lower."""
    s = settings("--budget-minutes", "30", "--out", str(tmp_path))
    studies = bases.made_studies(s)
    text = tasks.check_budget(s, studies, {"small": 0.01})
    assert text.startswith("112 trials, 2 at a time: about ")
    with pytest.raises(ConfigError, match="more than --budget-minutes 30; raise it, lower"):
        tasks.check_budget(s, studies, {"small": 1.0})
    plain = studies[0].variants[0]
    slow, fast = (tasks.trial_seconds(studies[0], plain, step_s) for step_s in (1.0, 0.5))
    assert slow - fast > 0.5 * s.steps
    assert (s.steps, s.replay_steps) == (72, 80)


# ---- The user's own base ------------------------------------------------------------------------


@pytest.fixture
def own(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> options.StudySettings:
    """Settings of a study of one's own base."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 100)
    words = ["--base", str(base), "--train", "text.txt", "--val", "text.txt", "--out", "out"]
    return settings(*words, "--general", "wiki=text.txt", "books=text.txt")


def test_a_base_of_ones_own_has_all_variants(own: options.StudySettings) -> None:
    """Its data are found before anything starts."""
    options.check(own)
    found = bases.own_study(own)
    names = [v.name for v in found.variants]
    assert {"new-1", "new-2", "prefix", "lora", "moe", "self-replay"} <= set(names)
    assert "replay" not in names and list(found.general) == ["wiki", "books"]
    lora = next(v for v in found.variants if v.name == "lora")
    built = tasks.trial(found, lora, 1e-3, 1).about["built"]
    assert built["rank"] == models.lora_rank(found.checkpoint, found.compared)
    study.check_inputs(own, [found])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": ("none.txt",)}, r"none\.txt"),
        ({"choices": "none.jsonl"}, r"none\.jsonl"),
        ({"seq_len": 1024}, "seq_len 1024 is over max_position_embeddings 512"),
        ({"general": ("text.txt",)}, "--general: 'text.txt' is not NAME=PATH"),
        ({"general": ("domain=text.txt",)}, "--general domain=...: this name is the new domain's"),
        (
            {"variants": ("new-8",)},
            "--variants new-8: not possible here; possible are new-1",
        ),
    ],
)
def test_what_a_base_of_ones_own_lacks_is_told_before_anything_starts(
    own: options.StudySettings, change: dict[str, Any], message: str
) -> None:
    """By the file or the option; --out is not even made."""
    s = dataclasses.replace(own, **change)
    with pytest.raises(UserError, match=message):
        study.check_inputs(s, bases.with_variants([bases.own_study(s)]))
    assert not Path("out").exists()


def test_names_of_more_bases_are_not_taken_twice(base: Path) -> None:
    """The small one is the study's own."""
    with pytest.raises(ConfigError, match=r"--more-bases small=\.\.\.: this name is taken"):
        bases.made_studies(settings("--more-bases", f"small={base}"))


def test_an_expansion_of_another_base_is_not_taken_for_this_ones(
    own: options.StudySettings,
) -> None:
    """In the same --out, after the weights of --base have changed."""
    found = bases.own_study(dataclasses.replace(own, variants=("new-1",)))
    (task,) = tasks.start_tasks([found])
    task.out.mkdir(parents=True)
    write_json(task.out / "result.json", {"about": task.about, "result": {}, "seconds": 1})
    assert task.result() == {}
    other = dataclasses.replace(task, about=task.about | {"base_sha256": "another"})
    with pytest.raises(ConfigError, match=r"other settings \(base_sha256\): choose another --out"):
        other.result()


def test_a_trial_on_other_text_under_the_same_path_is_not_taken_for_this_one(
    own: options.StudySettings,
) -> None:
    """Nor on other held-out text."""
    found = bases.own_study(own)
    task = tasks.trial(found, found.variants[0], 1e-3, 1)
    assert task.about["text_sha256"] == tasks.base_task(found).about["text_sha256"]
    bases._text_sha256.cache_clear()  # as in another process
    Path("text.txt").write_text(TEXT * 99)
    assert (
        tasks.trial(found, found.variants[0], 1e-3, 1).about["text_sha256"]
        != (task.about["text_sha256"])
    )


# ---- A search of its own length ------------------------------------------------------------------


def test_a_search_of_its_own_length_chooses_the_rate_and_nothing_else(
    own: options.StudySettings,
) -> None:
    """Full fine-tuning has rates of its own; the first seed trains again, at full length."""
    s = dataclasses.replace(own, search_steps=2, learning_rates=(1e-3, 2e-3), full_rate=0.1)
    found = bases.own_study(s)
    variants = {v.name: v for v in found.variants}
    full, plain = variants["full"], variants["new-1"]
    assert tasks.rates(s, full) == pytest.approx([1e-4, 2e-4])
    assert tasks.rates(s, plain) == [1e-3, 2e-3]
    search, trial = (tasks.trial(found, full, 1e-4, 1, is_search) for is_search in (True, False))
    steps = [
        task.about["argv"][task.about["argv"].index("--train.steps") + 1]
        for task in (search, trial)
    ]
    assert steps == ["2", str(s.steps)] and search.out.name == "search-lr-0.0001"
    assert search.about["only_losses"] and not trial.about["only_losses"]
    assert tasks.trials_left(found, full) == (2, 3)
    assert tasks.trials_left(found, variants["self-replay"]) == (0, 3)
    search.out.mkdir(parents=True)
    (search.out / "result.json").write_text("{}")
    assert tasks.trials_left(found, full) == (1, 3)
    assert tasks.trial_seconds(found, full, 1.0) - tasks.trial_seconds(found, full, 1.0, 2) == 70
    counts = bases.own_study(own)
    assert tasks.trials_left(counts, counts.variants[0]) == (0, 5)  # 3 rates, 3 seeds, 1 is both


def test_a_killed_trial_continues_its_run_and_measures_what_it_is_asked(
    own: options.StudySettings, base: Path
) -> None:
    """A search keeps losses only. Chats and texts of the base count as its general text."""
    shutil.copytree(base, "chat")
    Path("chat/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    )
    s = dataclasses.replace(
        own, base="chat", steps=4, search_steps=2, evaluations=2, seq_len=32, batch_size=2,
        micro_batch_size=2, eval_sequences=2, abilities=True, general=("wiki=text.txt",),
    )  # fmt: skip
    found = bases.own_study(s)
    full = next(v for v in found.variants if v.name == "full")
    search = tasks.trial(found, full, 1e-3, 1, is_search=True)
    result = train(search.about, search.out)
    assert set(result["curves"]) == {"domain", "wiki"} and result["choices"] is None
    assert not {"kl", "instructed"} & set(result)
    # Killed after the last step, before it was measured: its run is complete, and is not repeated.
    trial = tasks.trial(found, full, 1e-3, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trial.merge_checkpoint", None)
        with pytest.raises(TypeError):
            train(trial.about, trial.out)
    metrics = trial.out / "run" / "metrics.jsonl"
    before = metrics.read_text()
    (keep_task,) = [task for task in tasks.start_tasks([found]) if task.function == "keep"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abilities.REQUESTS", own.dir.parent / "requests.txt")
        Path("requests.txt").write_text("Who?\nWhy?\n")
        keep_task.out.mkdir(parents=True)
        assert keep(keep_task.about, keep_task.out) == {"chats": 2, "texts": 2}
        patch.setattr("abilities.instructed", lambda *_: {"passed": 1, "asked": 2, "answers": []})
        result = train(trial.about, trial.out)
        measured = measure(models.base_model(Path("chat")), trial.about)
    assert metrics.read_text() == before and not (trial.out / "run" / "checkpoints").exists()
    assert result["kl"]["chats"]["kl"] > 0 and result["instructed"]["passed"] == 1
    losses = {name: curve[0][1] for name, curve in result["curves"].items()}
    made = {"base": {"losses": losses} | measured, "full": result, "search": result}
    for name, task in {"full": trial, "search": search}.items():
        write_json(
            task.out / "result.json", {"about": task.about, "result": made[name], "seconds": 1}
        )
    around = tasks.base_task(found)
    around.out.mkdir(parents=True)
    write_json(
        around.out / "result.json", {"about": around.about, "result": made["base"], "seconds": 1}
    )
    rows = [
        {"variant": "full", "lr": 1e-3, "seed": 1, "task": task, "writing": None}
        | {"chosen": task is trial}
        for task in (search, trial)
    ]
    collected = study.collect(found, around, {}, rows)
    assert collected["general"] == ["chats", "texts"]
    assert collected["base_result"]["losses"]["chats"] == 0
    row = next(row for row in summary.summarize(collected) if row["name"] == "full")
    assert row["runs"] == 1  # the search is none
    assert row["sets"]["texts"].mean == result["kl"]["texts"]["kl"]
    page = summary.tables(
        {
            "studies": [collected],
            "about": {"machine": "", "versions": {}, "settings": {}, "elapsed_s": 1},
        }
    )
    assert "### Abilities" in page and "50.0% ± 35.4%" in page


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
    with (
        study.locked(tmp_path),
        pytest.raises(ConfigError, match="another study is writing here"),
    ):
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
