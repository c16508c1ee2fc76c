"""What `train.py` does not make and block expansion is compared with, trained in the same way.

- `lora`: low-rank adapters (Hu et al., 2022) by PEFT on every linear of the base.
- `moe`: the paper's Appendix H: beside each W_3 (`down_proj`) a second, zero one; the two are
  weighted by the softmax of two scalars, and both are always active.
- `originals`: as many of the base's own blocks train as would have been added.
- `copies`: new blocks that are plain copies, W_O and W_3 not zeroed.
- `zero-norms`: new blocks that are the identity because their norms' weights are zero (Shen et al.,
  2022), W_O and W_3 copied.

A builder gives a whole model on the CPU with `requires_grad` set. It is trained as `train.py`
trains: its data, order, schedule, optimizer, step and evaluation, and records of the same form.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import TRAINABLE_FILE, training_checkpoints
from llamapro.errors import ConfigError
from llamapro.expansion import Layout, expand_names, insert_after, is_in_layers
from llamapro.model import MLP, LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.training.job import Job
from llamapro.training.objective import NextToken
from llamapro.training.optim import FiniteGuard, build_adamw
from llamapro.training.preset import parse
from llamapro.training.settings import Settings, check

ROOT = Path(__file__).resolve().parents[1]
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
Build = Callable[[], LlamaForCausalLM]


@cache
def train_file() -> ModuleType:
    """Returns `train.py` as a module: it lies at the root, which is not on the path."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


# ---- Models -------------------------------------------------------------------------------------


class TwoDownProjections(nn.Module):
    """The FFN of Appendix H: `h (s_1 W_3 + s_2 W_3^)` with s = softmax(a), a = (1, 0) at first.

    So at first W_3's part is scaled by 0.731: this start is not the base.

    Attributes:
        new_down_proj: W_3^, zero at first.
        scales: a, (2,).
    """

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        weight = mlp.down_proj.weight
        self.new_down_proj = type(mlp.down_proj)(weight.shape[1], weight.shape[0]).to(weight)
        nn.init.zeros_(self.new_down_proj.weight)
        self.scales = nn.Parameter(torch.tensor([1.0, 0.0]).to(weight))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        h = ops.swiglu(self.gate_proj(x), self.up_proj(x))
        old, new = self.scales.softmax(0)
        return old * self.down_proj(h) + new * self.new_down_proj(h)


def base_model(base: Path) -> LlamaForCausalLM:
    """Returns a checkpoint's model, frozen, its weights copied: nothing here may reach the file."""
    model = Checkpoint.open(base).load()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def originals(base: Path, layers: Sequence[int]) -> LlamaForCausalLM:
    """The base, of which the named blocks train."""
    model = base_model(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_in_layers(name, layers))
    return model


def expanded(base: Path, layers: Sequence[int], keep: str) -> LlamaForCausalLM:
    """The base with new blocks, of which these alone train.

    Args:
        base: checkpoint directory.
        layers: after each of which a new block goes, copied from it.
        keep: "zero-outputs", the paper's identity; "copies", nothing is zero; "zero-norms".
    """
    checkpoint = Checkpoint.open(base)
    layout: Layout = insert_after(checkpoint.config.num_hidden_layers, layers)
    tensors, mapped = {}, checkpoint.state_dict()
    for name, (source, is_output) in expand_names(mapped, layout).items():
        is_new = is_in_layers(name, layout.new_layers)
        is_zero = is_output if keep == "zero-outputs" else is_new and name.endswith(NORMS)
        is_zero = is_zero and keep != "copies"
        tensors[name] = torch.zeros_like(mapped[source]) if is_zero else mapped[source].clone()
    model = build_on_meta(
        checkpoint.config.resized(len(layout.sources), checkpoint.config.vocab_size, None)
    )
    load_tensors(model, tensors)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_in_layers(name, layout.new_layers))
    return model


def moe(base: Path) -> LlamaForCausalLM:
    """The base with a second down projection in every FFN; these and their scales train."""
    model = base_model(base)
    for layer in model.model.layers:
        layer.mlp = TwoDownProjections(layer.mlp)  # type: ignore[arg-type]
    return model


