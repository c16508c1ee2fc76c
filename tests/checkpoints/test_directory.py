"""Checkpoint directories: what is written is read back, what is damaged is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE, Checkpoint
from llamapro.checkpoints.tensors import combine_hashes
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, ConfigError

SMALL_SHARD = 60_000  # bytes: several files for the tiny model


@pytest.fixture
def single(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Callable[..., ModelConfig]
) -> Path:
    """A checkpoint of one file, 2 layers."""
    return write_random_checkpoint(tmp_path / "single", tiny_config(num_hidden_layers=2))


@pytest.fixture
def sharded(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Callable[..., ModelConfig]
) -> Path:
    """The same weights in several files."""
    config = tiny_config(num_hidden_layers=2)
    path = write_random_checkpoint(tmp_path / "sharded", config, max_shard_bytes=SMALL_SHARD)
    assert len(list(path.glob("model-*.safetensors"))) > 3
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "tied", "max_shard_bytes"),
    [  # every pair of values
        (torch.float32, False, 10**9),
        (torch.float32, True, SMALL_SHARD),
        (torch.bfloat16, False, SMALL_SHARD),
        (torch.bfloat16, True, 10**9),
    ],
)
def test_what_is_written_is_read_back(
    dtype: torch.dtype,
    tied: bool,
    max_shard_bytes: int,
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Any,
    write_random_checkpoint: Any,
) -> None:
    """By tensor, by state_dict, by model and by the safetensors library: the same bits."""
    config = tiny_config(tie_word_embeddings=tied)
    tensors = random_tensors(config, dtype, 3)
    path = write_random_checkpoint(tmp_path / "c", config, dtype, 3, max_shard_bytes)
    assert (path / INDEX_FILE).exists() == (max_shard_bytes == SMALL_SHARD)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config == config and checkpoint.dtype == dtype
    assert list(checkpoint.tensors) == list(tensors)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())

    by_library: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        by_library |= load_file(file)
    state = checkpoint.state_dict()
    model = checkpoint.load()
    assert by_library.keys() == state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        one = checkpoint.tensors[name].read()
        in_model = model.get_parameter(name)
        for found in (one, by_library[name], state[name], in_model):
            assert found.dtype == dtype and torch.equal(found, tensor), name
        assert not in_model.requires_grad
    assert not model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("dtype", "tied", "max_shard_size"),
    [  # every pair of values
        (torch.float32, False, "1GB"),
        (torch.float32, True, "60KB"),
        (torch.bfloat16, False, "60KB"),
        (torch.bfloat16, True, "1GB"),
    ],
)
def test_what_transformers_saves_is_opened(
    dtype: torch.dtype,
    tied: bool,
    max_shard_size: str,
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
) -> None:
    """Its single file and its shards, its config.json; the logits are its logits."""
    torch.manual_seed(0)
    config = tiny_config(tie_word_embeddings=tied)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**config.raw), dtype=dtype
    )
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_size == "60KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype == dtype
    for name, parameter in theirs.named_parameters():
        assert torch.equal(checkpoint.tensors[name].read(), parameter), name
    ids = torch.arange(2 * 33).view(2, 33)
    with torch.no_grad():
        difference = checkpoint.load(torch.float32)(ids) - theirs.float().eval()(ids).logits
    assert difference.abs().max() < 1e-5


@torch.no_grad()
def test_what_is_written_is_loaded_by_transformers(sharded: Path) -> None:
    """AutoModelForCausalLM finds every tensor, none missing, none too many."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        sharded, output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in Checkpoint.open(sharded).state_dict().items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_another_dtype_is_converted_on_request(single: Path) -> None:
    """state_dict(bf16) and load(bf16) round each value once; the file's own dtype is mapped."""
    checkpoint = Checkpoint.open(single)
    narrow = checkpoint.load(torch.bfloat16)
    for name, tensor in checkpoint.state_dict(torch.bfloat16).items():
        assert torch.equal(tensor, checkpoint.tensors[name].read().bfloat16())
        assert torch.equal(tensor, narrow.get_parameter(name))


