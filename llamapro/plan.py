"""What a run will do, said before it starts: sizes, tokens per step, and an estimate of memory."""

from pathlib import Path
from typing import Any

import torch

from llamapro import ops
from llamapro.config import ConfigError, ModelConfig
from llamapro.distributed import world_size
from llamapro.expansion import select_trainable
from llamapro.metrics import format_bytes
from llamapro.model import build_on_meta
from llamapro.settings import Settings


def make_plan(
    settings: Settings,
    config: ModelConfig,
    compute_dtype: torch.dtype,
    run_dir: Path,
    resume_from: Path | None,
) -> dict[str, Any]:
    """Returns the plan, JSON-able; allocates nothing.

    Raises:
        ConfigError: a Triton kernel was asked for that cannot run here.
    """
    t = settings.train
    has_gpu = torch.cuda.is_available() and t.device != "cpu"
    try:
        with ops.use(t.ops):
            backends = ops.summary(
                config, torch.device("cuda" if has_gpu else "cpu"), compute_dtype
            )
    except ops.BackendError as error:
        raise ConfigError(f"train.ops {t.ops!r}: {error}; use auto, or torch for this op") from None
    model = build_on_meta(config)
    select_trainable(model, t.trainable)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = config.expansion
    return {
        "model": settings.model.path or settings.model.config,
        "parameters": {"total": total, "trainable": trainable, "frozen": total - trainable},
        "layers": config.num_hidden_layers,
        "new_layers": list(record.new_layers) if record else None,
        "tokens_per_step": t.batch_size * settings.data.seq_len,
        "micro_batches": t.batch_size // (world_size() * t.micro_batch_size),
        "steps": t.steps or f"{t.epochs:g} epoch(s)",
        "world_size": world_size(),
        "dtype": str(compute_dtype).removeprefix("torch."),
        "ops": backends,
        "memory_bytes": estimate_memory(settings, config, compute_dtype, total, trainable),
        "run_dir": str(run_dir),
        "resume_from": str(resume_from) if resume_from else None,
    }


def estimate_memory(
    settings: Settings,
    config: ModelConfig,
    compute_dtype: torch.dtype,
    total: int,
    trainable: int,
) -> dict[str, int]:
    """Estimates the bytes one process needs at its peak, by part.

    Counted for activations is what one block keeps for backward: its input, two normed copies with
    their fp32 forms, q, k, v and the attention output, gate, up, SiLU and product.
    """
    t, size, ranks = settings.train, compute_dtype.itemsize, world_size()
    tokens = t.micro_batch_size * settings.data.seq_len
    record = config.expansion
    # Below the first new block no graph is built, so nothing is kept.
    first = record.new_layers[0] if record and t.trainable == "new_blocks" else 0
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    block = (4 * config.hidden_size + heads + 4 * config.intermediate_size) * size
    block += 4 * config.hidden_size * 4
    kept = config.num_hidden_layers - first
    if t.recompute:  # each block keeps its input; one at a time has the rest
        activations = tokens * (kept * config.hidden_size * size + block)
    else:
        activations = tokens * kept * block
    layer = sum(p.numel() for p in build_on_meta(config).model.layers[0].parameters())
    parts = {
        "frozen weights": (total - trainable) * size // ranks,
        "fp32 masters": trainable * 4 // ranks,
        "gradients": trainable * 4 // ranks,
        "AdamW moments": trainable * 8 // ranks,
        "gathered blocks": 2 * layer * size if ranks > 1 else 0,
        "activations": activations,
        "logits": 3 * 4 * min(1 << 26, tokens * config.vocab_size),
    }
    return parts | {"total": sum(parts.values())}


def render(plan: dict[str, Any], settings: Settings) -> str:
    """Returns the plan as the start-up block."""
    s, sizes = settings, plan["parameters"]
    memory = {name: size for name, size in plan["memory_bytes"].items() if size}
    new = plan["new_layers"] if s.train.trainable == "new_blocks" else "every weight trains"
    lines = {
        "model": f"{plan['model']} ({plan['layers']} layers)",
        "parameters": f"{sizes['total']:,} in all, {sizes['trainable']:,} train, "
        f"{sizes['frozen']:,} frozen",
        "new blocks": new,
        "tokens per step": f"{plan['tokens_per_step']:,} = {s.train.batch_size} sequences x "
        f"{s.data.seq_len} ({plan['world_size']} process(es) x {plan['micro_batches']} "
        f"micro-batch(es) x {s.train.micro_batch_size})",
        "length": plan["steps"] if isinstance(plan["steps"], str) else f"{plan['steps']} steps",
        "precision": f"{plan['dtype']}; fp32 masters and gradient reduction",
        "ops": plan["ops"],
        "memory estimate": ", ".join(f"{name} {format_bytes(n)}" for name, n in memory.items())
        + " per process",
        "training data": " ".join(s.data.train),
        "validation": " ".join(s.data.val) or "none",
        "run dir": plan["run_dir"],
        "resume from": plan["resume_from"] or "new run",
    }
    return "\n".join(f"{name:<16} {value}" for name, value in lines.items())
