"""Meta's release layout (`params.json`, `consolidated.NN.pth`) to Hugging Face's and back.

Shard k of n holds the k-th of n equal slices of every matrix, by rows (dim 0) or columns (dim 1),
and a copy of every norm. The files are mapped, so names and shapes cost no memory; what was read is
unmapped every 256 MiB, because mapped pages count as resident.
"""

import json
import math
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llamapro.checkpoint import (
    CHUNK_BYTES,
    DTYPE_CODES,
    DTYPES,
    Checkpoint,
    TensorSpec,
    tensor_chunks,
)
from llamapro.config import CheckpointError, ConfigError, DataError, ModelConfig
from llamapro.model import build_on_meta
from llamapro.output import output_directory, write_checkpoint, write_companions

# Meta's name -> (Hugging Face's name, the dimension split over shards), in a release's order.
_NAMES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),  # 0 in Llama 3: split by rows
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "layers.*.attention.wq.weight": ("model.layers.*.self_attn.q_proj.weight", 0),
    "layers.*.attention.wk.weight": ("model.layers.*.self_attn.k_proj.weight", 0),
    "layers.*.attention.wv.weight": ("model.layers.*.self_attn.v_proj.weight", 0),
    "layers.*.attention.wo.weight": ("model.layers.*.self_attn.o_proj.weight", 1),
    "layers.*.feed_forward.w1.weight": ("model.layers.*.mlp.gate_proj.weight", 0),
    "layers.*.feed_forward.w2.weight": ("model.layers.*.mlp.down_proj.weight", 1),
    "layers.*.feed_forward.w3.weight": ("model.layers.*.mlp.up_proj.weight", 0),
    "layers.*.attention_norm.weight": ("model.layers.*.input_layernorm.weight", None),
    "layers.*.ffn_norm.weight": ("model.layers.*.post_attention_layernorm.weight", None),
}
_ROPE = "rope.freqs"  # theta^(-2i / D): Meta's loader computes it anew, so it may be absent
_REMAP_BYTES = 256 << 20
# What torch.load raises for a damaged file, depending on which byte is wrong.
_DAMAGED = (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError)


