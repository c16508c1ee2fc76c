"""The model against Hugging Face's LlamaForCausalLM, and the promises the trainer relies on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed._composable.checkpoint_activation import checkpoint

from llamapro import expansion
from llamapro.config import ModelConfig
from llamapro.inference.cache import KVCache
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.ops import IGNORE_INDEX
from llamapro.training.objective import NextToken

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2, "num_hidden_layers": 3},
    "mqa": {"num_key_value_heads": 1, "num_hidden_layers": 2, "rms_norm_eps": 1e-6},
    "tied": {"tie_word_embeddings": True},
    "head_dim_over_c_per_head": {"head_dim": 24},
    "head_dim_under_c_per_head": {"head_dim": 8, "num_key_value_heads": 4},
    "theta_5e5": {"rope_theta": 500000.0},
    "theta_1e2": {"rope_theta": 100.0, "num_key_value_heads": 4},
    "theta_in_rope_parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}
    },
}
NINE = 9  # tensors of a block


def random_ids(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def ours(config: ModelConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    model = build_on_meta(config)
    load_tensors(model, {name: tensor.clone() for name, tensor in tensors.items()})
    return model


def theirs(config: ModelConfig, tensors: dict[str, Tensor]) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.raw))
    if config.tie_word_embeddings:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    # Assigned, as from_pretrained does, and not `model.to(dtype)`: that would round the frequencies
    # of their rotary embedding to bf16 as well, which nobody runs.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def config(request: pytest.FixtureRequest, tiny_config: Callable[..., ModelConfig]) -> ModelConfig:
    return tiny_config(**request.param)


@torch.no_grad()
def test_fp32_logits_match_hugging_face(config: ModelConfig, random_tensors: Any) -> None:
    """Logits agree within 1e-5 for lengths 1, 7 and 33 in a batch of 3."""
    tensors = random_tensors(config)
    model, reference = ours(config, tensors), theirs(config, tensors)
    for length in (1, 7, 33):
        ids = random_ids(config, 3, length)
        expected = reference(ids).logits
        assert expected.std() > 0.5, "logits near 0 would agree whatever the model computed"
        assert (model(ids) - expected).abs().max() < 1e-5


def test_loss_and_every_gradient_match_hugging_face(
    config: ModelConfig, random_tensors: Any
) -> None:
    """Mean loss within 1e-6 and each parameter's gradient within 1e-5 of its norm."""
    tensors = random_tensors(config)
    model, reference = ours(config, tensors), theirs(config, tensors)
    ids = random_ids(config, 3, 33)
    targets = ids[:, 1:].clone()
    targets[0, :20] = IGNORE_INDEX

    labels = torch.cat((ids[:, :1], targets), dim=1)  # Hugging Face shifts by itself
    expected = reference(ids, labels=labels).loss
    expected.backward()
    loss_sum, count = NextToken(model)(ids[:, :-1], targets)
    assert count == 3 * 32 - 20
    loss = loss_sum / count
    loss.backward()

    assert abs(loss - expected) < 1e-6 * expected
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@torch.no_grad()
def test_bf16_error_is_no_larger_than_hugging_face(
    config: ModelConfig, random_tensors: Any
) -> None:
    """Against the same weights computed in fp32, our bf16 logits are as near as theirs."""
    tensors = random_tensors(config, torch.bfloat16)
    ids = random_ids(config, 4, 65)
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    exact = theirs(config, wide)(ids).logits
    their_error = (theirs(config, tensors)(ids).logits.float() - exact).norm()
    our_error = (ours(config, tensors)(ids).float() - exact).norm()
    assert their_error > 0
    # Every rounding to bf16 happens at the same place, so on one machine the two are usually equal;
    # an attention kernel that sums in another order draws the same noise again, a few per cent off.
    assert our_error <= 1.05 * their_error


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_eighty_greedy_tokens_are_hugging_faces(
    variant: str, tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Decoding token by token through KVCache gives the ids of `generate(do_sample=False)`."""
    config = tiny_config(**VARIANTS[variant])
    tensors = random_tensors(config)
    model, reference = ours(config, tensors).eval(), theirs(config, tensors)
    ids = random_ids(config, 4, 9)
    reference.generation_config.eos_token_id = None
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80, pad_token_id=0
    )
    cache = KVCache(model, 4, 9 + 80)
    step, tokens = ids, [ids]
    for _ in range(80):
        step = model(step, cache=cache)[:, -1].argmax(-1, keepdim=True)
        tokens.append(step)
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    assert expected[:, 9:].unique().numel() > 20, "a constant continuation would prove nothing"


@torch.no_grad()
def test_chunked_prefill_equals_the_full_forward(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Pieces of 5, 1, 7 and 20 tokens through KVCache give the logits of all 33 at once."""
    config = tiny_config()
    model = ours(config, random_tensors(config))
    ids = random_ids(config, 2, 33)
    cache = KVCache(model, 2, 33)
    pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 7, 20], dim=1)]
    full = model(ids)
    assert cache.length == 33
    assert (torch.cat(pieces, dim=1) - full).abs().max() < 1e-5
    with pytest.raises(ValueError, match="holds 33 positions, asked for 34"):
        model(ids[:, :1], cache=cache)


