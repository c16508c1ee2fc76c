"""Expanding and merging never write over what they read, whatever --force says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo, write_blocks
from llamapro.checkpoints.run import LISTED, STATE_FILE, TRAINABLE_FILE, write_manifest
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import assemble_checkpoint, merge_checkpoint
from llamapro.errors import ConfigError

LAYOUT = expansion.interleave(4, 2)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, under its path."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*.*")}


def write_run(path: Path, trained: Checkpoint, trainable: str) -> Path:
    """A run directory whose one new-block file holds a checkpoint's own bytes, as after 0 steps."""
    info = BlocksInfo.of(trained.config, trainable, 0)
    specs = [
        tensor
        for name, tensor in trained.tensors.items()
        if trainable == "all" or expansion.is_in_layers(name, info.new_layers)
    ]
    step = path / "checkpoints" / "step-00000000"
    step.mkdir(parents=True)
    (path / "config.json").write_text(trained.config.to_json())
    write_blocks(
        step / TRAINABLE_FILE, list(specs), lambda s: trained.tensors[s.name].chunks(), info
    )
    for name in LISTED - {TRAINABLE_FILE}:
        (step / name).write_bytes(b"")
    state = {"step": 0, "tokens": 0, "eval": {}, "elapsed_s": 0.0, "settings": {}, "loss": None}
    (step / STATE_FILE).write_text(json.dumps(state))
    write_manifest(step)
    return path


@pytest.fixture
def home(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A directory that passes for a checkpoint, and in it a base, its expansion and a run."""
    home = tmp_path / "home"
    config = tiny_config(hidden_size=16, intermediate_size=16)
    base = Checkpoint.open(write_random_checkpoint(home / "base", config))
    (home / "config.json").write_text("{}")
    expand_checkpoint(base, home / "pro", LAYOUT)
    write_run(home / "run", Checkpoint.open(home / "pro"), "new_blocks")
    (home / "link").symlink_to(home / "base")
    return home


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("base", "is also the source"),
        ("pro/../base", "is also the source"),
        ("link", "is also the source"),
        (".", "contains the source .*base"),
    ],
)
def test_expand_never_replaces_its_base(home: Path, out: str, message: str) -> None:
    """Itself, under another name, or around it: refused, every byte as it was."""
    before = contents(home)
    with pytest.raises(ConfigError, match=f"{message}; choose another output"):
        expand_checkpoint(Checkpoint.open(home / "base"), home / out, LAYOUT, force=True)
    assert contents(home) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("pro", "is also the source"),
        (".", "contains the source .*pro"),
        ("run", rf"contains the source .*{TRAINABLE_FILE}"),
        ("run/checkpoints/step-00000000", rf"contains the source .*{TRAINABLE_FILE}"),
    ],
)
def test_merge_replaces_neither_the_model_nor_the_run(home: Path, out: str, message: str) -> None:
    """The expanded checkpoint and the new-block file are both sources."""
    before = contents(home)
    with pytest.raises(ConfigError, match=f"{message}; choose another output"):
        merge_checkpoint(Checkpoint.open(home / "pro"), home / "run", home / out, force=True)
    assert contents(home) == before


@pytest.mark.parametrize("out", ["all", "settings"])
def test_assembling_replaces_neither_the_run_nor_its_configuration(home: Path, out: str) -> None:
    """A run from a config.json alone: the folder of that file is a source as much as the run."""
    base = Checkpoint.open(home / "base")
    write_run(home / "all", base, "all")
    (home / "settings").mkdir()
    (home / "settings" / "config.json").write_text(base.config.to_json())
    before = contents(home)
    with pytest.raises(ConfigError, match="contains the source"):
        assemble_checkpoint(home / "settings" / "config.json", home / "all", home / out, force=True)
    assert contents(home) == before


def test_merging_into_the_run_directory_beside_its_checkpoints_is_allowed(home: Path) -> None:
    """Only what would be lost is protected; the blocks of step 0 give the expanded model back."""
    before = contents(home)
    expanded = Checkpoint.open(home / "pro")
    merge_checkpoint(expanded, home / "run", home / "run" / "merged")
    assert Checkpoint.open(home / "run" / "merged").sha256() == expanded.sha256()
    merge_checkpoint(expanded, home / "run", home / "run" / "merged", force=True)
    assert {f: data for f, data in contents(home).items() if "merged" not in f} == before
