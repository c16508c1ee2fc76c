"""Where two files or fields answer one question, a difference is said or refused, never ignored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file

from llamapro.checkpoints.base import contained_checkpoint
from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE, Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import CheckpointError, ConfigError, UserError
from llamapro.expansion import insert_after

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def make(tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any) -> Callable[..., Path]:
    """`make(name, seed=0, max_shard_bytes=..., **fields)`: a checkpoint of one layer."""

    def write(name: str, seed: int = 0, max_shard_bytes: int = 10**9, **fields: Any) -> Path:
        config: ModelConfig = tiny_config(
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1} | fields
        )
        how = {"seed": seed, "max_shard_bytes": max_shard_bytes}
        return write_random_checkpoint(tmp_path / name, config, **how)

    return write


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


def check_as_transformers(path: Path) -> None:
    """Asserts that our logits are those of transformers."""
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        theirs = theirs(IDS).logits
        torch.testing.assert_close(Checkpoint.open(path).load(torch.float32)(IDS), theirs)


def test_a_single_file_counts_and_not_an_older_index(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers; that the shards are not read is said."""
    path, newer = make("c", max_shard_bytes=20_000), make("newer", seed=7)
    assert len(list(path.glob("model-*"))) > 1
    shutil.copy(newer / SINGLE_FILE, path)
    assert Checkpoint.open(path).sha256() == Checkpoint.open(newer).sha256()
    check_as_transformers(path)
    said = capsys.readouterr().err
    assert f"{path / SINGLE_FILE}: read, as transformers does; {INDEX_FILE}" in said


def test_an_index_of_the_single_file_is_no_second_answer(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Some repositories have one."""
    path = make("c")
    weight_map = dict.fromkeys(Checkpoint.open(path).tensors, SINGLE_FILE)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    Checkpoint.open(path)
    assert not capsys.readouterr().err


def test_an_index_that_names_another_shard_changes_nothing(make: Callable[..., Path]) -> None:
    """What counts is where a tensor is; transformers reads all shards too."""
    path = make("c", max_shard_bytes=20_000)
    before, index = Checkpoint.open(path).sha256(), json.loads((path / INDEX_FILE).read_text())
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: files[i % len(files)] for i, name in enumerate(names)}
    (path / INDEX_FILE).write_text(json.dumps(index))
    assert Checkpoint.open(path).sha256() == before
    check_as_transformers(path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors"]
)
def test_weights_in_another_layout_are_said_not_to_be_read(
    name: str, make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors count, as in transformers."""
    path = make("c")
    (path / name).write_bytes(b"")
    Checkpoint.open(path)
    assert f"{path / name}: not read; the model is in safetensors" in capsys.readouterr().err


def test_an_adapter_beside_the_weights_is_refused(make: Callable[..., Path]) -> None:
    """transformers adds it to them, if peft is installed."""
    path = make("c")
    (path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: a PEFT adapter beside whole weights, which transf" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_beside_a_tied_embedding_must_be_the_embedding(
    dtype: torch.dtype, make: Callable[..., Path]
) -> None:
    """A copy of it goes on, in any dtype that holds the same numbers; another head is refused."""
    path = make("c", tie_word_embeddings=True)
    tensors = {k: v.bfloat16().float() for k, v in load_file(path / SINGLE_FILE).items()}
    head = tensors["model.embed_tokens.weight"].to(dtype)
    save_file(tensors | {"lm_head.weight": head.clone()}, path / SINGLE_FILE)
    assert "lm_head.weight" not in Checkpoint.open(path).tensors
    check_as_transformers(path)
    head = head.clone()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, path / SINGLE_FILE)
    message = refusal(path)
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in message
    assert "config.json says tie_word_embeddings true: set it to false" in message
    raw = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(raw))
    check_as_transformers(path)


