"""The settings of a study: mistakes, the user's own base, a search of its own length."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import bases
import models
import options
import pytest
import study
import summary
import tasks
from trial import keep, measure, train, write_json

from llamapro.errors import ConfigError, UserError

TEXT = "def usage(parser): return parser.usage\n"


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
    (tmp_path / "mine.toml").write_text("lr = 1\n")  # a key of train.py's presets
    with pytest.raises(ConfigError) as caught:
        settings("--preset", str(tmp_path / "mine.toml"))
    assert "optim.lr" not in str(caught.value)


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
    names = ("new-4", "self-replay", "hold")
    longer = [tasks.steps_of(s, v) for v in studies[0].variants if v.name in names]
    assert longer == [72, 80, 84]


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
        ({"variants": ("new-8",)}, "--variants new-8: not possible here; possible are new-1"),
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
