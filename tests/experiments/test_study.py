"""experiments/study.py: one command, that says first how long it takes and goes on when killed."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import ConfigError, DataError, UserError

MODULES = "options bases tasks budget schedule trial variants domains summary study".split()
PRESET = """
workers = 1
steps = 28
batch_size = 2
micro_batch_size = 2
seq_len = 32
evaluations = 2
eval_sequences = 2
learning_rates = [1e-3]
seeds = [1, 2]
new_blocks = [1]
compared = 1
replay_tokens = 128
replay_weights = [3.0]
[pretrain]
config = "{config}"
vocab_size = 400
steps = 2
batch_size = 4
micro_batch_size = 2
"""


@pytest.fixture(scope="module")
def modules(root: Path) -> Iterator[SimpleNamespace]:
    """The modules, which import one another as siblings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "experiments")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable) -> Path:
    """A study of two layers and four steps."""
    home = tmp_path_factory.mktemp("preset")
    config = tiny_config(num_hidden_layers=2, hidden_size=32, max_position_embeddings=256)
    (home / "config.json").write_text(json.dumps(config.raw))
    (home / "tiny.toml").write_text(PRESET.format(config=home / "config.json"))
    return home / "tiny.toml"


@pytest.fixture
def base(
    tmp_path: Path, write_random_checkpoint: Callable[..., Path], tiny_config: Callable
) -> Path:
    return write_random_checkpoint(tmp_path / "base", tiny_config(num_hidden_layers=2))


# ---- The whole of it ----------------------------------------------------------------------------


@dataclasses.dataclass
class Ended:
    """What a study left, killed in the middle and started again."""

    out: Path
    before: dict[Path, int]  # results that were there when it was killed, and when they were made
    text: str
    said: str
    results: dict[str, Any]


