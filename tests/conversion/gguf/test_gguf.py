"""GGUF files: the tensors are transformers' own, the configuration is exact, damage is refused."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.gguf import from_gguf
from llamapro.errors import ConfigError, UserError

pytest.importorskip("gguf", reason="needs the extra gguf")

UP_PROJ = "model.layers.0.mlp.up_proj.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}


# ---- Tensors and configuration -----------------------------------------------------------------


def test_every_quantisation_is_read_as_transformers_reads_it(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, Tensor]],
    write_gguf: Callable[..., Path],
) -> None:
    """A tensor each of 13 types, grouped heads, their rows in llama.cpp's order: equal bits."""
    transformers = pytest.importorskip("transformers")
    config = tiny_config(
        num_hidden_layers=2, hidden_size=256, intermediate_size=256, num_attention_heads=4
    )
    kinds = {
        "token_embd.weight": "BF16",
        "output.weight": "F16",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.attn_k.weight": "Q4_0",
        "blk.0.attn_v.weight": "Q4_1",
        "blk.0.attn_output.weight": "Q5_0",
        "blk.0.ffn_gate.weight": "Q5_1",
        "blk.0.ffn_up.weight": "Q6_K",
        "blk.0.ffn_down.weight": "Q4_K",
        "blk.1.attn_q.weight": "IQ4_XS",
        "blk.1.attn_k.weight": "Q5_K",
        "blk.1.attn_v.weight": "Q2_K",
        "blk.1.attn_output.weight": "IQ2_XS",
    }
    file = write_gguf(
        tmp_path / "m.gguf", config, random_tensors(config), lambda name: kinds.get(name, "F32")
    )
    result = from_gguf(file, tmp_path / "out", torch.float32)
    assert set(result["quantizations"]) == {*kinds.values(), "F32"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    ours = Checkpoint.open(tmp_path / "out").state_dict()
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_a_model_that_was_never_quantised_comes_back_exactly(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, Tensor]],
    write_gguf: Callable[..., Path],
    fields: dict[str, bool],
) -> None:
    """Equal tensors and fields; eps, an fp32 number in the file, is the decimal it was made of."""
    config = tiny_config(**fields, head_dim=32, rope_theta=500000.0)
    tensors = random_tensors(config)
    from_gguf(write_gguf(tmp_path / "m.gguf", config, tensors), tmp_path / "out")
    opened = Checkpoint.open(tmp_path / "out")
    found = opened.state_dict()
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["rms_norm_eps"], raw["rope_theta"], raw["torch_dtype"]) == (1e-5, 5e5, "float32")
    same = ["vocab_size", "head_dim", "num_key_value_heads", "max_position_embeddings"]
    same += ["tie_word_embeddings", "attention_bias", "o_proj_bias", "mlp_bias"]
    assert all(getattr(opened.config, key) == getattr(config, key) for key in same)


