"""Resuming a run: its newest checkpoint, and the check that it is the same run.

A resumed run needs the frozen weights, tokenizer and corpora that it began with. Paths do not prove
that, so their contents are hashed when a run starts, kept in every `state.json` and compared.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamapro.checkpoints.base import check_stored_base
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import check_blocks, read_blocks
from llamapro.checkpoints.run import OPTIMIZER_FILE, TRAINABLE_FILE
from llamapro.checkpoints.tensors import combine_hashes, hash_tensors, read_safetensors
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, ConfigError, warn
from llamapro.model import LlamaForCausalLM
from llamapro.text.store import TokenStore
from llamapro.training.checkpoint import MOMENTS, Parameters
from llamapro.training.settings import Settings
from llamapro.training.weights import part_like, stored_name, stored_shape

# ---- Identity: what must be the same for a run to go on -----------------------------------------


def make_identity(
    checkpoint: Checkpoint | None,
    trainable: Iterable[str],
    tokenizer_sha256: str,
    stores: dict[str, TokenStore],
    config: ModelConfig,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Hashes base, tokenizer and data of a run; reads the frozen weights that `cache_dir` lacks.

    Raises CheckpointError if the base inside is not the one that its expansion record names.

    Args:
        checkpoint: the weights to start from; None for random ones.
        trainable: names of its tensors that train; the others are frozen.
        stores: label, such as "train data/code" or "replay" -> tokens, whose hashes were checked.
    """
    names = set(trainable)
    tensors = checkpoint.tensors.values() if checkpoint else ()
    frozen = [tensor for tensor in tensors if tensor.name not in names]
    hashes = hash_tensors(frozen, "hash frozen weights", cache_dir) if frozen else {}
    if checkpoint and frozen and config.expansion:
        check_stored_base(checkpoint, hashes, cache_dir)
    return {
        "base": combine_hashes((tensor, hashes[tensor.name]) for tensor in frozen),
        "computation": config.computation,
        "tokenizer": tokenizer_sha256,
        "data": {
            label: {"tokens": store.tokens, "sha256": store.sha256}
            for label, store in stores.items()
        },
    }


def check_identity(
    saved: Any, identity: dict[str, Any], run_dir: Path, allowed: Sequence[str] = ()
) -> None:
    """Refuses to resume with other weights, another tokenizer or other tokens.

    Raises ConfigError that names everything that differs, unless `resume.allow` names its setting,
    and CheckpointError if the training checkpoint does not hold an identity.
    """
    try:
        # The same data may lie elsewhere now.
        olds, news = ([k for k in of["data"] if k.startswith("train ")] for of in (saved, identity))
        labels = dict(zip(olds, news, strict=True)) if len(olds) == len(news) else {}
        data = {labels.get(label, label): found for label, found in saved["data"].items()}
        before = _named(saved | {"data": data})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{run_dir}: its training checkpoints do not say which base, tokenizer and data they "
            "were made with; choose another --run-dir"
        ) from None
    if "computation" not in saved:
        warn(f"{run_dir}: of an older version, which did not save rope_theta, heads and eps")
        identity = {key: value for key, value in identity.items() if key != "computation"}
    now = _named(identity)
    changed = {
        thing: f"{thing[1]} was {before.get(thing, 'not there')}, is {now.get(thing, 'not there')}"
        for thing in before | now
        if before.get(thing) != now.get(thing) and thing[0] not in allowed
    }
    if changed:
        shown = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1...", "; ".join(changed.values()))
        settings = " ".join(dict.fromkeys(setting for setting, _ in changed))
        raise ConfigError(
            f"{run_dir} holds a run made of other things: {shown}; put them back to continue it, "
            f"choose another --run-dir, or allow them: --resume.allow {settings}"
        )


