"""Frozen blocks in 8 bits: what is rounded, what it changes and costs, and what stays as it was."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro.config import ModelConfig
from llamapro.model import Linear, LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.training import proposal, quantized
from llamapro.training.distributed import Ranks, process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw
from llamapro.training.plan import estimate_memory
from llamapro.training.quantized import QuantizedLinear, to_int8
from llamapro.training.settings import (
    DataSettings,
    FrozenDtype,
    OptimSettings,
    Settings,
    TrainSettings,
)
from llamapro.training.weights import init_random

LAYERS, NEW = 5, (1, 3)  # frozen below the lowest new block: 0; frozen above: 2, 4
KINDS: tuple[FrozenDtype, ...] = ("int8", "float8")
# Qwen3 with biases, which has all that a block can have; wide initial weights, so that at this
# width every block matters.
CONFIG = ModelConfig.from_file(Path(__file__).with_name("every_part.json"))
CPU = torch.device("cpu")


def freeze(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.requires_grad_(False)
    for index in NEW:
        model.model.layers[index].requires_grad_(True)
    return model


def build() -> LlamaForCausalLM:
    """The model before it is spread: fp32, only the new blocks train, and they begin as nothing."""
    model = build_on_meta(CONFIG)
    load_tensors(model, init_random(CONFIG, seed=0))
    for index in NEW:
        block: Any = model.model.layers[index]
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
    return freeze(model)


def batch(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets (8, 12): each token is 7 times the one before, plus 1."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    ids = torch.randint(CONFIG.vocab_size, (8, 1), generator=generator)
    for _ in range(12):
        ids = torch.cat((ids, (7 * ids[:, -1:] + 1) % CONFIG.vocab_size), dim=1)
    return ids[:, :-1], ids[:, 1:]


def take_steps(
    ranks: Ranks,
    kind: FrozenDtype,
    steps: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    model: LlamaForCausalLM | None = None,
    **how: bool,
) -> tuple[list[float], dict[str, Tensor], LlamaForCausalLM]:
    """Trains; returns this rank's losses, the last gradients, whole, by name, and the model."""
    model = model or build()
    objective = NextToken(model)
    shard(objective, ranks, dtype, TrainSettings(frozen_dtype=kind, **how))
    parameters = dict(model.named_parameters())
    optimizer = build_adamw(parameters.values(), OptimSettings())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        ids, targets = (rows[ranks.rank :: ranks.world_size] for rows in batch(step, seed))
        loss, count = objective(ids, targets)
        (loss / count).backward()
        optimizer.step()
        losses.append((loss / count).item())
    gradients = {
        name: p.grad.full_tensor().clone()  # type: ignore[attr-defined]
        for name, p in parameters.items()
        if p.grad is not None
    }
    return losses, gradients, model


def worker(out: str) -> None:
    """Writes the losses of two steps of one rank, for both kinds."""
    with process_group("cpu") as ranks:
        losses = {kind: take_steps(ranks, kind, steps=2)[0] for kind in KINDS}
        (Path(out) / f"{ranks.rank}.json").write_text(json.dumps(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_of_frozen_blocks_are_rounded(
    alone: Ranks, kind: FrozenDtype, dtype: torch.dtype
) -> None:
    """New blocks keep fp32 masters and have all gradients; the rest is in the compute dtype."""
    _, gradients, model = take_steps(alone, kind, dtype=dtype)
    layers: list[Any] = list(model.model.layers)
    for index, layer in enumerate(layers):
        modules = [m for m in layer.modules() if isinstance(m, Linear | QuantizedLinear)]
        assert len(modules) == 7
        assert {type(m) for m in modules} == {Linear if index in NEW else QuantizedLinear}
    new = tuple(f"model.layers.{index}." for index in NEW)
    assert list(gradients) == [n for n, _ in build().named_parameters() if n.startswith(new)]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in gradients else dtype)
    # Backward never reaches block 0, so it has no second copy.
    has_copy = [getattr(layer.mlp.up_proj, "transposed", None) is not None for layer in layers]
    assert has_copy == [kind == "float8" and index in (2, 4) for index in range(LAYERS)]


def test_int8_trains_as_on_a_base_that_was_rounded_before(alone: Ranks) -> None:
    """New blocks: the losses and gradients of the ordinary path, but for the order of the sums."""
    model = build()
    for index in {*range(LAYERS)} - {*NEW}:
        for linear in model.model.layers[index].modules():
            if isinstance(linear, Linear):
                rounded, scale = to_int8(linear.weight.detach(), torch.float32)
                linear.weight.data = rounded * scale
    expected, gradients, _ = take_steps(alone, "auto", 2, model=model)
    losses, found, _ = take_steps(alone, "int8", 2)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm()
    assert losses[0] != take_steps(alone, "auto")[0][0]


def test_float8_changes_gradients_by_its_rounding(alone: Ranks) -> None:
    """Each of 7 products, forward and backward, of 3 blocks adds an error of at most 2^-4."""
    (loss, *_), expected, _ = take_steps(alone, "auto")
    (rounded_loss, *_), found, _ = take_steps(alone, "float8")
    assert 0 < abs(rounded_loss - loss) < 2**-4 * loss
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # errors that are independent of one another
        bound = 2**-4 * math.sqrt(7 * 2 * 3) * gradient.norm()
        assert (found[name] - gradient).norm() <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["compile", "recompute"])
