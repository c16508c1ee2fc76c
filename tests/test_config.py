"""`config.json` is read strictly: what the model cannot compute is refused by its field's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from llamapro.config import ExpansionRecord, ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, interleave

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
SIZES = {
    key: LLAMA_2_7B[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
}
RECORD = {"new_layers": [1, 3], "source_layers": [0, 1], "base_sha256": "ab", "generations": []}


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw, "dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ")
    return str(caught.value)


def test_transformers_4_style_is_read() -> None:
    """LLaMA-2-7B's published file: every field, theta's default, one end token."""
    config = ModelConfig.from_dict(LLAMA_2_7B)
    assert config == ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_what_the_installed_transformers_writes_is_read(tmp_path: Path) -> None:
    """LlamaConfig.save_pretrained -> from_file keeps every field."""
    transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        rms_norm_eps=3e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        max_position_embeddings=777,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=5,
        eos_token_id=[6, 7],
    ).save_pretrained(tmp_path)
    assert ModelConfig.from_file(tmp_path / "config.json") == ModelConfig(
        300, 64, 112, 3, 4, 2, 24, 3e-6, 12345.0, 777, True, 0.05, 5, (6, 7)
    )


def test_what_is_written_here_is_read_by_transformers(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    """A record is carried along without being read."""
    record = ExpansionRecord.from_dict(RECORD, 4, "")
    config = tiny_config(num_hidden_layers=2, rope_theta=777.0, head_dim=24)
    config = config.resized(4, config.vocab_size, record)
    (tmp_path / "config.json").write_text(config.to_json())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.num_hidden_layers == 4 and theirs.head_dim == 24
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert theirs.to_dict()["llamapro"] == RECORD


def test_absent_fields_have_transformers_defaults() -> None:
    """The five sizes alone give what LlamaConfig gives."""
    theirs = transformers.LlamaConfig(**SIZES)
    config = ModelConfig.from_dict(dict(SIZES))
    for name in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
        "bos_token_id",
    ):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.eos_token_ids == (theirs.eos_token_id,)
    assert config.expansion is None


def test_no_end_token_and_several_are_possible() -> None:
    """`null` is none; a list is all of it."""
    assert ModelConfig.from_dict(SIZES | {"eos_token_id": None}).eos_token_ids == ()
    assert ModelConfig.from_dict(SIZES | {"eos_token_id": [2, 9]}).eos_token_ids == (2, 9)


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "gpt2"),
        ("model_type", "mixtral"),
        ("num_local_experts", 8),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("is_causal", False),
        ("per_layer_config", {"1": {"rms_norm_eps": 1e-3}}),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_a_field_the_model_does_not_compute_is_refused_by_name(field: str, value: Any) -> None:
    """Other kinds and activations, quantized weights: never loaded and computed wrongly."""
    assert f"{field} {value!r} is not supported" in message(LLAMA_2_7B | {field: value})


@pytest.mark.parametrize("key", SIZES)
def test_a_missing_size_is_named(key: str) -> None:
    """None of the five has a default, and what would follow from it is no second mistake."""
    found = message({k: v for k, v in SIZES.items() if k != key})
    assert found == f"dir/config.json: {key} is missing"


def test_all_mistakes_are_in_one_message() -> None:
    """Five mistakes, one error."""
    raw = LLAMA_2_7B | {"head_dim": 7, "mlp_bias": 1, "rms_norm_eps": "x", "rope_theta": -1}
    del raw["vocab_size"]
    found = message(raw)
    for field in (
        "head_dim",
        "mlp_bias is 1, expected true or false",
        "rms_norm_eps",
        "rope_theta",
        "vocab_size",
    ):
        assert field in found


@pytest.mark.parametrize(
    "change",
    [
        {"pretraining_tp": 2},
        {"hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 32},
        {"attention_bias": None, "mlp_bias": None, "num_local_experts": 1},
        {"pad_token_id": 32000},
        {"is_causal": True, "per_layer_config": None, "transformers_weights": "model.safetensors"},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "default", "factor": None}, "per_layer_config": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "rope_theta": 1e4},
    ],
)
def test_a_field_that_changes_nothing_is_no_reason_to_refuse(change: dict[str, Any]) -> None:
    """Other names of the same function, defaults written out, and what transformers ignores."""
    assert ModelConfig.from_dict(LLAMA_2_7B | change) == ModelConfig.from_dict(LLAMA_2_7B)


def test_a_class_of_another_family_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """model_type counts, as in transformers; a class alone does not say its defaults."""
    raw = SIZES | {"architectures": ["MistralForCausalLM"]}
    assert "architectures are ['MistralForCausalLM'], model_type is missing" in message(raw)
    assert ModelConfig.from_dict(raw | {"model_type": "llama"}).model_type == "llama"
    assert "model_type 'llama' counts, not architectures" in capsys.readouterr().err


def test_dropout_that_is_not_applied_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The results are those of inference, where dropout is 0 in transformers too."""
    ModelConfig.from_dict(LLAMA_2_7B | {"attention_dropout": 0.375})
    ModelConfig.from_dict(LLAMA_2_7B | {"attention_dropout": 0.375})
    assert capsys.readouterr().err.count("attention_dropout 0.375 is not applied") == 1


