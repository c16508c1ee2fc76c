"""Meta's release layout, refused: damaged, missing or foreign shards and params are named."""

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError, ConfigError

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}


@pytest.mark.parametrize("length", [0, -1])
def test_an_impossible_context_length_is_refused(
    tmp_path: Path, length: int, release: Callable[..., Path]
) -> None:
    """The option and its value are named, and nothing is written."""
    source = release(tmp_path / "release")
    with pytest.raises(ConfigError, match=f"--max-position-embeddings {length}: expected"):
        from_meta(source, tmp_path / "out", None, max_position_embeddings=length)
    assert not (tmp_path / "out").exists()


class Executed:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o700)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, release: Callable[..., Path]) -> None:
    """The message says nothing was executed, and nothing was."""
    source = release(tmp_path / "release")
    torch.save({"a": Executed(tmp_path / "mark")}, source / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: refused; nothing was exec"):
        from_meta(source, tmp_path / "out", None)
    assert not (tmp_path / "mark").exists()
    for other in ({"model": {"a": torch.ones(1)}}, [torch.ones(1)], {"norm.weight": 3}):
        torch.save(other, source / "consolidated.00.pth")
        with pytest.raises(CheckpointError, match="refused; nothing was executed"):
            from_meta(source, tmp_path / "out", None)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "end", "pickle"])
def test_a_damaged_shard_is_named_with_its_size(
    tmp_path: Path, damage: str, release: Callable[..., Path]
) -> None:
    """Truncated, empty or foreign files: no traceback of torch's, and nothing is left behind."""
    source = release(tmp_path / "release", shards=2)
    file = source / "consolidated.01.pth"
    data = file.read_bytes()
    content = {
        "half": data[: len(data) // 2],
        "empty": b"",
        "text": b"{not: found}" * 9,
        "end": data[:-30],
        "pickle": pickle.dumps({}, protocol=4),
    }[damage]
    file.write_bytes(content)
    size = f"{len(content):,} bytes"
    with pytest.raises(CheckpointError, match=rf"consolidated\.01\.pth: {size}"):
        from_meta(source, tmp_path / "out", None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["release"]


def test_the_old_torch_format_is_refused_with_the_fix(
    tmp_path: Path,
    release: Callable[..., Path],
    load_shards: Callable[[Path], list[dict[str, Tensor]]],
) -> None:
    """It cannot be mapped; the message tells how to save it again."""
    source = release(tmp_path / "release")
    file = source / "consolidated.00.pth"
    torch.save(load_shards(source)[0], file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"00\.pth: .*save it again with torch\.save"):
        from_meta(source, tmp_path / "out", None)


def test_a_missing_shard_is_named(tmp_path: Path, release: Callable[..., Path]) -> None:
    """In the middle by its number, at the end by the tensors' shapes, or all of them."""
    source = release(tmp_path / "release", shards=4)
    (source / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r"03\.pth: missing; .* over 4 shards, found 3"):
        from_meta(source, tmp_path / "out", None)
    (source / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: missing"):
        from_meta(source, tmp_path / "out", None)
    for file in source.glob("*.pth"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: missing"):
        from_meta(source, tmp_path / "out", None)


def test_shards_that_do_not_add_up_are_refused(
    tmp_path: Path,
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
) -> None:
    """Three equal parts of 21 columns are not the 64 columns of the whole."""
    tensors = make_tensors(PARAMS, vocab=402)
    tensors["tok_embeddings.weight"] = tensors["tok_embeddings.weight"][:, :63]
    source = write_release(tmp_path / "release", PARAMS, tensors, 3)
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight' is \[402, 21\].*over 3"):
        from_meta(source, tmp_path / "out", None)


W2, WV = "layers.0.feed_forward.w2.weight", "layers.0.attention.wv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda shard: shard.pop("layers.1.attention.wo.weight"),
            r"01\.pth: missing tensor 'layers\.1\.attention\.wo\.weight'",
        ),
        (
            lambda shard: shard.update({"layers.0.attention.wq.bias": torch.ones(3)}),
            r"01\.pth: unexpected tensor 'layers\.0\.attention\.wq\.bias'",
        ),
        (
            lambda shard: shard.update({W2: torch.ones(64, 95)}),
            rf"01\.pth: '{W2}' is \[64, 95\], expected \[64, 96\]",
        ),
        (
            lambda shard: shard.update({WV: shard[WV].half()}),
            rf"01\.pth: '{WV}' is torch\.float16, expected",
        ),
        (
            lambda shard: shard["layers.1.ffn_norm.weight"][5].add_(1e-6),
            r"01\.pth: 'layers\.1\.ffn_norm\.weight' is not the copy of .*00\.pth's",
        ),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "copy"],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
    release: Callable[..., Path],
    load_shards: Callable[[Path], list[dict[str, Tensor]]],
) -> None:
    """One message with the file, the tensor, what was found and what was expected."""
    source = release(tmp_path / "release", shards=2)
    shards = load_shards(source)
    change(shards[1])
    torch.save(shards[1], source / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=message):
        from_meta(source, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_scaled_rope": 8}, ConfigError, "use_scaled_rope is 8, expected true or false"),
        ({"dim": None}, ConfigError, "dim is None, expected a whole number"),
        (
            {"ffn_dim_multiplier": math.inf},
            ConfigError,
            "ffn_dim_multiplier is inf, expected a num",
        ),
        ({"n_layers": 2.5, "norm_eps": "x"}, ConfigError, "n_layers is 2.5.*norm_eps is 'x'"),
        ({"n_layers": 3}, CheckpointError, r"missing tensor 'layers\.2\.attention\.wk"),
        ({"vocab_size": "400"}, CheckpointError, "vocab_size is '400', 'output.weight' has 400"),
        ({"vocab_size": 500}, CheckpointError, "vocab_size is 500, 'output.weight' has 400"),
        ({"multiple_of": 256}, CheckpointError, r"intermediate_size of 256, .*w1.* has 192 rows"),
        ({"rope_theta": 20000.0}, CheckpointError, r"'rope\.freqs' .* rope_theta 20000"),
        ({"n_kv_heads": 2}, CheckpointError, r"wk\.weight' is \[32, 64\], expected \[8, 64\]"),
    ],
)
def test_params_that_do_not_fit_are_named(
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    release: Callable[..., Path],
) -> None:
    """Wrong fields and params of another model: the field or tensor and both values."""
    source = release(tmp_path / "release", shards=2)
    (source / "params.json").write_text(json.dumps(PARAMS | change))
    with pytest.raises(error, match=message):
        from_meta(source, tmp_path / "out", None)