def test_compiled_and_recomputed_blocks_compute_the_same(
    alone: Ranks, kind: FrozenDtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and a compiled block is one graph."""
    expected, gradients, _ = take_steps(alone, kind)
    # What the compiler makes of a graph is not in question here, and it is slow.
    compiler = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    torch.compiler.reset()
    losses, found, _ = take_steps(alone, kind, **{how: True})
    assert losses == expected
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_two_processes_give_the_losses_of_one(
    alone: Ranks, fork_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows have their own scales, so it does not matter which others are in a batch."""
    done = fork_ranks(2, __file__, "worker", str(tmp_path))
    assert done.statuses == [0, 0], done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for kind in KINDS:
        found = torch.tensor([rank[kind] for rank in ranks]).mean(0)
        expected = torch.tensor(take_steps(alone, kind, 2)[0])
        # fp32 sums in another order: a few units in the last place; updates hand it on.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_rounded_base_is_learned_on_as_well(alone: Ranks) -> None:
    """20 steps end where they end in fp32, within what another order of the data changes."""

    def end(kind: FrozenDtype, seed: int = 0) -> float:
        losses, _, _ = take_steps(alone, kind, 20, seed)
        return sum(losses[-5:]) / 5

    exact = [end("auto", seed) for seed in range(3)]
    noise = max(exact) - min(exact)
    first = take_steps(alone, "auto")[0][0]
    assert noise < (first - exact[0]) / 4
    for kind in KINDS:
        assert abs(end(kind) - exact[0]) < noise


# ---- The plan -----------------------------------------------------------------------------------


def plan_settings(device: str = "", **options: Any) -> Settings:
    data, place = DataSettings(seq_len=64), TrainSettings(batch_size=8, **options)
    return Settings(data=data, train=place, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ("auto", *KINDS))
def test_the_plan_counts_what_lies_there(
    alone: Ranks, kind: FrozenDtype, dtype: torch.dtype
) -> None:
    """Frozen weights to the byte: rounded matrices, both copies, scales, and all the rest."""
    settings = plan_settings(frozen_dtype=kind)
    planned = estimate_memory(settings, freeze(build_on_meta(CONFIG)), dtype, CPU, 4)
    _, _, model = take_steps(alone, kind, dtype=dtype)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    buffers = list(model.buffers())
    found = sum(x.nbytes for x in (*frozen, *buffers))
    if kind == "auto":
        found //= 4  # sharded
    assert planned["frozen weights"] == found
    assert ("rounding" in planned) == bool(buffers) == (kind != "auto")


def test_int8_takes_half_of_bfloat16_and_float8_as_much(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    """Of a block at the width of LLaMA-2-7B, but for scales and norms; one copy is half."""
    config = tiny_config(num_hidden_layers=1, hidden_size=4096, intermediate_size=11008)
    layer = build_on_meta(config).model.layers[0]
    size = partial(quantized.stored_bytes, layer, dtype=torch.bfloat16)
    plain = size(kind="auto", has_backward=True)
    for kind, has_backward, share in (
        ("int8", True, 0.5),
        ("float8", True, 1.0),
        ("float8", False, 0.5),
    ):
        found = size(kind=kind, has_backward=has_backward)
        assert share * plain < found < share * plain * 1.003


def test_rounded_weights_are_whole_on_every_process() -> None:
    """`auto` takes replicate; a proposal tries nothing else, and only rounds where it was asked."""
    for kind in KINDS:
        t = TrainSettings(frozen_dtype=kind)
        assert (t.placement(1), t.placement(8)) == ("replicate", "replicate")
        tried = list(proposal._fastest_first(plan_settings(frozen_dtype=kind), 2))
        assert {each.frozen for each in tried} == {"replicate"}
        assert {each.frozen_dtype for each in tried} == {kind}
    tried = list(proposal._fastest_first(plan_settings(), 2))
    assert {each.frozen_dtype for each in tried} == {"auto"}