def test_the_hash_is_of_the_weights_and_not_of_the_files(single: Path, sharded: Path) -> None:
    """One file or many: the same; one flipped bit, another name or dtype: another."""
    digest = Checkpoint.open(single).sha256()
    assert len(digest) == 64
    assert Checkpoint.open(sharded).sha256() == digest
    tensors = load_file(single / SINGLE_FILE)
    save_file(dict(reversed(tensors.items())), single / SINGLE_FILE, {"format": "pt"})
    assert Checkpoint.open(single).sha256() == digest, "the order in the file does not matter"

    a, b = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qo")  # of the same shape
    swapped = tensors | {a: tensors[b], b: tensors[a]}
    save_file(swapped, single / SINGLE_FILE)
    digests = {digest, Checkpoint.open(single).sha256()}
    save_file({n: t.bfloat16() for n, t in tensors.items()}, single / SINGLE_FILE)
    digests.add(Checkpoint.open(single).sha256())
    save_file(tensors, single / SINGLE_FILE)
    data = bytearray((single / SINGLE_FILE).read_bytes())
    data[-1] ^= 1
    (single / SINGLE_FILE).write_bytes(data)
    digests.add(Checkpoint.open(single).sha256())
    assert len(digests) == 4


def test_hashes_are_combined_whatever_their_order(single: Path) -> None:
    """By name: the order in which tensors were hashed does not matter, which is which does."""
    specs = list(Checkpoint.open(single).tensors.values())
    hashes = [(spec, f"{number:064x}") for number, spec in enumerate(specs)]
    digest = combine_hashes(hashes)
    assert combine_hashes(reversed(hashes)) == digest
    rotated = [(spec, hashes[i - 1][1]) for i, spec in enumerate(specs)]
    assert combine_hashes(rotated) != digest


def test_one_layer_and_the_companions_are_listed(single: Path) -> None:
    """Layer 1 has its nine tensors under their names inside it; the tokenizer travels along."""
    checkpoint = Checkpoint.open(single)
    layer = checkpoint.layer(1)
    assert len(layer) == 9
    weight = layer["mlp.up_proj.weight"]
    assert weight is checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    (single / "generation_config.json").write_text("{}")
    (single / "notes.txt").write_text("")
    names = [file.name for file in checkpoint.companions()]
    assert names == ["generation_config.json", "tokenizer.model"]


def test_derived_tensors_of_old_files_are_passed_over(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Callable[..., ModelConfig]
) -> None:
    """rotary_emb.inv_freq, and a tied model's stored lm_head, change nothing."""
    config = tiny_config(tie_word_embeddings=True)
    path = write_random_checkpoint(tmp_path / "c", config)
    before = Checkpoint.open(path)
    digest, names = before.sha256(), list(before.tensors)
    tensors = load_file(path / SINGLE_FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / SINGLE_FILE)
    after = Checkpoint.open(path)
    assert list(after.tensors) == names and after.sha256() == digest
    assert set(after.load().state_dict()) == {*names, "lm_head.weight"}


def test_a_missing_directory_or_configuration_is_named(single: Path, tmp_path: Path) -> None:
    """The path, or config.json inside it."""
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such checkpoint directory"
    assert "no such checkpoint directory" in refusal(single / SINGLE_FILE)
    (single / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"single/config\.json: no such file"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("consolidated.00.pth", "convert it first: llamapro from-meta '"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights"),
        ("readme.txt", f"expected {SINGLE_FILE} or {INDEX_FILE}"),
    ],
)
def test_a_directory_of_another_kind_says_what_to_do(
    name: str, expected: str, tmp_path: Path
) -> None:
    """Meta's release, pickled weights, and neither; a command with the path as a shell takes it."""
    (folder := tmp_path / "a model").mkdir()
    (folder / name).write_bytes(b"")
    message = refusal(folder)
    assert message.startswith(f"{folder}: no weights found; ") and expected in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """By its path, with the index as the witness."""
    shard = sorted(sharded.glob("model-*"))[1]
    shard.unlink()
    assert refusal(sharded) == f"{shard}: missing, but {INDEX_FILE} lists it"


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    """Empty, inside the length, the header or the data: one message with the file's size."""
    shard = sorted(sharded.glob("model-*"))[1]
    data = shard.read_bytes()[:keep]
    shard.write_bytes(data)
    message = refusal(sharded)
    assert message.startswith(f"{shard}: ") and f"{len(data):,} bytes" in message


