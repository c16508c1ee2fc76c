"""Expanding and merging never write over what they read, whatever --force says."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import TRAINABLE_FILE
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import assemble_checkpoint, merge_checkpoint
from llamapro.errors import ConfigError

LAYOUT = expansion.interleave(4, 2)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, under its path."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*.*")}


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    write_step: Callable[..., Path],
) -> Path:
    """A directory that passes for a checkpoint, and in it a base, its expansion and a run."""
    home = tmp_path_factory.mktemp("expand")
    config = tiny_config(hidden_size=16, intermediate_size=16)
    base = Checkpoint.open(write_random_checkpoint(home / "base", config))
    (home / "config.json").write_text("{}")
    expand_checkpoint(base, home / "pro", LAYOUT)
    write_step(home / "run", Checkpoint.open(home / "pro"), 0)
    (home / "run" / "config.json").write_text("{}")
    (home / "link").symlink_to("base")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "home", symlinks=True)


def test_expand_never_replaces_its_base(home: Path) -> None:
    """Itself, under another name, or around it: refused, every byte as it was."""
    before, itself = contents(home), "is also the source"
    for out, message in {
        "base": itself,
        "pro/../base": itself,
        "link": itself,
        ".": "contains the source .*base",
    }.items():
        with pytest.raises(ConfigError, match=f"{message}; choose another output"):
            expand_checkpoint(Checkpoint.open(home / "base"), home / out, LAYOUT, force=True)
    assert contents(home) == before


def test_merge_replaces_neither_the_model_nor_the_run(home: Path) -> None:
    """The expanded checkpoint and the new-block file are both sources."""
    before, blocks = contents(home), rf"contains the source .*{TRAINABLE_FILE}"
    for out, message in {
        "pro": "is also the source",
        ".": "contains the source .*pro",
        "run": blocks,
        "run/checkpoints/step-00000000": blocks,
    }.items():
        with pytest.raises(ConfigError, match=f"{message}; choose another output"):
            merge_checkpoint(Checkpoint.open(home / "pro"), home / "run", home / out, force=True)
    assert contents(home) == before


def test_assembling_replaces_neither_the_run_nor_its_configuration(
    home: Path, write_step: Callable[..., Path]
) -> None:
    """A run from a config.json alone: the folder of that file is a source as much as the run."""
    base = Checkpoint.open(home / "base")
    write_step(home / "all", base, 0, trainable="all")
    for name in ("all", "settings"):
        (home / name).mkdir(exist_ok=True)
        (home / name / "config.json").write_text(base.config.to_json())
    before, config = contents(home), home / "settings" / "config.json"
    for out in ("all", "settings"):
        with pytest.raises(ConfigError, match="contains the source"):
            assemble_checkpoint(config, home / "all", home / out, force=True)
    assert contents(home) == before


def test_merging_into_the_run_directory_beside_its_checkpoints_is_allowed(home: Path) -> None:
    """Only what would be lost is protected; the blocks of step 0 give the expanded model back."""
    before = contents(home)
    expanded = Checkpoint.open(home / "pro")
    merge_checkpoint(expanded, home / "run", home / "run" / "merged")
    assert Checkpoint.open(home / "run" / "merged").sha256() == expanded.sha256()
    merge_checkpoint(expanded, home / "run", home / "run" / "merged", force=True)
    assert {f: data for f, data in contents(home).items() if "merged" not in f} == before
