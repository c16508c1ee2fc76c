"""The fastest settings that fit a GPU, here or elsewhere, and the presets that rely on them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, interleave
from llamapro.kernels import device as kernel_device
from llamapro.scripts import CONFIGS, train
from llamapro.training import proposal
from llamapro.training.checks import check
from llamapro.training.preset import read_toml
from llamapro.training.settings import DataSettings, Settings, TrainSettings
from llamapro.training.validation import to_device

GB = 10**9


@pytest.fixture
def seven(tiny_config: Callable[..., ModelConfig]) -> ModelConfig:
    """LLaMA-2-7B with 8 new blocks."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    base = tiny_config(num_hidden_layers=32, max_position_embeddings=4096, **sizes, **heads)
    return expand_config(base, interleave(32, 8), "0" * 64)


def test_the_preset_of_7b_is_what_fits_an_80_gb_gpu(
    seven: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without recomputing, two sequences at a time: on 8 of them, and on one."""
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    preset = dataclasses.replace(read_toml(CONFIGS / "llama2-7b.toml"), device="h100")
    assert preset.data.seq_len == 0  # what the model allows, which a job puts in
    preset = dataclasses.replace(preset, data=dataclasses.replace(preset.data, seq_len=4096))
    found = {n: proposal.propose(preset, seven, n) for n in (1, 8)}
    expected = {"train.recompute": False, "train.micro_batch_size": 2, "train.frozen": "replicate"}
    for processes, size in ((1, 71.4), (8, 49.2)):
        settings = found[processes]["settings"]
        assert settings.pop("memory_bytes") == pytest.approx(size * GB, rel=0.02)
        assert settings == expected
    assert (preset.train.recompute, preset.train.micro_batch_size) == (False, 2)
    mistral = read_toml(CONFIGS / "mistral-7b.toml")
    assert (mistral.train.recompute, mistral.train.micro_batch_size) == (False, 2)


def plan_for(limit: int, monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> Any:
    settings = Settings(
        data=DataSettings(seq_len=64), train=TrainSettings(batch_size=24), device="h100"
    )
    monkeypatch.setattr(proposal, "ENOUGH_TOKENS", 256)
    monkeypatch.setattr(proposal, "usable_bytes", lambda device: limit)
    return proposal.propose(settings, config, 2)["settings"]


def test_with_less_memory_it_gives_up_speed_step_by_step(
    tiny_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the copies of frozen weights, then sequences at a time, at last the activations."""
    config = expand_config(tiny_config(num_hidden_layers=4), interleave(4, 2), "0" * 64)
    limit, steps = 1 << 40, []
    while found := plan_for(limit, monkeypatch, config):
        assert found["memory_bytes"] <= limit
        steps.append((found["train.recompute"], found["train.micro_batch_size"]))
        limit = found["memory_bytes"] - 1
    assert steps[0] == (False, 4)  # 4 x 64 tokens are enough, and divide 12
    assert steps[-1] == (True, 1)
    assert steps == sorted(steps, key=lambda step: (step[0], -step[1]))


@pytest.mark.parametrize(
    ("device", "usable"),
    [("h100", 80), ("H200", 141), ("RTX 4090", 24), ("a100-40", 40), ("48GB", 48), ("48 gb", 48)],
)
def test_gpus_are_known_by_name_or_memory(device: str, usable: int) -> None:
    """Nominal gigabytes: the GPU has as many GiB, and the rest is not the run's."""
    assert proposal.usable_bytes(device) == usable * GB


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "h1000", "dry_run": True}, r"'h1000'.*did you mean.*h100.*48GB"),
        ({"device": "0GB", "dry_run": True}, "'0GB'.*known are"),
        ({"device": "h100"}, "is for --dry-run"),
        ({"device": "h100", "dry_run": True, "train": TrainSettings(device="cpu")}, "leave one"),
    ],
)
def test_a_gpu_that_cannot_be_planned_for_is_refused(changes: dict[str, Any], said: str) -> None:
    """One message with the value and the fix."""
    with pytest.raises(ConfigError, match=said):
        check(dataclasses.replace(Settings(), **changes), 1)


def test_a_dry_run_plans_for_processes_and_a_gpu_that_are_not_here(
    pro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of them is started; text and JSON have the proposal, and no GPU gets none."""
    (tmp_path / "text.txt").write_text("text")
    words = ["--model.path", pro, "--data.train", tmp_path / "text.txt", "--data.seq-len", 32]
    words += ["--run-dir", tmp_path / "run", "--train.batch-size", 16, "--dry-run"]
    argv = [str(word) for word in words]
    planned = [*argv, "--processes", "8", "--device", "h100"]
    train.main([*planned, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["world_size"], plan["micro_batches"], plan["dtype"]) == (8, 2, "bfloat16")
    assert plan["proposal"]["usable_bytes"] == 80 * GB
    settings = plan["proposal"]["settings"]
    assert settings["train.micro_batch_size"] == 2 and settings["train.recompute"] is False
    train.main(planned)
    line = capsys.readouterr().out.splitlines()[-2]
    assert "train.recompute false, train.micro_batch_size 2" in line and "h100, 74.5 GiB" in line
    train.main([*argv, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert "proposal" not in plan and plan["dtype"] == "float32"


def test_one_process_keeps_frozen_weights_whole() -> None:
    """`auto` shards where there are parts; offloaded weights leave the GPU as shards."""
    for processes, shard_size, offload, expected in (
        (1, 0, False, "replicate"),
        (8, 0, False, "shard"),
        (8, 1, False, "replicate"),
        (8, 4, False, "shard"),
        (1, 0, True, "shard"),
    ):
        t = TrainSettings(shard_size=shard_size, offload=offload)
        assert t.placement(processes) == expected
        assert dataclasses.replace(t, frozen="gather").placement(processes) == "gather"


def test_batches_go_to_a_gpu_without_waiting_for_it() -> None:
    """From pinned memory. A CPU gets what it has."""

    class Column:
        log = ""

        def pin_memory(self) -> "Column":
            self.log += "pinned "
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> "Column":
            self.log += f"moved to {device}, non_blocking {non_blocking}"
            return self

    columns: list[Any] = [Column(), Column()]
    moved: list[Any] = list(to_device(columns, torch.device("cuda", 0)))
    assert [column.log for column in moved] == ["pinned moved to cuda:0, non_blocking True"] * 2
    rows = torch.ones(2, 3)
    assert to_device([rows], torch.device("cpu"))[0] is rows
