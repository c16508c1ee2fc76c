"""Meta's release layout, read: what the converted model computes and what its files say."""

import base64
import json
import math
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

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError, DataError
from llamapro.inference.cache import KVCache

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}


TEXT = (
    "Once upon a time, there was a little girl named Lily. "
    "She loved to play outside in the sunshine."
)


def rope_freqs(head_dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


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


@pytest.mark.parametrize(
    ("shards", "kv_heads", "rows"),
    [(1, None, False), (1, 2, False), (2, 2, True), (8, 8, False), (8, 2, False)],
)
def test_converted_model_computes_what_metas_formula_computes(
    tmp_path: Path,
    shards: int,
    kv_heads: int | None,
    rows: bool,
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
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


def test_greedy_text_of_the_release_survives_conversion(
    tmp_path: Path,
    shared: Path,
    release: Callable[..., Path],
    load_shards: Callable[[Path], list[dict[str, Tensor]]],
) -> None:
    """A release's greedy continuation is the converted model's; the real one tells its story."""
    real = shared / "checkpoints" / "tinystories-1m"
    source = real if real.is_dir() else release(tmp_path / "release", n_kv_heads=4)
    from_meta(source, tmp_path / "out", None)
    model = Checkpoint.open(tmp_path / "out").load()
    params, tensors = json.loads((source / "params.json").read_text()), load_shards(source)[0]
    ids, cache = [1], KVCache(model, 1, 100)
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


def test_llama_1_has_rope_s_frequencies_in_every_layer(
    tmp_path: Path, release: Callable[..., Path]
) -> None:
    """They follow from theta, which is checked; the result is the same without them."""
    source = release(tmp_path / "release")
    from_meta(source, tmp_path / "plain", None)
    file = source / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    freqs = tensors.pop("rope.freqs")
    names = [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(2)]
    torch.save(tensors | {name: freqs.clone() for name in names}, file)
    from_meta(source, tmp_path / "out", None)
    found, expected = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "plain")
    assert found.sha256() == expected.sha256()
    torch.save(tensors | {name: freqs * 2 for name in names}, file)
    with pytest.raises(CheckpointError, match=rf"'{names[0]}' \[4\] is not theta"):
        from_meta(source, tmp_path / "other", None)


def test_dtype_argument_converts_every_tensor(
    tmp_path: Path,
    release: Callable[..., Path],
    load_shards: Callable[[Path], list[dict[str, Tensor]]],
) -> None:
    """fp32 to bf16: each value rounded once, and config.json says so."""
    source = release(tmp_path / "release", shards=2)
    assert from_meta(source, tmp_path / "out", torch.bfloat16)["dtype"] == "bfloat16"
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config.raw["torch_dtype"] == "bfloat16"
    expected = torch.cat([s["output.weight"] for s in load_shards(source)]).bfloat16()
    assert torch.equal(checkpoint.tensors["lm_head.weight"].read(), expected)


def test_config_json_says_what_the_release_says(
    tmp_path: Path,
    tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
    release: Callable[..., Path],
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


def test_the_command_takes_the_context_length(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], release: Callable[..., Path]
) -> None:
    """--max-position-embeddings reaches config.json; without it the note names the option."""
    source, main = release(tmp_path / "a"), runpy.run_path(str(root / "convert.py"))["main"]
    for name, options in {"x": [], "y": ["--max-position-embeddings", "8192"]}.items():
        main(["from-meta", str(source), str(tmp_path / name), *options])
        config = ModelConfig.from_file(tmp_path / name / "config.json")
        assert config.max_position_embeddings == (8192 if options else 2048)
        assert ("--max-position-embeddings" in capsys.readouterr().err) is (not options)


def test_tokenizer_is_taken_from_the_parent_directory(
    tmp_path: Path, tokenizer_file: Path, release: Callable[..., Path]
) -> None:
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


def test_bpe_ranks_give_llama_3s_special_ids_and_come_back(
    tmp_path: Path, release: Callable[..., Path]
) -> None:
    """BOS and EOS are the first two ids after the ranks, whose file the round trip keeps."""
    source = release(tmp_path / "release", vocab=258 + 256)
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


def test_a_tokenizer_of_another_size_than_the_model_is_told(
    tmp_path: Path,
    tokenizer_file: Path,
    release: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One level up may lie another model's; a few rows more than tokens may be padding."""
    for vocab in (392, 408):
        source = release(tmp_path / f"{vocab}" / "release", vocab=vocab)
        shutil.copy(tokenizer_file, source.parent / "tokenizer.model")
    with pytest.raises(DataError, match=r"392/tokenizer\.model: 400 tokens, .* has 392 rows: anot"):
        from_meta(tmp_path / "392" / "release", tmp_path / "out", None)
    from_meta(tmp_path / "408" / "release", tmp_path / "out", None)
    assert "400 tokens, but the model has 408 rows; is it" in capsys.readouterr().err


def test_a_damaged_tokenizer_is_refused(tmp_path: Path, release: Callable[..., Path]) -> None:
    """A line of ranks cut short, a byte that has no token, no known format: nothing is written."""
    source = release(tmp_path / "release")
    for content, message in {
        rank_lines([b"ab"])[:-2]: "damaged",
        rank_lines([])[7:]: "damaged",
        b"\x00nothing": "not a sentencepiece model",
    }.items():
        (source / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=rf"tokenizer\.model.*{message}"):
            from_meta(source, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_transformers_gives_the_tokenizers_ids_and_our_logits(
    tmp_path: Path, tokenizer_file: Path, release: Callable[..., Path]
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
    tmp_path: Path,
    kind: str,
    shards: int,
    factor: float | None,
    positions: int,
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
    assert_same_release: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Scaled frequencies, by 8, or by 32 with tied embeddings; and back to every byte.

    No Llama 3.1 is as small, and a Llama 3.2 may have been untied: that 8 is a guess is said.
    """
    transformers = pytest.importorskip("transformers")
    params = LLAMA_3 | ({"use_scaled_rope": True} if factor else {})
    tensors = make_tensors(params, rope=False)
    if kind == "3.2":
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    source = write_release(tmp_path / "release", params, tensors, shards, rows=True)
    from_meta(source, tmp_path / "out", None)
    assert ("took Llama 3.1's, 8; a Llama 3.2" in capsys.readouterr().err) is (kind == "3.1")
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
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_tensors: Callable[..., dict[str, Tensor]],
    write_release: Callable[..., Path],
) -> None:
    """Neither max_seq_len nor the tokenizer is there."""
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "norm_eps": 1e-5}
    tensors = make_tensors(params, vocab=128256, rope=False)
    from_meta(write_release(tmp_path / "release", params, tensors), tmp_path / "out", None)
    config = ModelConfig.from_file(tmp_path / "out" / "config.json")
    assert config.max_position_embeddings == 8192
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001,))
    assert "max_seq_len" not in capsys.readouterr().err