def to_rotate_half(weight: Tensor, num_heads: int) -> Tensor:
    """Permutes the rows of Meta's wq or wk: Hugging Face's RoPE then rotates the same pairs.

    In a head's D rows Meta rotates neighbours (2i, 2i + 1), Hugging Face (i, i + D/2), both by
    position * theta^(-2i / D). So, for i < D/2 and j in {0, 1},
    `new[h * D + j * D/2 + i] = old[h * D + 2 * i + j]`. q and k meet only in their product, where a
    common order of rows does not matter; wv and wo stay as they are.

    Args:
        weight: (num_heads * D, C).
        num_heads: H for wq, KV for wk.
    """
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])  # (H, D / 2, 2, C)
    return pairs.transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Undoes `to_rotate_half`: `new[h * D + 2 * i + j] = old[h * D + j * D/2 + i]`."""
    halves = weight.view(num_heads, 2, -1, weight.shape[1])  # (H, 2, D / 2, C)
    return halves.transpose(1, 2).reshape(weight.shape)


def from_meta(
    meta_dir: Path, out_dir: Path, dtype: torch.dtype | None, force: bool = False
) -> dict[str, Any]:
    """Converts a Meta release (LLaMA 1 to 3) into a checkpoint directory.

    Without `max_seq_len` in `params.json` nothing tells the context length: `config.json` then says
    2048, LLaMA 1's; edit its `max_position_embeddings` (Llama 2: 4096, Llama 3: 8192).

    Args:
        meta_dir: `params.json`, `consolidated.NN.pth`; there or one level up, `tokenizer.model`.
        out_dir: the directory to create; it appears only once it is complete.
        dtype: of the result; None keeps each tensor's own.
        force: replace an existing checkpoint, once the new one is complete.

    Returns:
        JSON-able: parameters and bytes of the result, shards read, dtype.

    Raises:
        ConfigError: `params.json` is damaged or describes a model that is not supported.
        CheckpointError: a shard is missing, damaged, not plain tensors, or does not fit the rest.
        DataError: `tokenizer.model` is no tokenizer.
    """
    _refuse_same(meta_dir, out_dir)
    params, shards = _read_params(meta_dir / "params.json"), _Shards(meta_dir)
    raw, split = _describe(meta_dir / "params.json", params, shards)
    config = ModelConfig.from_dict(raw, str(meta_dir / "params.json"))
    meta_of = {hf: meta for meta, (hf, _) in _names(config.num_hidden_layers).items()}
    shapes = {n: tuple(p.shape) for n, p in build_on_meta(config).named_parameters()}
    shards.check({meta_of[hf]: shape for hf, shape in shapes.items()}, split)
    rope, first = shards.tensors[0].get(_ROPE), shards.tensors[0]
    if rope is not None and not _is_rope(rope, config):
        raise CheckpointError(
            f"{shards.files[0]}: {_ROPE!r} {list(rope.shape)} is not theta^(-2i / D) of rope_theta "
            f"{config.rope_theta} and head_dim {config.head_dim}; correct params.json"
        )
    tokenizer, ids, tokenizer_config = _read_tokenizer(meta_dir)
    raw |= ids
    raw["torch_dtype"] = _short(dtype or first["tok_embeddings.weight"].dtype)
    raw["meta_release"] = {
        "params": params,
        "shards": len(shards.files),
        "embedding_split": split,
        "tensor_order": _order_template(list(first), config.num_hidden_layers),
        "rope_freqs": None if rope is None else _to_hex(rope),
    }
    codes = {hf: DTYPE_CODES[dtype or first[meta].dtype] for hf, meta in meta_of.items()}
    specs = [TensorSpec(hf, codes[hf], shape) for hf, shape in shapes.items()]
    del first, rope  # or these mappings would stay

    def chunks_of(spec: TensorSpec) -> Iterator[memoryview]:
        name = meta_of[spec.name]
        dim = _split_dim(name, split)
        parts = shards.parts(name)[: 1 if dim is None else None]
        if heads := _rope_heads(name, config):
            # Joined first: with fewer heads than shards, one shard holds part of a head.
            parts = [to_rotate_half(torch.cat(parts), heads)]
        for block in _row_blocks(parts, dim):
            yield from tensor_chunks(block.to(DTYPES[spec.dtype]))

    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, specs, chunks_of, label="from-meta")
        config = ModelConfig.from_dict(raw, str(meta_dir / "params.json"))
        write_companions(aside, config, [*_legal_files(meta_dir), *tokenizer])
        _write_json(aside / "generation_config.json", ids)
        if tokenizer_config:
            _write_json(aside / "tokenizer_config.json", tokenizer_config)
    return {
        "parameters": sum(math.prod(spec.shape) for spec in specs),
        "bytes": sum(spec.nbytes for spec in specs),
        "shards": len(shards.files),
        "dtype": raw["torch_dtype"],
    }


def to_meta(
    ckpt_dir: Path, out_dir: Path, shards: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint in Meta's release layout; undoes `from_meta` to the byte of every tensor.

    One shard is held in memory while it is written: the whole model if there is only one. Meta's
    layout has no tied embeddings (output.weight repeats them), no context length and no record of
    new blocks. A checkpoint that is not from `from_meta` gets params that follow from its
    `config.json`, the embedding split by columns and no `rope.freqs`.

    Args:
        ckpt_dir: a checkpoint directory.
        out_dir, force: as for `from_meta`.
        shards: model-parallel shards; None for as many as the release had, or 1.

    Returns:
        JSON-able: parameters, bytes written, shards, dtype.

    Raises:
        ConfigError: the model does not split into `shards` (lists the numbers that fit), Meta's
            layout cannot express its head_dim, or the `meta_release` record is damaged.
        CheckpointError: the checkpoint is damaged, or writing failed.
    """
    _refuse_same(ckpt_dir, out_dir)
    checkpoint = Checkpoint.open(ckpt_dir)
    config = checkpoint.config
    params, recorded, split, order, freqs = _release_of(config, ckpt_dir / "config.json")
    count = recorded if shards is None else shards
    _check_count(count, recorded, config)
    names = _names(config.num_hidden_layers)

    def read(name: str) -> Tensor:
        if name == _ROPE and freqs is not None:
            return freqs
        is_tied = config.tie_word_embeddings and name == "output.weight"
        stored = checkpoint.tensors[names["tok_embeddings.weight" if is_tied else name][0]]
        heads = _rope_heads(name, config)
        return to_interleaved(stored.read(), heads) if heads else stored.read()

    written = 0
    tokenizer = [file for file in checkpoint.companions() if file.name == "tokenizer.model"]
    if not tokenizer:
        _say(f"{ckpt_dir}: no tokenizer.model, so the release has none")
    with output_directory(out_dir, force) as aside:
        for index in range(count):
            tensors = {}
            for name in tqdm(order, desc=f"shard {index + 1} of {count}", disable=None):
                tensors[name] = _slice(read(name), _split_dim(name, split), index, count)
            file = aside / f"consolidated.{index:02d}.pth"
            try:
                torch.save(tensors, file)
            except RuntimeError as error:  # torch hides the system's error number
                raise CheckpointError(
                    f"{out_dir / file.name}: writing failed, most likely because the disk is full "
                    f"({str(error).splitlines()[0]}); the partial output was removed"
                ) from None
            written += sum(t.nbytes for t in tensors.values())
        _write_json(aside / "params.json", params)
        for source in [*tokenizer, *_legal_files(ckpt_dir)]:
            shutil.copyfile(source, aside / source.name)
    return {
        "parameters": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        "bytes": written,
        "shards": count,
        "dtype": _short(checkpoint.dtype),
    }


