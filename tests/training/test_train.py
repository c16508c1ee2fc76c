"""The training loop: what it computes does not depend on how it is spread, split or interrupted."""

import argparse
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamapro import expansion
from llamapro.checkpoints.base import base_names, layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints, write_manifest
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import CheckpointError, ConfigError, DataError, DivergedError, UserError
from llamapro.kernels import device
from llamapro.scripts import convert, train
from llamapro.training import validation
from llamapro.training.data import Data
from llamapro.training.job import Job
from llamapro.training.metrics import MetricsLog
from llamapro.training.preset import parse
from llamapro.training.progress import Progress
from llamapro.training.state import RunState

STEPS, SAVE_EVERY = 6, 3
LAYOUT, NEW = expansion.interleave(2, 2), [1, 3]
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A base, its expansion (2 new blocks), a bf16 pair of them, and a small corpus."""
    home = tmp_path_factory.mktemp("train")
    config = tiny_config(num_hidden_layers=2)
    for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
        path = write_random_checkpoint(home / f"base{suffix}", config, dtype)
        expand_checkpoint(Checkpoint.open(path), home / f"pro{suffix}", LAYOUT)
    for name, module in (("train", argparse_source()), ("val", os_source())):
        (home / f"{name}.py").write_text(module, encoding="utf-8")
    return home


def argparse_source() -> str:
    return Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]


def os_source() -> str:
    return Path(os.__file__).read_text(encoding="utf-8")[:8000]


@pytest.fixture(scope="module")
def arguments(words: Callable[..., list[str]], home: Path) -> Callable[..., list[str]]:
    """`arguments(run_dir, **changes)`: the options of a small run."""

    def arguments(run_dir: Path, **changes: Any) -> list[str]:
        options = {
            "model.path": home / "pro",
            "data.train": home / "train.py",
            "data.val": f"code={home / 'val.py'}",
            "data.seq_len": 32,
            "data.cache_dir": home / "cache",
            "train.steps": STEPS,
            "train.batch_size": 4,
            "train.micro_batch_size": 2,
            "optim.lr": 1e-2,
            "eval.every": SAVE_EVERY,
            "eval.sequences": 3,
            "save.every": SAVE_EVERY,
            "log_every": 1,
            "run_dir": run_dir,
        }
        return words(options, **changes)

    return arguments


@pytest.fixture
def run(arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Trains in this process; returns the run directory."""

    def run(name: str = "run", **changes: Any) -> Path:
        run_dir = tmp_path / name
        train.main(arguments(run_dir, **changes))
        return run_dir

    return run


@pytest.fixture(scope="module")
def straight(
    arguments: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run directory of a run that nothing disturbs; not to be changed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train.main(arguments(run_dir))
    return run_dir


def metrics(run_dir: Path, kind: str, key: str) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r[key] for r in map(json.loads, lines) if r["kind"] == kind]


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(training_checkpoints(run_dir)[-1] / "trainable.safetensors")


def assert_same_losses(run_dir: Path, expected: Path, kind: str = "train") -> None:
    """fp32 sums in another order: a few units in the last place of a loss near 6."""
    found, losses = (torch.tensor(metrics(path, kind, "loss")) for path in (run_dir, expected))
    torch.testing.assert_close(found, losses, rtol=2e-6, atol=0)


