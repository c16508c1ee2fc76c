"""Tensors are read, or mapped without a copy; a file that ends too soon is named."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llamapro.checkpoints.tensors import StoredTensor, read_safetensors
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError


def test_a_file_that_ends_while_it_is_read_is_named(tmp_path: Path) -> None:
    """Truncated after it was opened: no endless loop, no silent zeros."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(10))
    tensor = StoredTensor("w", "F32", (4,), file, 4)
    for read in (tensor.read, tensor.sha256):
        with pytest.raises(CheckpointError, match=r"x\.safetensors: ends inside tensor 'w'"):
            read()


# VmHWM, not ru_maxrss: the latter is inherited through exec from whoever starts the process.
PEAK_SCRIPT = """
import sys
from llamapro.checkpoints.directory import Checkpoint
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
checkpoint = Checkpoint.open(sys.argv[1])
opened = peak()
model = checkpoint.load()
for parameter in model.parameters():
    parameter.sum()  # touches every page
print(checkpoint.nbytes, peak() - opened)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_a_loaded_model_costs_one_copy_of_its_weights(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Callable[..., ModelConfig]
) -> None:
    """Peak memory over that of opening alone: below 1.25 times 150 MB of weights."""
    config = tiny_config(
        vocab_size=16000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1
    )
    path = write_random_checkpoint(tmp_path / "c", config, max_shard_bytes=70_000_000)
    command = [sys.executable, "-c", PEAK_SCRIPT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    nbytes, more = map(int, done.stdout.split())
    shutil.rmtree(path)
    assert nbytes > 150_000_000
    assert 0.9 * nbytes < more < 1.25 * nbytes


def test_a_mapped_tensor_is_the_one_that_is_read(tmp_path: Path) -> None:
    """It may start anywhere in its page; at an odd address it is read instead."""
    tensors = {"a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3000, 5)}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, stored in read_safetensors(tmp_path / "x.safetensors")[0].items():
        assert torch.equal(stored.map(), tensors[name])
        assert torch.equal(stored.read(), tensors[name])
    data = tensors["b"].numpy().tobytes()
    (tmp_path / "raw").write_bytes(b"x" * 4099 + data)
    odd = StoredTensor("b", "F32", (3000, 5), tmp_path / "raw", 4099)
    assert torch.equal(odd.map(), tensors["b"])
