"""The models for comparison that `train.py` does not make by itself.

- `lora`: low-rank adapters (Hu et al., 2022) by PEFT on every linear layer of the base.
- `moe`: the paper's Appendix H. Every W_3 (`down_proj`) gets a second one, zero at first. The
  softmax of two scalars weighs the two, and both are always active.
- `originals`: as many of the base's own blocks train as would have been added.
- `copies`: new blocks that are plain copies, with W_O and W_3 not zeroed.
- `zero-norms`: new blocks with copied W_O and W_3 that are the identity because the weights of
  their norms are zero (Shen et al., 2022).

`build` returns a whole model on the CPU with `requires_grad` set, ready for `train.run`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamapro import ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.expansion import expand_names, insert_after, is_in_layers
from llamapro.model import MLP, LlamaForCausalLM, build_on_meta, load_tensors

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


class TwoDownProjections(nn.Module):
    """The FFN of Appendix H: `h (s_1 W_3 + s_2 W_3')` with s = softmax(a).

    At first, W_3' (`new_down_proj`) is zero and a (`scales`) is (1, 0). The output of W_3 is then
    scaled by 0.731, so this start is not the base.
    """

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        weight = mlp.down_proj.weight
        self.new_down_proj = type(mlp.down_proj)(weight.shape[1], weight.shape[0], bias=False).to(
            weight
        )
        nn.init.zeros_(self.new_down_proj.weight)
        self.scales = nn.Parameter(torch.tensor([1.0, 0.0]).to(weight))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        h = ops.swiglu(self.gate_proj(x), self.up_proj(x))
        old, new = self.scales.softmax(0)
        return old * self.down_proj(h) + new * self.new_down_proj(h)


def base_model(base: Path) -> LlamaForCausalLM:
    """Returns a checkpoint's model, frozen. Its weights are copies, so the file never changes."""
    model = Checkpoint.open(base).load()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.requires_grad_(False)


def expanded(base: Path, layers: Sequence[int], start: str) -> LlamaForCausalLM:
    """Returns the base with new blocks on top of some of its layers. Only the new blocks train.

    Args:
        base: checkpoint directory.
        layers: base layers, each of which gets its copy on top.
        start: "zero-outputs", the paper's identity; "copies", nothing is zero; "zero-norms".
    """
    checkpoint = Checkpoint.open(base)
    layout = insert_after(checkpoint.config.num_hidden_layers, layers)
    stored, tensors = checkpoint.state_dict(), {}
    for name, (source, is_output) in expand_names(stored, layout).items():
        is_norm = is_in_layers(name, layout.new_layers) and name.endswith(NORMS)
        is_zero = {"zero-outputs": is_output, "zero-norms": is_norm, "copies": False}[start]
        tensors[name] = torch.zeros_like(stored[source]) if is_zero else stored[source].clone()
    config = checkpoint.config.resized(len(layout.sources), checkpoint.config.vocab_size, None)
    model = build_on_meta(config)
    load_tensors(model, tensors)
    return train_layers(model, layout.new_layers)


def train_layers(model: LlamaForCausalLM, layers: Sequence[int]) -> LlamaForCausalLM:
    """Freezes all parameters outside these layers, and returns the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_in_layers(name, layers))
    return model


def moe(base: Path) -> LlamaForCausalLM:
    """Returns the base with second down projections. Only these and their scales train."""
    model = base_model(base)
    for layer in model.model.layers:
        layer.mlp = TwoDownProjections(layer.mlp)  # type: ignore[arg-type]
    return model


def lora_rank(base: Path, blocks: int) -> int:
    """Returns the rank at which adapters have about as many parameters as blocks of the base."""
    checkpoint = Checkpoint.open(base)
    layers = [checkpoint.layer(i).values() for i in range(checkpoint.config.num_hidden_layers)]
    per_block = sum(math.prod(tensor.shape) for tensor in layers[0])
    per_rank = sum(sum(t.shape) for layer in layers for t in layer if len(t.shape) == 2)
    return max(1, round(blocks * per_block / per_rank))


def lora(base: Path, rank: int, seed: int) -> LlamaForCausalLM:
    """Returns the base with adapters of this rank, scaled by 1. Needs PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    model = base_model(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def build(about: dict[str, Any]) -> LlamaForCausalLM:
    """Returns the model that a trial's `built` describes by kind and arguments."""
    kind, base = about["model"], Path(about["base"])
    if kind == "lora":
        return lora(base, about["rank"], about["seed"])
    if kind == "originals":
        return train_layers(base_model(base), about["layers"])
    return moe(base) if kind == "moe" else expanded(base, about["layers"], kind)
