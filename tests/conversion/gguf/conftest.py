"""A small model in GGUF."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llamapro.config import ModelConfig

SHAPE = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def model(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, Tensor]],
    write_gguf: Callable[..., Path],
) -> Callable[..., Path]:
    """`model(config={}, tensors={}, **arguments of write_gguf) -> file`: a layer of 32 dimensions.

    The tensors replace some of the random ones; None leaves one out.
    """

    def make(
        config: dict[str, Any] | None = None,
        name: str = "m.gguf",
        tensors: dict[str, Tensor | None] | None = None,
        **arguments: Any,
    ) -> Path:
        full = tiny_config(**SHAPE, **(config or {}))
        written = random_tensors(full) | (tensors or {})
        kept = {name: tensor for name, tensor in written.items() if tensor is not None}
        return write_gguf(tmp_path / name, full, kept, **arguments)

    return make
