"""New-block files, training checkpoints, Meta's releases and GGUF files for the tests here."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo, write_blocks
from llamapro.checkpoints.run import LISTED, STATE_FILE, TRAINABLE_FILE, write_manifest
from llamapro.checkpoints.writing import in_memory
from llamapro.config import ModelConfig
from llamapro.expansion import is_in_layers
from llamapro.text.vocabulary import byte_characters


@pytest.fixture(scope="session")
def write_trained() -> Callable[..., Path]:
    """`write_trained(file, model, noise=0.0, seed=1, step=1, trainable=...)`: a new-block file.

    It holds the model's own weights, and with noise (its standard deviation) changed ones in fp32.
    """

    def write(
        file: Path,
        model: Checkpoint,
        noise: float = 0.0,
        seed: int = 1,
        step: int = 1,
        trainable: str = "new_blocks",
    ) -> Path:
        info = BlocksInfo.of(model.config, trainable, step)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: stored.read()
            for name, stored in model.tensors.items()
            if trainable == "all" or is_in_layers(name, info.new_layers)
        }
        if noise:
            tensors = {
                name: tensor.float() + noise * torch.randn(tensor.shape, generator=generator)
                for name, tensor in tensors.items()
            }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_blocks(file, in_memory(tensors), info)
        return file

    return write


@pytest.fixture(scope="session")
def write_step(write_trained: Callable[..., Path]) -> Callable[..., Path]:
    """`write_step(run_dir, model, step, state={}, trainable=...)`: a training checkpoint.

    It holds the model's own weights; `state` is added to its `state.json`. Returns the new-block
    file.
    """

    def write(
        run_dir: Path,
        model: Checkpoint,
        step: int,
        state: dict[str, Any] | None = None,
        trainable: str = "new_blocks",
    ) -> Path:
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        file = write_trained(path / TRAINABLE_FILE, model, step=step, trainable=trainable)
        for name in LISTED - {TRAINABLE_FILE, STATE_FILE}:
            (path / name).write_bytes(b"some bytes")
        start = {"step": step, "tokens": 0, "eval": {}, "elapsed_s": 0.0, "settings": {}}
        (path / STATE_FILE).write_text(json.dumps(start | {"loss": None} | (state or {})))
        write_manifest(path)
        return file

    return write


# ---- Releases in Meta's layout -------------------------------------------------------------------

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5}
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def _rope_freqs(head_dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


def _make_tensors(
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
        tensors["rope.freqs"] = _rope_freqs(D, params.get("rope_theta", 10000.0)).to(dtype)
    return tensors


def _write_release(
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


def _release(path: Path, shards: int = 1, vocab: int = 400, **overrides: Any) -> Path:
    params = PARAMS | overrides
    return _write_release(path, params, _make_tensors(params, vocab), shards)


def _load_shards(path: Path) -> list[dict[str, Tensor]]:
    return [torch.load(f, weights_only=True) for f in sorted(path.glob("consolidated.*.pth"))]


def _assert_same_release(found: Path, expected: Path) -> None:
    """Same shards, names, dtypes, shapes, bytes and params; Meta's code computes rope.freqs."""
    one, other = _load_shards(found), _load_shards(expected)
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


@pytest.fixture(scope="session")
def make_tensors() -> Callable[..., dict[str, Tensor]]:
    """`make_tensors(params, vocab=400, dtype=torch.float32, rope=True)`: all of a release."""
    return _make_tensors


@pytest.fixture(scope="session")
def write_release() -> Callable[..., Path]:
    """`write_release(path, params, tensors, shards=1, rows=False)`: split as Meta splits it."""
    return _write_release


@pytest.fixture(scope="session")
def release() -> Callable[..., Path]:
    """`release(path, shards=1, vocab=400, **overrides) -> path`: small; keys of params.json."""
    return _release


