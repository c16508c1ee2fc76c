"""GGUF files: the tensors are transformers' own, the configuration is exact, damage is refused."""

import json
import math
import runpy
import struct
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

SHAPE = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}


@pytest.fixture
def model(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, Tensor]],
    write_gguf: Callable[..., Path],
) -> Callable[..., Path]:
    """`model(config={}, tensors={}, **arguments of write_gguf) -> file`: a layer of 32 dimensions.

    The tensors replace some of the random ones; None leaves one out.
    """

    def make(
        config: dict[str, Any] | None = None,
        name: str = "m.gguf",
        tensors: dict[str, Tensor | None] | None = None,
        **arguments: Any,
    ) -> Path:
        full = tiny_config(**SHAPE, **(config or {}))
        written = random_tensors(full) | (tensors or {})
        kept = {name: tensor for name, tensor in written.items() if tensor is not None}
        return write_gguf(tmp_path / name, full, kept, **arguments)

    return make


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_was_never_quantised_comes_back_exactly(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, Tensor]],
    write_gguf: Callable[..., Path],
    tied: bool,
) -> None:
    """Equal tensors and fields; eps, an fp32 number in the file, is the decimal it was made of."""
    config = tiny_config(tie_word_embeddings=tied, head_dim=32, rope_theta=500000.0)
    tensors = random_tensors(config)
    from_gguf(write_gguf(tmp_path / "m.gguf", config, tensors), tmp_path / "out")
    opened = Checkpoint.open(tmp_path / "out")
    found = opened.state_dict()
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["rms_norm_eps"], raw["rope_theta"], raw["torch_dtype"]) == (1e-5, 5e5, "float32")
    same = ("vocab_size", "head_dim", "num_key_value_heads", "max_position_embeddings")
    assert all(getattr(opened.config, key) == getattr(config, key) for key in same)
    assert opened.config.tie_word_embeddings == tied


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
    model: Callable[..., Path],
    tmp_path: Path,
    head_dim: int,
    theta: float,
    scaling: dict[str, Any],
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
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    ],
)
def test_linear_scaling_and_windows_reach_the_configuration(
    model: Callable[..., Path], tmp_path: Path, values: dict[str, Any], expected: float | None
) -> None:
    """Linear scaling, as today and as in 2023; a window makes it a Mistral."""
    window = {"llama.attention.sliding_window": 64}
    from_gguf(model(values=values | window), tmp_path / "out")
    config = Checkpoint.open(tmp_path / "out").config
    assert (config.model_type, config.sliding_window) == ("mistral", 64)
    assert (config.rope_scaling and config.rope_scaling.factor) == expected


