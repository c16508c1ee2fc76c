"""A base, its expanded model, and two files of new blocks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint

EVERY_2 = expansion.interleave(4, 2)  # layers 2 and 5 of 6 are new


Write = Callable[..., Path]


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Checkpoint:
    config = tiny_config(hidden_size=16, intermediate_size=16)
    path = write_random_checkpoint(tmp_path_factory.mktemp("merge") / "base", config)
    (path / "LICENSE.txt").write_text("be kind")
    (path / "README.md").write_text("# The base")
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def pro(base: Checkpoint) -> Checkpoint:
    """The base with two new blocks."""
    expand_checkpoint(base, base.path.parent / "pro", EVERY_2)
    return Checkpoint.open(base.path.parent / "pro")


@pytest.fixture(scope="module")
def files(pro: Checkpoint, write_trained: Write) -> list[Path]:
    """Two new-block files that were trained on it."""
    return [
        write_trained(pro.path.parent / f"{seed}.safetensors", pro, 1.0, seed=seed)
        for seed in (1, 2)
    ]


@pytest.fixture
def copy(pro: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy of the expanded model that a test may damage."""
    shutil.copytree(pro.path, tmp_path / "pro")
    return Checkpoint.open(tmp_path / "pro")
