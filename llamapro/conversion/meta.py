"""Converts between Meta's release layout (`meta_release.py`) and Hugging Face's.

They differ in names, in shards, and in the order of wq's and wk's rows, because Meta's RoPE rotates
neighbouring pairs. `config.json` keeps under `meta_release` what Hugging Face's layout cannot say.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.matching import META_FIELDS
from llamapro.checkpoints.tensors import CHUNK_BYTES, DTYPE_CODES, all_finite, tensor_chunks
from llamapro.checkpoints.writing import Target, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion import meta_release
from llamapro.conversion.companions import write_companions
from llamapro.errors import CheckpointError, ConfigError, DataError, note, warn
from llamapro.files import copy_companion, output_directory, refuse_large, refuse_source, write_json
from llamapro.model import build_on_meta
from llamapro.text.template_files import own_template
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import (
    LLAMA_3_RANKS,
    LLAMA_3_SPECIAL,
    is_ranks,
    parse_ranks,
    read_vocabulary,
)


def from_meta(
    meta_dir: Path,
    out_dir: Path,
    dtype: torch.dtype | None,
    force: bool = False,
    max_position_embeddings: int | None = None,
) -> dict[str, Any]:
    """Converts a Meta release (LLaMA 1 to 3.3, text) into a checkpoint directory.

    Args:
        meta_dir: `params.json`, `consolidated.NN.pth`; there or one level up, `tokenizer.model`.
        dtype: of the result; None keeps each tensor's own.
        max_position_embeddings: the context length; None for `max_seq_len` of `params.json`, else
            8192 for Llama 3, 131072 from 3.1 on, and 2048 for others.

    Returns:
        JSON-able: parameters and bytes of the result, shards read, dtype.
    """
    refuse_source(out_dir, meta_dir)
    if meta_dir.is_file():
        raise ConfigError(f"{meta_dir}: give the directory of the release, {meta_dir.parent}")
    file = meta_dir / "params.json"
    if (meta_dir / "config.json").exists() and not file.exists():
        raise ConfigError(f"{meta_dir}: in Hugging Face layout already; nothing is to convert")
    params, shards = meta_release.read_params(file), meta_release.Shards(meta_dir)
    raw, split = meta_release.describe(params, shards, max_position_embeddings)
    config = ModelConfig.from_dict(raw, str(file))
    names = meta_release.tensor_names(config.num_hidden_layers, split)
    shapes = {n: tuple(p.shape) for n, p in build_on_meta(config).named_parameters()}
    all_shapes = {"lm_head.weight": shapes["model.embed_tokens.weight"]} | shapes  # tied: not in it
    expected = {meta: (all_shapes[hf], dim) for meta, (hf, dim) in names.items()}
    shards.check_shapes(expected, config)
    tokenizer, ids = _read_tokenizer(meta_dir, config.vocab_size)
    dtypes = {name: dtype or tensor.dtype for name, tensor in shards.tensors[0].items()}
    raw |= ids
    raw["torch_dtype"] = str(dtypes["tok_embeddings.weight"]).removeprefix("torch.")
    raw["meta_release"] = {
        "params": params,
        "shards": len(shards.files),
        "embedding_split": split,
        # The value now; another one in config.json later is an edit and wins over max_seq_len.
        "max_position_embeddings": config.max_position_embeddings,
    }
    config = ModelConfig.from_dict(raw, str(file))

    def chunks_of(name: str) -> Iterator[memoryview]:
        dim = names[name][1]
        parts = shards.parts(name)[: 1 if dim is None else None]
        if heads := _rope_heads(name, config):
            # Joined first: with fewer heads than shards, one shard holds part of a head.
            parts = [ops.interleaved_to_halves(torch.cat(parts), heads)]
        for block in _row_blocks(parts, dim):
            yield from tensor_chunks(block.to(dtypes[name]))

    meta_of = {hf: meta for meta, (hf, _) in names.items()}
    targets = [
        Target(hf, DTYPE_CODES[dtypes[meta_of[hf]]], shape, [partial(chunks_of, meta_of[hf])])
        for hf, shape in shapes.items()
    ]
    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, "from-meta")
        legal = [*meta_dir.glob("LICENSE*"), *meta_dir.glob("USE_POLICY*")]
        write_companions(aside, config, [*legal, *tokenizer])
        write_json(aside / "generation_config.json", ids)
    return {
        "parameters": sum(math.prod(target.shape) for target in targets),
        "bytes": sum(target.nbytes for target in targets),
        "shards": len(shards.files),
        "dtype": raw["torch_dtype"],
    }


def to_meta(
    ckpt_dir: str | Path, out_dir: Path, shards: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint in Meta's release layout: the way back from `from_meta`.

    Meta's code loads the result; its tensors are those of the release, but for `rope.freqs`, which
    that code computes itself. Memory holds one shard. Meta's layout has no tied embeddings
    (output.weight repeats them), no context length and no record of new blocks. A checkpoint of
    other origin gets params that follow from its `config.json`, and the embedding split by columns.
    `shards` is None for as many as the release had, or 1.

    Returns:
        JSON-able: parameters, bytes written, shards, dtype.
    """
    checkpoint = Checkpoint.open(ckpt_dir)
    refuse_source(out_dir, checkpoint.path)
    config = checkpoint.config
    params, recorded, names = _release_of(config, checkpoint.path / "config.json")
    count = recorded if shards is None else shards
    _check_count(count, recorded, config)

    def read(name: str) -> Tensor:
        is_tied = config.tie_word_embeddings and name == "output.weight"
        hf, _ = names["tok_embeddings.weight" if is_tied else name]
        tensor, heads = checkpoint.tensors[hf].read(), _rope_heads(name, config)
        if not all_finite(tensor):
            raise CheckpointError(f"{checkpoint.path}: {hf!r} holds NaN or infinity")
        return ops.halves_to_interleaved(tensor, heads) if heads else tensor

    if config.expansion is not None:
        warn(
            f"{ckpt_dir}: Meta's layout has no record of new blocks; the release has them as layers"
        )
    recorded_length = (config.raw.get("meta_release") or {}).get("max_position_embeddings")
    if (length := config.max_position_embeddings) != recorded_length:
        warn(
            f"{ckpt_dir}: Meta's layout has no context length; 'llamapro from-meta' needs "
            f"--max-position-embeddings {length} to know it"
        )
    written = 0
    companions = {file.name: file for file in checkpoint.companions() if file.is_file()}
    if file := companions.get("tokenizer.model"):
        _say_lost(checkpoint.path, file)
    else:
        note(f"{ckpt_dir}: no tokenizer.model, so the release has none")
    with output_directory(out_dir, force) as aside:
        for index in range(count):
            tensors = {}
            for name in tqdm(names, desc=f"shard {index + 1} of {count}", disable=None):
                tensor, dim = read(name), names[name][1]
                if dim is not None and count > 1:  # copied: of a view, torch.save writes the whole
                    tensor = tensor.chunk(count, dim)[index]
                    tensor = tensor.clone(memory_format=torch.contiguous_format)
                tensors[name] = tensor
            file = aside / f"consolidated.{index:02d}.pth"
            try:
                torch.save(tensors, file)
            except RuntimeError as error:  # torch hides the system's error number
                raise CheckpointError(
                    f"{out_dir / file.name}: writing failed, most likely because the disk is full "
                    f"({str(error).splitlines()[0]}); the partial output was removed"
                ) from None
            written += sum(t.nbytes for t in tensors.values())
        write_json(aside / "params.json", params)
        for name, source in companions.items():
            if name == "tokenizer.model" or name.startswith(("LICENSE", "USE_POLICY")):
                copy_companion(source, aside / name)
    return {
        "parameters": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        "bytes": written,
        "shards": count,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
    }