@pytest.fixture(scope="module")
def ended(root: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The study without --base, some of its variants; SIGKILL hits it after two trials."""
    out = tmp_path_factory.mktemp("study") / "out"
    command = [sys.executable, "experiments/study.py", "--preset", str(preset), "--out", str(out)]
    command += ["--variants", "new-1", "originals", "distill-3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how: dict[str, Any] = {"cwd": root, "env": environment, "text": True}
    first = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how
    )
    assert first.stdout is not None
    said = []
    for line in first.stdout:  # it says when a trial is done
        said.append(line)
        if len([line for line in said if "· seed" in line]) == 2:
            break
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert first.returncode == -signal.SIGKILL, "".join(said)
    before = {file: file.stat().st_mtime_ns for file in out.glob("small-*/*/*/result.json")}
    second = subprocess.run(command, capture_output=True, **how)
    assert second.returncode == 0, second.stderr
    results = json.loads((out / "results.json").read_text())
    return Ended(out, before, "".join(said), second.stderr + second.stdout, results)


def test_it_says_first_how_long_it_takes(ended: Ended) -> None:
    """Estimated from a measured step, before anything is made: (3 + 2) x 2 trials."""
    first = ended.text.splitlines()[0]
    assert re.match(
        r"10 trials, 1 at a time: about \d.* \(a training step takes .* s of small", first
    )


def test_a_killed_study_goes_on_without_repeating_what_is_done(ended: Ended) -> None:
    """Results that were there keep their files; the second run says how many are left."""
    assert len(ended.before) >= 2
    assert all(file.stat().st_mtime_ns == made for file, made in ended.before.items())
    assert f"{10 - len(ended.before)} trials, 1 at a time" in ended.said
    assert "[1/" in ended.said and " left\n" in ended.said


def test_every_trial_is_in_the_results_with_its_measures(ended: Ended) -> None:
    """All seeds, with their curves, questions, shift, speed and memory."""
    assert [study["name"] for study in ended.results["studies"]] == ["small-code", "small-math"]
    for study in ended.results["studies"]:
        tried = [(t["variant"], t["lr"], t["seed"]) for t in study["trials"]]
        assert len(set(tried)) == len(tried)
        for trial in study["trials"]:
            assert trial["failed"] is None
            assert set(trial["curves"]) == {study["domain"], "english", "packages"}
            tokens = [point[0] for point in trial["curves"]["english"]]
            last = 32 if trial["variant"] == "distill-3" else 28  # steps, of 2 x 32 tokens
            # A source's last sequence is shorter.
            assert tokens == pytest.approx([0, last // 2 * 64, last * 64], rel=0.02)
            assert trial["choices"]["questions"] == 64 and trial["shift"]["positions"] > 0
            assert trial["tokens_per_s"] > 0 and trial["memory_bytes"] > 1 << 20
            assert trial["chosen"] is True
            start = trial["curves"]["english"][0][1]
            assert start == pytest.approx(study["base_result"]["losses"]["english"], abs=1e-3)
        assert set(study["step_ratios"]) == {"distill-3"} and study["step_ratios"]["distill-3"] > 0
        written = {t["variant"]: t["replay_s"] for t in study["trials"]}
        assert written["distill-3"] > 0 == written["new-1"]


def test_the_whole_study_has_the_gradients_and_the_page_has_everything(ended: Ended) -> None:
    """Table, verdicts, pictures and settings lie in --out."""
    code = ended.results["studies"][0]
    assert [n for n, norm in code["gradients"]["zero-norms"][0].items() if norm] == [
        "input_layernorm"
    ]
    page = (ended.out / "study.md").read_text()
    for word in ("small-math", "self-distillation, weight 3", "own blocks", "zero-norms"):
        assert word in page
    for picture in ("curves.png", "pareto.png", "blocks.png"):
        assert (ended.out / picture).stat().st_size > 10_000 and picture in page
    assert ended.results["about"]["settings"]["replay_weights"] == [3.0]
    assert not list(ended.out.glob("small-*/*/*/run/checkpoints"))


def test_every_variant_trains_from_the_same_base_on_as_many_tokens(ended: Ended) -> None:
    """Parameters: one block that is added, or one of the base's."""
    code = ended.results["studies"][0]
    of = {t["variant"]: t for t in code["trials"]}
    assert of["originals"]["trainable"] == of["new-1"]["trainable"]
    assert of["new-1"]["total"] - of["new-1"]["trainable"] == of["originals"]["total"]


# ---- Mistakes -----------------------------------------------------------------------------------


def settings(modules: SimpleNamespace, *words: str) -> Any:
    return modules.options.parse(list(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: expected more than 0"),
        (["--steps", "70"], "--steps 70 is not a multiple of --evaluations 4"),
        (["--replay-share", "1"], "--replay-share 1.0: expected more than 0 and less than 1"),
        (["--replay-weights", "0"], "--replay-weights 0.0: expected more than 0"),
        (["--learning-rates", "-1"], "--learning-rates -1.0: expected more than 0"),
        (["--variants", "new-3"], "--variants new-3: unknown; known are new-1, new-2, new-4"),
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
def test_mistakes_are_told_before_anything_starts(
    modules: SimpleNamespace, words: list[str], message: str
) -> None:
    """All at once, by the option."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        modules.options.check(settings(modules, *words))


@pytest.mark.parametrize("missing", ["matplotlib", "peft"])
def test_a_missing_extra_is_named_with_its_pip_command(
    modules: SimpleNamespace, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT only if LoRA is asked for."""
    found = modules.options.find_spec
    hidden = {"find_spec": lambda name: None if name == missing else found(name)}
    monkeypatch.setattr(modules.options, **{"name": "find_spec", "value": hidden["find_spec"]})
    message = re.escape(f"{missing} is not installed: pip install 'llamapro[study]'")
    with pytest.raises(ConfigError, match=message):
        modules.options.check(settings(modules))
    if missing == "peft":
        modules.options.check(settings(modules, "--variants", "new-4"))


def test_an_unknown_key_of_a_preset_is_told(modules: SimpleNamespace, tmp_path: Path) -> None:
    """With the nearest that exists."""
    (tmp_path / "mine.toml").write_text("step = 4\n[pretrain]\nlr = 'high'\n")
    with pytest.raises(ConfigError, match=r"unknown key 'step'.*steps.*pretrain\.lr is 'high'"):
        settings(modules, "--preset", str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match="no such preset"):
        settings(modules, "--preset", "huge")


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_presets_are_possible(
    modules: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their base exists, and its layers take the numbers of new blocks."""
    monkeypatch.setattr(modules.options.torch.cuda, "is_available", lambda: True)
    s = settings(modules, "--preset", name)
    modules.options.check(s)
    studies = modules.bases.made_studies(s, Path("out"))
    assert [study.name for study in studies] == ["small-code", "small-math"]
    numbers = [v.new_blocks for v in studies[0].variants(s) if v.group == "number"]
    assert numbers == list(s.new_blocks) and studies[0].compared(s) == s.compared


def test_a_study_over_its_budget_does_not_start(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the estimate, the limit and what to lower; --dry-run prints the estimate."""
    s = settings(modules, "--budget-minutes", "30")
    studies = modules.bases.made_studies(s, tmp_path)
    speed = modules.budget.Speed
    text = modules.budget.check_budget(s, tmp_path, studies, {"small": speed(0.01, 0.01)})
    assert text.startswith("116 trials, 2 at a time: about ")
    with pytest.raises(ConfigError, match="more than --budget-minutes 30; raise it, lower"):
        modules.budget.check_budget(s, tmp_path, studies, {"small": speed(1.0, 0.01)})
    slow = modules.budget.left_to_do(s, tmp_path, studies, {"small": speed(1.0, 0.01)})[1]
    fast = modules.budget.left_to_do(s, tmp_path, studies, {"small": speed(0.5, 0.01)})[1]
    assert slow - fast > 0.5 * 116 * s.steps * 0.5
    assert (s.steps, s.replay_steps) == (72, 80)
    before = [
        modules.budget.preparation_seconds(s, tmp_path, studies, {"small": speed(0.1, write)})
        for write in (0.01, 0.02)
    ]
    # Two texts of 16,384 tokens, 64 documents at a time, and those that two placements measure.
    assert before[1] - before[0] == pytest.approx(0.01 * (2 * 256 + 2 * 4 * 256))


# ---- The user's own base ------------------------------------------------------------------------


def test_a_base_of_ones_own_has_all_variants(
    modules: SimpleNamespace, base: Path, tmp_path: Path
) -> None:
    """Its data are found before anything starts."""
    text = tmp_path / "text.txt"
    text.write_text("def f(): return 1\n" * 100)
    words = ["--base", str(base), "--train", str(text), "--val", str(text)]
    s = settings(modules, *words, "--general", f"wiki={text}", f"books={text}")
    modules.options.check(s)
    study = modules.bases.own_study(s)
    names = [v.name for v in study.variants(s)]
    assert {"new-1", "new-2", "prefix", "lora", "moe", "self-replay"} <= set(names)
    assert "replay" not in names and list(study.general) == ["wiki", "books"]
    modules.study.check_inputs(s, tmp_path / "out", [study])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": ("none.txt",)}, r"none\.txt"),
        ({"choices": "none.jsonl"}, r"none\.jsonl"),
        ({"seq_len": 1024}, "seq_len 1024 is over max_position_embeddings 512"),
        ({"general": ("text.txt",)}, "--general: 'text.txt' is not NAME=PATH"),
        ({"general": ("domain=text.txt",)}, "--general domain=...: this name is the new domain's"),
        ({"variants": ("new-8",)}, "--variants new-8: none is possible for own, a base of 2"),
    ],
)
def test_what_a_base_of_ones_own_lacks_is_told_before_anything_starts(
    modules: SimpleNamespace,
    base: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the file or the option; --out is not even made."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("def f(): return 1\n" * 100)
    words = ["--base", str(base), "--train", "text.txt", "--val", "text.txt"]
    s = dataclasses.replace(settings(modules, *words, "--general", "wiki=text.txt"), **change)
    with pytest.raises(UserError, match=message):
        modules.study.check_inputs(s, tmp_path / "out", [modules.bases.own_study(s)])
    assert not (tmp_path / "out").exists()


def test_names_of_more_bases_are_not_taken_twice(
    modules: SimpleNamespace, base: Path, tmp_path: Path
) -> None:
    """The small one is the study's own."""
    s = settings(modules, "--more-bases", f"small={base}")
    with pytest.raises(ConfigError, match=r"--more-bases small=\.\.\.: this name is taken"):
        modules.bases.made_studies(s, tmp_path)


def test_an_expansion_of_another_base_is_not_taken_for_this_ones(
    modules: SimpleNamespace, base: Path, tmp_path: Path
) -> None:
    """In the same --out, after --base has changed."""
    (tmp_path / "text.txt").write_text("def f(): return 1\n" * 100)
    text = str(tmp_path / "text.txt")
    words = ["--base", str(base), "--train", text, "--val", text, "--general", f"a={text}"]
    s = settings(modules, *words, "--variants", "new-1")
    study = modules.bases.own_study(s)
    start = modules.bases.expanded_dir(tmp_path, study, study.variants(s)[0])
    layout = expansion.interleave(2, 1)
    expand_checkpoint(Checkpoint.open(base), start, layout)
    modules.bases.expand(s, tmp_path, [study])  # it is there, and of this base
    other = dataclasses.replace(study, checkpoint=start)
    with pytest.raises(ConfigError, match="is of another base: choose another --out"):
        modules.bases.expand(s, tmp_path, [other])


# ---- Tasks --------------------------------------------------------------------------------------


def test_a_task_runs_once_and_a_failed_one_names_its_log(
    modules: SimpleNamespace, base: Path, tmp_path: Path
) -> None:
    """A result is kept; one that was made otherwise, or is damaged, is refused."""
    about = {"base": str(base), "tokens": 16, "length": 8, "device": "cpu"}
    task = modules.schedule.Task("text", "write", about, tmp_path / "text")
    assert modules.schedule.run([task], 1, 1)[0]["tokens"] >= 16
    made = (tmp_path / "text" / "text.txt").stat().st_mtime_ns
    assert modules.schedule.run([task], 1, 1)[0]["tokens"] >= 16
    assert (tmp_path / "text" / "text.txt").stat().st_mtime_ns == made
    other = dataclasses.replace(task, about=about | {"length": 9})
    with pytest.raises(ConfigError, match=r"made with other settings \(length\): choose another"):
        modules.schedule.run([other], 1, 1)
    (tmp_path / "text" / "result.json").write_text("{")
    with pytest.raises(DataError, match="damaged; remove it"):
        task.result()
    broken = dataclasses.replace(
        task, about=about | {"base": str(tmp_path)}, out=tmp_path / "broken"
    )
    with pytest.raises(DataError, match=r"text: .*no weights found"):  # the mistake itself
        modules.schedule.run([broken], 1, 1)
    crashed = dataclasses.replace(task, about={}, out=tmp_path / "crashed")
    message = r"text: failed \(exit status 1\): see .*crashed/log\.txt"
    with pytest.raises(DataError, match=message):
        modules.schedule.run([crashed], 1, 1)
    assert "KeyError" in (tmp_path / "crashed" / "log.txt").read_text()


def test_a_worker_ends_with_the_study(root: Path, base: Path, tmp_path: Path) -> None:
    """Even if the study alone is killed: it would write where the next one does."""
    about = {"base": str(base), "tokens": 1 << 40, "length": 8, "device": "cpu"}  # for ever
    script = (
        f"import sys; sys.path.insert(0, {str(root / 'experiments')!r})\n"
        "from pathlib import Path\nfrom schedule import Task, run\n"
        f"run([Task('text', 'write', {about!r}, Path({str(tmp_path / 'text')!r}))], 1, 1)\n"
    )
    (tmp_path / "study.py").write_text(
        f"if __name__ == '__main__':\n    {script.replace(chr(10), chr(10) + '    ')}"
    )
    study = subprocess.Popen([sys.executable, str(tmp_path / "study.py")])
    log = tmp_path / "text" / "log.txt"
    while not log.exists():
        assert study.poll() is None
    of_it = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if writes(pid, log)]
    assert of_it
    study.kill()
    study.wait()
    for _ in range(10_000_000):
        if not any(writes(pid, log) for pid in of_it):
            return
    raise AssertionError(f"{of_it} still run")


def writes(pid: int, log: Path) -> bool:
    """Whether a process has a file as its standard output."""
    try:
        return os.readlink(f"/proc/{pid}/fd/1") == str(log)
    except OSError:
        return False


def test_the_time_left_follows_what_trials_really_take(
    modules: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Estimated at 10 s, taken 20: three more take 60, two at a time 30."""
    task = modules.schedule.Task("trial", "train", {}, tmp_path, 10.0)
    progress = modules.schedule.Progress(4, 40.0, 2)
    progress.done(task, 20.0, "code 3.9")
    assert capsys.readouterr().err == "[1/4] trial: code 3.9 · 20s · about 30s left\n"


def test_a_second_study_in_the_same_directory_is_refused(
    modules: SimpleNamespace, tmp_path: Path
) -> None:
    """While the first runs; then it may."""
    second = modules.study.alone(tmp_path)
    with (
        modules.study.alone(tmp_path),
        pytest.raises(ConfigError, match="another study is writing here"),
    ):
        second.__enter__()
    with modules.study.alone(tmp_path):
        pass


def test_a_trial_that_diverged_is_shown_and_never_chosen(modules: SimpleNamespace) -> None:
    """The best learning rate is of those that ended; if all failed, the first."""
    study = SimpleNamespace(domain="code")
    good = {"curves": {"code": [[0, 4.0], [10, 3.0]]}}
    failed = {"failed": "the gradient is not finite"}
    null = {"curves": {"code": [[0, 4.0], [10, None]]}}  # JSON's for a loss that is not finite
    assert modules.study.best(study, [(1e-3, good), (1e-2, null)]) == 1e-3
    assert modules.study.describe(None, null) == "code not finite"
    assert modules.study.best(study, [(1e-3, good), (1e-2, failed)]) == 1e-3
    assert modules.study.best(study, [(1e-3, failed), (1e-2, failed)]) == 1e-3
    assert modules.study.describe(None, failed) == "failed: the gradient is not finite"