def test_a_typo_is_answered_with_the_nearest_key() -> None:
    """A foreign key is a typo if a similar key is absent; beside that key it is no mistake."""
    raw = SIZES | {"num_key_value_head": 8}
    assert "unknown key 'num_key_value_head' (did you mean 'num_key_value_heads'?)" in message(raw)
    assert ModelConfig.from_dict(raw | {"num_key_value_heads": 8}).num_key_value_heads == 8
    assert ModelConfig.from_dict(SIZES | {"eot_token_id": 7}).eos_token_ids == (2,)  # its own name


def test_foreign_keys_survive_a_rewrite() -> None:
    """Expansion changes two sizes and llamapro, and nothing else of the file."""
    raw = LLAMA_2_7B | {"my_tool": {"a": [1, None]}}
    record = ExpansionRecord((32,), (31,), "ab")
    written = json.loads(ModelConfig.from_dict(raw).resized(33, 32002, record).to_json())
    sizes = {"num_hidden_layers": 33, "vocab_size": 32002}
    assert written == raw | sizes | {"llamapro": written["llamapro"]}
    assert ModelConfig.from_dict(written).expansion == record
    assert raw["num_hidden_layers"] == 32, "the base's own mapping is left alone"


@pytest.mark.parametrize(
    "damage",
    [
        {"new_layers": []},
        {"new_layers": [float("inf"), 3]},
        {"new_layers": [3, 1]},
        {"new_layers": [1, 1]},
        {"new_layers": [1, 4]},
        {"new_layers": [-1, 3]},
        {"new_layers": None},
        {"new_layers": ["x", 3]},
        {"source_layers": [0]},
        {"source_layers": [0, 2]},
        {"source_layers": [-1, 0]},
        {"generations": None},
        {"generations": [3]},
        {"generations": [{}]},
        {"generations": [{"new_layers": [0], "source_layers": []}]},
        {"generations": [{"new_layers": 3, "source_layers": [0]}]},
        {"generations": [{"new_layers": [3], "source_layers": [0]}]},
        {"generations": [{"new_layers": [9], "source_layers": [0]}]},
        {"computation": [3]},
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, Any]) -> None:
    """Two new blocks among four layers: anything that cannot be is a ConfigError."""
    good = SIZES | {"num_hidden_layers": 4, "llamapro": RECORD}
    assert ModelConfig.from_dict(good).expansion == ExpansionRecord((1, 3), (0, 1), "ab")
    assert "'llamapro' record" in message(good | {"llamapro": RECORD | damage})


