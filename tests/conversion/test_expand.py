"""Expanding, merging and stripping never write over what they read, whatever --force says."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import TRAINABLE_FILE
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import assemble_checkpoint, merge_checkpoint, merge_many
from llamapro.conversion.strip import strip_checkpoint
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


def test_nothing_that_is_read_is_replaced(home: Path, write_step: Callable[..., Path]) -> None:
    """A source itself, under another name, or around it: refused, every byte as it was."""
    base, pro = Checkpoint.open(home / "base"), Checkpoint.open(home / "pro")
    # A run from a config.json alone: the folder of that file is a source as much as the run.
    write_step(home / "all", base, 0, trainable="all")
    for name in ("all", "settings"):
        (home / name).mkdir(exist_ok=True)
        (home / name / "config.json").write_text(base.config.to_json())
    given = home / "settings" / "config.json"
    itself, blocks = "is also the source", rf"contains the source .*{TRAINABLE_FILE}"
    around = "contains the source .*"
    step = "run/checkpoints/step-00000000"
    cases: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]] = [
        (partial(expand_checkpoint, layout=LAYOUT), (base,), {"base": itself, "link": itself}),
        (partial(expand_checkpoint, layout=LAYOUT), (base,), {"pro/../base": itself, ".": around}),
        (merge_checkpoint, (pro, home / "run"), {"pro": itself, ".": around, "run": blocks}),
        (merge_checkpoint, (pro, home / "run"), {step: blocks}),
        (merge_many, (pro, [home / "run"]), {"pro": itself, ".": around, step: blocks}),
        (strip_checkpoint, (pro,), {"pro": itself, ".": around}),
        (assemble_checkpoint, (given, home / "all"), {"all": around, "settings": around}),
    ]
    before = contents(home)
    for command, sources, outputs in cases:
        for out, message in outputs.items():
            with pytest.raises(ConfigError, match=f"{message}.*; choose another output"):
                command(*sources, out_dir=home / out, force=True)
    assert contents(home) == before


def test_merging_into_the_run_directory_beside_its_checkpoints_is_allowed(home: Path) -> None:
    """Only what would be lost is protected; the blocks of step 0 give the expanded model back."""
    before = contents(home)
    expanded = Checkpoint.open(home / "pro")
    merge_checkpoint(expanded, home / "run", home / "run" / "merged")
    assert Checkpoint.open(home / "run" / "merged").sha256() == expanded.sha256()
    merge_checkpoint(expanded, home / "run", home / "run" / "merged", force=True)
    assert {f: data for f, data in contents(home).items() if "merged" not in f} == before
