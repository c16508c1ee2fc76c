"""However the weights are spread, the step is the same; what is frozen costs what it says."""

import itertools
import json
import runpy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamapro.errors import ConfigError
from llamapro.model import load_tensors
from llamapro.training import distributed
from llamapro.training.distributed import process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.settings import Frozen, TrainSettings

SPREADING = str(Path(__file__).with_name("spreading.py"))
SHARED = SimpleNamespace(**runpy.run_path(SPREADING))
BATCH, TOKENS, LAYERS = SHARED.BATCH, SHARED.TOKENS, SHARED.LAYERS
NEW, LOWEST = SHARED.NEW, SHARED.LOWEST
OPTIONS, DTYPES, NEW_NAMES = SHARED.OPTIONS, SHARED.DTYPES, SHARED.NEW_NAMES
build, samples, train = SHARED.build, SHARED.samples, SHARED.train
whole, frozen_bytes = SHARED.whole, SHARED.frozen_bytes
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


class Spread(NamedTuple):
    """The results of some processes.

    Attributes:
        out: where the files are.
        processes: how many.
        shard_size: of a group; fewer than all processes are groups (HSDP).
        dtypes: of computation and frozen weights.
    """

    out: Path
    processes: int
    shard_size: int
    dtypes: tuple[str, ...]

    def read(self, frozen: str, dtype: str) -> list[dict[str, Any]]:
        """What each rank saw, by rank."""
        found = []
        for rank in range(self.processes):
            file = self.out / f"{frozen}-{dtype}-{rank}"
            gradients = torch.load(f"{file}.pt", weights_only=True)
            found.append(json.loads(Path(f"{file}.json").read_text()) | {"gradients": gradients})
        return found


@pytest.fixture(scope="module")
def spread_over(
    tmp_path_factory: pytest.TempPathFactory, fork_ranks: Callable[..., Any]
) -> Callable[[int, int, tuple[str, ...]], Path]:
    """`spread_over(processes, shard_size, dtypes)`: the files of `worker`, run once."""

    @cache
    def run(processes: int, shard_size: int, dtypes: tuple[str, ...]) -> Path:
        out = tmp_path_factory.mktemp("spread")
        done = fork_ranks(processes, SPREADING, "worker", str(out), shard_size, dtypes)
        assert done.statuses == [0] * processes, done.stderr
        return out

    return run


