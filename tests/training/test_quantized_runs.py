"""Frozen blocks in 8 bits: the settings that are refused, and what a run says and saves."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.config import ModelConfig
from llamapro.conversion.merge import merge_checkpoint
from llamapro.errors import ConfigError
from llamapro.scripts import train
from llamapro.training import proposal
from llamapro.training.checks import check
from llamapro.training.settings import DataSettings, FrozenDtype, Settings, TrainSettings

KINDS: tuple[FrozenDtype, ...] = ("int8", "float8")


def plan_settings(device: str = "", **options: Any) -> Settings:
    data, place = DataSettings(seq_len=64), TrainSettings(batch_size=8, **options)
    return Settings(data=data, train=place, device=device)


# ---- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frozen": "shard"}, "train.frozen is shard.*set train.frozen to 'replicate' or 'auto'"),
        ({"frozen": "gather"}, "train.frozen is gather.*set train.frozen to 'replicate'"),
        ({"trainable": "all"}, "train.trainable 'all' freezes nothing: set it to 'auto'"),
    ],
)
def test_settings_that_contradict_it_are_refused(options: dict[str, Any], said: str) -> None:
    """One message with both settings and the fix; "auto" goes with all of them."""
    for kind in KINDS:
        with pytest.raises(ConfigError, match=f"train.frozen_dtype is {kind} and {said}"):
            check(plan_settings(frozen_dtype=kind, **options), 2)
    with pytest.raises(ConfigError) as error:
        check(plan_settings(**options), 2)  # of other things
    assert "frozen_dtype" not in str(error.value)


def check_gpu(
    config: ModelConfig, kind: FrozenDtype, dtype: str = "bfloat16", device: str = ""
) -> None:
    proposal.check_float8(plan_settings(device, frozen_dtype=kind, dtype=dtype), config)


@pytest.mark.parametrize(
    ("name", "capability"),
    {"A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0)}.items(),
)
def test_float8_needs_a_gpu_that_has_it(
    name: str,
    capability: tuple[int, int],
    tiny_config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From compute capability 8.9 on; int8 needs nothing."""
    gpu = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    check_gpu(tiny_config(), "auto", "float32")
    check_gpu(tiny_config(), "int8", "float32")
    if capability >= (8, 9):
        return check_gpu(tiny_config(), "float8")
    said = r"'float8': A100 has compute capability 8\.0, below 8\.9; take 'int8' or 'auto'"
    with pytest.raises(ConfigError, match=said):
        check_gpu(tiny_config(), "float8")


def test_float8_on_a_gpu_needs_bfloat16_and_even_sizes(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    """What the product on a GPU asks for."""
    with pytest.raises(ConfigError, match="has the size 100, which is not a multiple of 16"):
        check_gpu(tiny_config(intermediate_size=100), "float8", device="h100")
    with pytest.raises(ConfigError, match=r"on a GPU it needs train\.dtype bfloat16"):
        check_gpu(tiny_config(), "float8", "float32", device="h100")


def test_a_plan_for_a_gpu_without_float8_is_refused(
    pro: Path, root: Path, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    """By its name, as there is no GPU to ask; a size of memory may belong to one that has it."""
    options = {"model.path": pro, "data.train": root / "README.md", "data.seq_len": 32}
    options |= {"run_dir": tmp_path, "train.batch_size": 4, "train.frozen_dtype": "float8"}
    for device in ("A100", "rtx 3090"):
        with pytest.raises(ConfigError, match="is a GPU without float8; take 'int8' or 'auto'"):
            train.main([*words(options, dry_run=""), "--device", device])
    for device in ("h100", "48GB"):
        train.main([*words(options, dry_run=""), "--device", device])


def test_every_gpu_without_float8_is_a_gpu_of_the_table() -> None:
    """A name that nobody can give would refuse nothing."""
    assert {*proposal.WITHOUT_FLOAT8} < {*proposal.GPUS}


# ---- A run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_is_rounded_and_merged_files_are_not(
    kind: FrozenDtype,
    pro: Path,
    root: Path,
    tmp_path: Path,
    words: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Evaluation at step 0 differs from the base's; outside new blocks merged bytes are its own."""
    options = {"model.path": pro, "data.train": root / "CONTRIBUTING.md", "data.seq_len": 32}
    options |= {"data.val": f"text={root / 'README.md'}", "data.cache_dir": tmp_path / "cache"}
    options |= {"train.steps": 2, "train.batch_size": 4, "eval.sequences": 4, "log_every": 1}
    exact = words(options, run_dir=tmp_path / "exact")
    train.main(exact)
    assert "frozen blocks" not in capsys.readouterr().err
    run_dir = tmp_path / "run"
    rounded = words(options, run_dir=run_dir, train__frozen_dtype=kind)
    train.main([*rounded, "--dry-run"])
    said = capsys.readouterr().out
    slow = " (emulated, slowly)" if kind == "float8" else ""
    assert f"{kind}{slow}: training and evaluation, from step 0, use the base rounded; " in said
    assert "as the teacher" not in said
    train.main([*rounded, "--dry-run", *words({"replay.hold": "3%"})])
    assert "use the base rounded, also as the teacher of replay" in capsys.readouterr().out
    train.main(rounded)

    def losses(run: Path) -> list[float]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "eval"]

    found, expected = losses(run_dir), losses(tmp_path / "exact")
    assert all(0 < abs(a - b) < 0.05 * b for a, b in zip(found, expected, strict=True))

    merge_checkpoint(Checkpoint.open(pro), run_dir, tmp_path / "merged")
    before, after = (Checkpoint.open(path).state_dict() for path in (pro, tmp_path / "merged"))
    new = load_file(training_checkpoints(run_dir)[-1] / "trainable.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[name], new.get(name, tensor))
        assert (name in new) == name.startswith("model.layers.2.")

    for changed in (None, "int8" if kind == "float8" else "float8"):
        with pytest.raises(ConfigError, match=f'train.frozen_dtype "{kind}" -> '):
            train.main(words(options, run_dir=run_dir, train__frozen_dtype=changed))
