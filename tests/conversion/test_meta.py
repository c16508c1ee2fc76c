"""Meta's release layout: read exactly, refused clearly, written back with equal tensors."""

import base64
import json
import math
import os
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from llamapro import expansion, ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion import meta, meta_release
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.inference.cache import KVCache

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
TEXT = (
    "Once upon a time, there was a little girl named Lily. "
    "She loved to play outside in the sunshine."
)


def rope_freqs(head_dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


def make_tensors(
    params: dict[str, Any], vocab: int = 400, dtype: torch.dtype = torch.float32, rope: bool = True
) -> dict[str, Tensor]:
    """A whole release's tensors, before they are split, in the order of Meta's own files."""
    C, D = params["dim"], params["dim"] // params["n_heads"]
    kv = (params.get("n_kv_heads") or params["n_heads"]) * D
    hidden = int(2 * (4 * C) / 3)
    hidden = int((params.get("ffn_dim_multiplier") or 1) * hidden)
    hidden = -(-hidden // params["multiple_of"]) * params["multiple_of"]
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(C)).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.2 * torch.randn(C, generator=generator)).to(dtype)

    tensors = {
        "tok_embeddings.weight": matrix(vocab, C),
        "norm.weight": norm(),
        "output.weight": matrix(vocab, C),
    }
    for i in range(params["n_layers"]):
        tensors |= {
            f"layers.{i}.attention.wq.weight": matrix(C, C),
            f"layers.{i}.attention.wk.weight": matrix(kv, C),
            f"layers.{i}.attention.wv.weight": matrix(kv, C),
            f"layers.{i}.attention.wo.weight": matrix(C, C),
            f"layers.{i}.feed_forward.w1.weight": matrix(hidden, C),
            f"layers.{i}.feed_forward.w2.weight": matrix(C, hidden),
            f"layers.{i}.feed_forward.w3.weight": matrix(hidden, C),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    if rope:
        tensors["rope.freqs"] = rope_freqs(D, params.get("rope_theta", 10000.0)).to(dtype)
    return tensors


def write_release(
    path: Path,
    params: dict[str, Any],
    tensors: dict[str, Tensor],
    shards: int = 1,
    rows: bool = False,
) -> Path:
    """Writes the layout as Meta's model parallelism saves it."""
    path.mkdir(parents=True)
    (path / "params.json").write_text(json.dumps(params))
    for index in range(shards):
        part = {}
        for name, tensor in tensors.items():
            columns = name.endswith(COLUMNS) or (name.startswith("tok_") and not rows)
            if tensor.ndim == 2:
                tensor = tensor.chunk(shards, dim=int(columns))[index]
            part[name] = tensor.clone(memory_format=torch.contiguous_format)
        torch.save(part, path / f"consolidated.{index:02d}.pth")
    return path


def release(path: Path, shards: int = 1, **overrides: Any) -> Path:
    params = PARAMS | overrides
    return write_release(path, params, make_tensors(params), shards)


def scaled(freqs: Tensor, factor: float) -> Tensor:
    """Llama 3.1's frequencies, one by one (`apply_scaling` in Meta's llama-models)."""
    out = []
    for freq in freqs.tolist():
        waves = 8192 * freq / (2 * math.pi)  # in the context it was first trained with
        share = min(1.0, max(0.0, (waves - 1) / (4 - 1)))
        out.append((1 - share) * freq / factor + share * freq)
    return torch.tensor(out)


def meta_logits(
    params: dict[str, Any], w: dict[str, Tensor], ids: Tensor, factor: float = 8.0
) -> Tensor:
    """Meta's forward: complex RoPE over neighbouring pairs. ids (T,) -> logits (T, V), fp32."""
    H, T = params["n_heads"], len(ids)
    KV, D = params.get("n_kv_heads") or H, params["dim"] // params["n_heads"]
    freqs = rope_freqs(D, params.get("rope_theta", 10000.0))
    freqs = scaled(freqs, factor) if params.get("use_scaled_rope") else freqs
    angles = torch.outer(torch.arange(T).float(), freqs)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D / 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((T, T), -math.inf).triu(1)
    for i in range(params["n_layers"]):
        layer = {n.removeprefix(f"layers.{i}."): t for n, t in w.items()}
        h = norm(x, layer["attention_norm.weight"])
        q = rotate((h @ layer["attention.wq.weight"].T).view(T, H, D))
        k = rotate((h @ layer["attention.wk.weight"].T).view(T, KV, D))
        v = (h @ layer["attention.wv.weight"].T).view(T, KV, D)
        k, v = k.repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D) + mask
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(T, -1)
        x = x + out @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate = F.silu(h @ layer["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def load_shards(path: Path) -> list[dict[str, Tensor]]:
    return [torch.load(f, weights_only=True) for f in sorted(path.glob("consolidated.*.pth"))]


def assert_same_release(found: Path, expected: Path) -> None:
    """Same shards, names, dtypes, shapes, bytes and params; Meta's code computes rope.freqs."""
    one, other = load_shards(found), load_shards(expected)
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        theirs.pop("rope.freqs", None)
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].shape == tensor.shape, name
            assert torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8)), name
    read = [json.loads((p / "params.json").read_text()) for p in (found, expected)]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("shards", "kv_heads", "rows"),
    [(1, None, False), (1, 2, False), (2, 2, True), (8, 8, False), (8, 2, False)],
)
def test_converted_model_computes_what_metas_formula_computes(
    tmp_path: Path, shards: int, kv_heads: int | None, rows: bool
) -> None:
    """Logits equal Meta's own forward with complex RoPE, with and without grouped heads."""
    params = PARAMS | ({"n_kv_heads": kv_heads} if kv_heads else {})
    tensors = make_tensors(params)
    write_release(tmp_path / "release", params, tensors, shards, rows)
    from_meta(tmp_path / "release", tmp_path / "out", None)
    model = Checkpoint.open(tmp_path / "out").load()
    ids = torch.randint(0, 400, (33,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids[None])[0]
    torch.testing.assert_close(found, meta_logits(params, tensors, ids), rtol=1e-5, atol=1e-5)


def test_greedy_text_of_the_release_survives_conversion(tmp_path: Path, shared: Path) -> None:
    """A release's greedy continuation is the converted model's; the real one tells its story."""
    real = shared / "checkpoints" / "tinystories-1m"
    source = real if real.is_dir() else release(tmp_path / "release", n_kv_heads=4)
    from_meta(source, tmp_path / "out", None)
    model = Checkpoint.open(tmp_path / "out").load()
    params, tensors = json.loads((source / "params.json").read_text()), load_shards(source)[0]
    ids, cache = [1], KVCache(model.config, 1, 100, torch.float32)
    with torch.no_grad():
        while len(ids) < 100:
            ids.append(int(model(torch.tensor([ids[-1:]]), cache=cache)[0, -1].argmax()))
    expected = meta_logits(params, tensors, torch.tensor(ids[:-1])).argmax(-1)
    assert expected.tolist() == ids[1:]
    if source == real:
        tokenizer = sentencepiece.SentencePieceProcessor(
            model_file=str(tmp_path / "out" / "tokenizer.model")
        )
        assert tokenizer.decode(ids[1:]).startswith(TEXT)


def test_permutation_follows_its_index_formula() -> None:
    """new[h D + j D/2 + i] = old[h D + 2 i + j], and the inverse undoes it."""
    H, D = 3, 8
    old = torch.arange(H * D * 5).view(H * D, 5)
    new = ops.interleaved_to_halves(old, H)
    for h in range(H):
        for i in range(D // 2):
            for j in range(2):
                assert torch.equal(new[h * D + j * D // 2 + i], old[h * D + 2 * i + j])
    assert torch.equal(ops.halves_to_interleaved(new, H), old)


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


def test_dtype_argument_converts_every_tensor(tmp_path: Path) -> None:
    """fp32 to bf16: each value rounded once, and config.json says so."""
    source = release(tmp_path / "release", shards=2)
    assert from_meta(source, tmp_path / "out", torch.bfloat16)["dtype"] == "bfloat16"
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config.raw["torch_dtype"] == "bfloat16"
    expected = torch.cat([s["output.weight"] for s in load_shards(source)]).bfloat16()
    assert torch.equal(checkpoint.tensors["lm_head.weight"].read(), expected)


def test_config_json_says_what_the_release_says(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fields of params.json under Hugging Face's names; an unknown context length is announced."""
    source = release(tmp_path / "a", n_kv_heads=2, rope_theta=500000.0, max_seq_len=96)
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    from_meta(source, tmp_path / "out", None)
    assert capsys.readouterr().err == ""
    config = ModelConfig.from_file(tmp_path / "out" / "config.json")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (400, 64, 192)
    assert (config.num_hidden_layers, config.head_dim) == (2, 8)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert (config.rope_theta, config.max_position_embeddings) == (500000.0, 96)
    assert config.rms_norm_eps == 1e-5
    from_meta(release(tmp_path / "b"), tmp_path / "out_b", None)
    output = capsys.readouterr()
    assert output.out == ""
    assert "max_position_embeddings" in output.err
    assert "no tokenizer.model" in output.err
    config = ModelConfig.from_file(tmp_path / "out_b" / "config.json")
    assert (config.max_position_embeddings, config.num_key_value_heads) == (2048, 8)


def test_a_given_context_length_wins_and_the_round_trip_keeps_params(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_the_command_takes_the_context_length(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--max-position-embeddings reaches config.json; without it the note names the option."""
    source, main = release(tmp_path / "a"), runpy.run_path(str(root / "convert.py"))["main"]
    for name, options in {"x": [], "y": ["--max-position-embeddings", "8192"]}.items():
        main(["from-meta", str(source), str(tmp_path / name), *options])
        config = ModelConfig.from_file(tmp_path / name / "config.json")
        assert config.max_position_embeddings == (8192 if options else 2048)
        assert ("--max-position-embeddings" in capsys.readouterr().err) is (not options)


@pytest.mark.parametrize("length", [0, -1])
def test_an_impossible_context_length_is_refused(tmp_path: Path, length: int) -> None:
    """The option and its value are named, and nothing is written."""
    source = release(tmp_path / "release")
    with pytest.raises(ConfigError, match=f"--max-position-embeddings {length}: expected"):
        from_meta(source, tmp_path / "out", None, max_position_embeddings=length)
    assert not (tmp_path / "out").exists()


def test_tokenizer_is_taken_from_the_parent_directory(tmp_path: Path, tokenizer_file: Path) -> None:
    """Llama 1 and 2 downloads keep one tokenizer beside the sizes' folders."""
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.model")
    from_meta(release(tmp_path / "7b"), tmp_path / "out", None)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def rank_lines(tokens: list[bytes]) -> bytes:
    """A `tokenizer.model` as Llama 3's: all bytes, and these."""
    every = [*(bytes([byte]) for byte in range(256)), *tokens]
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(every))


def test_bpe_ranks_give_llama_3s_special_ids_and_come_back(tmp_path: Path) -> None:
    """BOS and EOS are the first two ids after the ranks, whose file the round trip keeps."""
    source = release(tmp_path / "release")
    text = rank_lines([b"ab", b"abc"])
    (source / "tokenizer.model").write_bytes(text)
    from_meta(source, tmp_path / "out", None)
    config = ModelConfig.from_file(tmp_path / "out" / "config.json")
    count = text.count(b"\n")
    assert (config.bos_token_id, config.eos_token_ids) == (count, (count + 1,))
    assert (tmp_path / "out" / "original" / "tokenizer.model").read_bytes() == text
    raw = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert raw["added_tokens"][0]["id"] == count
    to_meta(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == text
    assert not (tmp_path / "back" / "original").exists()


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    """A line of ranks cut short, a byte that has no token, no known format: nothing is written."""
    source = release(tmp_path / "release")
    for content, message in {
        rank_lines([b"ab"])[:-2]: "damaged",
        rank_lines([])[7:]: "damaged",
        b"\x00nothing": "neither",
    }.items():
        (source / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=rf"tokenizer\.model.*{message}"):
            from_meta(source, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_transformers_gives_the_tokenizers_ids_and_our_logits(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """AutoTokenizer and AutoModelForCausalLM read the directory; ids and logits are the same."""
    transformers = pytest.importorskip("transformers")
    source = release(tmp_path / "release", n_kv_heads=2, rope_theta=500000.0)
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    from_meta(source, tmp_path / "out", None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    for text in ("def parse(self, args):\n    return 12\n", "Grüße, 世界", "x", "a\tb  c"):
        ids = [1, *ours.encode(text)]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        batch = torch.tensor([ids])
        mine = Checkpoint.open(tmp_path / "out").load()(batch)
        torch.testing.assert_close(model(batch).logits, mine, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's smaps")
def test_only_a_small_part_of_the_release_is_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    def watched(directory: Path, specs: Any, chunks_of: Any, **options: Any) -> None:
        def chunks(spec: Any) -> Any:
            resident.append(resident_bytes())
            yield from chunks_of(spec)

        write(directory, specs, chunks, **options)

    monkeypatch.setattr(meta, "write_checkpoint", watched)
    from_meta(source, tmp_path / "out", None)
    assert whole > 20 << 20
    assert resident[0] < 4 << 20  # the norms, compared between shards, and the pages around them
    # Two threads hold a tensor each, at most the embedding of 4 MiB, beside what is still mapped.
    assert max(resident) < 12 << 20
    assert max(resident[4:-2]) < 6 << 20  # between embedding and head: small tensors alone
    to_meta(tmp_path / "out", tmp_path / "back")
    assert_same_release(tmp_path / "back", source)


class Executed:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o700)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
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
def test_a_damaged_shard_is_named_with_its_size(tmp_path: Path, damage: str) -> None:
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


def test_the_old_torch_format_is_refused_with_the_fix(tmp_path: Path) -> None:
    """It cannot be mapped; the message tells how to save it again."""
    source = release(tmp_path / "release")
    file = source / "consolidated.00.pth"
    torch.save(load_shards(source)[0], file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"00\.pth: .*save it again with torch\.save"):
        from_meta(source, tmp_path / "out", None)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
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


def test_shards_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
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
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
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
        ({"vocab_size": 500}, CheckpointError, "vocab_size is 500, 'output.weight' has 400"),
        ({"multiple_of": 256}, CheckpointError, r"intermediate_size of 256, .*w1.* has 192 rows"),
        ({"rope_theta": 20000.0}, CheckpointError, r"'rope\.freqs' .* rope_theta 20000"),
        ({"n_kv_heads": 2}, CheckpointError, r"wk\.weight' is \[32, 64\], expected \[8, 64\]"),
    ],
)
def test_params_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Wrong fields and params of another model: the field or tensor and both values."""
    source = release(tmp_path / "release", shards=2)
    (source / "params.json").write_text(json.dumps(PARAMS | change))
    with pytest.raises(error, match=message):
        from_meta(source, tmp_path / "out", None)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_params_are_refused(tmp_path: Path, content: str | None) -> None:
    """A missing, damaged or foreign params.json is named."""
    source = release(tmp_path / "release")
    (source / "params.json").unlink()
    if content is not None:
        (source / "params.json").write_text(content)
    with pytest.raises(ConfigError, match=r"params\.json: not readable"):
        from_meta(source, tmp_path / "out", None)


def test_the_source_is_never_its_own_output(tmp_path: Path) -> None:
    """--force must not replace a release by its conversion, nor the other way round."""
    source = release(tmp_path / "release")
    with pytest.raises(ConfigError, match="also the source"):
        from_meta(source, tmp_path / "x" / ".." / "release", None, force=True)
    from_meta(source, tmp_path / "hf", None)
    with pytest.raises(ConfigError, match="also the source"):
        to_meta(tmp_path / "hf", tmp_path / "hf", force=True)


def test_an_existing_release_is_replaced_only_with_force(tmp_path: Path) -> None:
    """The output stays without force and is replaced with it."""
    from_meta(release(tmp_path / "two", shards=2), tmp_path / "hf", None)
    release(tmp_path / "out", shards=4, n_layers=1)
    with pytest.raises(ConfigError, match="--force"):
        to_meta(tmp_path / "hf", tmp_path / "out")
    to_meta(tmp_path / "hf", tmp_path / "out", force=True)
    assert_same_release(tmp_path / "out", tmp_path / "two")


@pytest.mark.parametrize("rows", [False, True])
def test_resharding_gives_the_release_of_that_many_shards(tmp_path: Path, rows: bool) -> None:
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
def test_shards_that_do_not_divide_are_refused(tmp_path: Path, shards: int) -> None:
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


LLAMA_3 = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 400,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize(
    ("kind", "shards", "factor", "positions"),
    [
        ("3", 1, None, 2048),
        ("3.1", 1, 8.0, 131072),
        ("3.1", 2, 8.0, 131072),
        ("3.2", 1, 32.0, 131072),
    ],
)
def test_llama_3_releases_compute_metas_formula_in_transformers_too(
    tmp_path: Path, kind: str, shards: int, factor: float | None, positions: int
) -> None:
    """Scaled frequencies, by 8, or by 32 with tied embeddings; and back to every byte."""
    transformers = pytest.importorskip("transformers")
    params = LLAMA_3 | ({"use_scaled_rope": True} if factor else {})
    tensors = make_tensors(params, rope=False)
    if kind == "3.2":
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    source = write_release(tmp_path / "release", params, tensors, shards, rows=True)
    from_meta(source, tmp_path / "out", None)
    config = ModelConfig.from_file(tmp_path / "out" / "config.json")
    assert config.tie_word_embeddings is (kind == "3.2")
    assert (config.rope_scaling and config.rope_scaling.factor) == factor
    assert config.max_position_embeddings == positions
    ids = torch.randint(0, 400, (600,), generator=torch.Generator().manual_seed(1))
    expected = meta_logits(params, tensors, ids, factor or 0.0)
    if factor:  # this far into a text another factor is seen
        other = meta_logits(params, tensors, ids, 1.0)
        assert (other - expected).abs().max() > 100 * 1e-5 * expected.abs().max()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        mine = Checkpoint.open(tmp_path / "out").load()(ids[None])[0]
        found = theirs(ids[None]).logits[0]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, mine, rtol=1e-5, atol=1e-5)
    to_meta(tmp_path / "out", tmp_path / "back")
    assert_same_release(tmp_path / "back", source)


def test_a_vocabulary_of_llama_3s_size_tells_context_and_control_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither max_seq_len nor the tokenizer is there."""
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "norm_eps": 1e-5}
    tensors = make_tensors(params, vocab=128256, rope=False)
    from_meta(write_release(tmp_path / "release", params, tensors), tmp_path / "out", None)
    config = ModelConfig.from_file(tmp_path / "out" / "config.json")
    assert config.max_position_embeddings == 8192
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001,))
    assert "max_seq_len" not in capsys.readouterr().err


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


def test_an_expanded_checkpoint_becomes_a_release_of_more_layers(tmp_path: Path) -> None:
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


def test_an_edited_config_wins_over_the_recorded_params(tmp_path: Path) -> None:
    """Another rope_theta or context length is written to params.json."""
    from_meta(release(tmp_path / "release", max_seq_len=96), tmp_path / "hf", None)
    edit_config(tmp_path / "hf", rope_theta=1e6, max_position_embeddings=512)
    to_meta(tmp_path / "hf", tmp_path / "back")
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert params == PARAMS | {"max_seq_len": 512, "rope_theta": 1e6}
    from_meta(tmp_path / "back", tmp_path / "again", None)


@pytest.mark.parametrize("record", [3, {"params": 5}, {"shards": "x"}])
def test_a_damaged_release_record_is_refused(tmp_path: Path, record: Any) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
