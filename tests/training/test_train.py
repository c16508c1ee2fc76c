"""The training loop: what it computes, however it is spread and split, and what comes out."""

import json
import subprocess
import sys
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
from llamapro.checkpoints.run import training_checkpoints
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import DataError
from llamapro.scripts import convert, train
from llamapro.training.job import Job
from llamapro.training.preset import parse
from llamapro.training.state import RunState

NEW = [1, 3]
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def test_two_processes_give_the_losses_of_one(
    straight: Path,
    train_on: Callable[..., Any],
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    metrics: Callable[[Path, str, str], list[float]],
    assert_same_losses: Callable[..., None],
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
    assert_same_losses: Callable[..., None],
) -> None:
    """On two processes, each with a copy of its own (HSDP), as on one with everything sharded."""
    changes = {"train__micro_batch_size": 1, "train__frozen": frozen, "train__shard_size": 1}
    train_on(2, arguments(tmp_path / "two", **changes))
    assert_same_losses(tmp_path / "two", straight)


@pytest.mark.parametrize("rows", [1, 4])
def test_micro_batches_change_rounding_only(
    rows: int, run: Callable[..., Path], straight: Path, assert_same_losses: Callable[..., None]
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
    metrics: Callable[[Path, str, str], list[float]],
    trained: Callable[[Path], dict[str, torch.Tensor]],
    assert_same_losses: Callable[..., None],
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


def test_loss_is_normalised_by_the_valid_tokens_of_the_whole_batch(
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    metrics: Callable[[Path, str, str], list[float]],
    trained: Callable[[Path], dict[str, torch.Tensor]],
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
    straight: Path, home: Path, tmp_path: Path, trained: Callable[[Path], dict[str, torch.Tensor]]
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
    run: Callable[..., Path],
    straight: Path,
    home: Path,
    metrics: Callable[[Path, str, str], list[float]],
) -> None:
    """Before the first step the expanded model scores as the base; after some it is better."""
    losses = metrics(straight, "eval", "loss")
    assert losses[-1] < losses[0] - 0.1
    base = run("base", model__path=home / "base", train__trainable="all", train__steps=1)
    assert metrics(base, "eval", "loss")[0] == losses[0]


def test_recompute_gives_the_same_bits_and_old_training_checkpoints_go(
    run: Callable[..., Path],
    straight: Path,
    metrics: Callable[[Path, str, str], list[float]],
    trained: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """Activation checkpointing changes memory alone; `save.keep` counts the latest."""
    recomputed = run("recomputed", train__recompute="", save__every=1, save__keep=2)
    assert metrics(straight, "train", "loss") == metrics(recomputed, "train", "loss")
    for name, tensor in trained(straight).items():
        assert torch.equal(tensor, trained(recomputed)[name])
    names = [path.name for path in training_checkpoints(recomputed)]
    assert names == ["step-00000005", "step-00000006"]


def test_masters_are_fp32_and_the_checkpoint_keeps_bf16(
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    trained: Callable[[Path], dict[str, torch.Tensor]],
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
    run: Callable[..., Path],
    home: Path,
    tmp_path: Path,
    trained: Callable[[Path], dict[str, torch.Tensor]],
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
    job: Any = SimpleNamespace(settings=settings, run_dir=Path("my run"))
    state = RunState(step=6, eval={"code": 4.5, "wiki": 3.1, "new": 2.0, "same": 1.009})
    state.base_eval = {"code": 5.0, "wiki": 3.0, "same": 1.0}
    _, text = Job.result(job, state)
    told = "code 4.5000 (-0.5000), wiki 3.1000 (+0.1000), new 2.0000, same 1.0090 (+0.0090)"
    worse = [f"wiki is worse by 0.100 nats per token; {fix}"] if fix else []
    next_command = "next: llamapro merge pro 'my run' OUT_DIR"
    assert text.splitlines() == [f"my run: 6 steps done; {told}", *worse, next_command]
