"""Compares what the files of a checkpoint hold with what its config.json says.

Where two of them answer the same question, they are compared: a difference is refused, or said
aloud and decided as transformers 5 decides it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from llamapro import ops
from llamapro.checkpoints.tensors import CHUNK_BYTES, StoredTensor
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, Problems, warn
from llamapro.files import read_json
from llamapro.model import build_on_meta

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Parts of names that a wrapper put there, and the wrapper.
_WRAPPERS = {
    r"_orig_mod\.": "torch.compile",
    r"_fsdp_wrapped_module\.": "FSDP",
    r"_checkpoint_wrapped_module\.": "activation checkpointing",
    r"_forward_module\.": "Lightning",
    r"base_model\.model\.|\.(base_layer|lora_\w+|modules_to_save|original_module)\.": "PEFT",
    r"^module\.": "DistributedDataParallel or DeepSpeed",
}
_ROPE_TABLE = re.compile(r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HINTS = {
    r"self_attn\..*\.bias$": "; is attention_bias true?",
    r"mlp\..*\.bias$": "; is mlp_bias true?",
    r"\.(q(weight|zeros)|g_idx|weight_(packed|scale\w*)|scales|biases|SCB|absmax)$": (
        ", of quantised weights; use the original ones"
    ),
}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Fields of Meta's params.json -> those of config.json.
META_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}


def match(
    path: Path, config: ModelConfig, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Checks names and shapes against the configuration; returns them in the model's order.

    Raises CheckpointError that names every tensor that is missing, unexpected or of another shape,
    or a head that is stored beside an embedding to which the configuration ties it.
    """
    # Before a model is built, even on the meta device: a config.json can ask for any size.
    widest = max(config.vocab_size, config.intermediate_size)
    widest = max(widest, config.num_attention_heads * config.head_dim)
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    if config.num_hidden_layers > len(stored) or config.hidden_size * widest > numbers:
        raise CheckpointError(
            f"{path / 'config.json'}: describes {config.num_hidden_layers:,} layers and a matrix "
            f"of {config.hidden_size:,} x {widest:,}, but the files hold {len(stored):,} tensors "
            f"of {numbers:,} numbers in all, such as {next(iter(stored), 'none')[:80]!r}"
        )
    expected = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    stored = _in_full(stored, {*expected, _HEAD})
    # Old versions of transformers wrote RoPE's tables; a tied head may be stored once more.
    derived = [n for n in stored if _ROPE_TABLE.search(n)]
    if config.tie_word_embeddings:
        derived.append(_HEAD)
        if _HEAD in stored:  # safetensors' save_model keeps only the first name of the two
            stored = {_EMBEDDING: replace(stored[_HEAD], name=_EMBEDDING)} | stored
    unexpected = [name for name in stored if name not in expected and name not in derived]
    refuse_wrapped(unexpected, path, _EMBEDDING)
    inside = {found[2] for name in expected if (found := _LAYER.match(name))}
    matches = [found for name in stored if (found := _LAYER.match(name))]
    layers = len({found[1] for found in matches if found[2] in inside})
    if layers not in (0, config.num_hidden_layers):
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, but the "
            f"files hold {layers} layers; correct it, or fetch what is missing"
        )
    wrong = Problems()
    wrong.add(*(_unexpected(stored[name]) for name in unexpected[:1]))
    for name, shape in expected.items():
        if name not in stored:
            hint = (
                "; is tie_word_embeddings true, or was it saved without?" if name == _HEAD else ""
            )
            wrong.add(f"missing tensor {name!r}, expected {list(shape)}{hint}")
        elif stored[name].shape != shape:
            stands = stored[name]
            wrong.add(
                f"{stands.file.name}: {name!r} is {list(stands.shape)}, "
                f"config.json says {list(shape)}"
            )
        elif stored[name].dtype not in _FLOATS:
            wrong.add(f"{name!r} is {stored[name].dtype}, quantised; use the original weights")
    wrong.add(*(_unexpected(stored[name]) for name in unexpected[1:]))
    fix = ": transformers leaves these out: remove them if that is right, or correct config.json"
    wrong.check(CheckpointError, f"{path}{fix if len(wrong) == len(unexpected) else ''}")
    for name in derived:
        if name.endswith("inv_freq"):
            _compare_frequencies(stored[name], config)
    is_head_twice = config.tie_word_embeddings and _HEAD in stored
    if is_head_twice and not have_same_values(stored[_HEAD], stored[_EMBEDDING]):
        raise CheckpointError(
            f"{stored[_HEAD].file}: {_HEAD!r} differs from {_EMBEDDING!r}, but config.json says "
            "tie_word_embeddings true: set it to false to use the stored head, as transformers 5 "
            "does, or remove the tensor to tie it, as transformers 4 does"
        )
    _compare_params(path / "params.json", config)
    return {name: stored[name] for name in expected}


