"""The short way of a single token on a CPU computes what the model computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamapro import backends
from llamapro.config import ModelConfig
from llamapro.inference import decoding
from llamapro.inference.cache import KVCache
from llamapro.inference.decoding import next_logits
from llamapro.model import LlamaForCausalLM, load_tensors

STEPS, PROMPT = 6, 5
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

Config = Callable[..., ModelConfig]
Tensors = Callable[..., dict[str, Tensor]]
Build = Callable[..., LlamaForCausalLM]


@pytest.fixture
def build(tiny_config: Config, random_tensors: Tensors) -> Build:
    """`build(dtype, **config) -> model` with random weights."""

    def make(dtype: torch.dtype, **config: Any) -> LlamaForCausalLM:
        made = LlamaForCausalLM(tiny_config(**config)).to(dtype)
        load_tensors(made, random_tensors(made.config, dtype))
        return made.requires_grad_(False)

    return make


def steps_of(logits_of: Callable[[Tensor, KVCache], Tensor], model: Any, rows: int) -> Tensor:
    """The logits (STEPS, B, V) of the tokens after a prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (rows, PROMPT + STEPS), generator=generator)
    cache = KVCache(model, rows, PROMPT + STEPS)
    with torch.inference_mode():
        logits_of(ids[:, :PROMPT], cache)
        found = [logits_of(ids[:, i : i + 1], cache) for i in range(PROMPT, PROMPT + STEPS)]
    assert cache.length == PROMPT + STEPS
    return torch.stack(found)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"sliding_window": 4, "model_type": "mistral"},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "attention_bias": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": LLAMA3, "head_dim": 24, "intermediate_size": 100},
    ],
    ids=["gqa", "tied", "window", "qwen2", "qwen3", "biases", "scaled"],
)
def test_logits_are_as_exact_as_the_models(build: Build, config: dict[str, Any], rows: int) -> None:
    """The error against fp64 is at most twice the model's own."""
    model = build(torch.float32, **config)
    exact = build(torch.float64, **config)
    exact.load_state_dict(model.state_dict())
    ours = steps_of(partial(next_logits, model), model, rows)
    plain, truth = (
        steps_of(lambda ids, cache, m=m: m(ids, cache)[:, -1], m, rows) for m in (model, exact)
    )
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("rows", [1, 2])
def test_bf16_keeps_the_roundings_of_the_model(build: Build, rows: int) -> None:
    """In bf16 every rounding stands where the model has it: the same bits by the same products."""
    model = build(torch.bfloat16)
    ours = steps_of(partial(next_logits, model), model, rows)

    def plain(ids: Tensor, cache: KVCache) -> Tensor:
        with products_of_pytorch() if rows == ids.shape[1] == 1 else nullcontext():
            return model(ids, cache)[:, -1]

    assert torch.equal(ours, steps_of(plain, model, rows))


@contextmanager
def products_of_pytorch() -> Iterator[None]:
    torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    yield
    torch.backends.mkldnn.set_flags(_enabled=True, _fp32_precision=None)


@pytest.mark.parametrize(("rows", "takes_onednn"), [(1, False), (2, True)])
def test_pytorch_itself_multiplies_a_single_row(
    build: Build, rows: int, takes_onednn: bool, monkeypatch: Any
) -> None:
    """oneDNN would pack every matrix anew. After a step, also one that fails, it is as before."""
    model, seen = build(torch.bfloat16), set[bool]()
    cache, ids = KVCache(model, rows, 2), torch.ones(rows, 1, dtype=torch.int64)
    product = F.linear

    def noted(*args: Any) -> Tensor:
        seen.add(torch.backends.mkldnn.enabled)
        return product(*args)

    monkeypatch.setattr(F, "linear", noted)
    with torch.no_grad():
        next_logits(model, ids, cache)
        assert seen == {takes_onednn}
        assert torch.backends.mkldnn.enabled
        with pytest.raises(IndexError):
            next_logits(model, ids + model.config.vocab_size, cache)
    assert torch.backends.mkldnn.enabled


def test_steps_in_two_threads_leave_onednn_on(build: Build, monkeypatch: Any) -> None:
    """Also if the one that began first ends first: its flag is the whole process's."""
    model, began, ended, product = build(torch.bfloat16), Event(), Event(), F.linear

    @torch.no_grad()
    def step() -> None:
        next_logits(model, torch.ones(1, 1, dtype=torch.int64), KVCache(model, 1, 2))

    other = Thread(target=step)

    def slow(*args: Any) -> Tensor:
        if current_thread() is other:
            began.set()
            assert ended.wait(10)
        elif not began.is_set():
            other.start()
            assert began.wait(10)
        return product(*args)

    monkeypatch.setattr(F, "linear", slow)
    step()
    ended.set()
    other.join()
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("ops", ["torch", "auto,attention=torch"])
def test_a_backend_that_was_asked_for_computes(build: Build, ops: str, monkeypatch: Any) -> None:
    """Where an op is told to take another backend, the model itself takes every step."""
    monkeypatch.setattr(decoding, "_step", None)
    model = build(torch.float32)
    with backends.use(ops):
        ours = steps_of(partial(next_logits, model), model, 1)
        assert torch.equal(ours, steps_of(lambda i, cache: model(i, cache)[:, -1], model, 1))


def test_the_head_reads_its_weight_once(build: Build) -> None:
    """And does not copy it for every sequence of a batch, as a product of (B, 1, C) would."""
    model = build(torch.float32)
    copied: list[int] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.clone.default, torch.ops.aten.bmm.default):
                copied.append(args[-1].numel())
            return out

    ids = torch.ones(4, PROMPT, dtype=torch.int64)
    with torch.no_grad(), Copies():
        next_logits(model, ids, KVCache(model, 4, PROMPT))
    assert max(copied, default=0) < model.lm_head.weight.numel()
