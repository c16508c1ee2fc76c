"""Steps of self-distillation: the same on every layout, and those of the formula.

`two_processes` trains a small model with every layout of frozen weights and writes down what came
out; the tests compare.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamapro import expansion, ops
from llamapro.checkpoints.base import base_names, layout_of
from llamapro.config import ModelConfig
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.scripts import train
from llamapro.text.mixture import Mixture, micro_batches
from llamapro.training.distributed import Ranks, process_group, shard
from llamapro.training.objective import make_objective
from llamapro.training.optim import FiniteGuard, build_adamw
from llamapro.training.settings import DataSettings, Frozen, OptimSettings, ReplaySettings, Settings
from llamapro.training.settings import TrainSettings as Train
from llamapro.training.weights import init_random

IGNORED = ops.IGNORE_INDEX
OPTIONS: tuple[Frozen, ...] = ("shard", "gather", "replicate")
STEPS, BATCH, LENGTH = 2, 8, 12
DISTILLED = ReplaySettings(share=0.4, distill=True, weight=2.0)
BASE = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # at this width, so that every block matters
    }
)
CONFIG = expansion.expand_config(BASE, expansion.interleave(2, 2), "")
NEW = (1, 3)


# ---- The same steps in one process and in two ----------------------------------------------------


class Numbers:
    """A source of random sequences, some of whose targets are ignored."""

    seq_len = LENGTH

    def __init__(self, length: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.ids = draw.integers(BASE.vocab_size, size=(length, LENGTH + 1))
        self.is_ignored = draw.random((length, LENGTH)) < 0.2

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        ids = self.ids[index]
        return ids[:-1], np.where(self.is_ignored[index], IGNORED, ids[1:])

    def documents(self, index: int) -> list[int | None]:
        return [index]


MIXTURE = Mixture([Numbers(15, 0), Numbers(9, 1)], [1.0, 1.0], seed=1)


def build(in_new: float = 0.05) -> LlamaForCausalLM:
    """The expanded model in fp32; `in_new` is the size of what its new blocks have learnt."""
    model = build_on_meta(CONFIG)
    load_tensors(model, init_random(CONFIG, seed=0))
    expansion.select_trainable(model, "new_blocks")
    generator = torch.Generator().manual_seed(1)
    for index in NEW:
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            weight = model.model.layers[index].get_parameter(name)
            weight.data = in_new * torch.randn(weight.shape, generator=generator)
    return model


def base_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Its base as a model of its own."""
    assert model.config.expansion
    layout = layout_of(model.config)
    tensors = model.state_dict()
    base = build_on_meta(BASE)
    names = base_names(tensors, layout)
    load_tensors(base, {name: tensors[ours].clone() for ours, name in names.items()})
    return base.requires_grad_(False)


def take_steps(
    ranks: Ranks, frozen: Frozen = "shard", rows: int = 1, steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """Trains on the mixture with train.py's own step; returns what came out, weights gathered."""
    replay = options.pop("replay", DISTILLED)
    settings = Settings(replay=replay, train=Train(micro_batch_size=rows, batch_size=BATCH))
    model = build()
    objective = make_objective(model, replay)
    shard(objective, ranks, torch.float32, Train(frozen=frozen, **options))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = build_adamw(parameters.values(), OptimSettings())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    guard, found = FiniteGuard(optimizer, 0), {"losses": [], "norms": []}
    for step in range(steps):
        where = (step * BATCH, BATCH, rows, ranks.rank, ranks.world_size)
        batch = micro_batches(MIXTURE, *where, 1 if replay.is_apart else None)
        valid, own = ranks.sum(*map(sum, zip(*(part.targets for part in batch), strict=True)))
        loss, norm = train.train_step(objective, guard, batch, valid, own, settings, ranks)
        found["losses"] += ranks.sum(loss)
        found["norms"].append(norm.item())
        with torch.no_grad():  # leaves units gathered that the next step must take as they are
            objective(*(column[:1] for column in batch[0].columns[:2]))
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()
    }
    return found | {"weights": {name: p.detach().clone() for name, p in weights.items()}}


def two_processes(out: str) -> None:
    """Takes the steps with every layout; the main rank writes one file each."""
    with process_group("cpu") as ranks:
        for frozen in OPTIONS:
            found = take_steps(ranks, frozen, recompute=frozen == "gather")
            if ranks.is_main:
                torch.save(found, Path(out) / f"{frozen}.pt")


