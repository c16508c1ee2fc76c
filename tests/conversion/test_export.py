"""transformers and vLLM read what `merge` writes: classes, weights, files, token ids.

The same with transformers 4 and with llama.cpp is in test_ecosystem.py.
"""

import inspect
import json
import shutil
import struct
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.writing import write_checkpoint
from llamapro.conversion.companions import write_companions
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import assemble_checkpoint, merge_checkpoint
from llamapro.expansion import insert_after
from llamapro.inference.sampling import generate
from llamapro.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="pip install -e '.[hf]'")

KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 16,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}


@pytest.fixture(scope="module")
def vocabulary(
    tmp_path_factory: pytest.TempPathFactory, train_tokenizer: Callable[..., bytes]
) -> Path:
    """A tokenizer.model as the demo trains it, of 400 tokens."""
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    file.write_bytes(train_tokenizer([inspect.getsource(textwrap), "Grüße, мир"], 400))
    return file


@pytest.fixture(scope="module")
def export(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
    write_trained: Callable[..., Path],
    vocabulary: Path,
) -> Callable[..., Path]:
    """`export(kind, max_shard_bytes=...)`: expanded, its new blocks changed, and merged."""
    home = tmp_path_factory.mktemp("export")

    def make(kind: str, **options: Any) -> Path:
        out = home / "-".join([kind, *map(str, options.values())])
        if out.exists():
            return out
        work = tmp_path_factory.mktemp(kind)
        base = write_random_checkpoint(work / "base", tiny_config(**KINDS[kind]))
        shutil.copyfile(vocabulary, base / "tokenizer.model")
        expand_checkpoint(Checkpoint.open(base), work / "pro", insert_after(4, [1, 3]))
        pro = Checkpoint.open(work / "pro")
        blocks = write_trained(work / "blocks.safetensors", pro, 0.05)
        with pytest.MonkeyPatch.context() as patch:
            write = partial(write_checkpoint, **options)
            patch.setattr("llamapro.conversion.merge.write_checkpoint", write)
            merge_checkpoint(pro, blocks, out)
        return out

    return make


# ---- transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_all_weights_and_continues_as_we_do(
    export: Callable[..., Path], kind: str
) -> None:
    """No tensor missing, left over or renamed; 40 greedy tokens, for Mistral past its window."""
    path = export(kind)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, local_files_only=True
    )
    assert {name: list(found) for name, found in report.items() if found} == {}
    assert type(theirs).__name__ == KINDS[kind].get("architectures", ["LlamaForCausalLM"])[0]
    checkpoint = Checkpoint.open(path)
    assert theirs.config.num_hidden_layers == 6
    assert getattr(theirs.config, "sliding_window", None) == checkpoint.config.sliding_window
    prompt = torch.arange(1, 25)[None]
    expected = [int(token) for token in generate(checkpoint.load(), prompt, 40)]
    found = theirs.generate(prompt, do_sample=False, min_new_tokens=40, max_new_tokens=40)
    assert len(set(expected)) > 5 and 2 not in expected
    assert found[0, prompt.shape[1] :].tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_auto_tokenizer_gives_our_ids(
    export: Callable[..., Path], kind: str, texts: list[str]
) -> None:
    """On code, runs of spaces and many scripts; with BOS before; and the texts come back."""
    theirs = transformers.AutoTokenizer.from_pretrained(export(kind), local_files_only=True)
    ours = Tokenizer.load(export(kind))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [ours.bos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids)


def test_auto_tokenizer_gives_our_ids_with_llama_2s_vocabulary(
    shared: Path, tmp_path: Path, tiny_config: Callable[..., Any], texts: list[str]
) -> None:
    """Its runs of spaces have scores out of the order of their ids."""
    file = shared / "tokenizers" / "llama-2" / "tokenizer.model"
    if not file.exists():
        pytest.skip(f"needs {file}")
    write_companions(tmp_path, tiny_config(), [file])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = Tokenizer.load(file)
    for text in texts:
        assert theirs.encode(text) == ours.encode(text, bos=True)


