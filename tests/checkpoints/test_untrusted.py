"""Files of strangers: whatever they say, they are refused by name before memory is taken."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE, Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo, read_blocks
from llamapro.checkpoints.tensors import read_safetensors
from llamapro.checkpoints.writing import in_memory, write_safetensors
from llamapro.config import ModelConfig
from llamapro.conversion.meta import to_meta
from llamapro.errors import CheckpointError, ConfigError, UserError
from llamapro.files import MAX_JSON_BYTES, read_json


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- Headers ------------------------------------------------------------------------------------

W = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "negative dims": ({"w": entry([-1, -1], [0, 4])}, "invalid value: integer `-1`"),
    "float dim": ({"w": entry([1.0], [0, 4])}, "floating point `1.0`"),
    "bool dim": ({"w": entry([True], [0, 4])}, "boolean `true`"),
    "text as shape": ({"w": entry("1", [0, 4])}, 'string "1"'),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, "missing field `shape`"),
    "dims that overflow": ({"w": entry([1 << 32, 1 << 32], [0, 4])}, "overflow computing"),
    "overflow around zero": ({"w": entry([0, 1 << 64], [0, 0])}, "floating point `1.84467"),
    "more than the file": ({"w": entry([1 << 40], [0, 1 << 42])}, "file not fully covered"),
    "a thousand dims": ({"w": entry([1] * 1000, [0, 4])}, r"'w' is F32 \[1, 1"),
    "float offsets": ({"w": entry([1], [0.0, 4.0])}, "floating point `0.0`"),
    "bool offsets": ({"w": entry([1], [False, 4])}, "boolean `false`"),
    "three offsets": ({"w": entry([1], [0, 4, 8])}, "invalid length 3"),
    "text as offsets": ({"w": entry([1], "04")}, 'string "04"'),
    "offsets in the header": ({"w": entry([1], [-4, 0])}, "invalid value: integer `-4`"),
    "backwards": ({"w": entry([1], [4, 0])}, "offset for tensor `w`"),
    "overlap": ({"a": entry([1], [0, 4]), "b": entry([1], [2, 6])}, "offset for tensor `b`"),
    "the same twice": (
        {"a": entry([1], [0, 4]), "b": entry([1], [0, 4])},
        "offset for tensor `[ab]`",
    ),
    "a hole": ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, "offset for tensor `b`"),
    "a hole first": ({"a": entry([1], [4, 8])}, "offset for tensor `a`"),
    "one name twice": (f'{{"w": {W}, "w": {W}}}'.encode(), "'w' comes twice"),
    "one key twice": (b'{"w": {"dtype": "F32", "dtype": "F64"}}', "'dtype' comes twice"),
    "unhashable dtype": ({"w": entry([1], [0, 4], ["F32"])}, "sequence, expected string"),
    "metadata of numbers": (
        {"__metadata__": {"a": 1}, "w": entry([1], [0, 4])},
        "integer `1`, expected",
    ),
    "metadata of another type": ({"__metadata__": [], "w": entry([1], [0, 4])}, "expected a map"),
    "a list": (b"[]", "no JSON object"),
    "half an object": (b"{", "not a safetensors file"),
    "no UTF-8": (b"\xff\xfe", "not a safetensors file"),
    "a number as tensor": (b'{"w": 3}', "not a safetensors file"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [1]}}, "missing field `data_offsets`"),
    "an unknown dtype": ({"w": entry([1], [0, 4], "F99")}, "F99"),
    "a number as shape": ({"w": entry(1, [0, 4])}, "integer `1`"),
    "text as dim": ({"w": entry(["x"], [0, 4])}, 'string "x"'),
    "more bytes than the shape": ({"w": entry([1], [0, 8])}, "not a safetensors file"),
    "fewer bytes than the file": ({"w": entry([2], [0, 8])}, "not a safetensors file"),
    "deep lists": (b"[" * 200_000, "not a safetensors file"),
    "deep nesting": (b'{"w":' * 200_000, "not a safetensors file"),
    "deep metadata": (b'{"__metadata__":' + b"[" * 200_000, "not a safetensors file"),
    "a number of 5000 digits": (b'{"w": {"shape": [' + b"9" * 5000 + b"]}}", "not a safetensors"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_absurd_header_is_refused_by_the_file_s_name(
    write_header: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    """One short message with the file and the tensor, whatever its sizes or its JSON are."""
    header, message = HEADERS[name]
    file = write_header(tmp_path / "x.safetensors", header, 4)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 500


def test_what_the_format_allows_is_read(write_header: Callable[..., Path], tmp_path: Path) -> None:
    """Any order in the header, empty tensors, scalars, unknown keys, metadata."""
    header = {
        "b": entry([2], [4, 12]),
        "__metadata__": {"format": "pt"},
        "empty": entry([0, 3], [4, 4]),
        "a": entry([], [0, 4]) | {"note": 1},
    }
    found = read_safetensors(write_header(tmp_path / "x.safetensors", header, 12))[0]
    assert {name: t.shape for name, t in found.items()} == {"b": (2,), "empty": (0, 3), "a": ()}


def test_a_header_longer_than_any_model_needs_is_refused(
    write_header: Callable[..., Path], tmp_path: Path
) -> None:
    """The format allows it, but parsed it would take a hundred times the memory."""
    text = json.dumps({"w": entry([1], [0, 4])}).encode()
    file = write_header(tmp_path / "x.safetensors", text.ljust(MAX_JSON_BYTES), 4)
    assert set(read_safetensors(file)[0]) == {"w"}
    write_header(file, text.ljust(MAX_JSON_BYTES + 1), 4)
    with pytest.raises(CheckpointError, match="header claims 16,777,217"):
        read_safetensors(file)


def test_any_damaged_header_is_refused_or_describes_the_file(tmp_path: Path) -> None:
    """500 random edits: a CheckpointError, or tensors that fill the file to its last byte."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    file = tmp_path / "x.safetensors"
    write_safetensors(file, in_memory(tensors), {"k": '{"a": [1]}'})
    good = file.read_bytes()
    edges, refused = random.Random(0), 0
    for _ in range(500):
        data = bytearray(good)
        at = edges.randrange(8 + int.from_bytes(good[:8], "little"))
        new = bytes(edges.choices(b'0123456789-[]{}",:aF\0\xff', k=edges.randrange(4)))
        data[at : at + edges.randrange(4)] = new
        file.write_bytes(data)
        try:
            found = read_safetensors(file)[0]
        except CheckpointError as error:
            assert str(error).startswith(f"{file}: ")
            refused += 1
        else:
            header = 8 + int.from_bytes(data[:8], "little")
            assert header + sum(tensor.nbytes for tensor in found.values()) == len(data)
            for tensor in found.values():
                assert tensor.read().nbytes == tensor.nbytes
    assert 300 < refused < 500


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": True},
        {"step": -1},
        {"new_layers": "12"},
        {"new_layers": [1.5]},
        {"new_layers": 3},
        {"base_sha256": None},
        {"trainable": ["all"]},
        None,
    ],
    ids=str,
)
def test_a_new_block_file_that_says_odd_things_is_refused(
    write_header: Callable[..., Path], change: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Its metadata are texts that hold JSON, and are checked as the header is."""
    info = {"trainable": "new_blocks", "base_sha256": "ab", "new_layers": [1, 2], "step": 3}
    file, header = tmp_path / "x.safetensors", {"w": entry([1], [0, 4])}
    good = {"__metadata__": {"llamapro": json.dumps(info)}}
    assert read_blocks(write_header(file, header | good, 4)).info == BlocksInfo(
        "new_blocks", "ab", (1, 2), 3
    )
    text = "[" * 200_000 if change is None else json.dumps(info | change)
    write_header(file, header | {"__metadata__": {"llamapro": text}}, 4)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*'llamapro' metadata"):
        read_blocks(file)


# ---- Directories --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Callable[..., ModelConfig]
) -> Path:
    """A checkpoint in several files."""
    config = tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return write_random_checkpoint(tmp_path / "c", config, max_shard_bytes=20_000)


def test_links_to_shards_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """In Hugging Face's cache every file is a link; only names with a path are refused."""
    (tmp_path / "snapshot").mkdir()
    before = Checkpoint.open(checkpoint).sha256()
    for file in checkpoint.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert Checkpoint.open(tmp_path / "snapshot").sha256() == before


@pytest.mark.parametrize("name", [INDEX_FILE, "config.json", "shard"])
def test_a_pipe_is_not_opened(name: str, checkpoint: Path) -> None:
    """Reading it would wait for ever; a link to one is no better."""
    file = sorted(checkpoint.glob("model-*"))[1] if name == "shard" else checkpoint / name
    file.unlink()
    os.mkfifo(checkpoint / "pipe")
    file.symlink_to(checkpoint / "pipe")
    with pytest.raises(UserError, match=file.name):
        Checkpoint.open(checkpoint)


def test_a_tensor_in_two_shards_is_refused(checkpoint: Path) -> None:
    """If their values differ: which of the two counts would depend on the order of the files."""
    first, *_, last = sorted(checkpoint.glob("model-*"))
    before, tensors = Checkpoint.open(checkpoint).sha256(), load_file(last)
    name, value = next(iter(load_file(first).items()))
    save_file(tensors | {name: value}, last)
    assert Checkpoint.open(checkpoint).sha256() == before
    save_file(tensors | {name: value + 1}, last)
    with pytest.raises(CheckpointError, match=rf"{last.name}: '{name}' is also in {first.name}, w"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}',
        '{"weight_map": ' + "[" * 200_000,
        '{"weight_map": {"a": 1e400}}',
    ],
    ids=["twice", "deep", "infinity"],
)
def test_an_odd_index_is_refused(text: str, checkpoint: Path) -> None:
    """Two maps of which readers take different ones, nesting without end, a number as a name."""
    (checkpoint / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / INDEX_FILE}: ")


# ---- Memory -------------------------------------------------------------------------------------


def test_json_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    """The limit itself is still read; one byte more is not."""
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"a": 1}).ljust(100))
    assert read_json(file, 100) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"x\.json: damaged: 100 bytes, over 99"):
        read_json(file, 99)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: missing"):
        read_json(tmp_path / SINGLE_FILE)


def test_a_release_record_of_absurd_sizes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A number of shards is finite."""
    record = {"shards": float("inf")}
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"meta_release": record}))
    with pytest.raises(ConfigError, match="'meta_release' record is damaged"):
        to_meta(checkpoint, tmp_path / "out")
