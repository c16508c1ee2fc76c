"""The weights that train, their random start, and the rows of added tokens among them.

An added token is one more row of embedding and head. The base's rows must keep every bit while the
new rows train, but they are one matrix. So the whole matrix is a trainable parameter whose gradient
is masked: AdamW leaves a row alone that has gradient 0 and no weight decay. Only the new rows are
saved, under the names of `NEW_ROWS`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llamapro import expansion
from llamapro.checkpoints.new_blocks import NEW_ROWS
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.model import LlamaForCausalLM, build_on_meta


def init_random(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Draws fp32 weights as Hugging Face does: N(0, initializer_range), 1 in norms, 0 in biases.

    Returns:
        Name -> tensor for every parameter, a function of (config, seed).
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, meta in build_on_meta(config).named_parameters():  # a tied weight appears once
        tensors[name] = torch.full(meta.shape, 0.0 if name.endswith(".bias") else 1.0)
        if meta.ndim == 2:
            tensors[name].normal_(0.0, config.initializer_range, generator=generator)
    return tensors


def freeze(model: LlamaForCausalLM, trainable: str, new_tokens: bool = False) -> list[str]:
    """Sets `requires_grad` of every parameter, before weights are loaded and sharded.

    Args:
        trainable: "new_blocks" (those of the latest expansion) or "all".
        new_tokens: also train embedding and head, for the rows of the tokens that this expansion
            added. `mask_gradients` keeps the other rows as they are.

    Returns the names of the parameters that train. Raises ConfigError for "new_blocks" without a
    record, and `new_tokens` with "all" or without added tokens.
    """
    names = expansion.select_trainable(model, trainable)
    if not new_tokens:
        return names
    if trainable == "all":
        raise ConfigError("train.new_tokens true: with train.trainable 'all' they train anyway")
    if not first_new_row(model.config):
        raise ConfigError(
            "train.new_tokens true: this model's vocabulary did not grow; give 'llamapro expand' "
            "--add-tokens, or set it to false"
        )
    for name in NEW_ROWS:
        model.get_parameter(name).requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def is_trained(module: nn.Module) -> bool:
    """Returns whether any parameter of a module trains."""
    return any(p.requires_grad for p in module.parameters())


def lowest_in_backward(model: LlamaForCausalLM) -> int:
    """Returns the lowest block that backward goes through; their number if it reaches none."""
    if is_trained(model.model.embed_tokens):
        return 0
    layers = model.model.layers
    return next((i for i, layer in enumerate(layers) if is_trained(layer)), len(layers))


def first_new_row(config: ModelConfig) -> int:
    """Returns the id of the first token that the latest expansion added, 0 if it added none."""
    return (config.expansion and config.expansion.base_vocab_size) or 0


def mask_gradients(parameters: Mapping[str, nn.Parameter], first_row: int) -> None:
    """Zeroes the gradient of embedding and head in the base's rows whenever one is computed.

    The parameters are given after sharding; all others are left alone.
    """
    for name in NEW_ROWS.keys() & parameters.keys():
        parameter = parameters[name]
        mask = (torch.arange(parameter.shape[0]) >= first_row).float()[:, None]  # (V, 1)
        mask = part_like(parameter, mask)

        def apply(p: Tensor, mask: Tensor = mask) -> None:
            assert p.grad is not None
            p.grad.mul_(mask)

        parameter.register_post_accumulate_grad_hook(apply)


def part_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Returns of a whole tensor, which all ranks have, what lies where this parameter lies."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh  # on the GPU, even if the parameter is offloaded
        whole = whole.to(mesh.device_type)
        whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
    return whole.to(parameter.device)


def stored_name(name: str, first_row: int) -> str:
    """Returns the name under which `stored_part` of a parameter is saved."""
    return NEW_ROWS.get(name, name) if first_row else name


def stored_part(name: str, tensor: Tensor, first_row: int) -> Tensor:
    """Returns the saved part of a whole parameter or moment: all of it, or its new rows."""
    return tensor[first_row:] if first_row and name in NEW_ROWS else tensor


def stored_shape(name: str, parameter: Tensor, first_row: int) -> tuple[int, ...]:
    """Returns the shape of `stored_part`; the parameter may be sharded."""
    rows, *rest = parameter.shape
    return (rows - first_row if name in NEW_ROWS else rows, *rest)