# ---- What pytest runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with process_group("cpu") as ranks:
        return take_steps(ranks)


def assert_same_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """fp32 sums in another order: a few units in the last place, which updates hand on."""
    for key in ("losses", "norms"):
        ours, theirs = torch.tensor(found[key]), torch.tensor(expected[key])
        torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=0)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)


def test_two_processes_take_the_steps_of_one(
    alone: dict[str, Any], fork_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Wherever frozen weights lie; at some steps only one of the two has something replayed."""
    dealt = [micro_batches(MIXTURE, i * BATCH, BATCH, BATCH, 0, 1, 1) for i in range(STEPS)]
    counts = [whole.replayed for (whole,) in dealt]
    assert any(count % 2 for count in counts)
    done = fork_ranks(2, __file__, "two_processes", str(tmp_path))
    assert done.statuses == [0, 0], done.stderr
    for frozen in OPTIONS:
        assert_same_steps(torch.load(tmp_path / f"{frozen}.pt"), alone)


@pytest.mark.parametrize("rows", [2, 8])
def test_micro_batches_do_not_change_the_steps(rows: int, alone: dict[str, Any]) -> None:
    """Some of them hold both kinds of sequences, of 8 rows each step's only one."""
    with process_group("cpu") as ranks:
        assert_same_steps(take_steps(ranks, rows=rows), alone)


def test_recomputed_blocks_take_the_same_steps(alone: dict[str, Any]) -> None:
    """To the bit."""
    with process_group("cpu") as ranks:
        found = take_steps(ranks, recompute=True)
    assert found["losses"] == alone["losses"] and found["norms"] == alone["norms"]


@pytest.mark.slow  # that blocks compute the same when compiled, test_distributed.py says too
def test_compiled_blocks_take_the_same_steps(
    alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base runs them without a gradient."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    # What the compiler makes of a graph is not in question here, and it is slow.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    with process_group("cpu") as ranks:
        assert_same_steps(take_steps(ranks, rows=4, compile=True), alone)
    assert graphs


@pytest.mark.parametrize("distill", [True, False])
def test_the_step_is_that_of_the_formula(distill: bool) -> None:
    """The gradient of (CE of the others + weight x (KL or CE) of the replayed) / tokens.

    The loss that is logged is that of the others, which says what the domain's is.
    """
    with process_group("cpu") as ranks:
        settings = replace(DISTILLED, distill=distill)
        found = take_steps(ranks, rows=2, steps=1, replay=settings)
    model = build().double()
    base, total, valid = base_of(model), torch.zeros((), dtype=torch.float64), 0
    own: list[float] = []  # loss and tokens of each of the others
    for i in range(BATCH):
        number, sequence = MIXTURE.locate(i)
        ids, targets = map(torch.from_numpy, MIXTURE.sources[number][sequence])
        counted = targets != IGNORED
        log_p, log_q = (m(ids[None])[0, counted].log_softmax(-1) for m in (model, base))
        loss = -log_p.gather(1, targets[counted, None]).sum()
        if number == 1:
            kl = (log_q.exp() * (log_q - log_p)).sum()
            loss = settings.weight * (kl if distill else loss)
        else:
            own += loss.item(), int(counted.sum())
        total, valid = total + loss, valid + int(counted.sum())
    (total / valid).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    # fp32 against fp64: 1e-5 is a hundred units in the last place for sums over thousands of terms.
    assert found["losses"][0] == pytest.approx(sum(own[::2]) / sum(own[1::2]), rel=1e-5)
    assert found["norms"][0] == pytest.approx(norm.item(), rel=1e-5)


def gathered(frozen: Frozen, replayed: int | None) -> dict[str, list[int]]:
    """The blocks that one micro-batch gathers, by phase, in order."""
    from traffic import fake_ranks, record_micro_batch

    with fake_ranks(2) as ranks:
        model = build_on_meta(CONFIG)
        expansion.select_trainable(model, "new_blocks")
        objective = make_objective(model, DISTILLED)
        shard(objective, ranks, torch.float32, Train(frozen=frozen))
        calls = record_micro_batch(objective, 2, LENGTH, 1.0, replayed)
    found: dict[str, list[int]] = {"forward": [], "backward": []}
    for call in calls:
        if call.operation == "all-gather" and call.unit:
            found[call.phase].append(int(call.unit.rpartition(".")[2]))
    return found


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("shard", [0, 2, 0, 1, 2, 3]),  # the base's blocks, then all
        ("gather", [0, 2, 0, 1, 3]),  # those above the first new block stay
        ("replicate", [1, 3]),
    ],
)
def test_the_teacher_costs_no_gathering_in_backward(frozen: Frozen, expected: list[int]) -> None:
    """Only in forward, on every rank alike, and none ahead of time that nobody needs."""
    plain = gathered(frozen, None)
    for rows in (0, 1):  # 0: here, but not on another rank
        assert gathered(frozen, rows) == plain | {"forward": expected}


