"""Trains a small model with every placement of its weights, and writes down what each rank saw."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from llamapro.config import ModelConfig
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.training.distributed import process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw, clip_gradients
from llamapro.training.settings import Frozen, OptimSettings, TrainSettings
from llamapro.training.weights import init_random

LAYERS, NEW, LOWEST = 5, (1, 3), 1  # frozen below: 0; frozen above: 2, 4
NEW_NAMES = tuple(f"model.layers.{index}." for index in NEW)
OPTIONS: tuple[Frozen, ...] = ("shard", "gather", "replicate")
DTYPES = ("float32", "bfloat16")
STEPS, BATCH, TOKENS = 2, 4, 12
# Qwen3 with biases, which has all that a block can have; wide initial weights, so that at this
# width every block matters.
CONFIG = ModelConfig.from_file(Path(__file__).with_name("every_part.json"))


def build(tied: bool = False) -> LlamaForCausalLM:
    """The model before it is spread: fp32, only the new blocks train."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model = build_on_meta(config)
    load_tensors(model, init_random(config, seed=0))
    model.requires_grad_(False)
    for index in NEW:
        model.model.layers[index].requires_grad_(True)
    return model


def samples(step: int) -> Tensor:
    """(BATCH, TOKENS + 1) token ids, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(CONFIG.vocab_size, (BATCH, TOKENS + 1), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_or_part(tensor: Tensor) -> Tensor:
    """What of it this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def frozen_bytes(model: LlamaForCausalLM) -> str:
    """SHA-256 of what is frozen, gathered."""
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            found.update(whole(parameter.detach()).float().numpy().tobytes())
    return found.hexdigest()


def train(objective: NextToken, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Trains on this rank's part of every batch, an evaluation between; returns what was seen."""
    model = objective.model
    parameters = dict(model.named_parameters())
    optimizer = build_adamw(parameters.values(), OptimSettings())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    seen: dict[str, Any] = {"losses": [], "frozen": [frozen_bytes(model)], "calls": []}
    for step in range(STEPS):
        ids = samples(step)[rank::world]
        forward, backward = CommDebugMode(), CommDebugMode()
        with forward:
            loss, _ = objective(ids[:, :-1], ids[:, 1:])
        if step == 0:
            seen["whole"] = [
                index
                for index, layer in enumerate(model.model.layers)
                if not isinstance(layer.mlp.down_proj.weight, DTensor)  # type: ignore[union-attr]
            ]
        with backward:
            (loss * world / (BATCH * TOKENS)).backward()
        seen["losses"].append(loss.item())
        seen["calls"].append([counts(forward), counts(backward)])
        seen["with_gradient"] = [n for n, p in parameters.items() if p.grad is not None]
        if step == 0:
            seen["gradients"] = {
                n: whole(p.grad).clone() for n, p in parameters.items() if p.grad is not None
            }
        clip_gradients(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # leaves units gathered that the next step must take as they are
            objective(ids[:, :-1], ids[:, 1:])
    seen["frozen"].append(frozen_bytes(model))
    seen["dtypes"] = {n: str(p.dtype) for n, p in parameters.items()}
    return seen


def counts(comm: CommDebugMode) -> dict[str, int]:
    """Returns collective operation -> how often."""
    return {str(name).split(".")[-1]: n for name, n in comm.get_comm_counts().items()}


def worker(out: str, shard_size: int, dtypes: list[str]) -> None:
    """Trains with every option; one file per option and rank."""
    with process_group("cpu", shard_size) as ranks:
        for frozen, dtype in itertools.product(OPTIONS, dtypes):
            objective = NextToken(build())
            model = objective.model
            shard(objective, ranks, getattr(torch, dtype), TrainSettings(frozen=frozen))
            kept = sum(whole_or_part(p).nbytes for p in model.parameters())
            seen = train(objective, ranks.rank, ranks.world_size) | {"kept": kept}
            seen["mesh"] = [list(ranks.mesh.mesh_dim_names or ()), ranks.mesh.mesh.tolist()]
            file = Path(out) / f"{frozen}-{dtype}-{ranks.rank}"
            torch.save(seen.pop("gradients"), f"{file}.pt")
            Path(f"{file}.json").write_text(json.dumps(seen))
