"""Files of strangers: whatever they say, they are refused by name before memory is taken."""

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE, Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo, read_blocks
from llamapro.checkpoints.tensors import TensorSpec, read_safetensors, tensor_chunks
from llamapro.checkpoints.writing import write_safetensors
from llamapro.config import ModelConfig
from llamapro.conversion.meta import to_meta
from llamapro.conversion.meta_release import Shards, describe, read_params
from llamapro.conversion.pth_file import MAX_PICKLE_BYTES, load_pth
from llamapro.errors import CheckpointError, ConfigError, UserError
from llamapro.files import MAX_JSON_BYTES, read_json


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_header(file: Path, header: bytes | dict[str, Any], data: int) -> Path:
    """A safetensors file with this header and `data` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return file


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
def test_an_absurd_header_is_refused_by_the_file_s_name(name: str, tmp_path: Path) -> None:
    """One short message with the file and the tensor, whatever its sizes or its JSON are."""
    header, message = HEADERS[name]
    file = write_header(tmp_path / "x.safetensors", header, 4)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 500


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    """Any order in the header, empty tensors, scalars, unknown keys, metadata."""
    header = {
        "b": entry([2], [4, 12]),
        "__metadata__": {"format": "pt"},
        "empty": entry([0, 3], [4, 4]),
        "a": entry([], [0, 4]) | {"note": 1},
    }
    found = read_safetensors(write_header(tmp_path / "x.safetensors", header, 12))[0]
    assert {name: t.shape for name, t in found.items()} == {"b": (2,), "empty": (0, 3), "a": ()}


def test_a_header_longer_than_any_model_needs_is_refused(tmp_path: Path) -> None:
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
    codes = {"a": "F32", "b": "BF16"}
    specs = [TensorSpec(name, codes[name], tuple(t.shape)) for name, t in tensors.items()]
    file = tmp_path / "x.safetensors"
    write_safetensors(file, specs, lambda s: tensor_chunks(tensors[s.name]), {"k": '{"a": [1]}'})
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
    change: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Its metadata are texts that hold JSON, and are checked as the header is."""
    info = {"trainable": "new_blocks", "base_sha256": "ab", "new_layers": [1, 2], "step": 3}
    file, header = tmp_path / "x.safetensors", {"w": entry([1], [0, 4])}
    good = {"__metadata__": {"llamapro": json.dumps(info)}}
    assert read_blocks(write_header(file, header | good, 4))[1] == BlocksInfo(
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


# ---- Meta releases ------------------------------------------------------------------------------


class Asked:
    """A pickle that calls a function, which torch.load with weights_only allows."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def save_asking(file: Path, function: Any, *arguments: Any) -> None:
    """A `.pth` file whose pickle calls the function, laid out as PyTorch does."""
    with zipfile.ZipFile(file, "w") as archive:
        pickled = pickle.dumps({"w": Asked(function, *arguments)}, protocol=2)
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/version", b"3\n")


def recompress(file: Path, method: int, more: int = 0) -> None:
    """Writes the archive again, with `more` zero bytes (whole MiB) after its pickle."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, data in entries.items():
            with archive.open(name, "w") as out:
                out.write(data)
                for _ in range(more >> 20 if name.endswith(".pkl") else 0):
                    out.write(bytes(1 << 20))


def test_a_pickle_may_ask_for_tensors_and_nothing_else(tmp_path: Path) -> None:
    """Calls that weights_only allows can take any amount of memory: they are refused by name."""
    file = tmp_path / "x.pth"
    for function in (bytearray, torch.UntypedStorage, set):
        save_asking(file, function, 1 << 50 if function is not set else ())
        name = f"{function.__module__}.{function.__name__}".replace("builtins", r"\w+")
        with pytest.raises(CheckpointError, match=rf"x\.pth: refused; .* asks for '{name}'"):
            load_pth(file)
    tensors = {"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2))}
    torch.save(tensors, file)
    assert load_pth(file).keys() == tensors.keys()


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A hundredfold: 32 MB in a file of 256 KB. Stored, a large pickle is refused too.

    Compressed numbers of any size are refused: mapped, they would be other numbers.
    """
    file = tmp_path / "x.pth"
    torch.save({"w": torch.randn(5000), "v": torch.randn(5000)}, file)
    recompress(file, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"x\.pth: refused: '.*' is compressed"):
        load_pth(file)
    torch.save({"w": torch.ones(3)}, file)
    recompress(file, zipfile.ZIP_DEFLATED, 32 << 20)
    assert file.stat().st_size < 1 << 18
    with pytest.raises(CheckpointError, match=r"x\.pth: refused: '.*' is compressed"):
        load_pth(file)
    torch.save({"w": torch.ones(3)}, file)
    recompress(file, zipfile.ZIP_STORED, MAX_PICKLE_BYTES)
    with pytest.raises(CheckpointError, match=r"x\.pth: refused: '.*\.pkl' has .* over"):
        load_pth(file)


def test_one_number_shown_as_many_is_refused(tmp_path: Path) -> None:
    """A stride of 0: to copy such a tensor would take its whole shape. Shared storage is fine."""
    file, whole = tmp_path / "x.pth", torch.arange(12.0).view(3, 4)
    torch.save({"w": torch.ones(1).expand(1 << 40, 4)}, file)
    with pytest.raises(CheckpointError, match=r"x\.pth: refused: 'w' \[1099511627776, 4\] has"):
        load_pth(file)
    torch.save({"a": whole[:, :2], "b": whole.T}, file)
    assert torch.equal(load_pth(file)["b"], whole.T)


def test_any_damaged_shard_is_refused_or_holds_plain_tensors(tmp_path: Path) -> None:
    """200 random bytes changed, of the pickle, the archive's directory and the numbers."""
    file, refused = tmp_path / "x.pth", 0
    torch.save({"w": torch.ones(2, 3), "v": torch.ones(4, dtype=torch.bfloat16)}, file)
    good, chance = file.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            assert all(t.nbytes < len(data) for t in load_pth(file).values())
        except CheckpointError as error:
            assert str(error).startswith(f"{file}: ")
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth"])
def test_a_pipe_in_a_release_is_not_opened(name: str, tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises((ConfigError, CheckpointError), match=rf"{name}: .*not a plain file"):
        read_params(tmp_path / name) if name == "params.json" else Shards(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("n_layers", 10**12), ("dim", 10**15)])
def test_params_that_claim_too_much_are_refused(key: str, value: int, tmp_path: Path) -> None:
    """Before a name of each of the layers is made, or a weight of that size."""
    params = {"dim": 4, "n_layers": 1, "n_heads": 1, "multiple_of": 1, "norm_eps": 1e-5} | {
        key: value
    }
    torch.save({"norm.weight": torch.ones(4)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"params\.json: {key} is {value:,}"):
        describe(params, Shards(tmp_path), None)


# ---- Memory -------------------------------------------------------------------------------------

# With the address space limited to 256 MB more than the program has when it begins.
LIMITED = """
import json, resource, sys
from pathlib import Path
from llamapro.checkpoints.new_blocks import find_blocks
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import UserError
from llamapro.conversion.meta_release import Shards, read_params
from llamapro.checkpoints.tensors import read_safetensors
status = Path("/proc/self/status").read_text()
now = int(status.split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20),) * 2)
calls = {"open": Checkpoint.open, "header": read_safetensors, "blocks": find_blocks,
         "shards": Shards, "params": read_params}
said = {}
for path, call in json.loads(sys.argv[1]).items():
    try:
        calls[call](Path(path))
        said[path] = "opened"
    except UserError as error:
        said[path] = f"refused: {error}"
    except MemoryError:
        said[path] = "MemoryError"
print(json.dumps(said))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_absurd_files_are_refused_before_memory_is_taken(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Callable[..., ModelConfig]
) -> None:
    """Each asks for terabytes, or has gigabytes (of holes): a message, in 256 MB."""
    config = tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    calls: dict[Path, str] = {}

    def sparse(file: Path, start: bytes = b"{") -> Path:
        file.write_bytes(start)
        os.truncate(file, 3 << 30)
        return file

    for key, value in (("num_hidden_layers", 10**12), ("hidden_size", 1 << 62), ("size", 0)):
        path = write_random_checkpoint(tmp_path / key, config)
        text = json.loads((path / "config.json").read_text()) | {key: value}
        (path / "config.json").write_text(json.dumps(text))
        calls[path] = "open"
    sparse(tmp_path / "size" / "config.json")
    path = write_random_checkpoint(tmp_path / "index", config)
    sparse(path / INDEX_FILE)
    (path / SINGLE_FILE).unlink()
    calls[path] = "open"
    path = write_random_checkpoint(tmp_path / "empty", config)
    empty = {f"{i}": entry([0], [0, 0]) for i in range(250_000)}
    calls[write_header(path / SINGLE_FILE, empty, 0)] = "header"
    long = (MAX_JSON_BYTES + 1).to_bytes(8, "little") + b'{"w": ['
    calls[sparse(tmp_path / "header.safetensors", long)] = "header"
    huge = {"w": entry([1 << 44], [0, 1 << 46])}
    calls[write_header(tmp_path / "tensor.safetensors", huge, 4)] = "header"
    calls[write_header(tmp_path / "blocks.safetensors", huge, 4)] = "blocks"
    for name, function in (("array", bytearray), ("storage", torch.UntypedStorage)):
        (tmp_path / name).mkdir()
        save_asking(tmp_path / name / "consolidated.00.pth", function, 1 << 40)
        calls[tmp_path / name] = "shards"
    (tmp_path / "bomb").mkdir()
    torch.save({"w": torch.ones(3)}, tmp_path / "bomb" / "consolidated.00.pth")
    recompress(tmp_path / "bomb" / "consolidated.00.pth", zipfile.ZIP_DEFLATED, 300 << 20)
    calls[tmp_path / "bomb"] = "shards"
    calls[sparse(tmp_path / "params.json")] = "params"

    words = json.dumps({str(path): call for path, call in calls.items()})
    command = [sys.executable, "-c", LIMITED, words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said.keys() == {str(path) for path in calls}
    for path, message in said.items():
        assert message.startswith(f"refused: {path}"), message[:500]


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
