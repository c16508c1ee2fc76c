"""Device, dtype and the backend of each op, which generate and evaluate share."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llamapro import backends
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.inference.options import ComputeOptions


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` without a GPU is a ConfigError, `auto` takes the CPU then; with one, both take it."""
    auto, cpu, cuda = (ComputeOptions(device=name) for name in ("auto", "cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert auto.choose_device() == cpu.choose_device() == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        cuda.choose_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert auto.choose_device() == cuda.choose_device() == "cuda"
    assert cpu.choose_device() == "cpu"


def test_loading_says_what_computes(
    tmp_path: Path,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on standard error: dtype, device, and each op's backend with the reason."""
    path = write_random_checkpoint(tmp_path / "checkpoint", tiny_config())
    options = ComputeOptions(device="cpu", dtype="bfloat16")
    with options.backends():
        model = options.load(Checkpoint.open(path))
    assert model.lm_head.weight.dtype == torch.bfloat16
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.endswith("bfloat16 on cpu; ops: all: cpu (device is cpu)\n")


def test_a_backend_that_is_unknown_or_cannot_run_is_a_config_error(
    tmp_path: Path,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It names the option, the reason and what to use instead."""
    for wrong in ("tritn", "auto,atention=torch"):
        with (
            pytest.raises(ConfigError, match=re.escape(f"--ops: {wrong!r}: no ")),
            ComputeOptions(ops=wrong).backends(),
        ):
            pass
    path = write_random_checkpoint(tmp_path / "checkpoint", tiny_config())
    monkeypatch.setattr(backends, "_cannot_run", lambda *_: "head dim 300 is over 256")
    options = ComputeOptions(ops="torch,attention=triton", device="cpu")
    with (
        options.backends(),
        pytest.raises(ConfigError, match=r"attention.*head dim 300.*use auto, or torch"),
    ):
        options.load(Checkpoint.open(path))
