"""Meta's release layout, written back: equal tensors, other numbers of shards, derived params."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.writing import Target
from llamapro.config import ModelConfig
from llamapro.conversion import meta, meta_release
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError, ConfigError

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("dtype", "shards", "rows", "rope", "extra"),
    [
        (torch.float32, 1, False, True, {}),
        (torch.float16, 1, False, True, {}),
        (torch.bfloat16, 1, False, True, {}),
        (torch.float16, 2, False, True, {"vocab_size": -1, "n_kv_heads": None}),
        (
            *(torch.bfloat16, 2, True, False),
            {"vocab_size": 400, "n_kv_heads": 2, "rope_theta": 500000.0},
        ),
        (
            *(torch.bfloat16, 8, False, True),
            {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "max_seq_len": 96},
        ),
        (
            *(torch.float32, 8, True, True),
            {"rope_theta": 1e6, "ffn_dim_multiplier": None, "unknown": [1]},
        ),
    ],
)
def test_round_trip_gives_back_every_byte(
    tmp_path: Path,
    tokenizer_file: Path,
    dtype: torch.dtype,
    shards: int,
    rows: bool,
    rope: bool,
    extra: dict[str, Any],
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
    assert_same_release: Callable[[Path, Path], None],
) -> None:
    """Meta -> Hugging Face -> Meta: names, dtypes, shapes, bytes, params, tokenizer."""
    params = PARAMS | extra
    tensors = make_tensors(params, dtype=dtype, rope=rope)
    source = write_release(tmp_path / "release", params, tensors, shards, rows)
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    (source / "LICENSE.txt").write_text("terms")
    found = from_meta(source, tmp_path / "hf", None)
    count = sum(t.numel() for name, t in tensors.items() if name != "rope.freqs")
    name = str(dtype).removeprefix("torch.")
    assert found == {
        "parameters": count,
        "bytes": count * dtype.itemsize,
        "shards": shards,
        "dtype": name,
    }
    assert Checkpoint.open(tmp_path / "hf").dtype == dtype
    back = to_meta(tmp_path / "hf", tmp_path / "back")
    assert (back["parameters"], back["shards"], back["dtype"]) == (count, shards, name)
    assert_same_release(tmp_path / "back", source)
    for file in ("tokenizer.model", "LICENSE.txt"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()


def test_a_given_context_length_wins_and_the_round_trip_keeps_params(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    release: Callable[..., Path],
    assert_same_release: Callable[[Path, Path], None],
) -> None:
    """config.json has the option's value; the params stay, with or without max_seq_len."""
    for name, extra in {"a": {}, "b": {"max_seq_len": 96}, "c": {"max_seq_len": None}}.items():
        source = release(tmp_path / name, **extra)
        from_meta(source, tmp_path / f"hf_{name}", None, max_position_embeddings=4096)
        assert "max_seq_len" not in capsys.readouterr().err
        config = ModelConfig.from_file(tmp_path / f"hf_{name}" / "config.json")
        assert config.max_position_embeddings == 4096
        to_meta(tmp_path / f"hf_{name}", tmp_path / f"back_{name}")
        assert_same_release(tmp_path / f"back_{name}", source)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's smaps")
def test_only_a_small_part_of_the_release_is_resident(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
    assert_same_release: Callable[[Path, Path], None],
) -> None:
    """Shapes are learned without reading data, and what was written is unmapped again."""
    params = {"dim": 256, "n_layers": 5, "n_heads": 8, "multiple_of": 256, "norm_eps": 1e-5}
    source = write_release(tmp_path / "release", params, make_tensors(params, vocab=4000))
    whole = (source / "consolidated.00.pth").stat().st_size
    monkeypatch.setattr(meta_release, "REMAP_BYTES", 1 << 20)
    resident = []

    def resident_bytes() -> int:
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                inside = str(source) in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) << 10
        return total

    write = meta.write_checkpoint

    def watched(directory: Path, targets: Any, label: str) -> None:
        def chunks(target: Target) -> Any:
            resident.append(resident_bytes())
            yield from target.chunks()

        write(directory, [replace(t, parts=[partial(chunks, t)]) for t in targets], label)

    monkeypatch.setattr(meta, "write_checkpoint", watched)
    from_meta(source, tmp_path / "out", None)
    assert whole > 20 << 20
    assert resident[0] < 4 << 20  # the norms, compared between shards, and the pages around them
    # Two threads hold a tensor each, at most the embedding of 4 MiB, beside what is still mapped.
    assert max(resident) < 12 << 20
    assert max(resident[4:-2]) < 6 << 20  # between embedding and head: small tensors alone
    to_meta(tmp_path / "out", tmp_path / "back")
    assert_same_release(tmp_path / "back", source)