@pytest.fixture(
    params=[
        pytest.param((2, 2, DTYPES), id="2"),
        pytest.param((4, 4, DTYPES), id="4", marks=pytest.mark.slow),
        pytest.param((4, 2, DTYPES[:1]), id="2x2"),
        pytest.param((4, 2, DTYPES[1:]), id="2x2-bfloat16", marks=pytest.mark.slow),
    ]
)
def spread(request: pytest.FixtureRequest, spread_over: Callable[..., Path]) -> Spread:
    """2 processes, 4, and 4 in two groups."""
    processes, shard_size, dtypes = request.param
    groups = shard_size if shard_size < processes else 0  # 0: all processes are one group
    return Spread(spread_over(processes, groups, dtypes), processes, shard_size, dtypes)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The same steps in one process, without FSDP: exact (fp64), in fp32, and with bf16 blocks."""
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        found[name] = train(NextToken(build().to(dtype)))
    with process_group("cpu") as ranks:
        objective = NextToken(build())
        shard(objective, ranks, torch.bfloat16, TrainSettings(frozen="shard"))
        found["bfloat16"] = train(objective)
    return found


def test_gradients_are_those_of_one_process(
    spread: Spread,
    alone: dict[str, Any],
    assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """With every option, on every rank: as close to fp64 as one process comes."""
    exact = alone["float64"]["gradients"]
    for frozen, dtype in itertools.product(OPTIONS, spread.dtypes):
        reference = alone[dtype]["gradients"]
        for seen in spread.read(frozen, dtype):
            assert seen["gradients"].keys() == exact.keys()
            for name, gradient in seen["gradients"].items():
                assert_as_exact_as_torch(gradient, reference[name].float(), exact[name])


def test_losses_are_those_of_one_process(spread: Spread, alone: dict[str, Any]) -> None:
    """Step by step, with every option, also after an evaluation; only rounding differs."""
    if "float32" not in spread.dtypes:
        pytest.skip("losses are compared in fp32")
    expected = torch.tensor(alone["float32"]["losses"])
    for frozen in OPTIONS:
        ranks = spread.read(frozen, "float32")
        found = torch.tensor([seen["losses"] for seen in ranks]).sum(0)
        # fp32 sums in another order: a few units in the last place; updates hand it on.
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert expected[-1] != expected[0]


def test_options_agree_to_the_bit(spread: Spread) -> None:
    """Where frozen weights lie changes what is communicated, not what is computed."""
    for dtype in spread.dtypes:
        first, *others = (spread.read(frozen, dtype) for frozen in OPTIONS)
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert mine["losses"] == theirs["losses"]
                for name, gradient in mine["gradients"].items():
                    assert torch.equal(gradient, theirs["gradients"][name])


def test_frozen_keeps_its_bytes_and_has_no_gradient(spread: Spread) -> None:
    """After the steps it is the same on all ranks; masters are fp32, frozen in compute dtype."""
    for frozen, dtype in itertools.product(OPTIONS, spread.dtypes):
        ranks = spread.read(frozen, dtype)
        assert len({digest for seen in ranks for digest in seen["frozen"]}) == 1
        for seen in ranks:
            trains = {n for n in seen["dtypes"] if n.startswith(NEW_NAMES)}
            assert len(trains) == (9 + 4 + 2) * len(NEW) and set(seen["with_gradient"]) == trains
            for name, kept in seen["dtypes"].items():
                assert kept == ("torch.float32" if name in trains else f"torch.{dtype}")


def test_what_is_frozen_is_gathered_as_often_as_said_and_never_reduced(spread: Spread) -> None:
    """shard: twice per frozen block above the lowest new one, once below; gather: once; replicate:
    never. New blocks: twice. Nothing else is communicated but the new blocks' gradients.
    """
    above = LAYERS - LOWEST - len(NEW)
    root = 1  # embeddings, norm and head: gathered once, kept for backward
    forward = {"shard": LAYERS + root, "gather": LAYERS + root, "replicate": len(NEW)}
    backward = {"shard": len(NEW) + above, "gather": len(NEW), "replicate": len(NEW)}
    reduced = {"_reduce_scatter_base_": len(NEW)}
    if spread.shard_size < spread.processes:  # HSDP: each gradient once more, between the groups
        reduced["allreduce_"] = len(NEW)
    for frozen in OPTIONS:
        for seen in spread.read(frozen, spread.dtypes[0]):
            assert seen["calls"][0][0] == {"_allgather_base_": forward[frozen]}
            for _, in_backward in seen["calls"]:  # after an evaluation as well
                assert in_backward == {"_allgather_base_": backward[frozen]} | reduced


def test_only_blocks_that_backward_needs_stay_whole_after_forward(spread: Spread) -> None:
    """shard: none; gather: the frozen ones above the lowest new one; replicate: all frozen."""
    expected = {"shard": [], "gather": [2, 4], "replicate": [0, 2, 4]}
    for frozen in OPTIONS:
        assert all(
            seen["whole"] == expected[frozen] for seen in spread.read(frozen, spread.dtypes[0])
        )


def test_a_rank_keeps_its_part_of_what_is_sharded(spread: Spread) -> None:
    """Bytes at rest: 1 / shard size of everything, or of the new blocks alone, which are fp32."""
    sizes = {name: p.numel() for name, p in build().named_parameters()}
    trained = 4 * sum(size for name, size in sizes.items() if name.startswith(NEW_NAMES))
    others = sum(size for name, size in sizes.items() if not name.startswith(NEW_NAMES))
    frozen = getattr(torch, spread.dtypes[0]).itemsize * others
    expected = dict.fromkeys(OPTIONS, (frozen + trained) // spread.shard_size)
    expected["replicate"] = frozen + trained // spread.shard_size
    for option in OPTIONS:
        for seen in spread.read(option, spread.dtypes[0]):
            assert seen["kept"] == expected[option]


def test_groups_are_of_neighbouring_ranks(spread: Spread) -> None:
    """One dimension "shard" or, with a shard size, "replicate" over groups of "shard"."""
    for seen in spread.read("shard", spread.dtypes[0]):
        if spread.shard_size == spread.processes:
            assert seen["mesh"] == [["shard"], list(range(spread.processes))]
        else:
            assert seen["mesh"] == [["replicate", "shard"], [[0, 1], [2, 3]]]


@pytest.mark.parametrize("frozen", OPTIONS)
def test_a_tied_head_stays_tied(frozen: Frozen) -> None:
    """Embedding and head are one tensor after sharding, and the loss is the plain model's."""
    ids = samples(0)
    expected, _ = NextToken(build(tied=True))(ids[:, :-1], ids[:, 1:])
    with process_group("cpu") as ranks:
        model = build(tied=True)
        objective = NextToken(model)
        shard(objective, ranks, torch.float32, TrainSettings(frozen=frozen))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        found, _ = objective(ids[:, :-1], ids[:, 1:])
        assert found.item() == expected.item()


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_blocks_compute_the_same(
    monkeypatch: pytest.MonkeyPatch,
    recompute: bool,
    alone: dict[str, Any],
    assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Every block runs compiled, under FSDP and recomputation; names stay, gradients agree."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    # What the compiler makes of a graph is not in question here, and it is slow.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    with process_group("cpu") as ranks:
        model = build()
        names = list(model.state_dict())
        objective = NextToken(model)
        t = TrainSettings(frozen="shard", recompute=recompute, compile=True)
        shard(objective, ranks, torch.float32, t)
        assert list(model.state_dict()) == names
        ids = samples(0)
        loss, _ = objective(ids[:, :-1], ids[:, 1:])
        (loss / (BATCH * TOKENS)).backward()
        assert compiled
        for name, exact in alone["float64"]["gradients"].items():
            gradient = whole(model.get_parameter(name).grad)  # type: ignore[arg-type]
            assert_as_exact_as_torch(gradient, alone["float32"]["gradients"][name], exact)


def test_offloading_without_a_gpu_is_refused() -> None:
    """There would be nothing to gain; the message says what to set."""
    with process_group("cpu") as ranks:
        model = build()
        with pytest.raises(ConfigError, match=r"train\.offload true: the device is cpu"):
            shard(NextToken(model), ranks, torch.float32, TrainSettings(offload=True))


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_processes_than_gpus_are_refused_on_every_rank(
    local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on the first, which has a GPU: it is the one that tells."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = r"2 processes on this machine, but 1 GPU\(s\); start at most 1 here"
    with pytest.raises(ConfigError, match=message), process_group("auto"):
        pass


def test_a_number_on_this_machine_alone_makes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell may keep torchrun's LOCAL_RANK; one GPU is enough for the process alone."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert distributed.local_rank() == 0 and not distributed.on_several_machines()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is 'not set'"),
        ({"WORLD_SIZE": "2"}, "RANK is 'not set'"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK is '', WORLD_SIZE is ''"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is 'not set', MASTER_PORT is 'not set'"),
        (WHOLE | {"RANK": "two"}, "RANK is 'two'"),
        (WHOLE | {"RANK": "2"}, "RANK is '2', WORLD_SIZE is '2'"),
        (WHOLE | {"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
    ],
)
def test_half_of_torchrun_s_variables_are_one_message(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names them and what to do; none set is a process alone, all set is a rank."""
    for name in (*distributed.VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not distributed.is_rank()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{named}.*: unset RANK and WORLD_SIZE"):
        distributed.is_rank()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.is_rank()


@pytest.mark.parametrize("frozen", OPTIONS)
def test_a_base_that_is_overwritten_in_place_changes_no_run(frozen: Frozen, tmp_path: Path) -> None:
    """What was loaded is memory of the process, also on a CPU, where nothing has to be moved."""
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in build().state_dict().items()}, file)
    with process_group("cpu") as ranks:
        model = build()
        load_tensors(model, load_file(file))
        shard(NextToken(model), ranks, torch.float32, TrainSettings(frozen=frozen))
        before = frozen_bytes(model)
        with open(file, "r+b") as out:
            out.seek(-40_000, 2)
            out.write(bytes(40_000))
        assert frozen_bytes(model) == before
