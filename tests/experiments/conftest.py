"""A small base for the study's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def base(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable,
) -> Path:
    """A random base, of 2 layers or as many as the module's `LAYERS` says."""
    layers = getattr(request.module, "LAYERS", 2)
    home = tmp_path_factory.mktemp("base")
    return write_random_checkpoint(home / "base", tiny_config(num_hidden_layers=layers))