def test_a_tied_embedding_may_have_the_head_s_name(make: Callable[..., Path]) -> None:
    """safetensors' save_model keeps one name of the two, and this is the first."""
    path = make("c", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(path)
    whole, logits = checkpoint.sha256(), checkpoint.load()(IDS)
    safetensors.torch.save_model(checkpoint.load(), str(path / SINGLE_FILE))
    assert "lm_head.weight" in load_file(path / SINGLE_FILE)
    assert Checkpoint.open(path).sha256() == whole
    assert torch.equal(Checkpoint.open(path).load()(IDS), logits)
    check_as_transformers(path)


def test_fp32_norms_among_bf16_are_computed_in_bf16(make: Callable[..., Path]) -> None:
    """As transformers loads them; expand keeps every tensor's own dtype, and verifies."""
    path = make("c")
    tensors = load_file(path / SINGLE_FILE)
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(mixed, path / SINGLE_FILE)
    model = Checkpoint.open(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model.load()(IDS), theirs(IDS).logits)
    expand_checkpoint(model, path.parent / "pro", insert_after(1, [0]))
    pro = Checkpoint.open(path.parent / "pro")
    assert {t.dtype for t in pro.tensors.values()} == {"F32", "BF16"}
    with torch.no_grad():
        assert torch.equal(contained_checkpoint(pro).load()(IDS), theirs(IDS).logits)


def test_quantised_weights_are_refused(make: Callable[..., Path]) -> None:
    """Eight bits without their scales are not the model's numbers."""
    path = make("c")
    tensors = load_file(path / SINGLE_FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path / SINGLE_FILE)
    assert f"{name!r} is I8, quantised" in refusal(path)


def test_a_missing_head_asks_whether_it_is_tied(make: Callable[..., Path]) -> None:
    """config.json says that it is not, the file that it is."""
    path = make("c", tie_word_embeddings=True)
    raw = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(raw))
    assert "missing tensor 'lm_head.weight'" in refusal(path)
    assert "is tie_word_embeddings true, or was it saved without?" in refusal(path)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_stored_frequencies_are_compared_with_theta(
    theta: float, make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Old files hold them; config.json counts, as in transformers, and a difference is said."""
    path = make("c")
    frequencies = theta ** -(torch.arange(0, 4, 2) / 4)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(path / SINGLE_FILE) | {name: frequencies.half()}, path / SINGLE_FILE)
    Checkpoint.open(path)
    assert ("are not the frequencies of config.json" in capsys.readouterr().err) == (theta > 1e4)


def test_params_json_beside_config_json_is_compared(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Mistral's repositories have both; config.json counts, as in transformers."""
    path = make("c")
    params = {"dim": 16, "n_layers": 1, "n_heads": 4, "rope_theta": 10000.0, "vocab_size": -1}
    (path / "params.json").write_text(json.dumps(params))
    Checkpoint.open(path)
    assert not capsys.readouterr().err
    (path / "params.json").write_text(json.dumps(params | {"rope_theta": 1e6}))
    Checkpoint.open(path)
    expected = "rope_theta (rope_theta) is 1000000.0, config.json says 10000.0; config.json counts"
    assert expected in capsys.readouterr().err
    (path / "params.json").write_text("[0.1]")  # another tool's
    Checkpoint.open(path)
    assert "holds no JSON object; config.json counts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "is_said"),
    [
        ({"dtype": "float32"}, False),
        ({"torch_dtype": "float32", "dtype": "float32"}, False),
        ({"torch_dtype": "float16"}, True),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, True),
    ],
)
def test_a_dtype_that_is_not_that_of_the_weights_is_said(
    fields: dict[str, str], is_said: bool, make: Callable[..., Path], capsys: Any
) -> None:
    """They are used as stored; transformers converts them to the dtype of config.json."""
    path = make("c", **fields)
    assert Checkpoint.open(path).dtype == torch.float32
    expected = f"{path}: the weights are float32, config.json says dtype"
    assert (expected in capsys.readouterr().err) == is_said


@pytest.mark.parametrize(
    ("name", "fields", "is_said"),
    [
        ("lm_head.weight", {}, True),
        ("lm_head.weight", {"dtype": "float32"}, False),
        ("model.norm.weight", {}, False),  # as many models have it
    ],
)
def test_matrices_of_several_dtypes_without_one_in_config_json_are_said(
    name: str, fields: dict[str, str], is_said: bool, make: Callable[..., Path], capsys: Any
) -> None:
    """We compute in the dtype of most, transformers in that of the first tensor."""
    path = make("c", **fields)
    tensors = load_file(path / SINGLE_FILE)
    save_file(tensors | {name: tensors[name].bfloat16()}, path / SINGLE_FILE, {"format": "pt"})
    assert Checkpoint.open(path).dtype == torch.float32
    assert ("matrices are BF16 and F32" in capsys.readouterr().err) == is_said


