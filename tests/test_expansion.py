"""Block expansion: where new blocks go, what they hold, and that they change no bit."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import expansion
from llamapro.checkpoints.base import base_names, layout_of
from llamapro.config import ExpansionRecord, ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import Layout, insert_after, interleave, stack
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors

PARTS = {
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}
LAYOUTS = {
    "interleave": interleave(4, 2),
    "interleave_pairs": interleave(4, 4, blocks_per_group=2),
    "after": insert_after(4, [2, 0]),
    "prefix": stack(4, 2, "prefix"),
    "suffix": stack(4, 2, "suffix"),
}


def loaded(config: ModelConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    model = build_on_meta(config)
    load_tensors(model, tensors)
    return model


def test_llama_2_7b_grows_as_in_the_paper() -> None:
    """32 layers, 8 groups of 4, P = 1: new 4, 9, ..., 39, each a copy of the layer below it."""
    layout = interleave(32, 8)
    assert layout.new_layers == (4, 9, 14, 19, 24, 29, 34, 39)
    assert tuple(layout.sources[i] for i in layout.new_layers) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert [layout.sources[i] for i in layout.base_layers] == list(range(32))
    assert len(layout.sources) == 40


def test_two_blocks_per_group_copy_its_top_two_in_order() -> None:
    """8 layers, 2 groups, P = 2: 2, 3 above 3, and 6, 7 above 7."""
    layout = interleave(8, 4, blocks_per_group=2)
    assert layout.sources == (0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7)
    assert layout.new_layers == (4, 5, 10, 11)


def test_every_possible_interleaving_is_the_literal_construction() -> None:
    """All (L, N, P) with L <= 12, N a divisor of L and P at most the group's size."""
    for L in range(1, 13):
        for N in (n for n in range(1, L + 1) if L % n == 0):
            M = L // N
            for P in range(1, M + 1):
                sources, new = [], []
                for group in range(N):
                    blocks = list(range(group * M, (group + 1) * M))
                    sources += blocks
                    new += range(len(sources), len(sources) + P)
                    sources += blocks[M - P :]
                assert interleave(L, N * P, P) == Layout(tuple(sources), tuple(new)), (L, N, P)


def test_numbers_that_do_not_divide_are_refused_with_those_that_do() -> None:
    """The message lists every number that works; what it lists works, nothing else does."""
    for L, P, fitting in ((12, 1, [1, 2, 3, 4, 6, 12]), (12, 2, [2, 4, 6, 8, 12]), (5, 3, [3])):
        for number in range(-1, 30):
            if number in fitting:
                assert len(interleave(L, number, P).new_layers) == number
                continue
            with pytest.raises(ConfigError) as caught:
                interleave(L, number, P)
            assert f"--num-new-blocks {number}" in str(caught.value)
            assert f"choose one of {', '.join(map(str, fitting))}, or" in str(caught.value)
    with pytest.raises(ConfigError, match="--blocks-per-group 5"):
        interleave(4, 5, 5)


@pytest.mark.parametrize("blocks_per_group", [0, -1])
def test_groups_need_at_least_one_block(blocks_per_group: int) -> None:
    """P below 1 is a ConfigError, whatever the number of blocks."""
    for number in (-4, 0, 4):
        with pytest.raises(ConfigError, match=f"--blocks-per-group {blocks_per_group}"):
            interleave(4, number, blocks_per_group)


def test_blocks_go_where_they_are_asked_for() -> None:
    """After listed layers in any order; below all; above all."""
    assert insert_after(4, [2, 0]) == Layout((0, 0, 1, 2, 2, 3), (1, 4))
    assert insert_after(4, range(4)) == interleave(4, 4)
    assert stack(4, 2, "prefix") == Layout((0, 1, 0, 1, 2, 3), (0, 1))
    assert stack(4, 2, "suffix") == Layout((0, 1, 2, 3, 2, 3), (4, 5))


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: insert_after(4, [0, 4]), r"--after 0,4: \[4\]"),
        (lambda: insert_after(4, [-1]), r"--after -1: \[-1\]"),
        (lambda: insert_after(4, [1, 1, 2]), r"--after 1,1,2: \[1\]"),
        (lambda: insert_after(4, []), "nothing"),
        (lambda: stack(4, 5, "prefix"), "--num-new-blocks 5: prefix copies 1 to 4"),
        (lambda: stack(4, 0, "suffix"), "--num-new-blocks 0: suffix copies 1 to 4"),
    ],
)
def test_an_impossible_placement_is_refused(make: Callable[[], Layout], expected: str) -> None:
    """The message names the option and the layers that are wrong."""
    with pytest.raises(ConfigError, match=expected):
        make()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_layout_is_rebuilt_from_the_record(
    layout: Layout, tiny_config: Callable[..., ModelConfig]
) -> None:
    """config.json's JSON text alone gives back sources and new layers, for every placement."""
    config = expansion.expand_config(tiny_config(), layout, "ab" * 32)
    read = ModelConfig.from_dict(json.loads(config.to_json()))
    assert read == config
    assert read.expansion is not None and read.expansion.base_sha256 == "ab" * 32
    assert layout_of(read) == layout


