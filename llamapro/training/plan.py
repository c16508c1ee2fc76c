"""The plan of a run before it starts: sizes, tokens per step and an estimate of memory."""

from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llamapro import backends, ops
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.formatting import format_bytes
from llamapro.kernels import cpu
from llamapro.model import DecoderLayer, LlamaForCausalLM, RMSNorm, build_on_meta
from llamapro.training.distributed import is_rank, world_size
from llamapro.training.quantized import stored_bytes
from llamapro.training.settings import ReplaySettings, Settings
from llamapro.training.weights import freeze, is_trained, lowest_in_backward


def make_plan(
    settings: Settings, config: ModelConfig, run_dir: Path, resume_from: Path | None
) -> dict[str, Any]:
    """Returns the plan of a run, JSON-able; allocates nothing.

    Raises ConfigError if `train.ops` names a Triton kernel that cannot run here.
    """
    t = settings.train
    # A dry run starts none of the processes that it plans for.
    ranks = world_size() if is_rank() else max(1, settings.processes)
    device, dtype = torch.device(device_type(settings)), compute_dtype(settings)
    model = build_on_meta(config)
    freeze(model, t.trainable, t.new_tokens)
    try:
        with backends.use(t.ops, t.deterministic_attention):
            summary = backends.summary(config, device, dtype)
            memory = estimate_memory(settings, model, dtype, device, ranks)
    except backends.BackendError as error:
        raise ConfigError(f"train.ops {t.ops!r}: {error}; use auto, or torch for this op") from None
    record = config.expansion
    return {
        "model": settings.model.path or settings.model.config,
        "parameters": count_parameters(model),
        "layers": config.num_hidden_layers,
        "new_layers": list(record.new_layers) if record else None,
        "tokens_per_step": t.batch_size * settings.data.seq_len,
        "micro_batches": t.batch_size // (ranks * t.micro_batch_size),
        "steps": t.steps or f"{t.epochs:g} epoch(s)",
        "world_size": ranks,
        "dtype": str(dtype).removeprefix("torch."),
        "frozen_dtype": t.frozen_dtype,
        "ops": summary,
        "memory_bytes": memory,
        "run_dir": str(run_dir),
        "resume_from": str(resume_from) if resume_from else None,
    }


def device_type(settings: Settings) -> str:
    """Returns "cuda" or "cpu": where the run computes, or the GPU that a dry run plans for."""
    has_gpu = bool(settings.device) or torch.cuda.is_available()
    return "cuda" if has_gpu and settings.train.device != "cpu" else "cpu"


def compute_dtype(settings: Settings) -> torch.dtype:
    """Returns the dtype of computation and frozen weights."""
    if settings.train.dtype != "auto":
        return getattr(torch, settings.train.dtype)
    return torch.bfloat16 if device_type(settings) == "cuda" else torch.float32


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns how many parameters a model has, how many train and how many are frozen."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "frozen": total - trainable}


def estimate_memory(
    settings: Settings,
    model: LlamaForCausalLM,
    dtype: torch.dtype,
    device: torch.device,
    world_size: int,
) -> dict[str, int]:
    """Estimates the bytes one process needs at its peak, by part, on the device it computes on.

    The total is on the safe side, because the parts are not all largest at the same moment. The
    estimate is for the backends that `backends.use` chooses around the call. Nothing is allocated.

    Args:
        model: on the meta device, with `requires_grad` set.

    Returns:
        Part -> bytes, and "total".
    """
    t, size = settings.train, dtype.itemsize
    rows, length = t.micro_batch_size, settings.data.seq_len
    blocks = [(is_trained(layer), count_parameters(layer)["total"]) for layer in model.model.layers]
    total, trainable, frozen = count_parameters(model).values()
    root = total - sum(numel for _, numel in blocks)  # embeddings, norm, head
    # With added tokens, embedding and head train.
    root_trained = trainable - sum(numel for trains, numel in blocks if trains)
    first = lowest_in_backward(model)

    parts = t.shard_size or world_size
    placement = t.placement(world_size)
    is_whole = placement == "replicate"
    # FSDP keeps a gathered copy beside the shards, even with one process. Two blocks are gathered:
    # the one that computes and, if there are peers, the next. The root stays gathered.
    managed = [numel for trains, numel in blocks if trains or not is_whole]
    gathered = max(managed, default=0) * (2 if parts > 1 else 1)
    gathered += root_trained if is_whole else root
    if placement == "gather":
        gathered += sum(numel for trains, numel in blocks[first:] if not trains)
    # With `frozen_dtype`, what `shard` rounds: all blocks of a kind are alike.
    rounded = {
        is_above: stored_bytes(model.model.layers[0], t.frozen_dtype, dtype, is_above)
        for is_above in (False, True)
    }
    in_blocks = [i for i, (trains, _) in enumerate(blocks) if not trains]
    kept = (frozen - sum(blocks[i][1] for i in in_blocks)) * size
    kept += sum(rounded[i >= first] for i in in_blocks)
    # The unit in backward has gradients in the compute dtype and, for the reduction, in fp32.
    reduced = max([n for trains, n in blocks if trains] + [root_trained])
    state = 0 if t.offload else 1
    estimate = {
        "frozen weights": kept if is_whole else state * kept // parts,
        "fp32 masters": state * trainable * 4 // parts,
        "gradients": state * trainable * 4 // parts,
        "AdamW moments": state * trainable * 8 // parts,
        "gathered weights": gathered * size,
        "gradient reduction": reduced * (size + 4),
        "activations": activation_bytes(model, (rows, length), dtype, device, t.recompute),
        "logits": _logit_bytes(model.config, rows * length, dtype, device, model.lm_head),
    }
    if t.frozen_dtype != "auto":
        estimate["rounding"] = _rounding_bytes(model.config, t.frozen_dtype, rows * length, size)
    if settings.replay.share and settings.replay.distill:
        estimate["teacher"] = _teacher_bytes(model.config, rows * length, dtype, device)
    return estimate | {"total": sum(estimate.values())}