def test_a_key_twice_in_config_json_is_refused(make: Callable[..., Path]) -> None:
    """Which of the two counts depends on the reader."""
    path = make("c")
    text = (path / "config.json").read_text().replace("{", '{"rms_norm_eps": 0.1,', 1)
    (path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: damaged: .*'rms_norm_eps' comes twice"):
        Checkpoint.open(path)


# ---- Names that say where a file comes from ------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        (lambda n: f"_orig_mod.{n}", "carry '_orig_mod.' of torch.compile"),
        (lambda n: f"module.{n}", "carry 'module.' of DistributedDataParallel"),
        (lambda n: f"base_model.model.{n}", "carry 'base_model.model.' of PEFT"),
        (lambda n: f"_fsdp_wrapped_module.{n}", "carry '_fsdp_wrapped_module.' of FSDP"),
        (lambda n: n.replace("layers.0.", "layers.0._orig_mod."), "carry '_orig_mod.' of torch.co"),
        (lambda n: n.replace("q_proj.", "q_proj.base_layer."), "carry '.base_layer.' of PEFT"),
        (lambda n: n.replace("lm_head", "lm_head.original_module"), "'.original_module.' of PEFT"),
        (lambda n: f"student.{n}", "begin with 'student.model.', expected 'model.', such as 's"),
        (lambda n: n.replace("model.", "model.language_model."), "begin with 'model.language_m"),
        (lambda n: n.replace("layers", "blocks"), "unexpected tensor 'model.blocks.0"),
    ],
)
def test_names_of_a_wrapper_are_told_apart(
    rename: Callable[[str], str], expected: str, make: Callable[..., Path]
) -> None:
    """The message has the part, whose it is, and one name that is in the file."""
    path = make("c")
    tensors = {rename(name): t for name, t in load_file(path / SINGLE_FILE).items()}
    save_file(tensors, path / SINGLE_FILE)
    message = refusal(path)
    assert expected in message and any(repr(name) in message for name in tensors)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "rename", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"], ids=["bare", "doubled"]
)
def test_names_without_model_or_with_it_twice_are_read(
    rename: Callable[[str], str], is_tied: bool, make: Callable[..., Path]
) -> None:
    """Without it a `LlamaModel` saves, and Lightning adds one; transformers reads both."""
    path = make("c", tie_word_embeddings=is_tied)
    whole, tensors = Checkpoint.open(path).sha256(), load_file(path / SINGLE_FILE)
    save_file({rename(name): t for name, t in tensors.items()}, path / SINGLE_FILE)
    assert Checkpoint.open(path).sha256() == whole
    check_as_transformers(path)
    both = {"norm.weight": torch.ones(16), "model.norm.weight": torch.ones(16)}
    save_file(tensors | both, path / SINGLE_FILE)
    assert "unexpected tensor 'norm.weight'" in refusal(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("score.weight", ""),
        ("model.layers.0.self_attn.q_proj.bias", "; is attention_bias true?"),
        ("model.layers.0.mlp.down_proj.bias", "; is mlp_bias true?"),
        ("model.layers.0.mlp.up_proj.qzeros", ", of quantised weights; use the original ones"),
        ("model.layers.0.mlp.up_proj.biases", ", of quantised weights; use the original ones"),
        ("model.layers.0.self_attn.masked_bias", ""),
    ],
)
def test_a_tensor_too_many_comes_with_the_fix(
    name: str, hint: str, make: Callable[..., Path]
) -> None:
    """transformers leaves them out; here that is the user's decision."""
    path = make("c")
    save_file(load_file(path / SINGLE_FILE) | {name: torch.tensor(1.0)}, path / SINGLE_FILE)
    expected = f"{path}: transformers leaves these out: remove them if that is right, or correct "
    assert (
        refusal(path) == f"{expected}config.json: {SINGLE_FILE}: unexpected tensor {name!r}{hint}"
    )


def test_a_missing_tensor_is_no_missing_layer(make: Callable[..., Path]) -> None:
    """It is named, and config.json is not said to be wrong."""
    path = make("c", num_hidden_layers=2)
    tensors = load_file(path / SINGLE_FILE)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path / SINGLE_FILE)
    told = refusal(path)
    assert "missing tensor 'model.layers.1.input_layernorm.weight'" in told
    assert "num_hidden_layers" not in told


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_one_message(layers: int, make: Callable[..., Path]) -> None:
    """A config.json that was not edited, or a shard that is not listed: not a list of tensors."""
    path = make("c", num_hidden_layers=2)
    raw = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(raw))
    expected = f"num_hidden_layers is {layers}, but the files hold 2 layers; correct it, or fetch"
    assert refusal(path).startswith(f"{path / 'config.json'}: {expected}")


