"""Weights are streamed into safetensors files, whole and finite."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llamapro.checkpoints.directory import INDEX_FILE
from llamapro.checkpoints.tensors import all_finite, read_safetensors, same_bytes
from llamapro.checkpoints.writing import in_memory, write_checkpoint, write_safetensors
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.errors import CheckpointError


def test_an_error_of_what_follows_a_file_ends_the_writing(tmp_path: Path) -> None:
    """It comes while the next file is written, and no file waits for more than one other."""
    seen: list[str] = []

    def failing(file: Path) -> None:
        seen.append(file.name)
        raise CheckpointError(f"{file.name} is wrong")

    tensors = in_memory({f"t{n}": torch.zeros(100) for n in range(9)})
    with pytest.raises(CheckpointError, match=r"00001-of-00009\S* is wrong"):
        write_checkpoint(tmp_path, tensors, max_shard_bytes=100, written=failing)
    assert len(seen) == 1 and len(list(tmp_path.iterdir())) == 2


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    """Every dtype, a scalar, an empty tensor, a non-contiguous one, and metadata."""
    tensors = {
        "matrix": torch.arange(12.0).view(3, 4).T,
        "bf16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }
    file = tmp_path / "x.safetensors"
    write_safetensors(file, in_memory(tensors), {"note": "hi"})
    with safe_open(file, "pt") as reader:
        assert reader.metadata() == {"format": "pt", "note": "hi"}
        assert set(reader.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = reader.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float()), name
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0, "the data is aligned, so that it can be mapped"
    assert {t.offset for t in read_safetensors(file)[0].values() if t.name == "matrix"} == {
        8 + header_bytes
    }


def test_shards_stay_below_the_limit_and_the_index_lists_all(tmp_path: Path) -> None:
    """40-byte tensors at 100 bytes a shard: two each; a larger one stands alone."""
    sizes = {"a": 10, "b": 10, "c": 10, "big": 50, "d": 10}
    tensors = {name: torch.ones(size) for name, size in sizes.items()}
    write_checkpoint(tmp_path, in_memory(tensors), max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(sizes.values())
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert index["weight_map"] == dict(a=names[0], b=names[0], c=names[1], big=names[2], d=names[3])
    for name in names:
        held = {n for n, shard in index["weight_map"].items() if shard == name}
        assert set(read_safetensors(tmp_path / name)[0]) == held
    assert sorted(f.name for f in tmp_path.iterdir()) == [*names, INDEX_FILE]


def test_companions_are_copied_beside_the_configuration(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    """Files keep their bytes and folder; a directory that matched a pattern is passed over."""
    (tmp_path / "tokenizer.model").write_bytes(b"\0tok")
    other = Path("additional_chat_templates", "tool_use.jinja")
    (tmp_path / other).parent.mkdir()
    (tmp_path / other).write_text("x")
    (tmp_path / "tokenizer_cache").mkdir()
    (tmp_path / "out").mkdir()
    files = [*tmp_path.glob("tokenizer*"), tmp_path / other]
    write_companions(tmp_path / "out", tiny_config(), files)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\0tok"
    assert ModelConfig.from_file(tmp_path / "out" / "config.json") == tiny_config()
    assert (tmp_path / "out" / other).read_text() == "x"
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_nan_or_infinity_is_found(dtype: torch.dtype) -> None:
    """Wherever it stands, also beside the largest finite numbers."""
    for count in (1, 7, 1000):
        numbers = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
        numbers[::2] = torch.finfo(dtype).min
        assert all_finite(numbers)
        for place in {0, count // 2, count - 1}:
            for value in (float("nan"), float("inf"), -float("inf")):
                numbers[place] = value
                assert not all_finite(numbers)
            numbers[place] = 0


def test_equal_bytes_are_not_equal_numbers() -> None:
    """-0.0 is not 0.0, a NaN equals itself, and the last odd bytes count."""
    numbers = torch.tensor([0.0, 1.0, float("nan"), 2.0, 3.0], dtype=torch.bfloat16)
    assert same_bytes(numbers, numbers.clone())
    for place, value in ((0, -0.0), (4, 4.0)):
        changed = numbers.clone()
        changed[place] = value
        assert not same_bytes(numbers, changed)
    assert not same_bytes(numbers, numbers[:4]) and not same_bytes(numbers, numbers.half())