@pytest.mark.parametrize("key", ["new_layers", "source_layers", "base_sha256"])
def test_a_record_without_one_of_its_keys_is_refused(key: str) -> None:
    """A record that is no object is refused, too."""
    record = {k: v for k, v in RECORD.items() if k != key}
    assert f"record has no '{key}': written by another version" in message(
        SIZES | {"llamapro": record}
    )
    assert "is damaged" in message(SIZES | {"llamapro": [1, 3]})


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128},
        {"rope_theta": 5e5},
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_what_decides_the_computation_must_be_that_of_the_base(change: dict[str, Any]) -> None:
    """The record holds it: an edit after `expand` is refused with both values."""
    config = ModelConfig.from_dict(LLAMA_2_7B)
    raw = json.loads(expand_config(config, interleave(32, 8), "ab").to_json())
    assert ModelConfig.from_dict(raw).expansion.computation == config.computation  # type: ignore[union-attr]
    found = message(raw | change)
    key = next(iter(change))
    assert f"{key} was {config.computation[key]!r}, is " in found and "edited since" in found
    # A context length decides nothing, and an older record has nothing to compare with.
    ModelConfig.from_dict(raw | {"max_position_embeddings": 8192})
    del raw["llamapro"]["computation"]
    ModelConfig.from_dict(raw | change)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    """Files are copied as they are, and transformers cannot read one that begins with it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_2_7B), encoding=encoding)
    assert ModelConfig.from_file(file) == ModelConfig.from_dict(LLAMA_2_7B)
    assert f"{file}: begins with a byte order mark" in capsys.readouterr().err
    with pytest.raises(OSError, match="not a valid JSON file"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    """Missing, not JSON, not an object, not text: each a ConfigError that names the file."""
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json: no such file.*from-meta"):
        ModelConfig.from_file(file)
    file.write_text('{"vocab_size": ')
    with pytest.raises(ConfigError, match=r"config\.json: damaged: JSONDecodeError"):
        ModelConfig.from_file(file)
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"config\.json: damaged: .* holds no JSON object"):
        ModelConfig.from_file(file)
    for damage in (b"\xff\xfe\x00", b"[" * 200_000):
        file.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"config\.json: damaged: "):
            ModelConfig.from_file(file)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_qwen_has_its_own_defaults(kind: str) -> None:
    """Those of transformers' own configurations, where a file does not say otherwise."""
    theirs = getattr(transformers, f"{kind}Config")(**SIZES)
    config = ModelConfig.from_dict(SIZES | {"model_type": kind.lower()})
    same = ("num_key_value_heads", "max_position_embeddings", "sliding_window", "bos_token_id")
    for name in (*same, "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.eos_token_ids == ()
    assert config.head_dim == getattr(theirs, "head_dim", 4096 // 32)
    biases = (config.attention_bias, config.o_proj_bias, config.mlp_bias, config.qk_norm)
    assert biases == ((True, False, False, False) if kind == "Qwen2" else (False,) * 3 + (True,))


def test_biases_that_a_kind_does_not_have_are_refused() -> None:
    """transformers would leave them out in silence; Qwen2's are there whatever the file says."""
    for kind, field in [("mistral", "attention_bias"), ("qwen2", "mlp_bias")]:
        assert f"{field} True is not supported for {kind!r}" in message(
            SIZES | {"model_type": kind, field: True}
        )
    qwen = SIZES | {"model_type": "qwen2"}
    assert ModelConfig.from_dict(qwen | {"attention_bias": False}).attention_bias


def test_mistral_has_its_own_defaults() -> None:
    """Those of transformers' MistralConfig; a window of null, as in v0.3, is none."""
    sizes = SIZES | {"model_type": "mistral"}
    theirs = transformers.MistralConfig(**SIZES)
    config = ModelConfig.from_dict(sizes)
    for name in ("num_key_value_heads", "max_position_embeddings", "sliding_window"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.sliding_window == 4096
    assert ModelConfig.from_dict(sizes | {"sliding_window": None}).sliding_window is None
    assert "sliding_window is -1" in message(sizes | {"sliding_window": -1})