def test_parameters_are_the_tensors_that_were_given(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Loading assigns: no parameter is a copy, and a tied head is the embedding itself."""
    for tied in (False, True):
        config = tiny_config(tie_word_embeddings=tied)
        tensors = random_tensors(config)
        model = build_on_meta(config)
        load_tensors(model, tensors)
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == tensors[name].data_ptr(), name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_build_on_meta_allocates_nothing(tiny_config: Callable[..., ModelConfig]) -> None:
    """A model of 1.9 TB is built: every parameter and buffer is shape only."""
    config = tiny_config(
        hidden_size=16384, intermediate_size=65536, num_attention_heads=128, num_hidden_layers=128
    )
    model = build_on_meta(config)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) > 1.9e12


def expanded_model(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> tuple[LlamaForCausalLM, list[str]]:
    """4 base blocks in 2 groups: new blocks 2 and 5 of 6, the only ones that train."""
    config = tiny_config()
    layout = expansion.interleave(4, 2)
    model = build_on_meta(expansion.expand_config(config, layout, "0" * 64))
    load_tensors(model, expansion.expand_state_dict(random_tensors(config), layout))
    return model, expansion.select_trainable(model, "new_blocks")


def backward(model: LlamaForCausalLM, seed: int = 0) -> None:
    ids = random_ids(model.config, 2, 33, seed)
    loss_sum, count = NextToken(model)(ids[:, :-1], ids[:, 1:].contiguous())
    (loss_sum / count).backward()


def test_recompute_saves_memory_and_changes_no_bit_of_a_gradient(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Activation checkpointing keeps fewer bytes for backward; gradients keep their bits."""
    gradients, saved = [], []
    for recompute in (False, True):
        model, _ = expanded_model(tiny_config, random_tensors)
        expansion.select_trainable(model, "all")
        for layer in model.model.layers:
            if recompute:
                checkpoint(layer)
        bytes_saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal bytes_saved
            bytes_saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            ids = random_ids(model.config, 2, 33)
            loss_sum, _ = NextToken(model)(ids[:, :-1], ids[:, 1:].contiguous())
            at_end_of_forward = bytes_saved
            loss_sum.backward()
        saved.append(at_end_of_forward)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert saved[1] < saved[0] / 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_below_the_first_new_block_builds_a_graph(
    recompute: bool, tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """Outputs below block 2 have no grad_fn, those above have; no frozen tensor gets a .grad."""
    model, trainable = expanded_model(tiny_config, random_tensors)
    outputs: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        if recompute:
            checkpoint(layer)
        layer.register_forward_hook(lambda _m, _i, out, index=index: outputs.update({index: out}))
    backward(model)
    assert {i for i, out in outputs.items() if out.grad_fn is None} == {0, 1}
    assert {i for i, out in outputs.items() if out.requires_grad} == {2, 3, 4, 5}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable)
    assert len(trainable) == 2 * NINE


def test_first_step_moves_the_two_zero_matrices_and_the_second_all_nine(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """At step 1 only o_proj and down_proj of a new block have a gradient; at step 2 all do."""
    model, trainable = expanded_model(tiny_config, random_tensors)
    parameters = {name: p for name, p in model.named_parameters() if name in trainable}

    def moving() -> set[str]:
        return {name for name, p in parameters.items() if p.grad.count_nonzero()}

    backward(model)
    parts = [part for part in expansion.ZERO_IN_NEW_BLOCKS if part.endswith("weight")]
    zeros = {f"model.layers.{i}.{part}" for i in (2, 5) for part in parts}
    assert moving() == zeros
    assert all(parameters[name].count_nonzero() == 0 for name in zeros)

    torch.optim.SGD([parameters[name] for name in zeros], lr=0.1).step()
    model.zero_grad()
    backward(model, seed=1)
    assert moving() == set(trainable)


def test_a_model_built_by_hand_has_random_weights(tiny_config: Callable[..., ModelConfig]) -> None:
    """Embeddings too: their standard deviation is the configuration's, and they train."""
    weight = LlamaForCausalLM(tiny_config()).model.embed_tokens.weight
    assert weight.requires_grad and weight.isfinite().all()
    assert abs(weight.std().item() - 0.1) < 0.01