def test_an_existing_release_is_replaced_only_with_force(
    tmp_path: Path, release: Callable[..., Path], assert_same_release: Callable[[Path, Path], None]
) -> None:
    """The output stays without force and is replaced with it."""
    from_meta(release(tmp_path / "two", shards=2), tmp_path / "hf", None)
    release(tmp_path / "out", shards=4, n_layers=1)
    with pytest.raises(ConfigError, match="--force"):
        to_meta(tmp_path / "hf", tmp_path / "out")
    to_meta(tmp_path / "hf", tmp_path / "out", force=True)
    assert_same_release(tmp_path / "out", tmp_path / "two")


@pytest.mark.parametrize("rows", [False, True])
def test_resharding_gives_the_release_of_that_many_shards(
    tmp_path: Path,
    rows: bool,
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
    assert_same_release: Callable[[Path, Path], None],
) -> None:
    """Two shards become four, each file holding only its own slices."""
    tensors = make_tensors(PARAMS)
    write_release(tmp_path / "two", PARAMS, tensors, 2, rows)
    write_release(tmp_path / "four", PARAMS, tensors, 4, rows)
    from_meta(tmp_path / "two", tmp_path / "hf", None)
    assert to_meta(tmp_path / "hf", tmp_path / "out", shards=4)["shards"] == 4
    assert_same_release(tmp_path / "out", tmp_path / "four")
    for file in (tmp_path / "out").glob("*.pth"):
        held = sum(t.nbytes for t in torch.load(file, weights_only=True).values())
        assert file.stat().st_size < held + 20_000


@pytest.mark.parametrize("shards", [0, 3, 16])
def test_shards_that_do_not_divide_are_refused(
    tmp_path: Path, shards: int, release: Callable[..., Path]
) -> None:
    """The message lists the numbers that fit heads, FFN and vocabulary."""
    from_meta(release(tmp_path / "release", n_kv_heads=4), tmp_path / "hf", None)
    with pytest.raises(ConfigError, match=r"--shards .*choose one of 1, 2, 4$"):
        to_meta(tmp_path / "hf", tmp_path / "out", shards=shards)


