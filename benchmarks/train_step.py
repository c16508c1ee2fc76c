"""A whole training step of LLaMA-2-7B with 8 new blocks: tokens/s, time and memory, three ways.

    python benchmarks/train_step.py [--size 7b] [--batch-size 2] [--sides triton torch transformers]
                                    [--steps 10] [--warmup 3] [--out RESULT.json]

The sides are this implementation with its Triton kernels (`triton`), the same with PyTorch alone
(`torch`: the backend `cpu`), and `transformers`' LlamaForCausalLM. The last two use SDPA, and
cuDNN's attention where it can run, because on Hopper PyTorch would take the slower
FlashAttention-2. All sides get the same random weights and the same batch of random tokens, and
train the same new blocks by train.py's own code: FSDP2 in a process group of one, frozen weights in
bf16, fp32 masters, gradients reduced in fp32, clipping, fused AdamW. `transformers` differs only in
the model's forward and backward; its loss holds the logits of all tokens, in bf16 and in fp32. The
losses of the first and the last step show that the sides compute the same.

One side is built, measured and released after the other. Times are medians over the steps, from
CUDA events; `optimizer` includes clipping. Peak memory is what PyTorch allocated in these steps,
with parameters, gradients and moments. On a CPU, `--size tiny` in fp32 shows that everything runs.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import measuring
import torch
from torch import Tensor, nn

from llamapro import backends, cli
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, expand_state_dict, interleave, select_trainable
from llamapro.model import build_on_meta, load_tensors
from llamapro.training.distributed import Ranks, process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw, clip_gradients
from llamapro.training.settings import Frozen, OptimSettings, TrainSettings

SIDES = ("triton", "torch", "transformers")
PARTS = ("forward", "backward", "optimizer")
CLIP = 1.0
LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """A base model, how many blocks are added, and the length of a sequence."""

    base: dict[str, Any]
    new_blocks: int
    seq_len: int


_TINY = {
    "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.1,
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_SMALL = _TINY | {
    "initializer_range": 0.02, "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 8, "num_attention_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
_SMOLLM = _SMALL | {  # SmolLM2-135M
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rope_theta": 1e5, "tie_word_embeddings": True,
}  # fmt: skip
_7B = _SMALL | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
SIZES = {
    "7b": Size(_7B, new_blocks=8, seq_len=4096),
    "smollm": Size(_SMOLLM, new_blocks=6, seq_len=512),
    "small": Size(_SMALL, new_blocks=4, seq_len=1024),
    "tiny": Size(_TINY, new_blocks=2, seq_len=24),
}


# ---- The sides ---------------------------------------------------------------------------------


def choose_sides(asked: list[str] | None, size: Size, device: torch.device) -> list[str]:
    """Returns the sides to measure; by default all, on a CPU `triton` only where interpreted.

    Raises:
        ConfigError: one of them cannot run here.
    """
    sides = list(asked or SIDES)
    if "triton" in sides:
        try:
            with backends.use("triton"):
                backends.summary(ModelConfig.from_dict(size.base), device, compute_dtype(device))
        except backends.BackendError as error:
            if asked:
                raise ConfigError(f"--sides triton: {error}") from None
            sides.remove("triton")
    if "transformers" in sides and find_spec("transformers") is None:
        raise ConfigError(
            "the side 'transformers' needs it: pip install -e '.[hf]', or leave it out with "
            "--sides triton torch"
        )
    return sides


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns what train.py takes for `auto`."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_tensors(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Does what `init_random` does, on the device: 7B in fp32 on the CPU would take 27 GB."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, meta in build_on_meta(config).named_parameters():
        tensors[name] = torch.ones(meta.shape, dtype=dtype, device=device)
        if meta.ndim == 2:
            tensors[name].normal_(0.0, config.initializer_range, generator=generator)
    return tensors


def transformers_model(
    config: ModelConfig, tensors: dict[str, Tensor], device: torch.device
) -> nn.Module:
    """Returns transformers' LLaMA with these tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config.raw | {"attn_implementation": "sdpa"}))
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(head | tensors, strict=True, assign=True)
    model.tie_weights()
    # Its frequencies are no parameter, so they are still without values.
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config=model.config)
    return model


class Transformers(NextToken):
    """transformers' model with its own loss."""

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        replayed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        # shift_labels: what should follow each token, as our targets.
        out = model(input_ids=input_ids, labels=targets, shift_labels=targets, use_cache=False)
        count = torch.tensor(targets.numel())
        return out.loss * count, count


def build_model(
    side: str, size: Size, device: torch.device, dtype: torch.dtype, masters: bool = False
) -> nn.Module:
    """Returns a side's expanded model, of which only the new blocks train.

    Args:
        side: "transformers" or any other, which is ours.
        masters: hold what trains in fp32.
    """
    base = ModelConfig.from_dict(size.base)
    layout = interleave(base.num_hidden_layers, size.new_blocks)
    config = expand_config(base, layout, base_sha256="")
    tensors = expand_state_dict(random_tensors(base, device, dtype), layout)
    model: Any = build_on_meta(config)
    trainable = select_trainable(model, "new_blocks")
    if masters:
        tensors |= {name: tensors[name].float() for name in trainable}
    if side == "transformers":
        model = transformers_model(config, tensors, device)
    else:
        load_tensors(model, tensors)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model


