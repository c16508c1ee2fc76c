"""Numbers, RoPE and the window of a `config.json`; two answers to a question are refused."""

import json
from typing import Any

import pytest
import transformers

from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.fields import RopeScaling

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw, "dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ")
    return str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_theta": 500000},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_theta_is_found_where_either_generation_writes_it(rope: dict[str, Any]) -> None:
    """It stands at the top level (transformers 4) or inside rope_parameters (5)."""
    assert ModelConfig.from_dict(SIZES | rope).rope_theta == 500000.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    ],
)
def test_other_scaled_rope_is_refused_by_its_type(rope: dict[str, Any]) -> None:
    """All three spellings are refused."""
    inner = next(iter(rope.values()))
    kind = inner.get("rope_type", inner.get("type"))
    assert f"rope type {kind!r} is not supported" in message(SIZES | rope)


def test_kinds_of_layers_are_compared_with_the_window(capsys: pytest.CaptureFixture[str]) -> None:
    """Mistral's window is that of all layers; a list that says otherwise is refused.

    One of another length is that of the base, before another tool expanded it.
    """
    mistral = SIZES | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 64}
    config = ModelConfig.from_dict(mistral | {"layer_types": ["sliding_attention"] * 32})
    assert config.sliding_window == 64
    assert config.resized(40, 32000, None).raw["layer_types"] == ["sliding_attention"] * 40
    config = ModelConfig.from_dict(mistral | {"layer_types": ["sliding_attention"] * 28})
    assert config.sliding_window == 64
    assert "28 entries for 32 layers, which transformers refuses" in capsys.readouterr().err
    found = message(mistral | {"layer_types": ["full_attention"] * 32})
    assert "layer_types ['full_attention'" in found and "only 'sliding_attention' for all" in found


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            ["scaling is given twice", "rope_parameters {", "rope_scaling {", "'factor': 4.0"],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e6},
            ["theta is given twice", "rope_theta 1000000.0 and rope_parameters.rope_theta 10000.0"],
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 5e5}},
            ["rope_parameters.rope_theta 10000.0 and rope_scaling.rope_theta 500000.0"],
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "type": "linear", "factor": 2.0}},
            ["rope_type is 'llama3', type is 'linear'"],
        ),
        (
            {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 4096},
            ["original_max_position_embeddings is 4096, and 8192 in rope_scaling; keep one"],
        ),
        ({"rope_scaling": {"factor": 2.0}}, ["has a factor 2.0, but no rope_type that uses it"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["rope_parameters.full_attention: settings for some layers only"],
        ),
    ],
)
def test_two_answers_about_rope_are_refused_with_both(
    change: dict[str, Any], expected: list[str]
) -> None:
    """Whoever adds rope_scaling to a file that has rope_parameters is told, and not ignored."""
    found = message(SIZES | change)
    for part in expected:
        assert part in found


CONTEXT = {"original_max_position_embeddings": 8192}
SCALES = {key: value for key, value in LLAMA_3.items() if key not in CONTEXT}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA_3},
        {"rope_parameters": LLAMA_3 | {"rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": SCALES, **CONTEXT},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA_3, **CONTEXT},
        {"rope_theta": 500000.0, "rope_scaling": SCALES, "max_position_embeddings": 8192},
    ],
)
def test_llama_3_scaling_is_found_where_either_generation_writes_it(rope: dict[str, Any]) -> None:
    """Beside theta (transformers 4) or with it (5), the same numbers; 5 can do without one."""
    config = ModelConfig.from_dict(SIZES | rope)
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(rope)))
    theirs.standardize_rope_params()  # as its model does
    assert theirs.rope_parameters["original_max_position_embeddings"] == 8192
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 500000.0