class _Shards:
    """The `.pth` files of a release; `tensors[k]` maps names to shard k's mapped tensors."""

    def __init__(self, directory: Path):
        numbers = [re.fullmatch(r"consolidated\.(\d\d)\.pth", f.name) for f in directory.glob("*")]
        found = {int(match[1]) for match in numbers if match}
        for number in range(max(found, default=0) + 1):
            if number not in found:
                raise CheckpointError(
                    f"{directory / f'consolidated.{number:02d}.pth'}: missing; a release's shards "
                    f"are numbered from 00 without gaps, found {sorted(found) or 'none'}"
                )
        self.files = [directory / f"consolidated.{number:02d}.pth" for number in sorted(found)]
        self._map()

    def _map(self) -> None:
        self.tensors: list[dict[str, Tensor]] = []  # the old mappings end first
        self.tensors = [_load(file) for file in self.files]
        self._touched = 0

    def parts(self, name: str) -> list[Tensor]:
        """Returns every shard's part of a tensor; keep no reference, or its file stays mapped."""
        if self._touched > _REMAP_BYTES:
            self._map()
        parts = [tensors[name] for tensors in self.tensors]
        self._touched += sum(part.nbytes for part in parts)
        return parts

    def check(self, shapes: dict[str, tuple[int, ...]], split: str) -> None:
        """Compares every part with its share of the full shape, and the copies with each other."""
        wrong, n = [], len(self.files)
        for name in self.tensors[0]:
            parts, dim = [t[name] for t in self.tensors], _split_dim(name, split)
            full = shapes.get(name, tuple(parts[0].shape))
            share = tuple(size // n if i == dim else size for i, size in enumerate(full))
            divides = dim is None or full[dim] % n == 0
            for file, part in zip(self.files, parts, strict=True):
                at = f"{file.name}: {name!r} is"
                if tuple(part.shape) != share or not divides:
                    total = f", {list(full)} over {n} shards" if n > 1 else ""
                    wrong.append(f"{at} {list(part.shape)}, expected {list(share)}{total}")
                elif not _is_float(part.dtype) or part.dtype != parts[0].dtype:
                    wrong.append(f"{at} {part.dtype}, expected one float dtype in all shards")
                elif dim is None and _to_hex(part) != _to_hex(parts[0]):
                    wrong.append(f"{at} not the copy of {self.files[0].name}'s it must be")
        _refuse(self.files[0].parent, wrong)


def _load(file: Path) -> dict[str, Tensor]:
    """Maps one shard; only plain tensors come out of it, whatever its pickle asks for."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "rb") as handle:
            magic = handle.read(2)
        if magic == b"\x80\x02":
            raise CheckpointError(
                f"{file}: in PyTorch's format from before 1.6, which cannot be mapped; save it "
                "again with torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)"
            )
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file}: refused; nothing was executed: its pickle "
            + (f"asks for {asked[1]!r}, not only plain tensors" if asked else "is damaged")
        ) from None
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{file}: {size:,} bytes, not a complete PyTorch file ({reason}); fetch it again"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided and t.ndim
        for name, t in tensors.items()
    ):
        raise CheckpointError(f"{file}: refused; nothing was executed: not only plain tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _read_params(file: Path) -> dict[str, Any]:
    """Reads `params.json` as it is; raises ConfigError naming every field that is wrong."""
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
        params.items()
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: not readable as a release's parameters ({error})") from None
    wrong = []
    whole = ("dim", "n_layers", "n_heads", "multiple_of", "n_kv_heads", "max_seq_len")
    optional = ("n_kv_heads", "max_seq_len", "rope_theta", "ffn_dim_multiplier")
    for key in (*whole, "norm_eps", "rope_theta", "ffn_dim_multiplier"):
        value, kind = params.get(key), (int if key in whole else (int, float))
        kind_name = "a whole number" if key in whole else "a number"
        if value is None and key in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
            wrong.append(f"{key} is {value!r}, expected {kind_name} above 0")
    if params.get("use_scaled_rope"):
        wrong.append("use_scaled_rope true (Llama 3.1 and later) is not supported")
    if wrong:
        raise ConfigError(f"{file}: " + "; ".join(wrong))
    return params


def _ffn_size(params: dict[str, Any]) -> int:
    """Meta's formula (`FeedForward` in its model.py)."""
    hidden, multiple = int(2 * (4 * params["dim"]) / 3), params["multiple_of"]
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return multiple * ((hidden + multiple - 1) // multiple)


def _describe(where: Path, params: dict[str, Any], shards: _Shards) -> tuple[dict[str, Any], str]:
    """Returns `config.json` and how the embedding is split, from `params.json` and the shapes."""
    names, first, n = _names(params["n_layers"]), shards.tensors[0], len(shards.files)
    optional = {_ROPE} & set(first)
    wrong = []
    for file, tensors in zip(shards.files, shards.tensors, strict=True):
        missing, unexpected = {*names, *optional} - set(tensors), set(tensors) - {*names, *optional}
        wrong += [f"{file.name}: missing tensor {name!r}" for name in sorted(missing)]
        wrong += [f"{file.name}: unexpected tensor {name!r}" for name in sorted(unexpected)]
    _refuse(where.parent, wrong)
    dim, rows = params["dim"], first["layers.0.attention.wq.weight"].shape[0]
    if 0 < rows * n < dim and dim % rows == 0:
        raise CheckpointError(
            f"{where.parent / f'consolidated.{n:02d}.pth'}: missing; the tensors are split over "
            f"{dim // rows} shards, found {n}"
        )
    vocab = first["output.weight"].shape[0] * n
    ffn = first["layers.0.feed_forward.w1.weight"].shape[0] * n
    if (params.get("vocab_size") or -1) not in (-1, vocab):
        wrong.append(f"vocab_size is {params['vocab_size']}, 'output.weight' has {vocab} rows")
    if _ffn_size(params) != ffn:
        wrong.append(
            "dim, multiple_of and ffn_dim_multiplier give an intermediate_size of "
            f"{_ffn_size(params)}, 'layers.0.feed_forward.w1.weight' has {ffn} rows"
        )
    _refuse(where, wrong)
    if params.get("max_seq_len") is None:
        _say(f"{where}: no max_seq_len; wrote max_position_embeddings 2048, edit it in config.json")
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": dim // params["n_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": params.get("max_seq_len") or 2048,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta") or 10000.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    return raw, "rows" if n > 1 and first["tok_embeddings.weight"].shape[-1] == dim else "columns"


def _read_tokenizer(
    directory: Path,
) -> tuple[list[Path], dict[str, int | None], dict[str, Any] | None]:
    """Finds `tokenizer.model`; returns it, its BOS and EOS ids, and `tokenizer_config.json`."""
    folders = (directory, directory.absolute().parent)  # Llama 1 and 2: beside the sizes' folders
    found = [f / "tokenizer.model" for f in folders if (f / "tokenizer.model").is_file()][:1]
    if not found:
        _say(f"{directory}: no tokenizer.model, here or one level up; copy one into the result")
        return [], {"bos_token_id": 1, "eos_token_id": 2}, None
    lines = found[0].read_bytes().splitlines()
    if lines and re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", lines[0]):
        # Llama 3's BPE ranks; <|begin_of_text|> and <|end_of_text|> are the first two ids after.
        _say(f"{found[0]}: BPE ranks; transformers needs its tokenizer.json, which is not written")
        return found, {"bos_token_id": len(lines), "eos_token_id": len(lines) + 1}, None
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(found[0]))
    except (OSError, RuntimeError):
        raise DataError(f"{found[0]}: neither a sentencepiece model nor BPE ranks") from None
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    used = {token: i for token, i in ids.items() if i >= 0}
    return (
        found,
        {f"{token}_token_id": used.get(token) for token in ("bos", "eos")},
        {
            "tokenizer_class": "LlamaTokenizer",
            **{f"{token}_token": model.id_to_piece(i) for token, i in used.items()},
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
        },
    )