def build(
    side: str, size: Size, ranks: Ranks, dtype: torch.dtype, frozen: Frozen = "shard"
) -> tuple[nn.Module, LossOf]:
    """Returns a side's model, frozen and sharded as train.py does it, and its mean loss."""
    model: Any = build_model(side, size, ranks.device, dtype)
    objective = Transformers(model) if side == "transformers" else NextToken(model)
    shard(objective, ranks, dtype, TrainSettings(frozen=frozen))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        loss_sum, count = objective(inputs, targets)
        return loss_sum / count

    return model, loss_of


# ---- Measuring ---------------------------------------------------------------------------------


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns train.py's optimizer at a constant rate."""
    optimizer = build_adamw(model.parameters(), OptimSettings())
    for group in optimizer.param_groups:
        group["lr"] = 2e-4
    return optimizer


def random_batch(
    size: Size, batch_size: int, device: torch.device, rank: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the inputs and targets of a rank, both (B, T)."""
    generator = torch.Generator(device).manual_seed(1 + rank)
    shape = (batch_size, size.seq_len + 1)
    ids = torch.randint(size.base["vocab_size"], shape, device=device, generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure(side: str, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Builds one side, runs its steps, and returns its row."""
    size, device = SIZES[args.size], ranks.device
    dtype = compute_dtype(device)
    model, loss_of = build(side, size, ranks, dtype, "replicate")  # as train.py in one process
    optimizer = build_optimizer(model)
    inputs, targets = random_batch(size, args.batch_size, device)

    laps, losses = [], []
    for step in range(args.warmup + args.steps):
        if step == args.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watch = measuring.Stopwatch(device)
        watch.mark()
        loss = loss_of(inputs, targets)
        watch.mark()
        loss.backward()
        watch.mark()
        clip_gradients(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        watch.mark()
        laps.append(watch.laps())
        losses.append(loss.item())
    measured = laps[args.warmup :]
    step_s = statistics.median(map(sum, measured))
    row: dict[str, Any] = {"side": side, "tokens_per_s": inputs.numel() / step_s, "step_s": step_s}
    for part, times in zip(PARTS, zip(*measured, strict=True), strict=True):
        row[f"{part}_s"] = statistics.median(times)
    on_gpu = device.type == "cuda"
    row["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None
    row["first_loss"], row["last_loss"] = losses[0], losses[-1]
    if side != "transformers":
        row["ops"] = backends.summary(model.config, device, dtype)
    return row


def measure_and_release(side: str, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Measures a side and frees its memory; a side that does not fit has a row that says so."""
    print(f"measuring {side} ...", file=sys.stderr, flush=True)
    try:
        with backends.use("triton" if side == "triton" else "cpu"):  # cuDNN's attention first
            row = measure(side, args, ranks)
    except torch.OutOfMemoryError:
        row = {"side": side, "failed": "out of memory"}
    gc.collect()  # FSDP's hooks and modules refer to each other
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


# ---- Report ------------------------------------------------------------------------------------


def describe(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns machine, versions and settings, JSON-able; `names` are options to tell."""
    size = SIZES[args.size]
    settings = {"size": args.size, **size.base, "new_blocks": size.new_blocks}
    settings |= {"seq_len": size.seq_len} | {name: getattr(args, name) for name in names}
    versions = measuring.versions("torch", "triton", "transformers")
    return {"machine": measuring.machine(), "versions": versions, "settings": settings}


def render(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    s, gpu = result["settings"], result["machine"]["gpu"]
    lines = [
        f"{s['size']}, {s['num_hidden_layers']} blocks + {s['new_blocks']} new, "
        f"{s['batch_size']} x {s['seq_len']} tokens a step, {s['dtype']} on {gpu or 'CPU'}; "
        f"median of {s['steps']} steps"
    ]
    heads = "side,tokens/s,step s,forward,backward,optimizer,peak GB,first loss,last loss"
    rows = []
    for row in result["rows"]:
        if "failed" in row:
            rows.append([f"{row['side']}: {row['failed']}"])
            continue
        peak = row["peak_memory_gb"]
        times = [f"{row[name]:.4f}" for name in ("step_s", *(f"{part}_s" for part in PARTS))]
        rows.append([row["side"], f"{row['tokens_per_s']:,.0f}", *times])
        rows[-1] += ["-" if peak is None else f"{peak:.1f}"]
        rows[-1] += [f"{row[name]:.4f}" for name in ("first_loss", "last_loss")]
    lines.append(measuring.table(heads.split(","), rows))
    return "\n".join(lines)


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument(
        "--size", choices=SIZES, help="model to train; default: 7b on a GPU, tiny on a CPU"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per step")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, help="sides; default: all that run here"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that are not")
    args = parser.parse_args()
    with process_group("auto") as ranks:
        args.size = args.size or ("7b" if ranks.device.type == "cuda" else "tiny")
        args.dtype = str(compute_dtype(ranks.device)).removeprefix("torch.")
        sides = choose_sides(args.sides, SIZES[args.size], ranks.device)
        result = describe(args, "batch_size", "steps", "warmup", "dtype")
        result["rows"] = []
        for side in sides:
            result["rows"].append(measure_and_release(side, args, ranks))
            measuring.write(args.out, result)
    print(render(result))


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