def _read_tokenizer(directory: Path, vocab_size: int) -> tuple[list[Path], dict[str, Any]]:
    """Finds `tokenizer.model`; returns it, and its BOS and EOS ids."""
    folders = (directory, directory.absolute().parent)  # Llama 1 and 2: beside the sizes' folders
    found = [f / "tokenizer.model" for f in folders if (f / "tokenizer.model").is_file()][:1]
    if not found:
        note(f"{directory}: no tokenizer.model, here or one level up; copy one into the result")
        bos = LLAMA_3_RANKS if vocab_size == meta_release.LLAMA_3_VOCAB else 1
        return [], {"bos_token_id": bos, "eos_token_id": bos + 1}
    refuse_large(found[0], 1 << 26)  # Llama 3's has 2 MB
    size, ids = _ids_of(found[0])
    problem = f"{found[0]}: {size:,} tokens, but the model has {vocab_size:,} rows"
    if size > vocab_size:
        raise DataError(f"{problem}: another model's; put the right one beside params.json")
    if size < vocab_size:
        warn(f"{problem}; is it this model's?")
    return found, ids


def _ids_of(file: Path) -> tuple[int, dict[str, Any]]:
    """Returns the number of tokens of a `tokenizer.model`, and its BOS and EOS ids."""
    if is_ranks(content := file.read_bytes()):
        # Llama 3's: <|begin_of_text|> and <|end_of_text|> are the first two ids after the ranks.
        bos = len(parse_ranks(file, content))
        return bos + len(LLAMA_3_SPECIAL), {"bos_token_id": bos, "eos_token_id": bos + 1}
    model = read_vocabulary(file, content, {})
    size = len(model.pieces.keys() | {token.id for token in model.added.values()})
    return size, {"bos_token_id": model.bos_id, "eos_token_id": model.eos_id}