def test_one_number_for_each_layer_is_one_number(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp reads a list, too; here the layers must be alike."""
    from_gguf(model(), tmp_path / "plain")
    values = {"llama.attention.head_count_kv": [1], "llama.feed_forward_length": [32]}
    from_gguf(model(name="lists.gguf", values=values), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").config == Checkpoint.open(tmp_path / "plain").config


@pytest.mark.parametrize(
    ("kind", "asked", "dtype"),
    [
        ("F32", None, torch.float32),
        ("F16", None, torch.float16),
        ("BF16", None, torch.bfloat16),
        ("Q8_0", None, torch.bfloat16),
        ("Q8_0", torch.float16, torch.float16),
        ("F16", torch.float32, torch.float32),
    ],
)
def test_dtype_is_the_files_own_or_bfloat16(
    model: Callable[..., Path], tmp_path: Path, kind: str, asked: Any, dtype: torch.dtype
) -> None:
    """Quantised weights become bfloat16 unless asked otherwise."""
    from_gguf(model(kind=kind), tmp_path / "out", asked)
    tensors = Checkpoint.open(tmp_path / "out").state_dict()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_any_part_of_a_split_model_stands_for_all(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """The parts are found beside the one that is given; a missing one is named."""
    model(per_file=5)
    from_gguf(model(name="whole.gguf"), tmp_path / "whole")
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    result = from_gguf(parts[1], tmp_path / "out")
    assert result["files"] == 3
    assert (
        Checkpoint.open(tmp_path / "out").sha256() == Checkpoint.open(tmp_path / "whole").sha256()
    )
    parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf: missing; all 3 parts"):
        from_gguf(parts[0], tmp_path / "no")
    with pytest.raises(UserError, match=r"other\.gguf: is one of 3 parts, but is not named"):
        from_gguf(tmp_path / "other.gguf", tmp_path / "no")
    parts[0].rename(parts[1])
    (tmp_path / "other.gguf").rename(parts[0])
    with pytest.raises(UserError, match=r"00001-of-00003\.gguf: split.no and split.count are 1"):
        from_gguf(parts[2], tmp_path / "no")


def test_parts_of_two_models_are_refused(model: Callable[..., Path], tmp_path: Path) -> None:
    """Even where no tensor is missing: one that two parts have would be taken from either."""
    model(per_file=5)
    model(per_file=4, name="n.gguf")
    (tmp_path / "n-00003-of-00003.gguf").replace(tmp_path / "m-00003-of-00003.gguf")
    with pytest.raises(UserError, match=r"m-00001.*parts of different models"):
        from_gguf(tmp_path / "m-00001-of-00003.gguf", tmp_path / "no")


# ---- RoPE and windows --------------------------------------------------------------------------


def llama3_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """What llama.cpp's converter writes for Llama 3.1, one frequency at a time."""
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for freq in 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim):
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return torch.tensor(factors)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 5e5, {"factor": 8.0, **LLAMA_3}),  # Llama 3.1 and 3.3
        (64, 5e5, {"factor": 32.0, **LLAMA_3}),  # Llama 3.2
        (16, 1e4, {"factor": 8.0, **LLAMA_3}),  # one frequency between low and high
        (8, 1e4, {"factor": 32.0, **LLAMA_3}),  # and none that is low
        (128, 1e6, {"factor": 4.0, **LLAMA_3, "low_freq_factor": 2.0, "high_freq_factor": 6.5}),
        (128, 5e5, {"factor": 16.0, **LLAMA_3, "original_max_position_embeddings": 4096}),
    ],
)
def test_llama_3_rope_factors_become_the_parameters_they_were_made_of(
    model: Callable[..., Path], tmp_path: Path, head_dim: int, theta: float, scaling: dict[str, Any]
) -> None:
    """The frequencies are those of the source; for Llama's own context so is each parameter."""
    config = {"head_dim": head_dim, "rope_theta": theta}
    extra = {"rope_freqs.weight": llama3_factors(head_dim, theta, scaling)}
    from_gguf(model(config, extra=extra), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"rope_type": "llama3", **scaling}
    if scaling["original_max_position_embeddings"] == 8192:
        assert raw["rope_scaling"] == expected
    frequencies = [
        ops.rope_frequencies(head_dim, theta, ModelConfig.from_dict(r).rope_scaling)
        for r in (raw, raw | {"rope_scaling": expected})
    ]
    assert torch.allclose(*frequencies, rtol=2 * torch.finfo().eps, atol=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.5}, 2.5),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.5}, 4.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scale_linear": 2.5}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    ],
)
def test_linear_scaling_and_windows_reach_the_configuration(
    model: Callable[..., Path], tmp_path: Path, values: dict[str, Any], expected: float | None
) -> None:
    """Linear scaling, as today and as in 2023, also without a type; a window makes it a Mistral."""
    window = {"llama.attention.sliding_window": 64}
    from_gguf(model(values=values | window), tmp_path / "out")
    config = Checkpoint.open(tmp_path / "out").config
    assert (config.model_type, config.sliding_window) == ("mistral", 64)
    assert (config.rope_scaling and config.rope_scaling.factor) == expected


def test_metadata_of_tokens_that_are_not_read_are_told(
    model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a tokenizer, a second template and sampling; tokens by their role decide nothing."""
    values = {
        "tokenizer.ggml.normalizer.lowercase": True,
        "tokenizer.ggml.mask_token_id": 3,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.rag": "b",
        "general.sampling.temp": 0.7,
    }
    from_gguf(model(values=values), tmp_path / "out")
    said = [line.split(": ")[-1] for line in capsys.readouterr().err.splitlines()]
    assert [line for line in said if "not known" in line] == [
        "tokenizer.ggml.normalizer.lowercase True is not known, and not used",
        "tokenizer.chat_template.rag 'b' is not known, and not used",
        "general.sampling.temp 0.7 is not known, and not used",
    ]


def test_factors_of_one_mean_no_scaling(model: Callable[..., Path], tmp_path: Path) -> None:
    from_gguf(model(extra={"rope_freqs.weight": torch.ones(8)}), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").config.rope_scaling is None


# ---- What is refused ---------------------------------------------------------------------------


def test_the_command_prints_what_it_made(
    model: Callable[..., Path], run_command: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    """As text, and as one JSON object; an existing directory is replaced with --force only."""
    file, out = model(kind="Q8_0"), tmp_path / "out"
    main = runpy.run_path(str(root / "convert.py"))["main"]
    status, stdout, _ = run_command(main, "from-gguf", file, out)
    assert status == 0 and stdout.startswith(f"{out}: ") and "from Q8_0, F32" in stdout
    status, _, stderr = run_command(main, "from-gguf", file, out)
    assert status == 2 and "pass --force" in stderr
    status, stdout, _ = run_command(main, "from-gguf", file, out, "--force", "--json")
    assert status == 0 and json.loads(stdout)["quantizations"] == {"Q8_0": 9, "F32": 3}


def test_a_missing_library_is_named_with_its_extra(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model()
    for name, message in (
        ("gguf.constants", r"GGUF needs gguf: pip install -e '\.\[gguf\]'"),
        ("tokenizers", r"its tokenizer needs protobuf and tokenizers: pip install -e '\.\[gguf\]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ConfigError, match=message):
                from_gguf(file, tmp_path / "out")
