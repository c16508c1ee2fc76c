"""GGUF that is of another model, damaged or hostile is refused by name, and takes no memory."""

import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.conversion.gguf import from_gguf
from llamapro.errors import UserError

pytest.importorskip("gguf", reason="needs the extra gguf")

UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; only 'llama'"),
        (
            {"general.type": "adapter"},
            "general.type is 'adapter'; give the file of the whole model",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, not supported (only 0)"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 10**9}, "llama.block_count is 1000000000, but the file has 12"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.context_length": 0}, "max_position_embeddings is 0"),
        ({"split.count": "two"}, "split.count is 'two', expected a whole number"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', not supported"),
        ({"llama.feed_forward_length": 64}, "'blk.0.ffn_gate.weight' is [32, 32], its metadata"),
        ({"llama.attention.head_count": [2, 1]}, "head_count is [2, 1], not supported (only one"),
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
    file = model(tensors=tensors, extra={"blk.0.attn_q.scale": torch.zeros(32)})
    with pytest.raises(UserError) as caught:
        from_gguf(file, tmp_path / "out")
    for words in (
        "missing tensor 'output_norm.weight'",
        "unexpected tensor 'blk.0.attn_q.scale'",
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


@pytest.mark.parametrize("name", ["m.gguf-split-a", "m.gguf.part1of2"])
def test_a_piece_of_a_file_is_no_damaged_file(
    model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Large files were cut for upload; the first piece begins like a whole one."""
    with pytest.raises(UserError, match=rf"{name}: a piece of a file; join all: cat "):
        from_gguf(model().rename(tmp_path / name), tmp_path / "out")


def test_a_download_that_broke_off_is_no_piece(tmp_path: Path) -> None:
    (tmp_path / "m.gguf.part").write_bytes(COUNTS)
    with pytest.raises(UserError, match="truncated"):
        from_gguf(tmp_path / "m.gguf.part", tmp_path / "out")


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
        (["{tmp}", "{tmp}/out"], "no such file; give a model"),
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