def test_a_null_in_the_scaling_is_no_value() -> None:
    """The context beside it counts then, as if the key were not there."""
    null = dict.fromkeys(CONTEXT)
    config = ModelConfig.from_dict(SIZES | {"rope_scaling": SCALES | null, **CONTEXT})
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_a_window_in_a_llama_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers leaves it out of the mask, but shortens the cache of keys by it."""
    assert ModelConfig.from_dict(SIZES | {"sliding_window": 2048}).sliding_window is None
    assert not capsys.readouterr().err  # as long as the context
    assert ModelConfig.from_dict(SIZES | {"sliding_window": 77}).sliding_window is None
    assert "config.json: sliding_window 77 is not applied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"factor": None}, "rope llama3: factor is missing"),
        ({"factor": "8"}, "rope llama3: factor is '8', expected a positive number"),
        (
            {"original_max_position_embeddings": 0},
            "original_max_position_embeddings is 0, expected",
        ),
        ({"low_freq_factor": 4.0}, "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_impossible_scaling_is_named(change: dict[str, Any], expected: str) -> None:
    """A number that is missing is not replaced by a default."""
    assert expected in message(SIZES | {"rope_scaling": LLAMA_3 | change})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"sliding_window": None, "max_window_layers": 0}, None),
        ({"max_window_layers": 0}, 4096),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": 64}, 64),
        ({"layer_types": ["full_attention"] * 32, "max_window_layers": 0}, None),
        ({"max_window_layers": 16}, "max_window_layers 16 is not supported (only 'full_att"),
        ({"max_window_layers": "all"}, "max_window_layers 'all' is not supported"),
        ({"layer_types": [*["full_attention"] * 30, "sliding_attention"]}, "for all 32 layers"),
        ({"layer_types": {"0": "full_attention"}}, "layer_types {'0'"),
        ({"layer_types": 32}, "layer_types 32 is not supported"),
        ({"use_sliding_window": False, "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes', expected true or false"),
    ],
)
def test_qwens_window_is_that_of_all_layers_or_of_none(
    change: dict[str, Any], expected: int | str | None
) -> None:
    """It counts if it is turned on, in layers that the list or the lowest one names."""
    raw = SIZES | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32}
    if isinstance(expected, str):
        assert expected in message(raw | change)
        return
    config = ModelConfig.from_dict(raw | change)
    assert config.sliding_window == expected
    larger = transformers.Qwen2Config(**config.resized(40, 32000, None).raw)
    kind = "full_attention" if expected is None else "sliding_attention"
    assert larger.layer_types == [kind] * 40 and larger.num_hidden_layers == 40


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"num_attention_heads": 33}, "4096 is not a multiple of num_attention_heads 33"),
        ({"num_key_value_heads": 5}, "32 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 33}, "head_dim 33 is odd"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive number"),
        ({"vocab_size": "32000"}, "vocab_size is '32000', expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a positive number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, expected a whole number"),
        ({"hidden_size": float("nan")}, "hidden_size is nan, expected a positive number"),
        ({"hidden_size": float("inf")}, "hidden_size is inf, expected a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a positive number"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default', expected a JSON object"),
        ({"eos_token_id": [[2]]}, "eos_token_id [[2]] is no token id"),
        ({"bos_token_id": "1"}, "bos_token_id '1' or"),
        ({"num_key_value_heads": 1e-300}, "num_key_value_heads is 1e-300, expected a whole"),
        ({"rope_scaling": {"rope_type": float("nan")}}, "rope type nan is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
    ],
)
def test_an_impossible_value_is_named(change: dict[str, Any], expected: str) -> None:
    """The message holds the field and the value found."""
    assert expected in message(SIZES | change)


def test_what_is_written_is_read_by_transformers_4_too() -> None:
    """It knows no `rope_parameters`: theta and scaling stand beside them."""
    config = ModelConfig.from_dict(
        SIZES | {"rope_parameters": LLAMA_3 | {"rope_theta": 5e5}, "num_key_value_heads": 8}
    )
    written = json.loads(config.to_json())
    assert written["rope_theta"] == 5e5 and written["rope_scaling"]["factor"] == 8.0
    assert ModelConfig.from_dict(written) == config
    plain = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    written = json.loads(ModelConfig.from_dict(plain).to_json())
    assert written["rope_theta"] == 1e6 and written["rope_scaling"] is None