def _named(identity: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Returns (setting, name) -> value as text, for everything that can differ."""
    named = {
        ("model.path", "the frozen base model"): f"sha256 {identity['base']}",
        ("model.tokenizer", "the tokenizer"): f"sha256 {identity['tokenizer']}",
    }
    for key, value in identity.get("computation", {}).items():
        named["model.path", f"{key} of config.json"] = json.dumps(value)
    for label, found in identity["data"].items():
        kind = label.split(" ", 1)[0]  # "train" or "val"
        text = f"{found['tokens']:,} tokens (sha256 {found['sha256']})"
        setting = "replay.data" if kind == "replay" else f"data.{kind}"
        named[setting, f"data {label!r}"] = text
    return named


# ---- Settings: what may change -----------------------------------------------------------------

# A resumed run may change where, how and how long it computes, and what it shows. All other
# settings decide the result.
FREE_TO_CHANGE = {
    "config", "run_dir", "processes", "resume.allow", "log_every", "log_seconds", "log_to",
    "log_spikes", "dry_run", "device", "json",
    "data.cache_dir", "data.workers",
    # The hashes of weights, tokenizer and data decide.
    "model.path", "model.config", "model.tokenizer", "data.train", "data.val", "data.date",
    "data.chat_template", "replay.data", "replay.prompts",
    "train.steps", "train.epochs", "train.micro_batch_size", "train.device", "train.ops",
    "train.deterministic_attention", "train.recompute", "train.frozen", "train.shard_size",
    "train.offload", "train.compile",
    "optim.final_lr_ratio", "optim.skip_bad_steps", "eval.every", "eval.sequences",
    "save.every", "save.keep", "save.keep_every", "save.background",
}  # fmt: skip
# Differences in these are not reported.
UNREPORTED = set("config run_dir processes resume.allow log_seconds dry_run json device".split())


def changes(before: dict[str, Any], settings: Settings, where: str) -> list[str]:
    """Compares the flattened settings of the run named `where` with those to resume it with.

    Returns the allowed differences, for example "train.steps 100 -> 200"; raises ConfigError, which
    names everything that differs and may not.
    """
    flat = json.loads(json.dumps(settings.flat()))
    # A setting that an earlier version did not know had what is now its default.
    before = json.loads(json.dumps(Settings().flat())) | before
    free: list[str] = []
    refused: list[str] = []
    for key, value in flat.items():
        if before.get(key) == value or key in UNREPORTED:
            continue
        text = f"{key} {json.dumps(before.get(key))} -> {json.dumps(value)}"
        (free if key in FREE_TO_CHANGE or key in settings.resume.allow else refused).append(text)
    if refused:
        names = " ".join(text.split(" ", 1)[0] for text in refused)
        raise ConfigError(
            f"{where} holds a run with other settings: {'; '.join(refused)}; continue it with its "
            f"own, choose another --run-dir, or allow them: --resume.allow {names}"
        )
    return free


# ---- Weights and optimizer --------------------------------------------------------------------


def load_trained(path: Path, model: LlamaForCausalLM, first_row: int = 0) -> None:
    """Puts the trained tensors of a training checkpoint into a loaded model, before it is sharded.

    Raises CheckpointError if they were trained on another base, or are other tensors.
    """
    trains = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    shapes = {stored_name(n, first_row): stored_shape(n, p, first_row) for n, p in trains.items()}
    blocks = read_blocks(path / TRAINABLE_FILE)
    check_blocks(blocks, model.config, shapes)
    for name, whole in trains.items():
        tensor = blocks.tensors[stored_name(name, first_row)].read()
        if len(tensor) < len(whole):  # the rows of added tokens
            tensor = torch.cat((whole[:first_row].to(tensor.dtype), tensor))
        model.get_parameter(name).data = tensor


def load_optimizer(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    step: int,
    first_row: int = 0,
) -> None:
    """Loads the moments of a training checkpoint into the optimizer, each rank its own shards.

    Raises CheckpointError if the file holds the moments of other parameters.
    """
    file = path / OPTIMIZER_FILE
    stored = read_safetensors(file)[0]
    names = {name: stored_name(name, first_row) for name in parameters}
    if set(stored) != {f"{name}.{moment}" for name in names.values() for moment in MOMENTS}:
        raise CheckpointError(f"{file}: holds the moments of other parameters")
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {"step": torch.tensor(float(step), device=parameter.device)}
        for moment in MOMENTS:
            saved = stored[f"{names[name]}.{moment}"].read()
            # Moments are 0 in the base's rows, which are not saved.
            missing = len(parameter) - len(saved)
            full = F.pad(saved, (0, 0, missing, 0)) if missing else saved
            state[moment] = part_like(parameter, full)
        optimizer.state[parameter] = state