def _release_of(
    config: ModelConfig, where: Path
) -> tuple[dict[str, Any], int, str, list[str], Tensor | None]:
    """Returns params, shards, embedding split, tensor order and rope.freqs of what to write."""
    C, H = config.hidden_size, config.num_attention_heads
    if config.head_dim * H != C:
        raise ConfigError(
            f"{where}: head_dim {config.head_dim} times num_attention_heads {H} is not hidden_size "
            f"{C}, as it must be in Meta's layout"
        )
    release, freqs = config.raw.get("meta_release") or {}, None
    try:
        params = _params_for(config, dict(release.get("params", {})))
        shards = int(release.get("shards", 1))
        split = str(release.get("embedding_split", "columns"))
        order = _ordered(release.get("tensor_order", list(_NAMES)), config.num_hidden_layers)
        if rope := release.get("rope_freqs"):
            freqs = torch.frombuffer(bytearray.fromhex(rope["hex"]), dtype=DTYPES[rope["dtype"]])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: the 'meta_release' record is damaged ({error!r}); remove it"
        ) from None
    if freqs is not None and not _is_rope(freqs, config):
        freqs = None  # rope_theta was changed since
    names = [*_names(config.num_hidden_layers), *([_ROPE] if freqs is not None else [])]
    order = [name for name in order if name != _ROPE or freqs is not None]
    return params, shards, split, order if sorted(order) == sorted(names) else names, freqs


