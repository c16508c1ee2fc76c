"""How a run starts, or goes on: its plan, what is refused before it, and what may change."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro import expansion, filesystem
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints, write_manifest
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint
from llamapro.errors import CheckpointError, ConfigError, DataError, UserError
from llamapro.kernels import device
from llamapro.report import write_report
from llamapro.scripts import train
from llamapro.training.job import Job
from llamapro.training.preset import parse

STEPS = 6
LAYOUT, NEW = expansion.interleave(2, 2), [1, 3]


def test_a_kernel_that_cannot_run_is_refused_before_anything_starts(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message for `--train.ops triton` without a GPU has option, reason and way out."""
    monkeypatch.setattr(device, "is_interpreted", lambda: False)
    with pytest.raises(
        ConfigError,
        match=r"train\.ops 'torch,rope=triton': rope: .*device is cpu.*use auto, or torch",
    ):
        run(train__ops="torch,rope=triton", train__device="cpu")
    assert not (tmp_path / "run").exists()


def test_deterministic_attention_is_in_the_plan_and_refuses_what_is_not(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start-up block says it for a GPU; `attention=cpu` is refused there."""
    monkeypatch.setattr(device, "is_interpreted", lambda: False)
    words = {"dry_run": "", "device": "h100", "train__deterministic_attention": ""}
    run(**words)
    assert "attention: triton (device is cuda, deterministic)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"attention=cpu': attention: .*; use auto, or torch"):
        run(**words, train__ops="auto,attention=cpu")


def test_dry_run_prints_the_plan_and_writes_nothing(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Parameters, memory and tokens per step are told; no run directory appears."""
    run_dir = run(**{"dry_run": "", "json": ""})
    plan = json.loads(capsys.readouterr().out)
    assert not run_dir.exists()
    assert plan["tokens_per_step"] == 4 * 32
    assert plan["new_layers"] == NEW
    block = plan["parameters"]["trainable"] // 2
    assert block == 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 112 + 2 * 64
    assert plan["memory_bytes"]["AdamW moments"] == 8 * 2 * block
    assert plan["memory_bytes"]["total"] > plan["memory_bytes"]["fp32 masters"] == 4 * 2 * block


def test_a_change_of_a_validation_set_is_no_change_of_its_loss(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path
) -> None:
    """Losses are compared with the base's on the same set, and one that is gone has none."""
    (tmp_path / "other.py").write_text("def f(x):\n    return x\n" * 40)
    sets = [f"code={home / 'val.py'}", f"code={tmp_path}/other.py", f"new={tmp_path}/other.py"]
    shown = []
    for steps, sequences, path in ((3, 3, sets[0]), (4, 3, sets[1]), (5, 3, sets[2])):
        capsys.readouterr()
        words: dict[str, Any] = {"train__steps": steps, "resume__allow": "data.val"}
        run(**words, data__val=path, eval__sequences=sequences)
        shown.append(capsys.readouterr().out.splitlines()[-2])
    assert re.search(r"3 steps done; code \S+ \(-\S+\)$", shown[0])
    assert re.search(r"4 steps done; code \S+$", shown[1])
    assert re.search(r"5 steps done; new \S+$", shown[2])
    (found,) = write_report([tmp_path / "run"])["runs"]
    assert found["sets"]["code"]["final_loss"] is None  # it was not evaluated at the end
    run("more", train__steps=3)
    run("more", train__steps=4, eval__sequences=2)
    assert "4 steps done; code" in (told := capsys.readouterr().out)
    assert "(" not in told[told.index("4 steps done; code") :].split("\n")[0]
    (found,) = write_report([tmp_path / "more"])["runs"]
    assert found["sets"]["code"]["final_loss"] and not found["sets"]["code"]["change"]


def test_a_run_directory_within_the_corpus_is_left_out(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Neither its lock nor its log is trained on, and the run goes on."""
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 20)
    (tmp_path / "b.txt").write_text("b" * 999)
    for steps in (1, 2, 3):
        capsys.readouterr()
        run(**{"data__train": tmp_path, "data__val": "", "train__steps": steps})
        told = capsys.readouterr().err
        assert "2 documents" in told and ("run (a run directory)" in told) is (steps > 1)
    assert "from the cache" in told


def test_a_file_of_several_corpora_is_told(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A validation set that is trained on, by a folder or a link, would measure nothing."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("def f(x):\n    return x\n")
    (tmp_path / "held.txt").symlink_to(folder / "b.txt")
    words = {"dry_run": "", "data__train": folder, "data__val": f"v={tmp_path}/held.txt"}
    run(**words)
    assert f"{folder}/b.txt: is in 'train {folder}' and 'val v'\n" in capsys.readouterr().err
    run(**words | {"data__val": f"w={folder}/a.txt x={folder}/*.txt"})
    told = "and 'val w' and 'val x'; 1 more are in several\n"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("file", "file is a file, not"),
        ("file/a", "file is a file, not"),
        ("link", "link is a link to no"),
    ],
)
def test_a_place_that_is_no_directory_is_refused(
    path: str, kind: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    """Of the cache and of the run, in the run itself and in a dry one."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for mode in {"dry_run": ""}, {}:
        with pytest.raises(ConfigError, match=rf"^data\.cache_dir: /.*/{kind}.*; choose another"):
            run(**mode, data__cache_dir=tmp_path / path)
        with pytest.raises(ConfigError, match=rf"^run_dir: /.*/{kind}.*; choose another"):
            run(path, **mode)


def test_a_run_directory_that_is_something_else_is_refused(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    """A model, or the data: a run would put its files among theirs."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run_dir .*: holds a model; give the run a directory"):
        run(".")
    (tmp_path / "config.json").rename(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match=r"run_dir .*: is data of the run; give"):
        run(".", data__train=tmp_path)


def test_dry_run_takes_a_cache_that_is_there_and_cannot_be_written(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that is mounted read-only, where the run itself would only read."""
    store, lacks = tmp_path / "cache" / "store", filesystem.lacks
    store.mkdir(parents=True)

    def read_only(directory: Path) -> set[str]:
        if directory == store.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return lacks(directory)

    monkeypatch.setattr(filesystem, "lacks", read_only)
    words = {"dry_run": "", "data__cache_dir": store.parent}
    with pytest.raises(ConfigError, match="not usable: Read-only"):
        run(**words)
    (store / "index.json").write_text("{}")
    run(**words)


def test_dry_run_reads_every_row_of_every_corpus(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One message names the bad rows of all; what is left out is named; nothing is tokenised."""
    for name, text in (("a", '{"text": "x"}\n{"txt": "y"}\n'), ("b", '{"text": "x"}\n3\n')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    good = tmp_path / "good"
    good.mkdir()
    (good / "a.txt").write_text("Once<|endoftext|>upon a time")
    (good / "b.bin").write_bytes(b"\0\1")
    words = {"dry_run": "", "data__cache_dir": tmp_path / "cache", "data__train": good}
    with pytest.raises(DataError) as found:
        run(**words | {"data__train": f"{tmp_path}/a.jsonl {good} {tmp_path}/b.jsonl"})
    assert "a.jsonl:2: no 'text' key" in str(found.value) and "b.jsonl:2: exp" in str(found.value)
    with pytest.raises(DataError, match=r"no1: no such file.*\n.*no2: no such file"):
        run(**words | {"data__train": f"{tmp_path}/no1 {tmp_path}/no2"})
    capsys.readouterr()
    run(**words)
    out, err = capsys.readouterr()
    assert "1 documents" in err and "b.bin (binary" in err and "'<|endoftext|>' stands" in err
    assert out.endswith("\nnext: the same command without --dry-run\n")
    run(**words, data__split_at="<|endoftext|>", device="h100")
    out, err = capsys.readouterr()
    assert "2 documents" in err and out.endswith("without --dry-run and --device\n")
    assert not (tmp_path / "cache").exists()


def test_dry_run_refuses_a_device_that_is_not_here(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is named as one to plan for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"'cuda': no GPU is visible.*plan.*--device"):
        run(dry_run="", train__device="cuda")
    run(dry_run="", train__device="cuda", device="h100")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_units", [True, False])
def test_the_plan_names_the_faster_dtype_of_a_cpu(
    has_units: bool,
    dtype: str,
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it has units for bf16 that the run would not use."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_units}, False)
    run(dry_run="", train__device="cpu", train__dtype=dtype)
    told = "--train.dtype bfloat16 is faster on this CPU" in capsys.readouterr().out
    assert told == (has_units and dtype == "float32")


def test_a_tilde_is_the_home_in_every_path_of_a_preset(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell reads a preset; no directory named `~` is made."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "mine.toml").write_text(
        'run_dir = "~/runs/first"\n[model]\npath = "~/pro"\n'
        '[data]\ntrain = ["~/train.py"]\ncache_dir = "~/cache"\nseq_len = 32\n'
    )
    job = Job.open(parse(["--config", "~/mine.toml", "--train.steps", "1"]))
    assert job.run_dir == home / "runs" / "first"
    assert job.checkpoint is not None and job.checkpoint.path == home / "pro"
    assert not list(tmp_path.iterdir())


def test_settings_that_decide_the_result_cannot_change_on_resume(run: Callable[..., Path]) -> None:
    """The message names each, with both values; intervals may change."""
    run(train__steps=3)
    with pytest.raises(
        ConfigError, match=r"optim\.lr 0\.01 -> 0\.5; .* --resume\.allow optim\.lr$"
    ):
        run(train__steps=3, optim__lr=0.5)
    with pytest.raises(ConfigError, match=r"optim\.lr 0\.01 -> 0\.5"):
        run(train__steps=3, optim__lr=0.5, dry_run="")
    run(train__steps=3, eval__every=1, train__micro_batch_size=1)


def test_a_run_goes_on_with_other_steps_and_with_what_is_allowed(
    run: Callable[..., Path],
    home: Path,
    capsys: pytest.CaptureFixture[str],
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """Steps, intervals and the last learning rate at once; other settings by name: all are told."""
    run(train__steps=3, optim__warmup_ratio=0.0)
    changed = {"train__steps": 5, "optim__final_lr_ratio": 0.5, "save__every": 1}
    allowed = {"optim__lr": 5e-3, "optim__warmup_ratio": 0.0, "train__batch_size": 2}
    run_dir = run(**changed, **allowed, resume__allow="optim.lr train.batch_size")
    told = capsys.readouterr().err
    for text in ("train.steps 3 -> 5", "final_lr_ratio 0.0 -> 0.5", "optim.lr 0.01 -> 0.005"):
        assert "changed          " in told and text in told
    (record,) = metrics(run_dir, "resume", "changed")
    assert "train.batch_size 4 -> 2" in record and len(record) == 5
    assert metrics(run_dir, "train", "learning_rate")[-1] == pytest.approx(
        5e-3 * (0.75 + 0.25 * math.cos(math.pi * 4 / 5))
    )
    # Step 4 reads on where step 3 ended, whatever the batch was then: no sample twice.
    state = json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())
    assert state["samples"] == 3 * 4 + 2 * 2
    with pytest.raises(ConfigError, match=r"no setting 'optim\.rl' \(did you mean 'optim\.lr'"):
        run(resume__allow="optim.rl")


def test_fewer_steps_than_are_done_end_the_run(
    run: Callable[..., Path], metrics: Callable[[Path, str, str], list[float]]
) -> None:
    """It does not train on towards a number that lies behind it."""
    run_dir = run(train__steps=4, save__every=2, eval__every=100)
    before = [path.name for path in training_checkpoints(run_dir)]
    run(train__steps=3, eval__every=3)
    assert [path.name for path in training_checkpoints(run_dir)] == before
    assert metrics(run_dir, "train", "step")[-1] == 4


def test_other_data_is_read_on_only_when_allowed(
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    argparse_source: Callable[[], str],
    os_source: Callable[[], str],
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """The same path with other text: found by its tokens, and allowed by the setting's name."""
    text = tmp_path / "text.py"
    text.write_text(argparse_source())
    run(data__train=text, train__steps=3)
    text.write_text(os_source())
    with pytest.raises(ConfigError, match=r"made of other things: data 'train .*text.py' was"):
        run(data__train=text)
    assert metrics(run(data__train=text, resume__allow="data.train"), "train", "step")[-1] == STEPS


def test_a_damaged_training_checkpoint_is_passed_over(
    run: Callable[..., Path], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the one before it, says so, and ends with the same bytes; with none
    left it does not start anew."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "damaged"))
    earlier, last = training_checkpoints(run_dir)
    for path, other in ((last, earlier), (earlier, None)):
        file = path / "optimizer.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        if other:
            capsys.readouterr()
            run("damaged")
            told = capsys.readouterr().err
            assert f"{file}: damaged" in told and f"resume from      {other}" in told
            for name in ("trainable.safetensors", "optimizer.safetensors"):
                again = training_checkpoints(straight)[-1] / name
                assert again.read_bytes() == (last / name).read_bytes()
            file.write_bytes(data)
            (last / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no training checkpoint is intact"):
        run("damaged")


def test_a_training_checkpoint_with_random_generators_is_still_taken(
    run: Callable[..., Path], straight: Path, home: Path, tmp_path: Path
) -> None:
    """Earlier versions saved rng.safetensors and no base_eval: such runs go on and merge."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "old"))
    shutil.rmtree(training_checkpoints(run_dir)[-1])
    path = training_checkpoints(run_dir)[-1]
    state = json.loads((path / "state.json").read_text())
    del state["base_eval"], state["settings"]["log_seconds"]
    (path / "state.json").write_text(json.dumps(state))
    (path / "rng.safetensors").write_bytes(b"states")
    (path / "manifest.json").unlink()
    write_manifest(path)
    assert "rng.safetensors" in (path / "manifest.json").read_text()
    merge_checkpoint(Checkpoint.open(home / "pro"), path, tmp_path / "merged")
    run("old")
    last = training_checkpoints(run_dir)[-1]
    assert last.name == "step-00000006" and not (last / "rng.safetensors").exists()
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert (last / name).read_bytes() == (
            training_checkpoints(straight)[-1] / name
        ).read_bytes()


def test_blocks_of_another_base_are_refused(
    run: Callable[..., Path],
    straight: Path,
    home: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """Merging into, or resuming on, a model expanded from another base says so."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(training_checkpoints(run_dir)[-1])
    config = tiny_config(num_hidden_layers=2)
    other = write_random_checkpoint(tmp_path / "other", config, seed=7)
    expand_checkpoint(Checkpoint.open(other), tmp_path / "other-pro", LAYOUT)
    with pytest.raises(CheckpointError, match="was trained on base sha256"):
        merge_checkpoint(Checkpoint.open(tmp_path / "other-pro"), run_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    saved = tmp_path / "saved"
    shutil.move(home / "pro", saved)
    shutil.copytree(tmp_path / "other-pro", home / "pro")
    try:
        with pytest.raises(ConfigError, match="the frozen base model was sha256"):
            run()
    finally:
        shutil.rmtree(home / "pro")
        shutil.move(saved, home / "pro")


@pytest.mark.parametrize(("allowed", "expected"), [(512, 512), (131072, 4096)])
def test_a_sequence_is_as_long_as_the_model_allows(
    arguments: Callable[..., list[str]], home: Path, tmp_path: Path, allowed: int, expected: int
) -> None:
    """Up to the paper's 4,096, unless data.seq_len says otherwise: presets fit every model."""
    path = shutil.copytree(home / "pro", tmp_path / "pro")
    config = json.loads((path / "config.json").read_text())
    config |= {"max_position_embeddings": allowed}
    (path / "config.json").write_text(json.dumps(config))
    job = Job.open(parse(arguments(tmp_path / "run", model__path=path, data__seq_len=None)))
    assert job.settings.data.seq_len == expected
    assert job.plan["tokens_per_step"] == 4 * expected


MISTAKES: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"model__path": "nowhere"}, CheckpointError, "nowhere: no such checkpoint directory"),
    ({"model__path": "{home}/base"}, ConfigError, "no 'llamapro' record; run 'llamapro expand'"),
    ({"data__train": "{home}/nothing*.py"}, DataError, r"nothing\*\.py"),
    ({"data__val": "code={home}/gone.py"}, DataError, r"gone\.py"),
    ({"data__val": "{home}/val.py"}, ConfigError, "NAME=PATH"),
    ({"data__seq_len": 1024}, ConfigError, "data.seq_len 1024 is over max_position_embeddings 512"),
    ({"train__batch_size": 5}, ConfigError, "nearest that are: 4 and 6"),
    ({"data__weights": "1.0 2.0"}, ConfigError, "data.weights has 2 numbers for 1"),
    ({"model__tokenizer": "{home}/gone"}, DataError, "gone"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), MISTAKES)
def test_mistakes_are_named_before_anything_is_written(
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[UserError],
    message: str,
) -> None:
    """Each wrong setting stops the run with its name, and no run directory appears."""
    filled = {k: v.format(home=home) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(kind, match=message):
        run(**filled)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(
    run: Callable[..., Path],
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """More tokens than the model has rows would index past the embedding."""
    small = write_random_checkpoint(tmp_path / "small", tiny_config(vocab_size=300))
    with pytest.raises(DataError, match=r"400.*300|300.*400"):
        run(model__path=small, train__trainable="all")


def test_epochs_are_counted_in_samples_when_the_batch_size_changes(
    run: Callable[..., Path], straight: Path, metrics: Callable[[Path, str, str], list[float]]
) -> None:
    """A run that goes on with twice the batch sees every sample of its epoch, and no more."""
    options = {"train__steps": None, "eval__every": 999, "save__every": 999, "data__val": None}
    run_dir = run(train__epochs=0.1, **options)
    first = metrics(run_dir, "train", "step")[-1]
    state = training_checkpoints(run_dir)[-1] / "state.json"
    one = json.loads(state.read_text())["samples"]
    allow = {"resume.allow": "train.batch_size", "train__batch_size": 8}
    run(train__epochs=0.3, **options, **allow)
    samples = json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())["samples"]
    assert first * 4 == one and abs(samples - 3 * one) <= 8


def test_a_batch_that_no_number_of_fits_the_epochs_is_told(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One step of 512 reads a small corpus several times; a number of steps is taken as given."""
    options = {"train__steps": None, "eval__every": 999, "save__every": 999, "data__val": None}
    run(train__batch_size=512, **options)
    told = capsys.readouterr().err
    found = re.search(r"tokens, (.*) epochs\)\nwarning +not train.epochs 1 but (.*): a step", told)
    assert found and found[1] == found[2] and float(found[1]) > 1.1
    run("given", train__batch_size=512, **options | {"train__steps": 1})
    assert "not train.epochs" not in capsys.readouterr().err


def test_a_resumed_run_may_find_its_files_elsewhere(
    run: Callable[..., Path],
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Relative, through a link, or moved: the bytes are the same, and it is told once."""
    run(train__steps=1, data__val=f"code={home / 'val.py'}")
    (tmp_path / "link").symlink_to(home)
    monkeypatch.chdir(home)
    shutil.copytree(home / "pro", tmp_path / "moved")
    shutil.copyfile(home / "train.py", tmp_path / "moved.py")
    spelled = {"model__path": tmp_path / "moved", "data__train": "./train.py"}
    run_dir = run(train__steps=2, data__val=f"code={tmp_path}/link/val.py", **spelled)
    state = json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())
    assert (state["step"], state["settings"]["data.train"]) == (2, ["./train.py"])
    told = capsys.readouterr().err
    assert f'{home}/pro" -> "{tmp_path}/moved"' in told
    spelled["data__train"] = tmp_path / "moved.py"
    run(train__steps=3, data__val="code=val.py", **spelled)
    assert 'model.path "' not in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"data 'val other' was not there.*data\.val$"):
        run(train__steps=4, data__val="other=val.py", **spelled)
    spelled["model__path"] = "pro-bf16"
    with pytest.raises(ConfigError, match=r"the frozen base model was .*model\.path$"):
        run(train__steps=4, data__val="code=val.py", **spelled)


def test_a_dry_run_tells_that_a_run_would_not_resume(run: Callable[..., Path], home: Path) -> None:
    """It says of a text that was changed what the start itself says."""
    text = home / "changing.txt"
    text.write_text("one two three four five six seven\n" * 40)
    told, options = [], {"data__train": text, "data__val": None}
    run(train__steps=1, **options)
    run(train__steps=2, dry_run="", **options)
    text.write_text("seven six five four three two one\n" * 50)
    for more in ({"dry_run": ""}, {}):
        with pytest.raises(ConfigError, match="a run made of other things: data 'train ") as caught:
            run(train__steps=2, **options, **more)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_many_small_sources_are_told(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A shell puts each file of a pattern on the command line, and each becomes a source."""
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    for file in files:
        file.write_text(f"{file.name} is small")
    for name, paths in (("many", map(str, files)), ("one", [f"{tmp_path}/*.txt"])):
        words = arguments(tmp_path / name, train__steps=1, data__train=None, data__val=None)
        train.main([*words, "--data.train", *paths])
        told = capsys.readouterr().err
        found = re.search(r"warning +4 sources fill \d+% of their sequences: name a folder", told)
        assert bool(found) == (name == "many")