def _in_full(stored: dict[str, StoredTensor], names: set[str]) -> dict[str, StoredTensor]:
    """Adds a "model." that is missing before a name, or takes one too many, as transformers."""
    full: dict[str, StoredTensor] = {}
    for old, tensor in stored.items():
        others = {f"model.{old}", old.removeprefix("model.")} & (names - stored.keys())
        new = next(iter(others - full.keys()), old)
        full[new] = replace(tensor, name=new)
    return full


def refuse_wrapped(names: Iterable[str], where: Path, embedding: str) -> None:
    """Raises CheckpointError if names of tensors carry the mark of a wrapper of the model.

    `embedding` is the name of the embedding without one.
    """
    names = list(names)
    for pattern, wrapper in _WRAPPERS.items():
        if found := [(match, name) for name in names if (match := re.search(pattern, name))]:
            mark, name = found[0]
            raise CheckpointError(
                f"{where}: {len(found)} names carry {mark[0]!r} of {wrapper}, such as "
                f"{name[:120]!r}: save the model inside the wrapper"
                + (" (PEFT: merge_and_unload() first)" if wrapper == "PEFT" else "")
            )
    *_, module, weight = embedding.split(".")
    part = f"{module}.{weight}"
    for name in names:
        if name.endswith(f".{part}"):
            prefix, own = name.removesuffix(part), embedding.removesuffix(part)
            count = sum(other.startswith(prefix) for other in names)
            raise CheckpointError(
                f"{where}: {count} names begin with {prefix[:80]!r}, expected {own!r}, such as "
                f"{name[:120]!r}: save the language model itself, or rename them"
            )


def _unexpected(tensor: StoredTensor) -> str:
    hint = next((fix for mark, fix in _HINTS.items() if re.search(mark, tensor.name)), "")
    return f"{tensor.file.name}: unexpected tensor {tensor.name!r}{hint}"


def have_same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Says whether two tensors hold the same numbers, whatever their dtypes; reads both."""
    if one.shape != other.shape or not one.nbytes:
        return one.shape == other.shape
    if one.dtype == other.dtype:
        return one.sha256() == other.sha256()
    rows = max(1, CHUNK_BYTES * one.shape[0] // one.nbytes)
    pairs = zip(one.map().split(rows), other.map().split(rows), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def _compare_frequencies(tensor: StoredTensor, config: ModelConfig) -> None:
    """Says so if RoPE's frequencies are stored and are not those of config.json, which count."""
    D, theta = config.head_dim, config.rope_theta
    if tensor.shape == (D // 2,):
        values = tensor.read().float()
        # They were computed in fp32 and perhaps rounded to a shorter dtype.
        for scaling in {None, config.rope_scaling}:
            if torch.allclose(values, ops.rope_frequencies(D, theta, scaling), rtol=1e-2):
                return
    warn(
        f"{tensor.file}: {tensor.name!r} are not the frequencies of config.json (rope_theta "
        f"{theta}); those of config.json are used, as in transformers"
    )


def _compare_params(file: Path, config: ModelConfig) -> None:
    """Says so if a params.json beside config.json describes another model; config.json counts."""
    if not file.exists():
        return
    try:
        params = read_json(file)
    except CheckpointError as error:  # many tools have a file of this name
        warn(f"{error}; config.json counts")
        return
    keys = META_FIELDS | {"hidden_dim": "intermediate_size", "head_dim": "head_dim"}  # Mistral's
    wrong = [
        f"{key} ({hf}) is {params[key]!r:.200}, config.json says {getattr(config, hf)!r}"
        for key, hf in keys.items()
        if params.get(key) not in (None, getattr(config, hf))
    ]
    if wrong:
        warn(f"{file}: {'; '.join(wrong)}; config.json counts, as in transformers")
