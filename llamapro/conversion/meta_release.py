"""Meta's release layout: `params.json`, `consolidated.NN.pth`, and how they are read safely.

Shard k of n holds the k-th of n equal slices of every matrix, by rows (dim 0) or columns (dim 1),
and a copy of every norm. The files are mapped, so names and shapes cost no memory; what was read is
unmapped every 256 MiB, because mapped pages count as resident.
"""

import math
import re
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from llamapro.checkpoints.directory import MISTRAL_LAYOUT
from llamapro.checkpoints.matching import refuse_wrapped
from llamapro.checkpoints.tensors import DTYPE_CODES, same_bytes
from llamapro.config import ModelConfig
from llamapro.conversion.companions import PLAIN_LLAMA
from llamapro.conversion.pth_file import load_pth
from llamapro.errors import CheckpointError, ConfigError, Problems, note, warn
from llamapro.fields import RopeScaling
from llamapro.files import read_json
from llamapro.text.vocabulary import LLAMA_3_RANKS, LLAMA_3_SPECIAL

# Meta's name -> (Hugging Face's name, the dimension split over shards).
_OUTSIDE: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),  # 0 in Llama 3: split by rows
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_IN_LAYER: dict[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
# theta^(-2i / D): Meta's code computes them anew, so they may be absent. LLaMA 1 has the second.
_ROPE = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")
_KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of"}
_KNOWN |= {"ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len"}
_KNOWN |= {"max_batch_size"}
_REFUSED = {*"sliding_window moe moe_args quantization_args lora_args use_qk_norm".split()}
_REFUSED |= {"rope_scaling", "rope_scaling_factor", "rope_high_freq_factor"}
REMAP_BYTES = 256 << 20
LLAMA_3_VOCAB = LLAMA_3_RANKS + len(LLAMA_3_SPECIAL)
_FLOATS = {dtype for dtype in DTYPE_CODES if dtype.is_floating_point}


def tensor_names(num_layers: int, split: str) -> dict[str, tuple[str, int | None]]:
    """Returns Meta's name -> (Hugging Face's name, split dimension) for all tensors.

    `split` says how the embedding is split over shards: "columns" (LLaMA 1 and 2) or "rows".
    """
    names = dict(_OUTSIDE)
    if split == "rows":
        names["tok_embeddings.weight"] = ("model.embed_tokens.weight", 0)
    for i in range(num_layers):
        for meta, (hf, dim) in _IN_LAYER.items():
            names[f"layers.{i}.{meta}"] = (f"model.layers.{i}.{hf}", dim)
    return names


class Shards:
    """The `.pth` files of a release, mapped: names and shapes are there, data is read on use.

    `tensors[k]` maps names to the tensors of shard k, each a slice or a copy.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        numbers = [re.fullmatch(r"consolidated\.(\d\d)\.pth", f.name) for f in directory.glob("*")]
        found = {int(match[1]) for match in numbers if match}
        for number in range(max(found, default=0) + 1):
            if number not in found:
                raise CheckpointError(
                    f"{directory / f'consolidated.{number:02d}.pth'}: missing; a release's shards "
                    f"are numbered from 00 without gaps, found {sorted(found) or 'none'}"
                )
        self.files = [directory / f"consolidated.{number:02d}.pth" for number in sorted(found)]
        self._lock = Lock()  # of `parts`, which several threads may call
        self._map()

    def _map(self) -> None:
        self.tensors: list[dict[str, Tensor]] = []  # the old mappings end first
        self.tensors = [load_pth(file) for file in self.files]
        self._touched = 0

    def parts(self, name: str) -> list[Tensor]:
        """Returns every shard's part of a tensor; keep no reference, or its file stays mapped."""
        with self._lock:
            if self._touched > REMAP_BYTES:
                self._map()
            parts = [tensors[name] for tensors in self.tensors]
            self._touched += sum(part.nbytes for part in parts)
        return parts

    def check_names(self, params: dict[str, Any]) -> None:
        """Raises CheckpointError if a shard lacks a tensor of this model or has another."""
        first, n = self.tensors[0], len(self.files)
        # Before anything is made of that size: params.json can say 10^12.
        widest = max((t.shape[-1] for t in first.values()), default=0)
        for key, most in (("n_layers", len(first)), ("dim", widest)):
            if params[key] > most * n:
                raise CheckpointError(
                    f"{self.directory / 'params.json'}: {key} is {params[key]:,}, too much for the "
                    f"tensors of {n} shards"
                )
        names = {*tensor_names(params["n_layers"], "columns"), *filter(_ROPE.fullmatch, first)}
        refuse_wrapped(first.keys() - names, self.files[0], "tok_embeddings.weight")
        wrong = Problems()
        for file, tensors in zip(self.files, self.tensors, strict=True):
            missing, unexpected = sorted(names - set(tensors)), sorted(set(tensors) - names)
            wrong.add(*(f"{file.name}: unexpected tensor {name!r}" for name in unexpected[:1]))
            wrong.add(*(f"{file.name}: missing tensor {name!r}" for name in missing))
            wrong.add(*(f"{file.name}: unexpected tensor {name!r}" for name in unexpected[1:]))
        wrong.check(CheckpointError, str(self.directory))

    def check_shapes(
        self, expected: dict[str, tuple[tuple[int, ...], int | None]], config: ModelConfig
    ) -> None:
        """Compares every part with its share of the full shape, and the copies with each other.

        `expected` is name -> (full shape, dimension it is split along, or None for copies). Any
        other tensor must be the same in all shards; RoPE's must follow from `config`.
        """
        wrong, n = Problems(), len(self.files)
        for name in self.tensors[0]:
            parts = [tensors[name] for tensors in self.tensors]
            full, dim = expected.get(name, (tuple(parts[0].shape), None))
            share = tuple(size // n if i == dim else size for i, size in enumerate(full))
            divides = dim is None or full[dim] % n == 0
            for file, part in zip(self.files, parts, strict=True):
                at = f"{file.name}: {name!r} is"
                if tuple(part.shape) != share or not divides:
                    total = f", {list(full)} over {n} shards" if n > 1 else ""
                    wrong.add(f"{at} {list(part.shape)}, expected {list(share)}{total}")
                elif part.dtype not in _FLOATS or part.dtype != parts[0].dtype:
                    wrong.add(f"{at} {part.dtype}, expected one float dtype in all shards")
                elif dim is None and not same_bytes(part, parts[0]):
                    wrong.add(f"{at} not the copy of {self.files[0].name}'s it must be")
        wrong.check(CheckpointError, str(self.directory))
        for name in filter(_ROPE.fullmatch, self.tensors[0]):
            if not _is_rope(rope := self.tensors[0][name], config):
                raise CheckpointError(
                    f"{self.files[0]}: {name!r} {list(rope.shape)} is not theta^(-2i / D) of "
                    f"rope_theta {config.rope_theta} and head_dim {config.head_dim}; correct "
                    "params.json"
                )

    def is_tied(self) -> bool:
        """Says whether output.weight repeats the embedding, row after row until one differs."""
        pairs = zip(*map(self.parts, ("tok_embeddings.weight", "output.weight")), strict=True)
        return all(
            one.shape == other.shape and all(map(same_bytes, one, other)) for one, other in pairs
        )


def read_params(file: Path) -> dict[str, Any]:
    """Reads `params.json` as it is; raises ConfigError naming every field that is wrong."""
    try:
        params = read_json(file)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{file}: ")
        inside = [f"; give {other.parent}" for other in sorted(file.parent.glob("*/params.json"))]
        raise ConfigError(
            f"{file}: not readable as a release's parameters ({reason}){''.join(inside[:1])}"
        ) from None
    if "multiple_of" not in params and "hidden_dim" in params:
        raise ConfigError(f"{file}: {MISTRAL_LAYOUT}")
    wrong = Problems()
    optional = ("n_kv_heads", "max_seq_len", "rope_theta", "ffn_dim_multiplier")
    for key in ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps", *optional):
        value: Any = params.get(key)
        is_real = key in ("norm_eps", "rope_theta", "ffn_dim_multiplier")
        if value is None and key in optional:
            continue
        # Python's JSON reads NaN and Infinity; neither is a size.
        if type(value) not in ((int, float) if is_real else (int,)) or not 0 < value < math.inf:
            wrong.add(f"{key} is {value!r}, expected a {'' if is_real else 'whole '}number above 0")
    for key in sorted(params.keys() - _KNOWN):
        if key in _REFUSED and params[key]:
            wrong.add(f"{key} {params[key]!r:.80} is not supported")
        else:
            warn(f"{file}: {key[:80]} {params[key]!r:.80} is not known, and not used")
    size = params.get("head_dim")
    if size is not None and not wrong and size != params["dim"] / params["n_heads"]:
        wrong.add(f"head_dim {size!r:.80} is not dim / n_heads, not supported")
    if (scaled := params.get("use_scaled_rope")) not in (None, False, True):
        wrong.add(f"use_scaled_rope is {scaled!r}, expected true or false")
    wrong.check(ConfigError, str(file))
    return params


def ffn_size(params: dict[str, Any]) -> int:
    """Returns F by Meta's formula (`FeedForward` in its model.py)."""
    hidden, multiple = int(2 * (4 * params["dim"]) / 3), params["multiple_of"]
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return multiple * ((hidden + multiple - 1) // multiple)


def rope_scaling(is_tied: bool) -> RopeScaling:
    """Returns the scaling that `use_scaled_rope` stands for.

    The factor is no field of `params.json`: 8, and 32 in Llama 3.2's small models (Meta's Hugging
    Face repositories), which are those with tied embeddings.
    """
    return RopeScaling("llama3", 32.0 if is_tied else 8.0, 1.0, 4.0, 8192)


def describe(
    params: dict[str, Any], shards: Shards, max_position_embeddings: int | None
) -> tuple[dict[str, Any], str]:
    """Returns the `config.json` of a release and how its embedding is split over shards."""
    if max_position_embeddings is not None and max_position_embeddings < 1:
        raise ConfigError(
            f"--max-position-embeddings {max_position_embeddings}: expected a whole number above 0"
        )
    shards.check_names(params)
    file, first, n = shards.directory / "params.json", shards.tensors[0], len(shards.files)
    dim, rows = params["dim"], first["layers.0.attention.wq.weight"].shape[0]
    if 0 < rows * n < dim and dim % rows == 0:
        raise CheckpointError(
            f"{shards.directory / f'consolidated.{n:02d}.pth'}: missing; the tensors are split "
            f"over {dim // rows} shards, found {n}"
        )
    vocab = first["output.weight"].shape[0] * n
    ffn = first["layers.0.feed_forward.w1.weight"].shape[0] * n
    wrong = Problems()
    if (params.get("vocab_size") or -1) not in (-1, vocab):
        wrong.add(f"vocab_size is {params['vocab_size']!r:.80}, 'output.weight' has {vocab} rows")
    if ffn_size(params) != ffn:
        wrong.add(
            "dim, multiple_of and ffn_dim_multiplier give an intermediate_size of "
            f"{ffn_size(params)}, 'layers.0.feed_forward.w1.weight' has {ffn} rows"
        )
    wrong.check(CheckpointError, str(file))
    is_tied, is_scaled = shards.is_tied(), bool(params.get("use_scaled_rope"))
    if is_scaled and not is_tied and dim < 4096:  # smaller than any Llama 3.1
        warn(
            f"{file}: does not name RoPE's factor: took Llama 3.1's, 8; a Llama 3.2 of this size, "
            "untied by training, has 32: correct rope_scaling in the result's config.json"
        )
    positions = max_position_embeddings or params.get("max_seq_len")
    if positions is None and (is_scaled or vocab == LLAMA_3_VOCAB):
        positions = 131072 if is_scaled else 8192
    if positions is None:
        note(
            f"{file}: no max_seq_len; wrote max_position_embeddings 2048, LLaMA 1's; the option "
            "--max-position-embeddings says otherwise (Llama 2: 4096)"
        )
    raw = PLAIN_LLAMA | {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": dim // params["n_heads"],
        "max_position_embeddings": positions or 2048,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta") or 10000.0,
        **({"rope_scaling": rope_scaling(is_tied).to_dict()} if is_scaled else {}),
        "tie_word_embeddings": is_tied,
    }
    return raw, "rows" if n > 1 and first["tok_embeddings.weight"].shape[-1] == dim else "columns"


def _is_rope(freqs: Tensor, config: ModelConfig) -> bool:
    """Says whether `freqs` are theta^(-2i / D) for i < D/2, as closely as their dtype can tell."""
    D, info = config.head_dim, torch.finfo(freqs.dtype)
    exact = config.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    # Releases computed them in fp32 or in the dtype itself: a few roundings, not one.
    return freqs.shape == exact.shape and torch.allclose(
        freqs.double(), exact, rtol=8 * info.eps, atol=8 * info.tiny * info.eps
    )
