"""Settings: a preset overridden by options, and every mistake told at once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import ConfigError
from llamapro.training.checks import check
from llamapro.training.preset import parse, read_toml
from llamapro.training.resume import FREE_TO_CHANGE, changes
from llamapro.training.settings import Settings, TrainSettings

PRESETS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


def valid(**changes: Any) -> Settings:
    """Settings that pass `check`, with changes as train__steps=3."""
    base = {"model__path": "ckpt", "data__train": ("corpus",), "train__batch_size": 8}
    groups: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for key, value in (base | changes).items():
        group, _, name = key.rpartition("__")
        (groups.setdefault(group, {}) if group else flat)[name] = value
    settings = Settings()
    nested = {g: dataclasses.replace(getattr(settings, g), **v) for g, v in groups.items()}
    return dataclasses.replace(settings, **nested, **flat)


def preset(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "preset.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_learned_defaults_are_the_papers() -> None:
    """Section 4.1: AdamW, 2e-4 with 6 % warm-up, decay 0.1, batch 1024."""
    flat = Settings().flat()
    assert (flat["optim.lr"], flat["optim.warmup_ratio"]) == (2e-4, 0.06)
    assert (flat["optim.weight_decay"], flat["optim.clip"]) == (0.1, 1.0)
    assert flat["optim.betas"] == (0.9, 0.95)
    assert (flat["train.batch_size"], flat["train.trainable"]) == (1024, "new_blocks")


@pytest.mark.parametrize("spelling", ["separate", "joined"])
def test_options_win_over_the_preset(tmp_path: Path, spelling: str) -> None:
    """What an option names is the option's, the rest the preset's, and what neither, default."""
    text = 'log_every = 3\n[train]\nsteps = 7\nseed = 5\n[data]\ntrain = ["a", "b"]\n'
    file = preset(tmp_path, text + "[optim]\nlr = 1\nbetas = [0.8, 0.9]\n")
    config = ["--config", str(file)] if spelling == "separate" else [f"--config={file}"]
    settings = parse(["--train.steps", "9", *config, "--data.train", "c", "--train.recompute"])
    assert (settings.train.steps, settings.train.seed, settings.log_every) == (9, 5, 3)
    assert settings.data.train == ("c",)
    assert settings.optim.lr == 1.0 and isinstance(settings.optim.lr, float)
    assert settings.optim.betas == (0.8, 0.9)
    assert settings.train.recompute is True
    assert settings.optim.weight_decay == Settings().optim.weight_decay
    assert settings.config == str(file)


def test_a_flag_of_a_preset_can_be_given_again_or_taken_back() -> None:
    """The preset `sft` has train.recompute."""
    for words, wanted in (
        ([], True),
        (["--train.recompute"], True),
        (["--train.no-recompute"], False),
    ):
        assert parse(["--config", "sft", *words]).train.recompute is wanted


@pytest.mark.parametrize("option", ["--data.train", "--data.val", "--resume.allow"])
def test_a_list_given_twice_is_refused(option: str) -> None:
    """The last would count alone. Without values it empties the list."""
    with pytest.raises(ConfigError, match=f"{option}: given twice"):
        parse([option, "a=b", f"{option}=c=d"])
    assert parse([option, "a=b", option]) == Settings()


def test_without_a_preset_all_is_default() -> None:
    """No option, no change; an option alone changes that field alone."""
    assert parse([]) == Settings()
    settings = (parse(["--save.keep", "5"]), Settings())
    changed, default = (s.flat() for s in settings)
    assert {key for key in default if changed[key] != default[key]} == {"save.keep"}


def test_all_mistakes_of_a_preset_come_in_one_message(tmp_path: Path) -> None:
    """Unknown keys with the nearest known one, unknown tables, and values of a wrong type."""
    text = """
    log_evry = 3
    batch_size = 4
    eval = 5
    [trian]
    steps = 1
    [train]
    stpes = 3
    seed = "one"
    zzzzzzzz = 1
    """
    file = preset(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    for part in (
        "unknown key 'log_evry' (did you mean 'log_every'?)",
        "unknown key 'batch_size' (did you mean 'train.batch_size'?)",
        "unknown key 'trian' (did you mean 'train'?)",
        "unknown key 'train.stpes' (did you mean 'steps'?)",
        "unknown key 'train.zzzzzzzz';",
        "eval is 5, expected a table [eval]",
        "train.seed is 'one', expected a whole number",
    ):
        assert part in message + ";", part


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train.steps = 1.5", "train.steps is 1.5, expected a whole number"),
        ("config = 'demo'", "config is 'demo', but a preset reads no other"),
        ("train.steps = true", "train.steps is True, expected a whole number"),
        ("train.recompute = 1", "train.recompute is 1, expected a bool"),
        ("optim.lr = '1e-3'", "optim.lr is '1e-3', expected a number"),
        ("optim.lr = true", "optim.lr is True, expected a number"),
        ("optim.betas = [0.9]", "optim.betas is [0.9], expected a list of 2 float"),
        ("optim.betas = [0.9, 'x']", "optim.betas is [0.9, 'x'], expected a number"),
        ("data.train = 'a.txt'", "data.train is 'a.txt', expected a list"),
        ("data.train = [1]", "data.train is [1], expected text"),
        ("train.dtype = 'fp8'", "train.dtype is 'fp8', expected 'auto' or 'float32' or 'bfloat16'"),
        ("model.path = 3", "model.path is 3, expected text"),
        ("replay.hold = 0.02", "replay.hold is 0.02, expected text in quotes"),
    ],
)
def test_wrong_types_are_refused_with_the_value(tmp_path: Path, line: str, told: str) -> None:
    """A value is taken as its type says or refused; nothing is converted in silence."""
    with pytest.raises(ConfigError) as caught:
        read_toml(preset(tmp_path, line))
    assert told in str(caught.value)


def test_missing_preset_names_the_nearest(tmp_path: Path) -> None:
    """A mistyped file name gets the nearest preset beside it."""
    (tmp_path / "llama2-7b.toml").touch()
    (tmp_path / "other.toml").touch()
    with pytest.raises(ConfigError, match=r"no such preset \(did you mean '.*llama2-7b\.toml'\?"):
        parse(["--config", str(tmp_path / "lama2-7b.toml")])
    with pytest.raises(ConfigError, match=r"no such preset$"):
        read_toml(tmp_path / "nowhere" / "zzz.toml")


def test_a_preset_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--config llama2-7b`, wherever the command runs; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "llama2-7b"]).run_dir == "runs/llama2-7b-pro"
    with pytest.raises(ConfigError, match=r"lama2-7b: no such preset \(did you mean 'llama2-7b'\?"):
        parse(["--config", "lama2-7b"])
    Path("llama2-7b").write_text("log_every = 7\n")
    assert parse(["--config", "llama2-7b"]).log_every == 7


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    """Some editors write one."""
    file = tmp_path / "preset.toml"
    file.write_bytes(b"\xef\xbb\xbflog_every = 7\n")
    assert read_toml(file).log_every == 7


@pytest.mark.parametrize("text", ["a = [", "\xff", "a = " + "[" * 20_000])
def test_what_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    """Broken syntax, bytes that are not UTF-8 and brackets without end name the file."""
    file = tmp_path / "preset.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"preset\.toml: not readable as TOML"):
        read_toml(file)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["--train.steps", "1.5"], "--train.steps"),
        (["--train.device", "tpu"], "--train.device"),
        (["--optim.betas", "0.9"], "--optim.betas"),
        (["--config"], "--config"),
    ],
)
def test_values_of_a_wrong_type_exit_2(
    options: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option is named on standard error."""
    with pytest.raises(SystemExit) as caught:
        parse(options)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert option in told.err and options[0] in told.err and not told.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--trian.steps 3", "--trian.steps: no such option (did you mean --train.steps?)"),
        ("--train.lr 1e-3", "--train.lr: no such option (did you mean --optim.lr?)"),
        ("--lr=1", "--lr: no such option (did you mean --optim.lr?)"),
        ("--train.seq-length 8", "(did you mean --data.seq-len?)"),
        ("--seq_len 8", "--seq_len: no such option (did you mean --data.seq-len?)"),
        ("--train.every 3", "(did you mean --eval.every or --save.every?)"),
        ("--eval.evry 3", "(did you mean --eval.every?)"),
        ("--zzz", "--zzz: no such option"),
        ("configs/x.toml", "a preset is named by --config: --config configs/x.toml"),
        ("--train.steps 3 demo", "demo: a preset is named by --config: --config demo"),
        ("train.steps=3", "options begin with two dashes: --train.steps"),
        ("--train.recompute yes", "yes: belongs to no option; 'llamapro train --help' lists them"),
    ],
)
def test_a_word_that_is_no_option_is_told_what_it_was_meant_to_be(words: str, told: str) -> None:
    """Habits of other tools: a preset without --config, an option in another section."""
    with pytest.raises(ConfigError) as caught:
        parse(words.split())
    assert str(caught.value).endswith(told)