def _say_lost(directory: Path, file: Path) -> None:
    """Warns of a chat template, and of tokens that a `tokenizer.model` itself does not have."""
    lost = ["the chat template"] * (own_template(directory) is not None)
    try:
        size = _ids_of(file)[0]
        added = [n for n, token in Tokenizer.load(directory).added.items() if token.id >= size]
        lost += added[:3]
        if len(added) > 3:
            lost.append(f"{len(added) - 3} more tokens")
    except DataError as error:
        lost.append(f"tokens of other files, if there are any ({error})")
    if lost:
        warn(f"{directory}: Meta's layout has no place for {', '.join(lost)}: left out")


def _release_of(
    config: ModelConfig, file: Path
) -> tuple[dict[str, Any], int, dict[str, tuple[str, int | None]]]:
    """Returns params, number of shards and names (`tensor_names`) of the release to write."""
    C, H = config.hidden_size, config.num_attention_heads
    if config.attention_bias or config.o_proj_bias or config.mlp_bias or config.qk_norm:
        what = "norms of queries and keys" if config.qk_norm else "biases"
        raise ConfigError(
            f"{file}: model_type {config.model_type!r} has {what}, which have no place in Meta's "
            "layout"
        )
    if config.head_dim * H != C:
        raise ConfigError(
            f"{file}: head_dim {config.head_dim} times num_attention_heads {H} is not hidden_size "
            f"{C}, as it must be in Meta's layout"
        )
    if config.sliding_window is not None:
        raise ConfigError(
            f"{file}: sliding_window {config.sliding_window} cannot be said in Meta's layout; the "
            "release would attend to all positions"
        )
    if (scaling := config.rope_scaling) is not None and scaling.factor == 1:
        config = dataclasses.replace(config, rope_scaling=None)
    elif scaling not in (None, scaled := meta_release.rope_scaling(config.tie_word_embeddings)):
        raise ConfigError(
            f"{file}: {scaling} cannot be said in Meta's layout, whose use_scaled_rope stands for "
            f"{scaled}"
        )
    release = config.raw.get("meta_release") or {}
    try:
        params, shards = _params_for(config, release), int(release.get("shards", 1))
        split = release.get("embedding_split", "columns")
        names = meta_release.tensor_names(config.num_hidden_layers, split)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{file}: the 'meta_release' record is damaged ({error!r}); remove it"
        ) from None
    return params, shards, names


def _params_for(config: ModelConfig, release: dict[str, Any]) -> dict[str, Any]:
    """Returns a release's params, or fresh ones, with what `config.json` says otherwise by now."""
    params = dict(release.get("params", {}))
    H, F = config.num_attention_heads, config.intermediate_size
    now = {meta: getattr(config, hf) for meta, hf in META_FIELDS.items()}
    now["use_scaled_rope"] = config.rope_scaling is not None
    if not params or (params.get("vocab_size") or -1) > 0:
        now["vocab_size"] = config.vocab_size
    positions = config.max_position_embeddings
    if "max_seq_len" in params and positions != release.get("max_position_embeddings"):
        now["max_seq_len"] = positions
    default = {"n_kv_heads": H, "rope_theta": 10000.0, "use_scaled_rope": False}
    params |= {k: v for k, v in now.items() if (params.get(k) or default.get(k)) != v}
    if "multiple_of" not in params or meta_release.ffn_size(params) != F:
        params.pop("ffn_dim_multiplier", None)
        for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
            params["multiple_of"] = multiple
            if meta_release.ffn_size(params) == F:
                return params
        # multiple_of is 1 now; + 0.5 makes the formula's int() exact whatever the rounding.
        params["ffn_dim_multiplier"] = (F + 0.5) / meta_release.ffn_size(params)
    return params


def _check_count(shards: int, recorded: int, config: ModelConfig) -> None:
    """Refuses a number of shards that cuts a head, or a matrix, into unequal parts."""
    H, KV, C = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    rest = math.gcd(C, config.intermediate_size, config.vocab_size)
    common = math.gcd(rest, H, KV)
    # A release may itself split a key/value head over its shards.
    allowed = math.gcd(rest, KV * config.head_dim) if shards == recorded else common
    if shards < 1 or allowed % shards:
        fitting = [n for n in range(1, min(common, 99) + 1) if common % n == 0]
        raise ConfigError(
            f"--shards {shards}: must divide num_attention_heads {H}, num_key_value_heads {KV}, "
            f"hidden_size {C}, intermediate_size {config.intermediate_size} and vocab_size "
            f"{config.vocab_size}; choose one of {', '.join(map(str, fitting))}"
        )


def _rope_heads(name: str, config: ModelConfig) -> int:
    """Returns the number of heads whose rows are permuted, 0 for a tensor that RoPE never meets."""
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def _row_blocks(parts: list[Tensor], dim: int | None) -> Iterator[Tensor]:
    """Yields the rows of the joined tensor, about 8 MiB at a time: it never exists whole."""
    rows = max(1, CHUNK_BYTES * parts[0].shape[0] // max(1, sum(p.nbytes for p in parts)))
    if dim == 1:
        for blocks in zip(*(part.split(rows) for part in parts), strict=True):
            yield torch.cat(blocks, dim=1)
    else:
        for part in parts:
            yield from part.split(rows)