def test_a_simulated_step_has_the_teacher_in_its_part_of_the_micro_batches() -> None:
    """A quarter of 8 samples on 2 ranks: in one micro-batch of four."""
    from simulate import Options, simulate

    steps, data = Train(batch_size=8), DataSettings(train=("-",), seq_len=LENGTH)
    calls = []
    for replay in (ReplaySettings(), ReplaySettings(share=0.25, distill=True)):
        found = simulate(Settings(train=steps, data=data, replay=replay), CONFIG, Options(2))
        calls.append(
            {(r["phase"], r["operation"], r["weights"]): r["calls"] for r in found["traffic"]}
        )
    plain, distilled = calls
    forward = ("forward", "all-gather", "frozen")
    assert plain[forward] == 4 * (2 + 1)  # blocks, and the root
    assert distilled == plain | {forward: plain[forward] + 2}


# ---- Which rows are replayed ---------------------------------------------------------------------


def order(last: int | None, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    (whole,) = micro_batches(MIXTURE, 5, BATCH, BATCH, rank, world_size, last)
    return whole.columns[0].tolist()


def sample(index: int) -> list[int]:
    number, sequence = MIXTURE.locate(index)
    return MIXTURE.sources[number][sequence][0].tolist()


def test_without_a_loss_of_their_own_samples_keep_their_order() -> None:
    """That of the mixture; and nothing is told apart in any micro-batch."""
    expected = [sample(i) for i in range(5, 5 + BATCH)]
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            assert order(None, rank, world_size) == expected[rank::world_size]
            dealt = micro_batches(MIXTURE, 5, BATCH, 1, rank, world_size)
            assert [part.replayed for part in dealt] == [None] * (BATCH // world_size)
    assert not ReplaySettings(share=0.5).is_apart and not ReplaySettings(weight=2.0).is_apart


def test_replayed_samples_come_last_in_their_order_on_any_number_of_ranks() -> None:
    """The union over ranks is the same; both kinds keep the mixture's order."""
    places = [MIXTURE.locate(i)[0] for i in range(5, 5 + BATCH)]
    samples = [sample(i) for i in range(5, 5 + BATCH)]
    kinds = [[s for s, n in zip(samples, places, strict=True) if n == kind] for kind in (0, 1)]
    assert all(kinds) and places != sorted(places)
    whole = order(1)
    assert whole == kinds[0] + kinds[1]
    for world_size in (2, 4):
        for rank in range(world_size):
            assert order(1, rank, world_size) == whole[rank::world_size]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_every_rank_runs_the_base_in_the_same_micro_batches(world_size: int, rows: int) -> None:
    """In all that hold a replayed row on any rank, and in no other; the rows are the right ones."""
    general = [sequence[0].tolist() for sequence in map(MIXTURE.sources[1].__getitem__, range(9))]
    seen = set()
    for first in range(24):
        where = (first, 4 * rows * world_size, rows)
        shares = [micro_batches(MIXTURE, *where, r, world_size, 1) for r in range(world_size)]
        for parts in zip(*shares, strict=True):
            kinds = [[row in general for row in part.columns[0].tolist()] for part in parts]
            assert all(len(kind) == rows and kind == sorted(kind) for kind in kinds)
            counts = [sum(kind) for kind in kinds]
            expected = counts if any(counts) else [None] * world_size
            assert [part.replayed for part in parts] == expected
            seen.update(expected)
    assert seen >= {None, rows} and (world_size == 1 or 0 in seen)