def test_a_folder_that_holds_a_release_names_it(
    tmp_path: Path, release: Callable[..., Path]
) -> None:
    """Llama 3's repositories have it in original/, LLaMA 1 one for each size."""
    release(tmp_path / "original")
    with pytest.raises(ConfigError, match=rf"params\.json: .*missing\); give {tmp_path}/original$"):
        from_meta(tmp_path, tmp_path / "out", None)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_params_are_refused(
    tmp_path: Path, content: str | None, release: Callable[..., Path]
) -> None:
    """A missing, damaged or foreign params.json is named."""
    source = release(tmp_path / "release")
    (source / "params.json").unlink()
    if content is not None:
        (source / "params.json").write_text(content)
    with pytest.raises(ConfigError, match=r"params\.json: not readable"):
        from_meta(source, tmp_path / "out", None)


def test_the_source_is_never_its_own_output(tmp_path: Path, release: Callable[..., Path]) -> None:
    """--force must not replace a release by its conversion, nor the other way round."""
    source = release(tmp_path / "release")
    with pytest.raises(ConfigError, match="also the source"):
        from_meta(source, tmp_path / "x" / ".." / "release", None, force=True)
    from_meta(source, tmp_path / "hf", None)
    with pytest.raises(ConfigError, match="also the source"):
        to_meta(tmp_path / "hf", tmp_path / "hf", force=True)