def test_valid_settings_pass() -> None:
    """The rules below refuse nothing that can run."""
    check(valid(), world_size=4)
    check(valid(data__weights=(1.5,), optim__warmup_ratio=0.0, optim__weight_decay=0.0), 1)
    check(valid(train__steps=5, train__epochs=0.0), 1)
    check(valid(model__path="", model__config="c", model__tokenizer="t", train__trainable="all"), 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__path": ""}, "give model.path"),
        ({"model__config": "c", "model__tokenizer": "t", "train__trainable": "all"}, "not both"),
        (
            {"model__path": "", "model__config": "c", "train__trainable": "all"},
            "needs model.tokenizer",
        ),
        (
            {"model__path": "", "model__config": "c", "model__tokenizer": "t"},
            "set train.trainable to 'all'",
        ),
        ({"data__train": ()}, "data.train is empty"),
        ({"data__train": ("a", "b", "a")}, "data.train: 'a' comes twice"),
        ({"data__cache_dir": ""}, "data.cache_dir is empty"),
        ({"data__weights": (1.0, 2.0)}, "2 numbers for 1 sources"),
        ({"data__weights": (0.0,)}, "data.weights: 0.0 is not more than 0"),
        ({"data__weights": (float("nan"),)}, "data.weights is (nan,), expected finite"),
        ({"data__seq_len": -1}, "data.seq_len is -1, expected 0 or more"),
        ({"data__workers": -1}, "data.workers is -1, expected 0 or more"),
        ({"train__batch_size": 0}, "train.batch_size is 0, expected more than 0"),
        ({"train__micro_batch_size": 0}, "train.micro_batch_size is 0, expected more than 0"),
        ({"train__epochs": 0.0}, "train.epochs is 0.0, expected more than 0"),
        ({"train__epochs": float("inf")}, "train.epochs is inf, expected finite"),
        ({"train__steps": -1}, "train.steps is -1, expected 0 or more"),
        (
            {"train__batch_size": 1 << 60},
            "train.batch_size is 1152921504606846976, expected at most 2^20",
        ),
        ({"train__seed": -1}, "train.seed is -1, expected 0 to 2^64 - 1"),
        ({"train__seed": 1 << 64}, "expected 0 to 2^64 - 1"),
        ({"train__ops": "tritn"}, "train.ops: 'tritn': no backend 'tritn' (known:"),
        ({"train__ops": "auto,ropes=torch"}, "no op 'ropes' (known:"),
        ({"train__shard_size": -1}, "train.shard_size is -1, expected 0 or more"),
        ({"train__shard_size": 2}, "shard_size 2 does not divide 1 process(es) into equal groups"),
        ({"optim__skip_bad_steps": -1}, "optim.skip_bad_steps is -1, expected 0 or more"),
        ({"optim__lr": 0.0}, "optim.lr is 0.0, expected more than 0"),
        ({"optim__lr": float("nan")}, "optim.lr is nan, expected finite"),
        ({"optim__clip": 0.0}, "optim.clip is 0.0, expected more than 0"),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay is -0.1, expected 0 or more"),
        ({"optim__warmup_ratio": 1.5}, "optim.warmup_ratio is 1.5, expected 0 to 1"),
        ({"optim__final_lr_ratio": -0.5}, "optim.final_lr_ratio is -0.5, expected 0 to 1"),
        ({"optim__betas": (0.9, 1.0)}, "optim.betas is (0.9, 1.0)"),
        ({"eval__every": 0}, "eval.every is 0, expected more than 0"),
        ({"eval__sequences": -1}, "eval.sequences is -1, expected 0 or more"),
        ({"save__every": 0}, "save.every is 0, expected more than 0"),
        ({"save__keep": 0}, "save.keep is 0, expected more than 0"),
        ({"log_every": 0}, "log_every is 0, expected more than 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], told: str) -> None:
    """Each rule names the setting and its value, and nothing else is complained about."""
    with pytest.raises(ConfigError) as caught:
        check(valid(**changes), world_size=1)
    assert told in str(caught.value)
    assert ";" not in str(caught.value)


def test_settings_that_are_not_read_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of another format of data: most likely it is forgotten. Epochs beside steps."""
    check(valid(data__text_key="body", data__split_at="x"), 1)
    check(valid(data__format="chat", data__chat_template="chatml", data__too_long="split"), 1)
    assert capsys.readouterr().err == ""
    check(valid(data__chat_template="chatml", data__date="2024-01-01"), 1)
    check(valid(data__format="chat", data__split_at="x"), 1)
    check(valid(train__steps=5, train__epochs=3.0), 1)
    assert capsys.readouterr().err.splitlines() == [
        "warning: data.chat_template is not read: it is for data.format 'chat'",
        "warning: data.date is not read: it is for data.format 'chat'",
        "warning: data.split_at is not read: it is for data.format 'text'",
        "warning: train.epochs is not read: train.steps is 5",
    ]


def test_all_impossible_settings_come_in_one_message() -> None:
    """Four mistakes, four complaints."""
    wrong = {"data__train": (), "optim__lr": -1.0, "save__keep": 0, "train__batch_size": 9}
    with pytest.raises(ConfigError) as caught:
        check(valid(**wrong), world_size=2)
    for key in ("data.train", "optim.lr", "save.keep", "train.batch_size"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "micro", "nearest"),
    [(10, 4, 1, "8 and 12"), (3, 4, 1, "4"), (50, 3, 4, "48 and 60"), (25, 2, 5, "20 and 30")],
)
def test_batch_that_does_not_split_names_the_nearest_that_do(
    batch_size: int, world_size: int, micro: int, nearest: str
) -> None:
    """The next multiples of processes times micro-batch below and above; 0 is none."""
    settings = valid(train__batch_size=batch_size, train__micro_batch_size=micro)
    with pytest.raises(ConfigError) as caught:
        check(settings, world_size)
    assert str(caught.value).endswith(f"nearest that are: {nearest}")


def test_a_shard_size_that_does_not_divide_names_those_that_do() -> None:
    """Every divisor of the number of processes."""
    with pytest.raises(ConfigError, match=r"shard_size 4 .* 6 .* one of 1, 2, 3, 6, or 0"):
        check(valid(train__shard_size=4, train__batch_size=6), 6)


def test_steps_are_given_or_follow_from_epochs() -> None:
    """100 sequences in batches of 8: 12.5 steps an epoch, rounded; at least one step."""
    assert valid(train__steps=5).steps(100) == 5
    assert valid(train__epochs=2.0).steps(100) == 25
    assert valid(train__epochs=0.01).steps(100) == 1
    for size, steps in ((8, 18), (2, 40), (4, 25)):  # after ten steps of 4, 60 of 100 are left
        found = valid(train__epochs=1.0, train__batch_size=size, train__micro_batch_size=1)
        assert found.steps(100, 10, 40) == steps
        assert found.steps(100, 11, 40 + size) == steps  # the next resume counts the same
    assert found.steps(100, 10, 400) == 10


def test_what_a_resumed_run_may_change_are_settings() -> None:
    """No name in the list is misspelt, and what decides the result is not in it."""
    flat = Settings().flat()
    assert set(flat) >= FREE_TO_CHANGE
    assert not FREE_TO_CHANGE & {"train.batch_size", "train.seed", "optim.lr", "data.seq_len"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_parse(path: Path) -> None:
    """Every file in configs/ has known keys and right types, and a schedule that can run."""
    settings = read_toml(path)
    if not settings.model.config:
        settings = dataclasses.replace(settings, model=valid().model)
    if not settings.data.train:
        settings = dataclasses.replace(settings, data=valid().data)
    check(settings, world_size=1)


def test_a_setting_that_a_run_did_not_know_had_its_default() -> None:
    """A run begun by an earlier version goes on; a value other than the default is a change."""
    before = json.loads(json.dumps(Settings().flat()))
    del before["train.new_tokens"]
    assert changes(before, Settings(), "run") == []
    grown = Settings(train=TrainSettings(new_tokens=True))
    with pytest.raises(ConfigError, match=r"train\.new_tokens false -> true"):
        changes(before, grown, "run")