def test_two_processes_give_the_losses_of_one(
    straight: Path,
    train_on: Callable[..., Any],
    arguments: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """The same global batch gives the same losses, whatever the number of processes."""
    done = train_on(2, arguments(tmp_path / "two", train__micro_batch_size=1))
    for kind in ("train", "eval"):
        assert_same_losses(tmp_path / "two", straight, kind)
    assert metrics(tmp_path / "two", "eval", "tokens") == metrics(straight, "eval", "tokens")
    assert " 6/6 " in done.stderr and f"new blocks       {NEW}" in done.stderr


@pytest.mark.slow  # the losses of such runs are also compared in test_resume_exact.py
@pytest.mark.parametrize("frozen", ["gather", "replicate"])
def test_where_frozen_weights_lie_changes_no_loss(
    frozen: str,
    straight: Path,
    train_on: Callable[..., Any],
    arguments: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """On two processes, each with a copy of its own (HSDP), as on one with everything sharded."""
    changes = {"train__micro_batch_size": 1, "train__frozen": frozen, "train__shard_size": 1}
    train_on(2, arguments(tmp_path / "two", **changes))
    assert_same_losses(tmp_path / "two", straight)


@pytest.mark.parametrize("rows", [1, 4])
def test_micro_batches_change_rounding_only(
    rows: int, run: Callable[..., Path], straight: Path
) -> None:
    """A batch of four is computed one by one, in two halves or as a whole."""
    assert_same_losses(run(train__micro_batch_size=rows), straight)


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_steps_on_kernels_give_the_losses_of_torch(
    steps: int,
    run: Callable[..., Path],
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """`--train.ops triton`, in the interpreter: forward, backward and update."""
    base = write_random_checkpoint(tmp_path / "base", tiny_config(num_hidden_layers=1))
    pro = tmp_path / "pro"
    expand_checkpoint(Checkpoint.open(base), pro, expansion.interleave(1, 1))
    small = {"model__path": pro, "data__seq_len": 16, "data__val": None}  # the interpreter is slow
    small |= {"train__batch_size": 1, "train__micro_batch_size": 1, "train__steps": steps}
    plain = run("torch", train__ops="torch", **small)
    fused = run("triton", train__ops="triton", **small)
    assert_same_losses(fused, plain)
    assert len(metrics(fused, "train", "loss")) == steps
    assert not torch.equal(trained(fused)[O_PROJ], torch.zeros(64, 64))
    plans = [json.loads((run_dir / "run.json").read_text()) for run_dir in (plain, fused)]
    assert [p["ops"] for p in plans] == ["all: torch (asked for)", "all: triton (asked for)"]


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


def test_loss_is_normalised_by_the_valid_tokens_of_the_whole_batch(
    run: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    """A short last sequence has few valid targets; on its own it must not weigh more."""
    text = tmp_path / "short.txt"
    text.write_text((home / "train.py").read_text()[:600])
    data = {"data__train": text, "train__batch_size": 4, "train__steps": 2}
    split = run("split", train__micro_batch_size=1, **data)
    whole = run("whole", train__micro_batch_size=4, **data)
    for name, tensor in trained(split).items():
        torch.testing.assert_close(tensor, trained(whole)[name], rtol=1e-3, atol=1e-5)
    assert metrics(split, "train", "tokens") == metrics(whole, "train", "tokens")


def test_only_new_blocks_train_and_the_base_keeps_its_bytes(
    straight: Path, home: Path, tmp_path: Path
) -> None:
    """Saved and optimised are the new blocks alone; after merge every base byte is the base's."""
    run_dir = straight
    step = training_checkpoints(run_dir)[-1]
    names = set(trained(run_dir))
    assert names and all(name.startswith(("model.layers.1.", "model.layers.3.")) for name in names)
    moments = set(load_file(step / "optimizer.safetensors"))
    assert moments == {f"{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq")}
    expanded = Checkpoint.open(home / "pro")
    for name, tensor in trained(run_dir).items():
        assert not torch.equal(tensor, expanded.tensors[name].read()), f"{name} did not move"
    merge_checkpoint(expanded, run_dir, tmp_path / "merged")
    found = verify(str(tmp_path / "merged"), str(home / "base"))
    assert found["base_intact"] and found["new_blocks"] == "trained"
    base, merged = Checkpoint.open(home / "base"), Checkpoint.open(tmp_path / "merged")
    layout = layout_of(merged.config)
    for name, base_name in base_names(merged.tensors, layout).items():
        assert merged.tensors[name].sha256() == base.tensors[base_name].sha256()


def test_losses_fall_and_start_at_the_base(
    run: Callable[..., Path], straight: Path, home: Path
) -> None:
    """Before the first step the expanded model scores as the base; after some it is better."""
    losses = metrics(straight, "eval", "loss")
    assert losses[-1] < losses[0] - 0.1
    base = run("base", model__path=home / "base", train__trainable="all", train__steps=1)
    assert metrics(base, "eval", "loss")[0] == losses[0]


def test_an_interrupted_run_continues_as_if_nothing_happened(
    run: Callable[..., Path], straight: Path, tmp_path: Path
) -> None:
    """N steps straight and N/2, stop, N/2 more: weights, moments and log are equal to the bit."""
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(training_checkpoints(resumed)[-1])  # as if killed after step 5
    run("resumed")
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = (training_checkpoints(r)[-1] / file for r in (straight, resumed))
        assert first.read_bytes() == second.read_bytes(), file
    for kind in ("train", "eval"):
        assert metrics(straight, kind, "loss") == metrics(resumed, kind, "loss")
        assert metrics(straight, kind, "step") == metrics(resumed, kind, "step")


def test_a_finished_run_is_left_alone(
    run: Callable[..., Path], straight: Path, tmp_path: Path
) -> None:
    """The same command after the last step trains nothing and writes nothing new."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    before = {f: f.stat().st_mtime_ns for f in run_dir.rglob("*.safetensors")}
    run()
    assert {f: f.stat().st_mtime_ns for f in run_dir.rglob("*.safetensors")} == before
    assert metrics(run_dir, "train", "step") == list(range(1, STEPS + 1))
    assert metrics(run_dir, "eval", "step") == [0, 3, 6]


def test_recompute_gives_the_same_bits_and_old_training_checkpoints_go(
    run: Callable[..., Path], straight: Path
) -> None:
    """Activation checkpointing changes memory alone; `save.keep` counts the latest."""
    recomputed = run("recomputed", train__recompute="", save__every=1, save__keep=2)
    assert metrics(straight, "train", "loss") == metrics(recomputed, "train", "loss")
    for name, tensor in trained(straight).items():
        assert torch.equal(tensor, trained(recomputed)[name])
    names = [path.name for path in training_checkpoints(recomputed)]
    assert names == ["step-00000005", "step-00000006"]


def test_masters_are_fp32_and_the_checkpoint_keeps_bf16(
    run: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    """In bf16 the new blocks keep fp32 masters; merged, they are rounded once, to bf16."""
    run_dir = run(model__path=home / "pro-bf16", train__dtype="bfloat16")
    tensors = trained(run_dir)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in tensors.values())
    merge_checkpoint(Checkpoint.open(home / "pro-bf16"), run_dir, tmp_path / "merged")
    merged = Checkpoint.open(tmp_path / "merged")
    assert {t.dtype for t in merged.tensors.values()} == {"BF16"}
    for name, tensor in tensors.items():
        assert torch.equal(merged.tensors[name].read(), tensor.bfloat16())
    assert verify(str(tmp_path / "merged"), str(home / "base-bf16"))["base_intact"]


def test_training_from_a_config_alone_makes_a_checkpoint(
    run: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    """Without a base all weights train from random ones, and merge writes an ordinary model."""
    config = home / "base" / "config.json"
    run_dir = run(
        model__path=None,
        model__config=config,
        model__tokenizer=home / "base",
        train__trainable="all",
        train__steps=2,
    )
    convert.main(["merge", str(config), str(run_dir), str(tmp_path / "model")])
    made = Checkpoint.open(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.model").exists()
    for name, tensor in trained(run_dir).items():
        assert torch.equal(made.tensors[name].read(), tensor)


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


def test_settings_that_decide_the_result_cannot_change_on_resume(
    run: Callable[..., Path],
) -> None:
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
    run: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
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


def test_fewer_steps_than_are_done_end_the_run(run: Callable[..., Path]) -> None:
    """It does not train on towards a number that lies behind it."""
    run_dir = run(train__steps=4, save__every=2, eval__every=100)
    before = [path.name for path in training_checkpoints(run_dir)]
    run(train__steps=3, eval__every=3)
    assert [path.name for path in training_checkpoints(run_dir)] == before
    assert metrics(run_dir, "train", "step")[-1] == 4


def test_other_data_is_read_on_only_when_allowed(
    run: Callable[..., Path], home: Path, tmp_path: Path
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
    arguments: Callable[..., list[str]],
    home: Path,
    tmp_path: Path,
    allowed: int,
    expected: int,
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


def refuse(words: list[str]) -> None:
    """Runs train.py on a rank, which has to find the mistake."""
    with pytest.raises(DataError, match=r"empty\.txt"):
        train.main(words)


def test_an_empty_corpus_is_refused_on_every_rank(
    fork_ranks: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A mistake that the main process finds is raised on all of them; nothing is left."""
    (tmp_path / "empty.txt").write_text("")
    words = arguments(tmp_path / "run", data__train=tmp_path / "empty.txt")
    done = fork_ranks(2, __file__, "refuse", words)
    assert done.statuses == [0, 0], done.stderr
    assert not (tmp_path / "run").exists()


def test_torchrun_reports_the_mistake_last(
    root: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The last line of its report is the message of the rank that failed first."""
    (tmp_path / "empty.txt").write_text("")
    words = arguments(tmp_path / "run", data__train=tmp_path / "empty.txt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(root / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    last = done.stderr.rstrip("=\n").splitlines()[-1]
    assert "DataError: " in last and "empty.txt" in last


def test_a_step_that_is_not_finite_ends_the_run_and_is_not_applied(
    run: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    """Nor is a later one, before that is noticed; its data is told; what was saved stays."""
    wild = {"optim__lr": 1e30, "optim__warmup_ratio": 0.0, "optim__clip": 1e30}
    with pytest.raises(UserError, match="the gradient is not finite"):
        run(save__every=1, log_every=5, eval__every=5, **wild)
    run_dir = tmp_path / "run"
    assert [path.name for path in training_checkpoints(run_dir)] == ["step-00000001"]
    for tensor in trained(run_dir).values():
        assert tensor.isfinite().all()
    (sequences,) = metrics(run_dir, "bad_step", "sequences")
    assert len(sequences) == 4
    for read in sequences:
        assert read["source"] == str(home / "train.py") and read["documents"] == [0, 0]
    assert metrics(run_dir, "bad_step", "step") == [2]


def test_a_bad_step_can_be_skipped(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With `optim.skip_bad_steps` its update is left out, moments and all, and training goes on."""
    clip, calls = train.clip_gradients, []

    def spoilt(parameters: Any, max_norm: float) -> torch.Tensor:
        calls.append(1)
        norm = clip(parameters, max_norm)
        return norm if len(calls) not in (2, 3) else torch.full_like(norm, float("nan"))

    monkeypatch.setattr(train, "clip_gradients", spoilt)
    run_dir = run(optim__skip_bad_steps=2, log_every=2)
    assert len(calls) == STEPS and metrics(run_dir, "train", "step")[-1] == STEPS
    assert metrics(run_dir, "bad_step", "skipped") == [1, 2]
    assert metrics(run_dir, "bad_step", "step") == [2, 3]
    state = json.loads((training_checkpoints(run_dir)[-1] / "state.json").read_text())
    assert state["skipped"] == 2
    calls.clear()
    with pytest.raises(UserError, match="the gradient is not finite"):
        run("stuck", optim__skip_bad_steps=1, log_every=2)
    assert metrics(tmp_path / "stuck", "bad_step", "step") == [2, 3]


def test_skipped_steps_in_a_row_count_over_resumes(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped after every bad step ends as one that is not."""

    def not_finite(*_: Any) -> torch.Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(train, "clip_gradients", not_finite)
    options = {"optim__skip_bad_steps": 2, "eval__every": 99, "save__every": 99}
    for steps in (1, 2):
        run(train__steps=steps, **options)
    with pytest.raises(DivergedError, match="the gradient is not finite"):
        run(train__steps=3, **options)


def test_a_final_evaluation_that_is_not_finite_is_no_success(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the end nor when the same command finds the run complete; all is saved."""
    mean_loss = validation.mean_loss
    calls: list[int] = []

    def diverged(*args: Any) -> tuple[float, int]:
        calls.append(1)
        loss, tokens = mean_loss(*args)
        return (float("nan") if len(calls) > 1 else loss), tokens

    monkeypatch.setattr(validation, "mean_loss", diverged)
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"at step 2, is not finite: code nan"):
            run(train__steps=2, eval__every=99)
    assert len(calls) == 2


def test_epochs_are_counted_in_samples_when_the_batch_size_changes(
    run: Callable[..., Path], straight: Path
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


def test_a_run_directory_that_is_removed_ends_the_run_and_loses_nothing(
    run: Callable[..., Path], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory is put back and saved, and the same command goes on.

    The first time it is removed again a moment after it was put back, as by `rm -r` on a slow disk.
    """
    saved, removals = Progress.saved, []

    def removed_last(self: Progress, report: Any) -> None:
        if report and report["step"] == STEPS and len(removals) < 2:
            removals.append(threading.Timer(0.1, shutil.rmtree, [tmp_path / "run"]))
            removals[-1].start()
            if len(removals) == 1:
                removals[-1].join()
        saved(self, report)

    monkeypatch.setattr("llamapro.training.preemption.SETTLE_S", 0.5)
    monkeypatch.setattr(Progress, "saved", removed_last)
    with pytest.raises(DataError, match=rf"was removed while .* saved .* step {STEPS}"):
        run()
    monkeypatch.undo()
    removals[-1].join()
    assert [path.name for path in training_checkpoints(tmp_path / "run")] == ["step-00000006"]
    shutil.rmtree(tmp_path / "run")
    batch, calls = Data.batch, []

    def removed(self: Data, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            shutil.rmtree(tmp_path / "run")
        return batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Data, "batch", removed)
        match = r"metrics\.jsonl: was removed while the run was writing it; saved .* step 5"
        with pytest.raises(DataError, match=match):
            run()
    run_dir = run()
    assert metrics(run_dir, "train", "step") == [1, 2, 3, 4, 5, 6]
    assert_same_losses(run_dir, straight)
    for name, tensor in trained(straight).items():
        assert torch.equal(tensor, trained(run_dir)[name])


def test_a_signal_before_the_first_step_stops_a_run_that_has_nothing_to_save(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no moments yet; the same command begins anew."""

    def signalled(self: Data, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, *args)

    batch = Data.batch
    monkeypatch.setattr(Data, "batch", signalled)
    assert training_checkpoints(run()) == []


def test_a_spike_is_logged_with_its_documents(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Whatever the logging interval, with the numbers of the documents that its batch read."""
    train_step, calls = train.train_step, []

    def jumping(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        loss, norm = train_step(*args)
        return (loss + 5 if len(calls) == 18 else loss), norm

    monkeypatch.setattr(train, "train_step", jumping)
    options = {"log_every": 50, "save__every": 7, "data__val": None, "optim__lr": 1e-4}
    options |= {"train__batch_size": 2, "data__seq_len": 16}
    run_dir = run(train__steps=18, **options)
    assert metrics(run_dir, "spike", "step") == [18]
    (loss,), (usual,) = (metrics(run_dir, "spike", key) for key in ("loss", "median"))
    assert usual + 4 < loss < usual + 6
    (sequences,) = metrics(run_dir, "spike", "sequences")
    assert [set(read) for read in sequences] == [{"source", "sequence", "documents"}] * 2


def test_a_full_disk_under_the_log_stops_the_run_in_order(
    run: Callable[..., Path], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is earned is saved, the message names the log, and the same command goes on."""
    log = MetricsLog.log

    def full(self: MetricsLog, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        log(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", full)
        with pytest.raises(DataError, match=r"metrics\.jsonl: .*No space left.*step 4"):
            run()
    run_dir = run()
    assert trained(straight).keys() == trained(run_dir).keys()
    for name, tensor in trained(straight).items():
        assert torch.equal(tensor, trained(run_dir)[name])


@pytest.mark.parametrize(
    ("place", "call", "saved"),
    [
        ("batch", 2, 1),  # noticed before the step is computed
        ("clip_gradients", 3, 3),  # inside a step, which is finished
        ("mean_loss", 2, 3),
        ("flatten", 1, 3),
        ("tokenize", 1, 0),  # nothing is earned yet
    ],
)
def test_a_signal_saves_all_and_the_run_continues_to_the_same_bits(
    place: str,
    call: int,
    saved: int,
    run: Callable[..., Path],
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it comes: in a step, an evaluation, while saving, or while data are tokenised."""
    owner: Any = {"tokenize": Job, "batch": Data, "mean_loss": validation}.get(place, train)
    original, calls = getattr(owner, place), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, signalled)
        run_dir = run()
    assert f"{saved} steps done, stopped by a signal" in capsys.readouterr().out
    found = [path.name for path in training_checkpoints(run_dir)]
    assert found[-1:] == ([f"step-{saved:08d}"] if saved else [])
    run()
    assert "6 steps done; " in capsys.readouterr().out
    assert metrics(run_dir, "eval", "step") == [0, 3, 6]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = (training_checkpoints(r)[-1] / name for r in (straight, run_dir))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_missing_validation_file_is_named_and_the_run_can_go_on(
    run: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    """Before anything is computed or written; put back, the run resumes."""
    val = tmp_path / "val.txt"
    val.write_text(os_source())
    run_dir = run(data__val=f"text={val}", train__steps=3)
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
    moved = val.rename(tmp_path / "moved.txt")
    with pytest.raises(DataError, match=r"val\.txt: no such file; give files, folders or globs"):
        run(data__val=f"text={val}")
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before
    moved.rename(val)
    assert metrics(run(data__val=f"text={val}"), "eval", "step") == [0, 3, 6]


def test_a_clock_that_is_set_back_changes_nothing(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are taken from a clock that nobody can set; the run's time only grows."""
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    elapsed = metrics(run(train__steps=2, data__val=None), "train", "elapsed_s")
    assert elapsed == sorted(elapsed) and 0 < elapsed[-1] < 600


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ([], "what holds it: --replay.hold 3%"),
        (["--replay.hold", "5%"], "what holds it: a smaller replay.hold than 5%"),
        (["--train.trainable", "all"], None),
    ],
)
def test_a_run_ends_with_what_it_forgot_and_the_next_command(
    options: list[str], fix: str | None
) -> None:
    """The change of each set; what would hold one that is worse; where the new blocks go."""
    settings = parse(["--model.path", "pro", *options])
    job: Any = SimpleNamespace(settings=settings, run_dir=Path("run"))
    state = RunState(step=6, eval={"code": 4.5, "wiki": 3.1, "new": 2.0, "same": 1.009})
    state.base_eval = {"code": 5.0, "wiki": 3.0, "same": 1.0}
    _, text = Job.result(job, state)
    told = "code 4.5000 (-0.5000), wiki 3.1000 (+0.1000), new 2.0000, same 1.0090 (+0.0090)"
    worse = [f"wiki is worse by 0.100 nats per token; {fix}"] if fix else []
    next_command = "next: llamapro merge pro run OUT_DIR"
    assert text.splitlines() == [f"run: 6 steps done; {told}", *worse, next_command]