def test_a_second_expansion_keeps_the_first_renumbered(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    """4 -> 6 -> 9 -> 10 layers: earlier new layers are found where they have moved to."""
    first = expansion.expand_config(tiny_config(), interleave(4, 2), "a")
    computes: Any = {"computation": tiny_config().computation}
    assert first.expansion == ExpansionRecord((2, 5), (1, 3), "a", **computes)
    second = expansion.expand_config(first, interleave(6, 3), "b")  # 0 1 + 2 3 + 4 5 +
    moved = {"new_layers": [3, 7], "source_layers": [1, 3], "base_sha256": "a", **computes}
    assert second.expansion == ExpansionRecord((2, 5, 8), (1, 3, 5), "b", (moved,), **computes)
    third = expansion.expand_config(second, stack(9, 1, "prefix"), "c")
    assert third.expansion == ExpansionRecord(
        (0,),
        (0,),
        "c",
        (
            moved | {"new_layers": [4, 8]},
            {"new_layers": [3, 6, 9], "source_layers": [1, 3, 5], "base_sha256": "b", **computes},
        ),
        **computes,
    )
    assert ModelConfig.from_dict(json.loads(third.to_json())) == third


def test_only_the_latest_generation_trains(tiny_config: Callable[..., ModelConfig]) -> None:
    """Earlier generations are frozen; a model that was never expanded has no blocks to train."""
    twice = expansion.expand_config(
        expansion.expand_config(tiny_config(), interleave(4, 2), "a"), interleave(6, 3), "b"
    )
    model = build_on_meta(twice)
    names = expansion.select_trainable(model, "new_blocks")
    assert set(names) == {f"model.layers.{i}.{part}" for i in (2, 5, 8) for part in PARTS}
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    everything = [name for name, _ in model.named_parameters()]
    assert expansion.select_trainable(model, "all") == everything
    with pytest.raises(ConfigError, match=r"no 'llamapro' record.*llamapro expand"):
        expansion.select_trainable(build_on_meta(tiny_config()), "new_blocks")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_expanded_logits_are_bit_identical_to_base(
    layout: Layout, dtype: torch.dtype, tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Logits are equal, not close, in fp32 and bf16 and for every placement."""
    config = tiny_config()
    tensors = random_tensors(config, dtype)
    expanded = expansion.expand_state_dict(tensors, layout)
    assert {tensor.dtype for tensor in expanded.values()} == {dtype}
    grown = loaded(expansion.expand_config(config, layout, ""), expanded)
    ids = torch.randint(config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    assert torch.equal(grown(ids), loaded(config, tensors)(ids))


def test_new_blocks_are_copies_with_two_zero_matrices(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Seven tensors equal the source's, norms included; none shares its memory or another's."""
    tensors = random_tensors(tiny_config())
    layout = interleave(4, 4, blocks_per_group=2)
    expanded = expansion.expand_state_dict(tensors, layout)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for index in layout.new_layers:
        prefix, source = f"model.layers.{index}.", f"model.layers.{layout.sources[index]}."
        parts = {n.removeprefix(prefix) for n in expanded if n.startswith(prefix)}
        assert parts == PARTS
        for part in parts:
            tensor, original = expanded[prefix + part], tensors[source + part]
            is_zero = part in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            assert torch.equal(tensor, torch.zeros_like(original) if is_zero else original)
            assert original.count_nonzero() > 0
            assert tensor.untyped_storage().data_ptr() not in storages, prefix + part
            storages.add(tensor.untyped_storage().data_ptr())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_base_names_is_the_inverse_for_what_is_frozen(
    layout: Layout, tiny_config: Callable[..., ModelConfig]
) -> None:
    """Each base tensor is found exactly once, under its own name; no new block has one."""
    names = [name for name, _ in build_on_meta(tiny_config()).named_parameters()]
    expanded = expansion.expand_names(names, layout)
    inverse = base_names(expanded, layout)
    assert sorted(inverse.values()) == sorted(names)
    assert inverse == {
        name: source
        for name, (source, _) in expanded.items()
        if not expansion.is_in_layers(name, layout.new_layers)
    }


def test_names_inside_layers_are_told_by_number() -> None:
    """Layer 1 is not layer 11, and what is outside the layers is in none."""
    assert expansion.is_in_layers("model.layers.1.input_layernorm.weight", (1,))
    assert not expansion.is_in_layers("model.layers.11.input_layernorm.weight", (1,))
    assert not expansion.is_in_layers("model.norm.weight", (1,))


def test_parameter_counts_are_the_papers(tiny_config: Callable[..., ModelConfig]) -> None:
    """LLaMA-2-7B 6,738,415,616, a block 202,383,360, with 8 new blocks 8,357,482,496."""
    base = tiny_config(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    model = build_on_meta(base)
    assert count(model) == 6_738_415_616
    assert count(model.model.layers[0]) == 202_383_360
    grown = build_on_meta(expansion.expand_config(base, interleave(32, 8), ""))
    assert count(grown) == 8_357_482_496
    expansion.select_trainable(grown, "new_blocks")
    assert sum(p.numel() for p in grown.parameters() if p.requires_grad) == 1_619_066_880