def test_rope_s_tables_of_old_files_are_passed_over(make: Callable[..., Path]) -> None:
    """They are computed from config.json, as in transformers."""
    path = make("c")
    whole, tensors = Checkpoint.open(path).sha256(), load_file(path / SINGLE_FILE)
    place = "model.layers.0.self_attn.rotary_emb"
    tensors |= {f"{place}.{name}_cached": torch.ones(1, 1, 8, 4) for name in ("cos", "sin")}
    tensors |= {"model.rotary_emb.original_inv_freq": torch.tensor([1.0, 0.01])}
    save_file(tensors, path / SINGLE_FILE)
    assert Checkpoint.open(path).sha256() == whole


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json", INDEX_FILE])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "a git-lfs pointer",
        ),
        ("<!DOCTYPE html><html>", "a web page, not the file"),
    ],
)
def test_what_stands_in_a_file_s_place_is_named(
    name: str, content: str, expected: str, make: Callable[..., Path]
) -> None:
    """A clone without git-lfs, a failed download."""
    path = make("c", max_shard_bytes=20_000 if name == INDEX_FILE else 10**9)
    (path / name).write_text(content)
    assert refusal(path).startswith(f"{path / name}: {expected}")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["params.json", "consolidated.safetensors"], "this is Mistral's own layout: use"),
        (["adapter_config.json", "adapter_model.safetensors"], "this is a PEFT adapter: merge it"),
        (["m.gguf"], "run 'llamapro from-gguf FILE OUT_DIR' on m.gguf first"),
        (["model.fp16.safetensors"], "found model.fp16.safetensors"),
        (["adapter_model.safetensors", "rng_state.pth"], "this is a PEFT adapter: merge it"),
        (["consolidated-00001-of-00002.safetensors"], "this is Mistral's own layout: use"),
        (["lit_model.pth", "training_args.bin"], "pickled weights (lit_model.pth) are not read"),
        (["hf_model_0001_0.pt"], "pickled weights (hf_model_0001_0.pt) are not read: save the"),
        (["tf_model.h5"], "weights in another format (tf_model.h5) are not read: save the model"),
        (["training_args.bin"], "no weights found; expected model.safetensors"),
        (["checkpoint-500/config.json"], "a model inside it, such as {path}/checkpoint-500"),
        (["refs/main", "snapshots/ab/config.json"], "inside it, such as {path}/snapshots/ab"),
    ],
)
def test_a_directory_without_a_model_says_what_it_is(
    files: list[str], expected: str, tmp_path: Path
) -> None:
    """Each with the next step."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert expected.format(path=tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json", "model-00001-of-00002.safetensors"])
def test_a_link_to_nothing_is_named(name: str, make: Callable[..., Path]) -> None:
    """The blobs of a cache were removed, or not copied."""
    path = make("c", max_shard_bytes=20_000 if "-of-" in name else 10**9)
    (path / name).unlink(missing_ok=True)
    if "-of-" in name:
        name = json.loads((path / INDEX_FILE).read_text())["weight_map"]["model.norm.weight"]
        (path / name).unlink()
    (path / name).symlink_to("../blobs/ab")
    assert refusal(path) == f"{path / name}: a link to ../blobs/ab, which does not exist"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", "(did you mean hf://meta-llama/Llama-2-7b-hf?)"),
        ("https://huggingface.co/a/b", "(did you mean hf://a/b?)"),
        ("https://huggingface.co/a/b/tree/main", "(did you mean hf://a/b?)"),
        ("hf.co/a/b", "(did you mean hf://a/b?)"),
        ("no/such/place", "no such checkpoint directory"),
    ],
)
def test_a_bare_name_of_the_hub_is_answered_with_its_scheme(given: str, expected: str) -> None:
    """Whoever copies a name from transformers is told how it is written here."""
    assert refusal(Path(given)).endswith(expected)


def test_a_file_in_a_directory_s_place_and_a_home(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of a file is named; `~` is the home, which a shell leaves alone behind `=`."""
    path = make("c")
    assert refusal(path / SINGLE_FILE).endswith(f"(give its directory, {path})")
    monkeypatch.setenv("HOME", str(path.parent))
    assert Checkpoint.open("~/c").path == path
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        Checkpoint.open("~/nowhere")