def lora_rank(base: Path, blocks: int) -> int:
    """Returns the rank at which adapters on every linear of a base have as many parameters as so
    many of its blocks, as nearly as can be.
    """
    checkpoint = Checkpoint.open(base)
    layers = [checkpoint.layer(i).values() for i in range(checkpoint.config.num_hidden_layers)]
    of_a_block = sum(math.prod(tensor.shape) for tensor in layers[0])
    per_rank = sum(sum(t.shape) for layer in layers for t in layer if len(t.shape) == 2)
    return max(1, round(blocks * of_a_block / per_rank))


def lora(base: Path, rank: int, seed: int) -> LlamaForCausalLM:
    """The base with adapters of this rank, scaled by 1.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("variant lora needs PEFT: pip install 'llamapro[study]'") from None
    model = base_model(base)
    torch.manual_seed(seed)
    how = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, lora_dropout=0.0)
    inject_adapter_in_model(how, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def build(about: dict[str, Any]) -> LlamaForCausalLM:
    """Returns what a trial's `built` describes: the model's name and its builder's arguments."""
    kind, base = about["model"], Path(about["base"])
    if kind == "originals":
        return originals(base, about["layers"])
    if kind == "lora":
        return lora(base, about["rank"], about["seed"])
    return moe(base) if kind == "moe" else expanded(base, about["layers"], kind)


# ---- Training -----------------------------------------------------------------------------------


def train(argv: list[str], make: Build) -> LlamaForCausalLM:
    """Trains a built model by `train.py` with these options.

    Args:
        argv: options of `train.py`; the base is `--model.path`, and train.trainable 'all'.
        make: builds the model, always the same; called twice.

    Returns:
        The trained model, whole, on the CPU, in the base's dtype.

    Raises:
        ConfigError: an option is impossible.
        DivergedError: a gradient is not finite.
    """
    settings = parse(argv)
    check(settings, 1)
    job = Job.open(settings)
    train_file().run(job, NextToken(make()))
    trained = load_file(training_checkpoints(job.run_dir)[-1] / TRAINABLE_FILE)
    model = make()
    unknown = model.load_state_dict(trained, strict=False).unexpected_keys
    assert not unknown, unknown
    return model.requires_grad_(False).eval()


def guarded_adamw(parameters: Sequence[nn.Parameter], settings: Settings) -> FiniteGuard:
    """Returns the optimizer of a run, guarded as `train.py` guards it."""
    o = settings.optim
    optimizer = build_adamw(parameters, o.betas, o.weight_decay)
    return FiniteGuard(optimizer, o.skip_bad_steps)


def whole(parameter: Tensor) -> Tensor:
    """Returns a sharded parameter, or one that is not, on the CPU."""
    tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return tensor.detach().cpu()


# ---- The first gradients ------------------------------------------------------------------------


def first_gradients(
    base: Path, layers: Sequence[int], keep: str, ids: Tensor, steps: int = 2, lr: float = 1e-3
) -> list[dict[str, float]]:
    """Shows which tensors of new blocks can learn: the norm of each one's gradient, step by step.

    Args:
        base, layers, keep: as for `expanded`.
        ids: (B, T + 1) tokens; the same at every step.
        steps: of AdamW without decay.
        lr: their rate.

    Returns:
        For each step: a tensor's name inside its block -> norm over all new blocks, computed in
        fp64, so that 0 is 0 and nothing else.
    """
    model = expanded(base, layers, keep).double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.0)
    found = []
    for _ in range(steps):
        loss, count = NextToken(model)(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        squares: dict[str, float] = {}
        for name, parameter in named.items():
            inside = name.split(".", 3)[3].removesuffix(".weight")
            assert parameter.grad is not None
            squares[inside] = squares.get(inside, 0.0) + parameter.grad.square().sum().item()
        found.append({name: square**0.5 for name, square in squares.items()})
        optimizer.step()
        optimizer.zero_grad()
    return found