@pytest.mark.parametrize("intermediate_size", [64, 100, 112, 170, 175, 256, 1000, 2048])
def test_a_checkpoint_of_other_origin_becomes_a_release(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    intermediate_size: int,
) -> None:
    """Meta's formula gives its FFN size from the derived params; converting back is exact."""
    config = tiny_config(intermediate_size=intermediate_size, rope_theta=500000.0)
    source = write_random_checkpoint(tmp_path / "hf", config, torch.bfloat16)
    found = to_meta(source, tmp_path / "release")
    assert found["shards"] == 1
    params = json.loads((tmp_path / "release" / "params.json").read_text())
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    m = params["multiple_of"]
    assert m * ((hidden + m - 1) // m) == intermediate_size
    assert (params["n_layers"], params["n_heads"], params["n_kv_heads"]) == (4, 4, 2)
    assert (params["vocab_size"], params["rope_theta"]) == (400, 500000.0)
    from_meta(tmp_path / "release", tmp_path / "again", None)
    assert Checkpoint.open(tmp_path / "again").sha256() == Checkpoint.open(source).sha256()


def test_tokens_and_a_template_without_a_place_are_told(
    expand: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Meta's layout has the tokenizer.model alone, which added tokens are not in."""
    base, grown = expand(tokens="<0> <1> <2> <3> <4>".split())
    (grown / "chat_template.jinja").write_text("{{ messages }}")
    to_meta(grown, tmp_path / "release")
    told = "no place for the chat template, <0>, <1>, <2>, 2 more tokens: left out"
    assert told in capsys.readouterr().err
    to_meta(base, tmp_path / "base-release")
    assert "no place for" not in capsys.readouterr().err


@pytest.mark.parametrize(("intermediate_size", "multiple_of"), [(176, 16), (192, 64), (256, 256)])
def test_derived_params_need_no_multiplier_where_rounding_is_enough(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    intermediate_size: int,
    multiple_of: int,
) -> None:
    """LLaMA 1's loader knows multiple_of only, so ffn_dim_multiplier is the last resort."""
    config = tiny_config(intermediate_size=intermediate_size)
    to_meta(write_random_checkpoint(tmp_path / "hf", config), tmp_path / "release")
    params = json.loads((tmp_path / "release" / "params.json").read_text())
    assert params["multiple_of"] == multiple_of
    assert "ffn_dim_multiplier" not in params
    assert "rope_theta" not in params


def test_tied_embeddings_are_written_twice(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    load_shards: Callable[[Path], list[dict[str, Tensor]]],
) -> None:
    """Meta's layout knows no tying: output.weight repeats the embedding."""
    source = write_random_checkpoint(tmp_path / "hf", tiny_config(tie_word_embeddings=True))
    to_meta(source, tmp_path / "release")
    tensors = load_shards(tmp_path / "release")[0]
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    from_meta(tmp_path / "release", tmp_path / "again", None)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        logits = [Checkpoint.open(d).load()(ids) for d in (source, tmp_path / "again")]
    assert torch.equal(*logits)
    assert Checkpoint.open(tmp_path / "again").sha256() == Checkpoint.open(source).sha256()


def test_a_scaling_that_meta_cannot_express_is_refused(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """params.json has one bit for it: another kind or factor would be lost in silence."""
    llama = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama["original_max_position_embeddings"] = 8192
    linear, none = ({"rope_type": "linear", "factor": factor} for factor in (4.0, 1.0))
    for number, rope in enumerate([linear, llama | {"factor": 32.0}, none, llama]):
        config = tiny_config(rope_scaling=rope)
        source = write_random_checkpoint(tmp_path / str(number), config)
        if rope in (llama, none):
            to_meta(source, tmp_path / "release", force=True)
            params = json.loads((tmp_path / "release" / "params.json").read_text())
            assert params.get("use_scaled_rope", False) == (rope is llama)
        else:
            with pytest.raises(ConfigError, match="cannot be said in Meta's layout"):
                to_meta(source, tmp_path / "release")


def test_an_expanded_checkpoint_becomes_a_release_of_more_layers(
    tmp_path: Path,
    release: Callable[..., Path],
    load_shards: Callable[[Path], list[dict[str, Tensor]]],
) -> None:
    """n_layers is the expanded model's; everything else stays the release's."""
    source = release(tmp_path / "release", shards=2, n_kv_heads=2)
    from_meta(source, tmp_path / "hf", None)
    base = Checkpoint.open(tmp_path / "hf")
    expand_checkpoint(base, tmp_path / "expanded", expansion.interleave(2, 2))
    to_meta(tmp_path / "expanded", tmp_path / "back")
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert params == PARAMS | {"n_kv_heads": 2, "n_layers": 4}
    for found, old in zip(load_shards(tmp_path / "back"), load_shards(source), strict=True):
        assert not found["layers.1.attention.wo.weight"].any()
        assert torch.equal(
            found["layers.2.attention.wq.weight"], old["layers.1.attention.wq.weight"]
        )
    from_meta(tmp_path / "back", tmp_path / "again", None)
    again, expanded = (Checkpoint.open(tmp_path / d) for d in ("again", "expanded"))
    assert again.sha256() == expanded.sha256()


def edit_config(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))


def test_an_edited_config_wins_over_the_recorded_params(
    tmp_path: Path, release: Callable[..., Path]
) -> None:
    """Another rope_theta or context length is written to params.json."""
    from_meta(release(tmp_path / "release", max_seq_len=96), tmp_path / "hf", None)
    edit_config(tmp_path / "hf", rope_theta=1e6, max_position_embeddings=512)
    to_meta(tmp_path / "hf", tmp_path / "back")
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert params == PARAMS | {"max_seq_len": 512, "rope_theta": 1e6}
    from_meta(tmp_path / "back", tmp_path / "again", None)


@pytest.mark.parametrize("record", [3, {"params": 5}, {"shards": "x"}])
def test_a_damaged_release_record_is_refused(
    tmp_path: Path, record: Any, release: Callable[..., Path]
) -> None:
    """The key is named with what is wrong with it."""
    from_meta(release(tmp_path / "release"), tmp_path / "hf", None)
    edit_config(tmp_path / "hf", meta_release=record)
    with pytest.raises(ConfigError, match=r"config\.json: the 'meta_release' record is damaged"):
        to_meta(tmp_path / "hf", tmp_path / "out")


def test_a_head_dim_that_meta_cannot_express_is_refused(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """Meta's layout has no head_dim of its own: it is dim / n_heads."""
    source = write_random_checkpoint(tmp_path / "hf", tiny_config(head_dim=32))
    with pytest.raises(ConfigError, match="head_dim 32 times num_attention_heads 4"):
        to_meta(source, tmp_path / "out")


def test_a_failed_write_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: Callable[..., Path]
) -> None:
    """torch reports a full disk as RuntimeError; the partial release disappears."""
    from_meta(release(tmp_path / "release"), tmp_path / "hf", None)

    def fail(_tensors: Any, file: Path) -> None:
        Path(file).write_bytes(b"partial")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: writing failed.*disk"):
        to_meta(tmp_path / "hf", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "release"]
