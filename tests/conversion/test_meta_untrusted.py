"""Files of strangers that ask for code or for absurd sizes: none is executed, no memory taken."""

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

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE
from llamapro.config import ModelConfig
from llamapro.conversion.meta_release import Shards, describe, read_params
from llamapro.conversion.pth_file import MAX_PICKLE_BYTES, load_pth
from llamapro.errors import CheckpointError, ConfigError
from llamapro.files import MAX_JSON_BYTES


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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": {"w": torch.ones(3)}}, r"'model' \(dict\)"),
        ({"epoch": 3}, r"'epoch' \(int\)"),
        ({"step": torch.tensor(3)}, r"'step' \(tensor \[\]\)"),
        ({7: torch.ones(3)}, r"7 \(tensor \[3\]\)"),
    ],
)
def test_what_is_no_plain_tensor_is_named(more: dict[Any, Any], said: str, tmp_path: Path) -> None:
    """Trainers save the tensors inside another dictionary, beside their state."""
    torch.save({"w": torch.ones(3)} | more, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=f"{said}; save the dictionary of the model's tensors"
    ):
        load_pth(tmp_path / "x.pth")


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
    tmp_path: Path,
    write_random_checkpoint: Any,
    write_header: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
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
    empty = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(250_000)}
    calls[write_header(path / SINGLE_FILE, empty, 0)] = "header"
    long = (MAX_JSON_BYTES + 1).to_bytes(8, "little") + b'{"w": ['
    calls[sparse(tmp_path / "header.safetensors", long)] = "header"
    huge = {"w": {"dtype": "F32", "shape": [1 << 44], "data_offsets": [0, 1 << 46]}}
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