def test_factors_of_one_mean_no_scaling(model: Callable[..., Path], tmp_path: Path) -> None:
    from_gguf(model(extra={"rope_freqs.weight": torch.ones(8)}), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").config.rope_scaling is None


# ---- What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; only 'llama'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, not supported (only 0)"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 10**9}, "llama.block_count is 1000000000, but the file has 12"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.context_length": 0}, "max_position_embeddings is 0"),
        ({"split.count": "two"}, "split.count is 'two', expected a whole number"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', not supported"),
        ({"llama.feed_forward_length": 64}, "'blk.0.ffn_gate.weight' is [32, 32], its metadata"),
        ({"llama.attention.head_count": [2, 2]}, "num_attention_heads is [2, 2], expected"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_the_key(
    model: Callable[..., Path],
    run_command: Callable[..., Any],
    root: Path,
    tmp_path: Path,
    values: dict[str, Any],
    message: str,
) -> None:
    """One message that names the file and the value, exit status 2, and nothing written."""
    file, out = model(values=values), tmp_path / "out"
    main = runpy.run_path(str(root / "convert.py"))["main"]
    status, stdout, stderr = run_command(main, "from-gguf", file, out)
    assert (status, stdout) == (2, "")
    assert str(file) in stderr and message in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_tensors_that_are_not_a_llamas_are_named(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """A missing one, one too many and one of another shape stand in one message."""
    tensors = {"model.norm.weight": None, UP_PROJ: torch.zeros(16, 32)}
    file = model(tensors=tensors, extra={"blk.0.attn_q.bias": torch.zeros(32)})
    with pytest.raises(UserError) as caught:
        from_gguf(file, tmp_path / "out")
    for words in (
        "missing tensor 'output_norm.weight'",
        "unexpected tensor 'blk.0.attn_q.bias'",
        "'blk.0.ffn_up.weight' is [16, 32], its metadata say [32, 32]",
    ):
        assert words in str(caught.value)


def test_rope_factors_that_no_llama_3_has_are_refused(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    factors = torch.linspace(1, 8, 8)
    with pytest.raises(UserError, match=r"no parameters of Llama 3\.1's scaling were found"):
        from_gguf(model(extra={"rope_freqs.weight": factors}), tmp_path / "out")
    with pytest.raises(UserError, match=r"'rope_freqs.weight' is \[4\], expected \[8\]"):
        from_gguf(model(extra={"rope_freqs.weight": factors[:4]}), tmp_path / "out")


def test_a_quantisation_that_the_library_cannot_read_is_refused_by_name(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """One that it knows by name only, and one that it does not know at all."""
    extra = {"rope_freqs.weight": torch.zeros(8, dtype=torch.float64)}
    file = model(extra=extra)
    with pytest.raises(UserError, match=r"'rope_freqs.weight' is quantised as F64, which the gguf"):
        from_gguf(file, tmp_path / "out")
    name = b"rope_freqs.weight"
    data = bytearray(file.read_bytes())
    at = data.index(name) + len(name) + 4 + 8
    data[at : at + 4] = struct.pack("<I", 999)
    file.write_bytes(data)
    with pytest.raises(UserError, match="is quantised as type 999, which the gguf library"):
        from_gguf(file, tmp_path / "out")


def test_numbers_too_large_for_float16_are_refused(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """They would become infinite; the message says which dtype holds them."""
    large = torch.zeros(32, 32)
    large[3, 5] = 1e6
    file = model(tensors={UP_PROJ: large})
    with pytest.raises(
        UserError, match=r"'model.layers.0.mlp.up_proj.weight' would .* --dtype bfloat16"
    ):
        from_gguf(file, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_early_is_refused_wherever_it_ends(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """In the magic, the counts, the metadata, the tensors' names, and the last tensor's bytes."""
    file = model()
    data = file.read_bytes()
    tensors = data.index(b"token_embd.weight")
    for length in (0, 3, 7, 12, 23, 30, 500, tensors - 1, tensors + 40, len(data) - 4096, -64):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"m\.gguf: (begins with|truncated or damaged: )"):
            from_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


COUNTS = struct.pack("<4sI", b"GGUF", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(60), r"begins with b'PK\\x03\\x04', not with b'GGUF'"),
        (struct.pack("<4sI", b"GGUF", 1) + bytes(60), "version 1 of GGUF, expected 2 or 3"),
        (struct.pack("<4sI", b"GGUF", 4) + bytes(60), "version 4 of GGUF, expected 2 or 3"),
        (struct.pack("<4s", b"GGUF") + struct.pack(">I", 3) + bytes(60), "a big-endian file"),
        (COUNTS + struct.pack("<QQ", 1 << 60, 0), "its header claims 1,152,921,504,606,846,976"),
        (COUNTS + struct.pack("<QQ", 0, 1 << 60), "claims 0 tensors and 1,152,921"),
        (COUNTS + struct.pack("<QQQ", 0, 1, 1 << 60), "asks for 1,152,921,504,606,846,976 bytes"),
        # A list of 2^60 texts, and of 2^60 numbers.
        (COUNTS + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 1 << 60), "a list of 1,152,921"),
        (COUNTS + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 10, 1 << 60), "asks for 9,223,372"),
        (COUNTS + struct.pack("<QQQ1sI", 0, 1, 1, b"k", 77), "a value of unknown type 77"),
        (COUNTS + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1), "a value of unknown type 9"),
        (COUNTS + struct.pack("<QQQ1sI", 1, 0, 1, b"t", 9), "tensor 't' has 9 dimensions"),
        (
            COUNTS + struct.pack("<QQQ1sIQQIQ", 1, 0, 1, b"t", 2, 1 << 60, 1 << 60, 0, 0),
            "tensor 't' ends at byte 5,316",
        ),
        (
            COUNTS + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 31, 8, 0),
            r"tensor 't' is Q8_0 of shape \[31\]",
        ),
        (
            COUNTS + struct.pack("<QQ", 0, 2) + 2 * struct.pack("<Q1sI?", 1, b"k", 7, True),
            "its header names 'k' twice",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_or_hostile_header_takes_no_memory(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """What the numbers claim is compared with the file before anything is made of it."""
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"m\.gguf: .*{message}"):
        from_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_damaged_byte_of_a_header_is_survived(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """One message or a conversion, never another exception; the reader's memory is the file's."""
    file = model()
    data = file.read_bytes()
    end = data.index(b"token_embd.weight") + 900
    for at in range(0, end, 61):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x91]) + data[at + 1 :])
        try:
            from_gguf(file, tmp_path / "out", force=True)
        except UserError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none.gguf", "{tmp}/out"], "none.gguf: no such file; give a model's .gguf file"),
        (["{tmp}", "{tmp}/out"], "not a plain file"),
        (["{tmp}/m.gguf", "{tmp}"], "contains the source"),
        (["{tmp}/m.gguf", "{tmp}/out", "--dtype", "bfloat61"], "bfloat61"),
    ],
)
def test_wrong_arguments_are_one_message(
    model: Callable[..., Path],
    run_command: Callable[..., Any],
    root: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    """Exit status 2, and no output directory."""
    model()
    main = runpy.run_path(str(root / "convert.py"))["main"]
    words = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    status, stdout, stderr = run_command(main, "from-gguf", *words)
    assert (status, stdout) == (2, "")
    assert message in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


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
        ("tokenizers", r"its tokenizer needs tokenizers: pip install -e '\.\[gguf\]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ConfigError, match=message):
                from_gguf(file, tmp_path / "out")
