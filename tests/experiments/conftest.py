"""A small base for the study's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable,
) -> Path:
    home = tmp_path_factory.mktemp("base")
    return write_random_checkpoint(home / "base", tiny_config(num_hidden_layers=2))