def activation_bytes(
    model: LlamaForCausalLM,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    recompute: bool,
) -> int:
    """Counts the bytes that blocks and final norm keep for backward.

    One block of each kind (the lowest that trains, whose input needs no gradient; trained; frozen)
    runs on fake tensors, which have a device but no memory, and the tensors that autograd saves are
    counted. So the count follows the model's code and the chosen backends.

    Args:
        model: on the meta device, with `requires_grad` set.
        shape: (B, T) of a micro-batch.
        recompute: whether blocks keep only their input, and one at a time computes the rest again.
    """
    config = model.config
    trains = [is_trained(layer) for layer in model.model.layers]
    has_graph = is_trained(model.model.embed_tokens)  # below the first that trains nothing is kept
    counted: dict[tuple[bool, bool], int] = {}
    kept: list[int] = []
    # Fake tensors of a GPU need one; those of the CPU stand in for them.
    with FakeTensorMode(), torch.device("cpu"), backends.planning_for(device):
        rotary = ops.rotary_table(config, torch.arange(shape[1]), dtype)
        for block_trains in trains:
            kind = (block_trains, has_graph)
            has_graph = has_graph or block_trains
            if not has_graph:
                continue
            if kind not in counted:
                block = DecoderLayer(config, 0)
                x = torch.empty(*shape, config.hidden_size, dtype=dtype)
                x.requires_grad_(kind[1])
                _assign_fake(block, dtype, block_trains)
                counted[kind] = _saved_bytes(block, x, rotary)
            kept.append(counted[kind])
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        _assign_fake(norm, dtype, is_trained(model.model.norm))
        x = torch.empty(*shape, config.hidden_size, dtype=dtype, requires_grad=has_graph)
        final = _saved_bytes(norm, x)
    if recompute:
        # The block that is computed again has counted its own input.
        inputs = max(len(kept) - 1, 0) * x.numel() * dtype.itemsize
        return inputs + max(kept, default=0) + final
    return sum(kept) + final


def _assign_fake(module: nn.Module, dtype: torch.dtype, trains: bool) -> None:
    """Gives a module fake weights in the dtype to which FSDP casts masters for forward."""
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            weight = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=trains)
            setattr(child, name, weight)


def _saved_bytes(module: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> int:
    """Runs a module; returns the bytes that autograd saves, less weights and shared tables."""
    shared = {t.untyped_storage()._cdata for t in (*module.parameters(), *(rotary or ()))}
    saved: dict[int, Tensor] = {}  # storage -> tensor, held so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x) if rotary is None else module(x, rotary)
    del out
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in shared)


