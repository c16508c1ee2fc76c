"""Block expansion (LLaMA Pro, section 3.2): new blocks, their place, their weights, their training.

The L blocks of the base form N groups of M = L / N. Copies of the top P blocks of each group are
stacked on top of it, so L becomes L + N * P. Four blocks, with N = 2 and P = 1:

    base        0  1      2  3
    expanded    0  1  1'  2  3  3'

In each copy `o_proj` (the paper's W_O) and `down_proj` (W_3) are zero, and so are their biases if
there are any. Both residual branches add exactly 0, so the expanded model computes what the base
computes, to the bit. Everything else is copied, both norms included: a norm of 0 would give the
identity too, but its gradient would stay 0 forever (Appendix A). At the first step only what is
zero has a gradient; from the second all of the block's tensors do.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llamapro.config import ExpansionRecord, ModelConfig
from llamapro.errors import ConfigError
from llamapro.model import LlamaForCausalLM

# The last matrix of each residual branch, and its bias. Where both are zero, the branch adds zero.
_LAST = ("self_attn.o_proj", "mlp.down_proj")
ZERO_IN_NEW_BLOCKS = tuple(f"{last}.{part}" for last in _LAST for part in ("weight", "bias"))
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Layout:
    """The blocks of an expanded model, from bottom to top."""

    sources: tuple[int, ...]  # for each block, the base layer that it is or is copied from
    new_layers: tuple[int, ...]  # the indices of the new blocks

    @property
    def base_layers(self) -> tuple[int, ...]:
        """The index in the expanded model of each base layer."""
        new = set(self.new_layers)
        return tuple(i for i in range(len(self.sources)) if i not in new)


def place(num_layers: int, inserted: Mapping[int, Iterable[int]]) -> Layout:
    """Builds a layout from base layer (-1 is below all) -> the layers copied on top of it."""
    sources: list[int] = []
    new: list[int] = []
    for layer in range(-1, num_layers):
        if layer >= 0:
            sources.append(layer)
        # The base keeps its order; a copy only pushes what is above it up by one.
        for source in inserted.get(layer, ()):
            new.append(len(sources))
            sources.append(source)
    return Layout(tuple(sources), tuple(new))


def interleave(num_layers: int, num_new_blocks: int, blocks_per_group: int = 1) -> Layout:
    """Places copies of the top P blocks of each of N groups on top of the group, as the paper does.

    Raises ConfigError if the layers do not split like this, with the numbers that work.

    Args:
        num_layers: L, the number of the base's layers.
        num_new_blocks: N * P, the number of new blocks in all.
        blocks_per_group: P.
    """
    P = blocks_per_group
    # N groups must be equal, and none can copy more blocks than it has.
    fitting = [
        n * P for n in range(1, num_layers + 1) if num_layers % n == 0 and 1 <= P <= num_layers // n
    ]
    if num_new_blocks not in fitting:
        raise ConfigError(
            f"--num-new-blocks {num_new_blocks} with --blocks-per-group {P} does not split "
            f"{num_layers} layers into equal groups; choose one of "
            f"{', '.join(map(str, fitting)) or 'another P'}, or list base layers with --after"
        )
    # The copies keep the order that their sources have.
    M = num_layers * P // num_new_blocks
    tops = range(M - 1, num_layers, M)
    return place(num_layers, {top: range(top - P + 1, top + 1) for top in tops})


def insert_after(num_layers: int, layers: Iterable[int]) -> Layout:
    """Places a copy of each listed base layer directly after it.

    Raises ConfigError if a layer is listed twice or does not exist.
    """
    layers = list(layers)
    wrong = sorted({i for i in layers if not 0 <= i < num_layers or layers.count(i) > 1})
    if wrong or not layers:
        raise ConfigError(
            f"--after {','.join(map(str, layers))}: {wrong or 'nothing'} listed twice or not among "
            f"the base layers 0 to {num_layers - 1}"
        )
    return place(num_layers, {layer: (layer,) for layer in layers})


def stack(num_layers: int, num_new_blocks: int, placement: str) -> Layout:
    """Places copies of the bottom blocks below all ("prefix"), or of the top above all ("suffix").

    Both train worse than `interleave` (Table 5). Raises ConfigError for more copies than layers.
    """
    if not 1 <= num_new_blocks <= num_layers:
        raise ConfigError(
            f"--num-new-blocks {num_new_blocks}: {placement} copies 1 to {num_layers} blocks"
        )
    if placement == "prefix":
        return place(num_layers, {-1: range(num_new_blocks)})
    return place(num_layers, {num_layers - 1: range(num_layers - num_new_blocks, num_layers)})


def expand_config(
    config: ModelConfig, layout: Layout, base_sha256: str, new_tokens: int = 0
) -> ModelConfig:
    """Returns the configuration of the expanded model, with the record of what is new in it.

    Args:
        config, layout: of the base, and the places of the new blocks.
        base_sha256: `Checkpoint.sha256()` of the base.
        new_tokens: the number of tokens that are added to the vocabulary.
    """
    # Earlier new blocks stay on record, at their new places, but belong to the base from now on.
    moved_to = layout.base_layers
    generations = []
    if (earlier := config.expansion) is not None:
        latest = earlier.to_dict()
        for generation in (*latest.pop("generations"), latest):
            moved = [moved_to[i] for i in generation["new_layers"]]
            generations.append(generation | {"new_layers": moved})
    record = ExpansionRecord(
        layout.new_layers,
        tuple(layout.sources[i] for i in layout.new_layers),
        base_sha256,
        tuple(generations),
        config.vocab_size if new_tokens else None,
        config.computation,
    )
    return config.resized(len(layout.sources), config.vocab_size + new_tokens, record)


def expand_names(base_names: Iterable[str], layout: Layout) -> dict[str, tuple[str, bool]]:
    """Maps every tensor of the expanded model to its source.

    Returns:
        Name in the expanded model -> (name in the base, is_zero). The tensor is the base's or, if
        is_zero, zeros of its shape.
    """
    inside: dict[int, list[str]] = {}
    outside = []  # embedding, final norm and head are in no block and stay as they are
    for name in base_names:
        if match := _LAYER.fullmatch(name):
            inside.setdefault(int(match[1]), []).append(match[2])
        else:
            outside.append(name)
    expanded = {name: (name, False) for name in outside}
    new = set(layout.new_layers)
    # A block's name follows from its place, its tensors from its source.
    for index, source in enumerate(layout.sources):
        for part in inside[source]:
            # The identity trick: a new block adds exactly 0 to the residual stream.
            is_zero = index in new and part in ZERO_IN_NEW_BLOCKS
            expanded[f"model.layers.{index}.{part}"] = (f"model.layers.{source}.{part}", is_zero)
    return expanded


def is_in_layers(name: str, layers: Iterable[int]) -> bool:
    """Returns whether a parameter belongs to one of these blocks."""
    match = _LAYER.fullmatch(name)
    return match is not None and int(match[1]) in set(layers)


def expand_state_dict(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Expands a model in memory; new tensors are copies, sharing no storage with their source."""
    expanded = {}
    for name, (source, is_zero) in expand_names(tensors, layout).items():
        tensor = tensors[source]
        if is_zero:
            tensor = torch.zeros_like(tensor)
        elif is_in_layers(name, layout.new_layers):
            # It trains apart from its source. All other tensors are shared with the base.
            tensor = tensor.clone()
        expanded[name] = tensor
    return expanded


def select_trainable(model: LlamaForCausalLM, trainable: str = "new_blocks") -> list[str]:
    """Sets `requires_grad` of every parameter and returns the names of those that train.

    Raises ConfigError if no block is recorded as new.

    Args:
        model: the model; its configuration has the expansion record.
        trainable: "new_blocks" (those of the latest expansion) or "all".
    """
    record = model.config.expansion
    if trainable == "new_blocks" and record is None:
        raise ConfigError(
            "train.trainable 'new_blocks': this model's config.json has no 'llamapro' record; run "
            "'llamapro expand', or 'llamapro adopt' if another tool expanded it, or choose 'all'"
        )
    for name, parameter in model.named_parameters():
        # The record says which blocks are new; the weights are never asked.
        is_new = record is not None and is_in_layers(name, record.new_layers)
        parameter.requires_grad_(trainable == "all" or is_new)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