def test_the_files_for_transformers_change_nothing_here(
    export: Callable[..., Path], vocabulary: Path
) -> None:
    """Same fingerprint: tokens stored with the vocabulary alone fit the merged model."""
    path = export("llama")
    assert (path / "tokenizer.json").exists() and (path / "tokenizer_config.json").exists()
    assert Tokenizer.load(path).fingerprint == Tokenizer.load(vocabulary).fingerprint


def test_a_model_trained_from_its_configuration_alone_has_a_tokenizer_by_the_usual_name(
    export: Callable[..., Path],
    write_trained: Callable[..., Path],
    vocabulary: Path,
    tmp_path: Path,
) -> None:
    """The run may have been given a file of any name."""
    named = tmp_path / "mine.model"
    shutil.copyfile(vocabulary, named)
    start = Checkpoint.open(export("llama"))
    write_trained(tmp_path / "trainable.safetensors", start, trainable="all")
    state = {"step": 1, "settings": {"model.tokenizer": str(named)}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    config = start.path / "config.json"
    assemble_checkpoint(config, tmp_path / "trainable.safetensors", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = Tokenizer.load(tmp_path / "out")
    assert ours.fingerprint == Tokenizer.load(vocabulary).fingerprint
    assert theirs.encode("Once upon a time") == ours.encode("Once upon a time", bos=True)


@pytest.mark.parametrize("says", [{}, {"torch_dtype": "bfloat16"}, {"dtype": "float16"}], ids=str)
def test_an_assembled_models_config_says_the_dtype_it_is_stored_in(
    export: Callable[..., Path],
    write_trained: Callable[..., Path],
    vocabulary: Path,
    tmp_path: Path,
    says: dict[str, str],
) -> None:
    """transformers loads the trained fp32 weights unrounded; the run may say another dtype."""
    start = Checkpoint.open(export("llama"))
    write_trained(tmp_path / "trainable.safetensors", start, trainable="all")
    state = {"step": 1, "settings": {"model.tokenizer": str(vocabulary)}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    raw = json.loads((start.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | says))
    out = tmp_path / "out"
    assemble_checkpoint(tmp_path / "config.json", tmp_path / "trainable.safetensors", out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert theirs.dtype == torch.float32
    written = json.loads((out / "config.json").read_text())
    assert {written.get(key, "float32") for key in ("torch_dtype", "dtype")} == {"float32"}
    loaded = theirs.state_dict()
    for name, tensor in start.state_dict().items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_files_that_come_with_a_vocabulary_are_all_there_is(
    export: Callable[..., Path], vocabulary: Path, tmp_path: Path, name: str
) -> None:
    """A model's own settings are copied, and nothing is put beside them."""
    own = tmp_path / name
    own.write_text('{"legacy": true}')
    (tmp_path / "out").mkdir()
    config = Checkpoint.open(export("llama")).config
    write_companions(tmp_path / "out", config, [vocabulary, own])
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "tokenizer.model", name}
    assert (tmp_path / "out" / name).read_text() == own.read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram", "normalization_rule_name": "identity", "byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
        {"normalization_rule_name": "identity", "byte_fallback": False},
        {"remove_extra_whitespaces": True, "byte_fallback": True},
        {"add_dummy_prefix": False, "byte_fallback": True},
        {"user_defined_symbols": ["<|im_start|>"], "byte_fallback": True},
    ],
    ids=str,
)
def test_a_vocabulary_that_tokenizer_json_would_not_repeat_gets_none(
    tmp_path: Path, tiny_config: Callable[..., Any], settings: dict[str, Any]
) -> None:
    """Unigram, texts that are normalised, bytes without a token, pieces that no merge makes: only
    the settings."""
    plain = {"model_type": "bpe", "remove_extra_whitespaces": False, "minloglevel": 2}
    plain |= {"normalization_rule_name": "identity", "vocab_size": 400, "num_threads": 1}
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(inspect.getsource(textwrap).splitlines()),
            model_writer=file,
            **(plain | settings),
        )
    (tmp_path / "out").mkdir()
    write_companions(tmp_path / "out", tiny_config(), [tmp_path / "tokenizer.model"])
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["bos_token"] == "<s>"


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"\0"], ids=["ranks", "bytes"])
def test_a_damaged_vocabulary_gets_no_files(
    tmp_path: Path, tiny_config: Callable[..., Any], content: bytes
) -> None:
    """It is copied as it is; what is wrong with it is told where it is used."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "out").mkdir()
    write_companions(tmp_path / "out", tiny_config(), [tmp_path / "tokenizer.model"])
    assert not list((tmp_path / "out").glob("tokenizer*.json"))
    [copy] = (tmp_path / "out").rglob("tokenizer.model")
    assert copy.read_bytes() == content


# ---- vLLM --------------------------------------------------------------------------------------

# Pieces of a checkpoint that are rows of one parameter in vLLM's llama.py.
STACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def vllm_parameters(config: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the name and shape of each parameter that vLLM's LlamaForCausalLM has."""
    C, F, V = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    H, KV = config["num_attention_heads"], config["num_key_value_heads"]
    D = config.get("head_dim") or C // H
    layer = {
        "input_layernorm": [C],
        "post_attention_layernorm": [C],
        "self_attn.qkv_proj": [(H + 2 * KV) * D, C],
        "self_attn.o_proj": [C, H * D],
        "mlp.gate_up_proj": [2 * F, C],
        "mlp.down_proj": [C, F],
    }
    shapes = {"model.embed_tokens.weight": [V, C], "model.norm.weight": [C]}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [V, C]
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("tied", {}), ("mistral", {}), ("llama", {"max_shard_bytes": 200_000})],
    ids=str,
)
def test_vllms_rules_for_a_model_directory_are_kept(
    export: Callable[..., Path], kind: str, options: dict[str, int]
) -> None:
    """The published rules, as vLLM is not installed: of its registry, loader and llama.py.

    A registered architecture that needs no remote code; SwiGLU; all safetensors files are read,
    with an index just those it names, and each must exist; every tensor is a parameter or rows of
    one, and every parameter is filled; the dtype is one that config.json or the files tell; the
    tokenizer has no id past the embedding.
    """
    path = export(kind, **options)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] in (["LlamaForCausalLM"], ["MistralForCausalLM"])
    assert config["model_type"] in ("llama", "mistral") and config["hidden_act"] == "silu"
    assert not config.keys() & {"auto_map", "quantization_config", "bias", "qkv_bias"}

    files = {file.name for file in path.glob("*.safetensors")}
    index = path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == bool(options)
    found: dict[str, str] = {}
    rows: dict[str, list[int]] = {}
    dtypes = set()
    for name in files:
        with open(path / name, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        assert header.pop("__metadata__")["format"] == "pt"
        for tensor, entry in header.items():
            assert tensor not in found
            found[tensor] = name
            dtypes.add(entry["dtype"])
            *before, module, kind_of = tensor.split(".")
            parameter = ".".join([*before, STACKED.get(module, module), kind_of])
            height, *width = entry["shape"]
            filled = rows.get(parameter, [0])[0]
            rows[parameter] = [filled + height, *width]
    assert rows == vllm_parameters(config)
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == found
    assert dtypes == {"F32"} and config.get("torch_dtype", "float32") == "float32"

    tokenizer = json.loads((path / "tokenizer.json").read_text())
    assert max(tokenizer["model"]["vocab"].values()) < config["vocab_size"]


def test_the_record_of_new_blocks_is_all_that_is_ours_in_config_json(
    export: Callable[..., Path],
) -> None:
    """Readers ignore the key: without it the same configuration."""
    path = export("llama")
    raw = json.loads((path / "config.json").read_text())
    theirs = transformers.AutoConfig.from_pretrained(path, local_files_only=True).to_dict()
    assert theirs.pop("llamapro") == raw.pop("llamapro")
    plain = transformers.LlamaConfig(**raw).to_dict()
    assert {key: theirs[key] for key in plain if key != "_name_or_path"} == {
        key: value for key, value in plain.items() if key != "_name_or_path"
    }