def _logit_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, head: nn.Linear
) -> int:
    """Returns the bytes of the head's gradients, which forward computes, and of the live logits.

    The reference holds all logits in its dtype and in fp32, with a gradient of each. The other
    backends hold one chunk of them, and the kernel holds it in its dtype alone.
    """
    logits, C = tokens * config.vocab_size, config.hidden_size
    backend, _ = backends.choose("linear_cross_entropy", device, dtype, C)
    trained = head.weight.numel() if head.weight.requires_grad else 0
    gradients = tokens * C * dtype.itemsize + trained * 4
    if backend == "triton":
        return min(logits, 1 << 27) * dtype.itemsize + gradients
    if backend == "cpu":
        logits = min(logits, cpu.logits_at_once(device, config.vocab_size))
    else:
        logits *= 2
    wide = min(logits, cpu.wide_at_once(device)) if backend == "cpu" else logits
    return logits * dtype.itemsize + wide * 4 + gradients


def _teacher_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Returns the bytes of the teacher's hidden states, and of a chunk of its logits.

    These exist once in the dtype and three times in fp32.
    """
    vocab_size = config.vocab_size
    logits = min(tokens * vocab_size, cpu.logits_at_once(device, vocab_size) // 2)
    wide = min(logits, cpu.wide_at_once(device))
    return (tokens * config.hidden_size + logits) * dtype.itemsize + wide * 3 * 4


def _rounding_bytes(config: ModelConfig, kind: str, tokens: int, size: int) -> int:
    """Returns the bytes of the matrix that int8 widens, or the input that float8 rounds."""
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim)
    if kind == "int8":
        return widest * config.hidden_size * size
    return tokens * max(widest, config.hidden_size) * (4 + 1)  # scaled in fp32, then rounded


def _describe_replay(replay: ReplaySettings) -> str:
    if not replay.share:
        return ""
    how = ", distilled" if replay.distill else ""
    weight = f", weight {replay.weight:g}" if replay.weight != 1 else ""
    weight = f", hold {replay.hold}" if replay.hold else weight
    return f", {replay.share:.1%} replay{how}{weight}"


def _faster_dtype(dtype: str, device: str) -> str:
    """Names the dtype for which this CPU has matrix units (AMX), if the run takes another."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    has_units = capabilities is not None and capabilities().get("amx_bf16")
    is_slow = has_units and device == "cpu" and dtype == "float32"
    return "; --train.dtype bfloat16 is faster on this CPU" if is_slow else ""


def _describe_frozen(s: Settings) -> str:
    """Returns what rounding the frozen blocks means; nothing if they are not rounded."""
    kind = s.train.frozen_dtype
    if kind == "auto":
        return ""
    slow = " (emulated, slowly)" if kind == "float8" and device_type(s) == "cpu" else ""
    teacher = ", also as the teacher of replay" if s.replay.share and s.replay.distill else ""
    return (
        f"{kind}{slow}: training and evaluation, from step 0, use the base rounded{teacher}; "
        "merged files keep its bytes, because only new blocks are saved"
    )


def render(plan: dict[str, Any], settings: Settings) -> str:
    """Returns the plan as the start-up block."""
    s, sizes = settings, plan["parameters"]
    memory = {name: size for name, size in plan["memory_bytes"].items() if size}
    estimate = ", ".join(f"{name} {format_bytes(n)}" for name, n in memory.items())
    new = plan["new_layers"] if s.train.trainable == "new_blocks" else "every weight trains"
    new = f"{new}, and the rows of added tokens" if s.train.new_tokens else new
    lines = {
        "model": f"{plan['model']} ({plan['layers']} layers)",
        "parameters": f"{sizes['total']:,} in all, {sizes['trainable']:,} train, "
        f"{sizes['frozen']:,} frozen",
        "new blocks": new,
        "tokens per step": f"{plan['tokens_per_step']:,} = {s.train.batch_size} sequences x "
        f"{s.data.seq_len} ({plan['world_size']} process(es) x {plan['micro_batches']} "
        f"micro-batch(es) x {s.train.micro_batch_size})",
        "length": plan["steps"] if isinstance(plan["steps"], str) else f"{plan['steps']} steps",
        "precision": f"{plan['dtype']}; fp32 masters and gradient reduction"
        + _faster_dtype(plan["dtype"], device_type(s)),
        "frozen blocks": _describe_frozen(s),
        "ops": plan["ops"],
        "memory estimate": f"\n{'':17}".join(wrap(f"{estimate} per process", 63)),
        "training data": " ".join(s.data.train) + _describe_replay(s.replay),
        "validation": " ".join(s.data.val) or "none",
        "run dir": plan["run_dir"],
        "resume from": plan["resume_from"] or "new run",
    }
    return "\n".join(f"{name:<16} {value}" for name, value in lines.items() if value)
