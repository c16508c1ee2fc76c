"""The plan's estimate of memory against what a run really keeps."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamapro import backends
from llamapro.config import ModelConfig
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.training.distributed import process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.plan import activation_bytes, estimate_memory
from llamapro.training.settings import DataSettings, Frozen, Settings, TrainSettings
from llamapro.training.weights import init_random

NEW = (2, 4)
SHAPE = (2, 64)  # (B, T)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., ModelConfig]) -> ModelConfig:
    return tiny_config(num_hidden_layers=6)


def freeze(model: LlamaForCausalLM, trainable: str = "new_blocks") -> LlamaForCausalLM:
    """Leaves trainable the new blocks, or everything."""
    model.requires_grad_(trainable == "all")
    for index in NEW:
        model.model.layers[index].requires_grad_(True)
    return model


def build(config: ModelConfig, trainable: str = "new_blocks") -> LlamaForCausalLM:
    """A real model on the CPU, fp32."""
    model = build_on_meta(config)
    load_tensors(model, init_random(config, seed=0))
    return freeze(model, trainable)


def tokens(
    config: ModelConfig, device: torch.device | str = CPU, shape: tuple[int, int] = SHAPE
) -> Tensor:
    return torch.arange(shape[0] * shape[1], device=device).view(shape) % config.vocab_size


def saved_bytes(model: LlamaForCausalLM, shape: tuple[int, int] = SHAPE) -> int:
    """Runs blocks and norm for real; the distinct storages that autograd holds, less weights."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(tokens(model.config, model.lm_head.weight.device, shape))
    for weight in model.parameters():
        saved.pop(weight.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class Live(TorchDispatchMode):
    """Knows the storages that operations inside it have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.made.values() if not ref.expired())


@pytest.mark.parametrize("trainable", ["new_blocks", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_autograd_saves(
    config: ModelConfig, dtype: torch.dtype, trainable: str
) -> None:
    """Within 10 % of the bytes saved by a real forward pass; the rest are the rotary tables."""
    found = activation_bytes(freeze(build_on_meta(config), trainable), SHAPE, dtype, CPU, False)
    real = saved_bytes(build(config, trainable).to(dtype))
    assert found == pytest.approx(real, rel=0.1)
    assert found <= real  # cosines and sines, shared by all blocks, are not counted


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_activations_follow_the_backend(config: ModelConfig, device: str, choice: str) -> None:
    """The kernels save a little else than plain PyTorch, and the estimate knows what."""
    config = dataclasses.replace(config, num_hidden_layers=3)
    shape = (1, 16)  # the interpreter is slow
    model = build_on_meta(config).requires_grad_(False)
    real_model = build_on_meta(config)
    load_tensors(real_model, init_random(config, seed=0))
    real_model.requires_grad_(False).to(device)
    for each in (model, real_model):
        each.model.layers[1].requires_grad_(True)
    with backends.use(choice):
        where = torch.device(device)
        found = activation_bytes(model, shape, torch.float32, where, False)
        assert found == pytest.approx(saved_bytes(real_model, shape), rel=0.1)
    with backends.use("torch"):
        plain = activation_bytes(model, shape, torch.float32, where, False)
    assert (found == plain) == (choice == "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputation_keeps_inputs_and_one_block(config: ModelConfig, dtype: torch.dtype) -> None:
    """Within 10 % of what is alive when the top block, a new one, has been computed again."""
    config = dataclasses.replace(config, num_hidden_layers=5)
    model = build(config).to(dtype)
    for layer in model.model.layers:
        checkpoint(layer)
    live, seen = Live(), []
    with live:
        out = model.model(tokens(config))
        after_forward = live.bytes()
        model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
            lambda *_: seen.append(live.bytes())
        )
        out.sum().backward()
    found = activation_bytes(freeze(build_on_meta(config)), SHAPE, dtype, CPU, True)
    # Alive for other reasons: the output, its gradient, the block's input to the first sum.
    passing = 3 * out.nbytes
    assert len(seen) == 1
    assert found == pytest.approx(seen[0] - passing, rel=0.1)
    kept = activation_bytes(freeze(build_on_meta(config)), SHAPE, dtype, CPU, False)
    assert after_forward < found < kept


def settings(**train: Any) -> Settings:
    return Settings(
        data=DataSettings(seq_len=SHAPE[1]), train=TrainSettings(micro_batch_size=SHAPE[0], **train)
    )


def estimate(
    config: ModelConfig, world_size: int = 1, trainable: str = "new_blocks", **train: Any
) -> dict[str, int]:
    model = freeze(build_on_meta(config), trainable)
    return estimate_memory(settings(**train), model, torch.bfloat16, CPU, world_size)


@pytest.mark.parametrize("frozen", ["shard", "gather", "replicate"])
def test_weights_are_those_that_a_process_holds(config: ModelConfig, frozen: Frozen) -> None:
    """At rest and gathered, to the byte, as FSDP has them in one process after forward."""
    found = estimate(config, frozen=frozen)
    with process_group("cpu") as ranks:
        model = build(config)
        objective = NextToken(model)
        shard(objective, ranks, torch.bfloat16, TrainSettings(frozen=frozen))
        at_rest = sum(p.nbytes for p in model.parameters())
        ids = tokens(config)
        loss, _ = objective(ids, ids)
        whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
        assert found["frozen weights"] + found["fp32 masters"] == at_rest
        gathered = 0 if frozen == "replicate" else sum(p.nbytes for p in whole)
        block = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
        assert found["gathered weights"] == gathered + block  # and the block that computes
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert found["gradients"] == gradients


def test_more_processes_share_what_is_sharded(config: ModelConfig) -> None:
    """Shards shrink with the shard size, not with the world; replicas and activations never do."""
    one = estimate(config)
    shared = ("fp32 masters", "gradients", "AdamW moments")
    for shard_size, parts in ((0, 8), (2, 2)):
        found = estimate(config, 8, shard_size=shard_size)
        for part in ("frozen weights", *shared):
            assert found[part] == one[part] // parts
        assert found["activations"] == one["activations"] and found["logits"] == one["logits"]
    whole = estimate(config, 8, frozen="replicate")
    assert whole["frozen weights"] == one["frozen weights"]
    assert [whole[part] for part in shared] == [one[part] // 8 for part in shared]


def test_offloading_takes_shards_off_the_gpu(config: ModelConfig) -> None:
    """Masters, gradients and moments leave it; replicated frozen weights and copies stay."""
    kept = estimate(config, 2, frozen="replicate")
    found = estimate(config, 2, frozen="replicate", offload=True)
    changed = {part for part in kept if found[part] != kept[part]} - {"total"}
    assert changed == {"fp32 masters", "gradients", "AdamW moments"}
    assert not any(found[part] for part in changed)
    assert estimate(config, 2, offload=True)["frozen weights"] == 0


def test_the_total_is_the_sum_of_the_parts(config: ModelConfig) -> None:
    """Whatever trains."""
    for trainable in ("new_blocks", "all"):
        found = estimate(config, 4, trainable)
        assert found.pop("total") == sum(found.values())
        assert all(found[part] > 0 for part in found if part != "frozen weights")