def test_bytes_after_the_end_are_refused(single: Path) -> None:
    """A longer file than the header describes is damaged too."""
    with open(single / SINGLE_FILE, "ab") as file:
        file.write(b"\0")
    assert f"{single / SINGLE_FILE}: truncated or damaged" in refusal(single)


def test_any_flipped_bit_of_the_header_length_is_refused(single: Path) -> None:
    """Too long, too short or absurd: never a traceback, a wrong tensor or a huge allocation."""
    file = single / SINGLE_FILE
    good = file.read_bytes()
    for bit in range(64):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        message = refusal(single)
        assert message.startswith(f"{file}: ")
        claimed = int.from_bytes(data[:8], "little")
        if claimed > len(data):
            assert f"header claims {claimed:,}" in message


def test_every_wrong_tensor_is_in_one_message(single: Path) -> None:
    """A shape, a missing and an unexpected tensor, each with its name and the shapes."""
    tensors = load_file(single / SINGLE_FILE)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    tensors["model.layers.7.extra"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    save_file(tensors, single / SINGLE_FILE)
    message = refusal(single)
    assert message.startswith(f"{single}: ")
    assert "missing tensor 'model.norm.weight', expected [64]" in message
    assert "'model.layers.0.self_attn.k_proj.weight' is [16, 64]" in message
    assert "config.json says [32, 64]" in message
    assert f"{SINGLE_FILE}: unexpected tensor 'model.layers.7.extra'" in message


def test_a_long_list_of_wrong_tensors_is_cut(
    single: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    """Eight are named, the others counted."""
    (single / "config.json").write_text(
        tiny_config(num_hidden_layers=2, attention_bias=True, mlp_bias=True).to_json()
    )
    message = refusal(single)
    assert message.count("missing tensor") == 8
    assert message.endswith("; and 6 more")


def test_shards_may_have_any_name(sharded: Path) -> None:
    """As a browser saves them, for example."""
    shards, index = sorted(sharded.glob("model-*")), (sharded / INDEX_FILE).read_text()
    for number, shard in enumerate(shards):
        index = index.replace(shard.name, f"shard {number}+(1)%20.safetensors")
        shard.rename(sharded / f"shard {number}+(1)%20.safetensors")
    (sharded / INDEX_FILE).write_text(index)
    assert Checkpoint.open(sharded).tensors.keys() == json.loads(index)["weight_map"].keys()


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "x.bin",
        "\n.safetensors",
        "",
        3,
    ],
)
def test_an_index_that_leaves_the_directory_is_refused(
    name: Any, sharded: Path, tmp_path: Path
) -> None:
    """Even where the file exists and holds the right tensors."""
    shard = sorted(sharded.glob("model-*"))[0]
    shutil.copy(shard, tmp_path / "x.safetensors")
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert f"shard name {name!r} is not a plain file name in .safetensors" in refusal(sharded)


def test_an_index_may_name_shards_in_its_own_directory(sharded: Path) -> None:
    """As "./model-00001-of-00002.safetensors", which transformers reads."""
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    before = Checkpoint.open(sharded).sha256()
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert Checkpoint.open(sharded).sha256() == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}']
)
def test_a_damaged_index_is_named(text: str, sharded: Path) -> None:
    """Not JSON, or not an index."""
    (sharded / INDEX_FILE).write_text(text)
    assert refusal(sharded).startswith(f"{sharded / INDEX_FILE}: ")