def _params_for(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Returns a release's params, or fresh ones, with what `config.json` says otherwise by now."""
    H, F = config.num_attention_heads, config.intermediate_size
    now = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": H,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    if not params or (params.get("vocab_size") or -1) > 0:
        now["vocab_size"] = config.vocab_size
    if "max_seq_len" in params:
        now["max_seq_len"] = config.max_position_embeddings
    default = {"n_kv_heads": H, "rope_theta": 10000.0}
    params |= {k: v for k, v in now.items() if (params.get(k) or default.get(k)) != v}
    if "multiple_of" not in params or _ffn_size(params) != F:
        params.pop("ffn_dim_multiplier", None)
        for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
            params["multiple_of"] = multiple
            if _ffn_size(params) == F:
                return params
        # multiple_of is 1 now; + 0.5 makes the formula's int() exact whatever the rounding.
        params["ffn_dim_multiplier"] = (F + 0.5) / _ffn_size(params)
    return params


def _check_count(shards: int, recorded: int, config: ModelConfig) -> None:
    """Refuses a number of shards that cuts a head, or a matrix, into unequal parts."""
    H, KV, C = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    rest = math.gcd(C, config.intermediate_size, config.vocab_size)
    # What the release itself had may split a key/value head over shards.
    common = math.gcd(rest, KV * config.head_dim) if shards == recorded else math.gcd(rest, H, KV)
    if shards < 1 or common % shards:
        common = math.gcd(rest, H, KV)
        fitting = [n for n in range(1, min(common, 99) + 1) if common % n == 0]
        raise ConfigError(
            f"--shards {shards}: must divide num_attention_heads {H}, num_key_value_heads {KV}, "
            f"hidden_size {C}, intermediate_size {config.intermediate_size} and vocab_size "
            f"{config.vocab_size}; choose one of {', '.join(map(str, fitting))}"
        )


def _names(num_layers: int) -> dict[str, tuple[str, int | None]]:
    """Returns Meta's name -> (Hugging Face's name, split dimension) for all tensors, in order."""
    names = {}
    for name in _ordered(list(_NAMES), num_layers):
        hf, dim = _NAMES[_template(name)]
        names[name] = (hf.replace("*", name.split(".")[1]), dim)
    return names


def _template(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)


def _ordered(templates: list[str], num_layers: int) -> list[str]:
    """Writes the layers' templates out, layer after layer, where the first of them stands."""
    inside = [t for t in templates if "*" in t]
    layers = [t.replace("*", str(i)) for i in range(num_layers) for t in inside]
    before = templates[: templates.index(inside[0])] if inside else templates
    return before + layers + [t for t in templates[len(before) :] if "*" not in t]


def _order_template(names: list[str], num_layers: int) -> list[str]:
    """Undoes `_ordered`; an order that has no template is returned as it is."""
    templates = list(dict.fromkeys(map(_template, names)))
    return templates if _ordered(templates, num_layers) == names else names


def _split_dim(name: str, split: str) -> int | None:
    if name == "tok_embeddings.weight":
        return 0 if split == "rows" else 1
    return None if name == _ROPE else _NAMES[_template(name)][1]


def _rope_heads(name: str, config: ModelConfig) -> int:
    """Returns the number of heads whose rows are permuted, 0 for a tensor that RoPE never meets."""
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def _is_rope(freqs: Tensor, config: ModelConfig) -> bool:
    """Says whether these are the RoPE frequencies, as closely as their dtype can tell."""
    D, info = config.head_dim, torch.finfo(freqs.dtype)
    exact = config.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    # Releases computed them in fp32 or in the dtype itself: a few roundings, not one.
    return freqs.shape == exact.shape and torch.allclose(
        freqs.double(), exact, rtol=8 * info.eps, atol=8 * info.tiny * info.eps
    )


def _row_blocks(parts: list[Tensor], dim: int | None) -> Iterator[Tensor]:
    """Yields the rows of the joined tensor, about 8 MiB at a time: it never exists whole."""
    rows = max(1, CHUNK_BYTES * parts[0].shape[0] // max(1, sum(p.nbytes for p in parts)))
    if dim == 1:
        for blocks in zip(*(part.split(rows) for part in parts), strict=True):
            yield torch.cat(blocks, dim=1)
    else:
        for part in parts:
            yield from part.split(rows)


def _slice(full: Tensor, dim: int | None, index: int, count: int) -> Tensor:
    """Returns a shard's part in its own memory: of a view, torch.save writes the whole base."""
    if dim is None or count == 1:
        return full
    return full.chunk(count, dim)[index].clone(memory_format=torch.contiguous_format)


def _to_hex(tensor: Tensor) -> dict[str, str]:
    data = b"".join(map(bytes, tensor_chunks(tensor)))
    return {"dtype": DTYPE_CODES[tensor.dtype], "hex": data.hex()}


def _legal_files(directory: Path) -> list[Path]:
    files = sorted([*directory.glob("LICENSE*"), *directory.glob("USE_POLICY*")])
    return [file for file in files if file.is_file()]


def _refuse_same(source: Path, out_dir: Path) -> None:
    if source.resolve() == out_dir.resolve():
        raise ConfigError(f"{out_dir}: is also the source; choose another output directory")


def _refuse(where: Path, wrong: list[str]) -> None:
    """Raises CheckpointError with the first eight mistakes, if there are any."""
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    if wrong:
        raise CheckpointError(f"{where}: " + "; ".join(wrong[:8]) + more)


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype in DTYPE_CODES


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
