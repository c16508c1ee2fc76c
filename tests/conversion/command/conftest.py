"""The command line of convert.py, an expanded model and a run on it."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.expansion import interleave


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    config = tiny_config(hidden_size=16, intermediate_size=16)
    base = write_random_checkpoint(tmp_path_factory.mktemp("convert") / "base", config)
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    return base


@pytest.fixture(scope="module")
def main(root: Path) -> Iterator[Callable[..., None]]:
    """The command line of convert.py, which tyro looks up among the loaded modules."""
    spec = importlib.util.spec_from_file_location("convert_under_test", root / "convert.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.main
    del sys.modules[spec.name]


@pytest.fixture
def convert(main: Callable[..., None], run_command: Callable[..., Any]) -> "Convert":
    """`convert(*words) -> (exit status, standard output, standard error)`, in this process."""
    return lambda *words: run_command(main, *words)


@pytest.fixture(scope="module")
def made(base: Path, write_step: Callable[..., Path]) -> Path:
    """The expanded `pro`, and a run on it with training checkpoints of steps 1 to 3."""
    expand_checkpoint(Checkpoint.open(base), base.parent / "pro", interleave(4, 2))
    for step in (1, 2, 3):
        write_step(base.parent / "run", Checkpoint.open(base.parent / "pro"), step)
    return base.parent


@pytest.fixture
def pro(made: Path, tmp_path: Path) -> Path:
    """A copy of the expanded model, with new layers 2 and 5."""
    return shutil.copytree(made / "pro", tmp_path / "pro")


@pytest.fixture
def run_dir(made: Path, pro: Path) -> Path:
    """A copy of the run, beside `pro`."""
    return shutil.copytree(made / "run", pro.parent / "run")


Convert = Callable[..., tuple[int, str, str]]
