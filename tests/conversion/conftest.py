"""New-block files and training checkpoints for the tests of conversions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo, write_blocks
from llamapro.checkpoints.run import LISTED, STATE_FILE, TRAINABLE_FILE, write_manifest
from llamapro.checkpoints.tensors import DTYPE_CODES, TensorSpec, tensor_chunks
from llamapro.expansion import is_in_layers


@pytest.fixture(scope="session")
def write_trained() -> Callable[..., Path]:
    """`write_trained(file, model, noise=0.0, seed=1, step=1, trainable=...)`: a new-block file.

    It holds the model's own weights, and with noise (its standard deviation) changed ones in fp32.
    """

    def write(
        file: Path,
        model: Checkpoint,
        noise: float = 0.0,
        seed: int = 1,
        step: int = 1,
        trainable: str = "new_blocks",
    ) -> Path:
        info = BlocksInfo.of(model.config, trainable, step)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: stored.read()
            for name, stored in model.tensors.items()
            if trainable == "all" or is_in_layers(name, info.new_layers)
        }
        if noise:
            tensors = {
                name: tensor.float() + noise * torch.randn(tensor.shape, generator=generator)
                for name, tensor in tensors.items()
            }
        specs = [TensorSpec(n, DTYPE_CODES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_blocks(file, specs, lambda spec: tensor_chunks(tensors[spec.name]), info)
        return file

    return write


@pytest.fixture(scope="session")
def write_step(write_trained: Callable[..., Path]) -> Callable[..., Path]:
    """`write_step(run_dir, model, step, state={}, trainable=...)`: a training checkpoint.

    It holds the model's own weights; `state` is added to its `state.json`. Returns the new-block
    file.
    """

    def write(
        run_dir: Path,
        model: Checkpoint,
        step: int,
        state: dict[str, Any] | None = None,
        trainable: str = "new_blocks",
    ) -> Path:
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        file = write_trained(path / TRAINABLE_FILE, model, step=step, trainable=trainable)
        for name in LISTED - {TRAINABLE_FILE, STATE_FILE}:
            (path / name).write_bytes(b"some bytes")
        start = {"step": step, "tokens": 0, "eval": {}, "elapsed_s": 0.0, "settings": {}}
        (path / STATE_FILE).write_text(json.dumps(start | {"loss": None} | (state or {})))
        write_manifest(path)
        return file

    return write