@pytest.fixture(scope="session")
def load_shards() -> Callable[[Path], list[dict[str, Tensor]]]:
    """`load_shards(path)`: the tensors of each shard."""
    return _load_shards


@pytest.fixture(scope="session")
def assert_same_release() -> Callable[[Path, Path], None]:
    """`f(found, expected)`: the same shards, names, dtypes, shapes, bytes and params."""
    return _assert_same_release


# ---- GGUF files, as llama.cpp's converter writes them -------------------------------------------

# Byte-level BPE without merges; its control tokens come first.
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", *byte_characters()],
    "tokenizer.ggml.token_type": [3, 3, *[1] * 256],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
TOKENIZER["tokenizer.ggml.tokens"].append("ab")
TOKENIZER["tokenizer.ggml.token_type"].append(1)


def _metadata(config: ModelConfig) -> dict[str, Any]:
    return {
        "general.name": "test",
        "llama.vocab_size": config.vocab_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
    }


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """The order of rows in which llama.cpp's converter writes q and k."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    kind: str | Callable[[str], str] = "F32",
    values: dict[str, Any] | None = None,
    extra: dict[str, Tensor] | None = None,
    per_file: int = 0,
) -> Path:
    gguf = pytest.importorskip("gguf")
    kinds = gguf.GGMLQuantizationType
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_file)
    types = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    for key, value in (_metadata(config) | TOKENIZER | (values or {})).items():
        if key == "general.architecture":
            del writer.kv_data[0][key]
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            name = types[type(value)]
            writer.add_key_value(key, value, gguf.GGUFValueType[name])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for hf, tensor in tensors.items():
        name = names.get_name(hf, try_suffixes=(".weight", ".bias"))
        if hf.split(".")[-2] == "q_proj":
            tensor = _interleave(tensor, config.num_attention_heads)
        elif hf.split(".")[-2] == "k_proj":
            tensor = _interleave(tensor, config.num_key_value_heads)
        chosen = "F32" if tensor.ndim == 1 else kind if isinstance(kind, str) else kind(name)
        writer.add_tensor(name, *_quantised(tensor, kinds[chosen]))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _quantised(tensor: Tensor, kind: Any) -> tuple[Any, None, Any]:
    """The arguments of `add_tensor` after the name.

    The library quantises in some types only. In the others, every byte below 64 is a number.
    """
    from gguf import GGML_QUANT_SIZES, quants

    try:
        return quants.quantize(tensor.float().numpy(), kind), None, kind
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(0, 64, shape, dtype=torch.uint8, generator=generator)
        return data.numpy(), None, kind


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """`write_gguf(path, config, tensors, kind="F32", values={}, extra={}, per_file=0) -> path`.

    `tensors` have Hugging Face's names. `kind` is the quantisation of the matrices, or a function
    of the name. `values` are metadata to add, or to leave out where they are None; `extra` are
    tensors under GGUF's names. With `per_file` the model is split into files of so many tensors.
    """
    return _write_gguf


_TEXTS = [
    "",
    "a",
    "Once upon a time",
    "  two spaces first,  two inside, two last  ",
    "if a == b:\n    return {1: 22}\n\n\tx\r\n",
    "Grüße aus Köln, où ça? Ünïcödé e\u0301 ﬁ",
    "Привет, мир; Γειά σου",
    "你好，世界 こんにちは 한국어",
    "العربية עברית हिन्दी ไทย",
    "emoji 😀👩\u200d👩\u200d👧 \u00a0\u200b\ufeff\x00\x7f",
    "\u2581 the mark of spaces \u2581\u2581",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts of many kinds, and 500 of characters, words and spaces of many scripts in a row."""
    draw = random.Random(0)
    characters = "  \n\tab.,(){}=1éßжя你こ한😀\u0301\u200b\u2581"
    parts = [*characters, "the", "    ", "return", "self", "ing"]
    drawn = ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(500)]
    return [*_TEXTS, *drawn]
