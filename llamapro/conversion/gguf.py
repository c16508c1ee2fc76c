"""Converts a GGUF file (llama.cpp's format) into a checkpoint in Hugging Face's layout.

Quantised weights are dequantised, so what was lost when the file was made stays lost. llama.cpp
rotates neighbouring rows of q and k, as Meta does; `ops.interleaved_to_halves` undoes that.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamapro import ops
from llamapro.checkpoints.tensors import DTYPE_CODES, tensor_chunks
from llamapro.checkpoints.writing import Target, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import PLAIN_LLAMA, write_companions
from llamapro.conversion.gguf_file import GGUFTensor, open_gguf
from llamapro.conversion.gguf_tokenizer import read_tokenizer
from llamapro.errors import CheckpointError, ConfigError, Problems, warn
from llamapro.fields import RopeScaling
from llamapro.files import output_directory, refuse_source, write_json
from llamapro.model import build_on_meta

ROPE_FACTORS = "rope_freqs.weight"
_MODULES = {  # Hugging Face's name of a module -> GGUF's
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
_BLOCK_BYTES = 1 << 22  # of fp32 values that exist at a time
# Metadata that changes what is computed, and the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
}
_READ = set(
    "vocab_size block_count context_length embedding_length feed_forward_length "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window expert_used_count "
    "rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout".split()
)


def from_gguf(
    file: Path, out_dir: Path, dtype: torch.dtype | None = None, force: bool = False
) -> dict[str, Any]:
    """Converts a LLaMA or Mistral in GGUF, quantised or not, into a checkpoint directory.

    Args:
        file: the model; of one in several parts, any part, with the others beside it.
        dtype: of the result; None keeps fp32 and fp16 and makes bf16 of every other type.

    Returns:
        JSON-able: parameters and bytes of the result, files read, tensors per quantisation, dtype.
    """
    refuse_source(out_dir, file)
    metadata, tensors, files = open_gguf(file)
    config, names = open_llama(metadata, tensors, file)
    raw = config.raw
    ids, companions = read_tokenizer(metadata, config.vocab_size, file)
    raw |= ids
    if dtype is None:
        kinds = {tensor.kind.name for tensor in tensors.values()}  # norms are always F32
        exact = torch.float32 if kinds == {"F32"} else torch.float16
        dtype = exact if kinds <= {"F16", "F32"} else torch.bfloat16
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    config = ModelConfig.from_dict(raw, str(file))

    def chunks_of(name: str, hf: str) -> Iterator[memoryview]:
        for values in rows_of(tensors[name], hf, config):
            yield from tensor_chunks(values.to(dtype))

    targets = [
        Target(hf, DTYPE_CODES[dtype], shape, [partial(chunks_of, name, hf)])
        for name, (hf, shape) in names.items()
    ]
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "from-gguf")
        write_companions(aside, config, [])
        write_json(aside / "generation_config.json", ids)
        for name, content in companions.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(content)
    return {
        "parameters": sum(math.prod(target.shape) for target in targets),
        "bytes": sum(target.nbytes for target in targets),
        "files": len(files),
        "quantizations": dict(Counter(tensors[name].kind.name for name in names).most_common()),
        "dtype": raw["torch_dtype"],
    }


Names = dict[str, tuple[str, tuple[int, ...]]]  # GGUF's name -> Hugging Face's, shape


def open_llama(
    metadata: dict[str, Any], tensors: dict[str, GGUFTensor], file: Path
) -> tuple[ModelConfig, Names]:
    """Returns the configuration, without token ids, and the names of all tensors of a file."""
    raw = describe(metadata, tensors, file)
    config = ModelConfig.from_dict(raw, str(file))
    names = _tensor_names(config)
    wrong = Problems()
    wrong.add(*(f"missing tensor {name!r}" for name in names if name not in tensors))
    for name, tensor in tensors.items():
        if name not in names and name != ROPE_FACTORS:
            wrong.add(f"unexpected tensor {name[:80]!r}, which no LLaMA has")
        elif name in names and tensor.shape != (shape := names[name][1]):
            wrong.add(f"{name!r} is {list(tensor.shape)}, its metadata say {list(shape)}")
    wrong.check(CheckpointError, f"{file}: its tensors are not those of a LLaMA")
    if scaling := _rope_scaling(metadata, tensors.get(ROPE_FACTORS), config, file):
        raw["rope_scaling"] = scaling.to_dict()
    return ModelConfig.from_dict(raw, str(file)), names


def describe(
    metadata: dict[str, Any], tensors: dict[str, GGUFTensor], file: Path
) -> dict[str, Any]:
    """Returns the `config.json` that the metadata say, without `rope_scaling` and token ids."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{file}: general.architecture is {architecture!r}; only 'llama' is supported, which "
            "is the name of LLaMA and Mistral models"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ConfigError(f"{file}: general.type is {kind!r:.80}; give the file of the whole model")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file}: missing tensor 'token_embd.weight'; download it again")
    wrong = Problems()

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, list):  # one number for each layer
            if len(set(map(repr, value))) != 1:
                wrong.add(f"llama.{key} is {value!r:.80}, not supported (only one for all layers)")
            return next(iter(value), None)
        if value is None:
            wrong.add(f"llama.{key} is missing")
        return value

    for key, allowed in _NEUTRAL.items():
        if (value := metadata.get(f"llama.{key}", allowed[0])) not in allowed:
            wrong.add(f"llama.{key} is {value!r}, not supported (only {allowed[0]!r})")
    rows = embedding.shape[0]
    if (said := metadata.get("llama.vocab_size", rows)) != rows:
        warn(f"{file}: llama.vocab_size is {said!r:.80}, but the embedding has {rows} rows")
    for key in metadata:
        short = key.removeprefix("llama.")
        if short != key and short not in _NEUTRAL and short not in _READ:
            warn(f"{file}: {key[:80]} {metadata[key]!r:.80} is not known, and not used")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    is_divisible = type(heads) is type(hidden) is int and heads > 0 and hidden % heads == 0
    head_dim = get("attention.key_length", hidden // heads if is_divisible else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := get(key, head_dim)) != head_dim:
            wrong.add(f"llama.{key} is {value!r}, not supported (only the head's {head_dim})")
    layers, window = get("block_count"), get("attention.sliding_window", 0)
    # Before anything is made for each layer: the file can say 10^9.
    if type(layers) is not int or not 0 < layers <= len(tensors):
        wrong.add(f"llama.block_count is {layers!r}, but the file has {len(tensors)} tensors")
    raw = PLAIN_LLAMA | {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    wrong.check(ConfigError, str(file))
    if window:
        raw |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        raw |= {"sliding_window": window}
    return raw


def _tensor_names(config: ModelConfig) -> Names:
    """Returns the names and shapes of every tensor of the model."""
    names: Names = {}
    for hf, parameter in build_on_meta(config).named_parameters():
        *folders, module, kind = hf.split(".")
        block = f"blk.{folders[2]}." if "layers" in folders else ""
        names[f"{block}{_MODULES[module]}.{kind}"] = (hf, tuple(parameter.shape))
    return names


def rows_of(tensor: GGUFTensor, name: str, config: ModelConfig) -> Iterator[Tensor]:
    """Yields the rows of the tensor with this name in Hugging Face's layout, in fp32: some MiB."""
    is_rotated = name.split(".")[-2] in ("q_proj", "k_proj")
    if is_rotated and name.endswith("bias"):
        numbers = tensor.read(0, 1).view(-1, 1)
        yield ops.interleaved_to_halves(numbers, len(numbers) // config.head_dim).view(1, -1)
        return
    multiple, total = config.head_dim if is_rotated else 1, math.prod(tensor.shape[:-1])
    count = max(1, _BLOCK_BYTES // (4 * tensor.shape[-1]) // multiple) * multiple
    for start in range(0, total, count):
        rows = tensor.read(start, min(count, total - start))
        yield ops.interleaved_to_halves(rows, len(rows) // multiple) if is_rotated else rows


# ---- RoPE for longer contexts ------------------------------------------------------------------


def _rope_scaling(
    metadata: dict[str, Any], factors: GGUFTensor | None, config: ModelConfig, file: Path
) -> RopeScaling | None:
    """Returns the scaling that the metadata name, or that the factors follow from."""
    # llama.cpp's defaults; files of 2023 have the second name.
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scale_linear", 1.0)
    factor = metadata.get("llama.rope.scaling.factor", factor) or 1.0
    if kind not in ("none", "linear"):
        raise ConfigError(f"{file}: llama.rope.scaling.type is {kind!r}, not supported ('linear')")
    if factors is None:
        return None if kind == "none" or factor == 1 else RopeScaling("linear", factor)
    if kind == "linear" and factor != 1:
        raise ConfigError(f"{file}: both {ROPE_FACTORS!r} and linear scaling; not supported")
    if factors.shape != (config.head_dim // 2,):
        raise CheckpointError(
            f"{file}: {ROPE_FACTORS!r} is {list(factors.shape)}, expected [{config.head_dim // 2}]"
        )
    values = factors.read(0, 1)[0]
    if (values == 1).all():
        return None
    context = metadata.get("llama.rope.scaling.original_context_length", 8192)
    scaling = _llama3_scaling(values, config, context) if type(context) is int else None
    if scaling is None:
        raise ConfigError(
            f"{file}: no parameters of Llama 3.1's scaling were found that give the factors in "
            f"{ROPE_FACTORS!r}; another way of scaling RoPE is not supported"
        )
    return scaling


def _llama3_scaling(factors: Tensor, config: ModelConfig, context: int) -> RopeScaling | None:
    """Returns the parameters with which "llama3" slows each frequency by its factor, or None."""
    # Between the low and the high frequencies, 1 / factor rises linearly with the number of waves
    # that fit into the original context. Context, low and high factor can be multiplied by one
    # number without changing anything, so the context is given and the others follow.
    D, factor = config.head_dim, float(str(factors.max().numpy()))
    plain = ops.rope_frequencies(D, config.rope_theta)
    # Meta's own parameters first: they are exact, and all there is if one pair is blended, or none
    # is slowed by the whole factor.
    found = [RopeScaling("llama3", f, 1.0, 4.0, context) for f in (factor, 8.0, 32.0)]
    is_blended = (factors > 1) & (factors < factor)
    if factor > 1 and is_blended.sum() >= 2:
        share = ((1 / factors.double() - 1 / factor) / (1 - 1 / factor))[is_blended]
        waves = (context / (2 * math.pi) * plain.double())[is_blended]
        slope = (share[0] - share[-1]) / (waves[0] - waves[-1])
        low_edge = waves[-1] - share[-1] / slope
        low, high = (float(f"{edge.item():.4g}") for edge in (low_edge, low_edge + 1 / slope))
        if 0 < low < high:
            found.append(RopeScaling("llama3", factor, low, high, context))
    for scaling in found:
        slowed = plain / ops.rope_frequencies(D, config.rope_theta, scaling)
        # Both were computed in fp32, in slightly different orders.
        if torch.allclose(slowed, factors, rtol=1e-5, atol=0):
            return scaling
    return None
