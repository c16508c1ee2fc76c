"""A simulated run shards and communicates what a real one does, whatever its size.

As a script, this file forks real processes that train a small model with every layout, and writes
down what they shard and communicate. Under pytest, it starts the script and compares.
"""

import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from simulate import Options, read_config, render, simulate
from simulate import main as command
from torch.distributed.tensor import DTensor
from traffic import Collective, Recorder, fake_ranks, links_between_nodes, record_micro_batch

from llamapro.config import ModelConfig
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, interleave, select_trainable
from llamapro.model import build_on_meta, load_tensors
from llamapro.training.distributed import Ranks, make_mesh, process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw, clip_gradients
from llamapro.training.plan import estimate_memory
from llamapro.training.settings import (
    DataSettings,
    Frozen,
    ModelSettings,
    OptimSettings,
    Settings,
    TrainSettings,
)
from llamapro.training.weights import init_random

RANKS, GROUP = 4, 2  # real processes; of a group with HSDP
STEPS, MICRO_BATCHES, ROWS, TOKENS = 2, 2, 1, 8
# Every layout of the frozen weights, and groups beside one group of all.
LAYOUTS: tuple[tuple[Frozen, int], ...] = (
    ("shard", 0),
    ("shard", GROUP),
    ("gather", 0),
    ("replicate", GROUP),
)
BASE = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 61,  # not a multiple of the ranks: what is gathered is padded
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    }
)
CONFIG = expand_config(BASE, interleave(2, 2), "")
NEW, BELOW, ABOVE = (1, 3), (0,), (2,)
ROOT = Path(__file__).resolve().parents[2]


def real_run(ranks: Ranks, frozen: Frozen) -> dict[str, Any]:
    """Trains for real; returns the collectives in order and this rank's shapes."""
    model = build_on_meta(CONFIG)
    load_tensors(model, init_random(CONFIG, seed=0))
    select_trainable(model, "new_blocks")
    objective = NextToken(model)
    shard(objective, ranks, torch.bfloat16, TrainSettings(frozen=frozen))
    optimizer = build_adamw(model.parameters(), OptimSettings())
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    with Recorder() as recorder:
        for _ in range(STEPS):
            for micro_batch in range(MICRO_BATCHES):
                recorder.phase = "forward"
                objective.set_requires_all_reduce(micro_batch == MICRO_BATCHES - 1)
                loss, _ = objective(ids, ids)
                recorder.phase = "backward"
                loss.backward()
            recorder.phase = "step"
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    shapes = {
        name: list((p.to_local() if isinstance(p, DTensor) else p).shape)
        for name, p in model.named_parameters()
    }
    return {"collectives": list(map(dataclasses.asdict, recorder.collectives)), "shapes": shapes}


def worker(out: Path, rank: int) -> None:
    """Runs every layout as one rank; one file per rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    found = {}
    with process_group("cpu", GROUP) as grouped:
        flat = dataclasses.replace(grouped, mesh=make_mesh("cpu", RANKS))
        for frozen, shard_size in LAYOUTS:
            ranks = grouped if shard_size else flat
            found[f"{shard_size} {frozen}"] = real_run(ranks, frozen)
        (out / f"{grouped.rank}.json").write_text(json.dumps(found), encoding="utf-8")


# ---- What pytest runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The collectives and shapes of 4 processes, by rank, for each layout."""
    out = tmp_path_factory.mktemp("real")
    launch = [sys.executable, __file__, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


def simulated(frozen: Frozen, shard_size: int, config: ModelConfig = CONFIG) -> list[Collective]:
    """The collectives of one micro-batch among pretended ranks."""
    with fake_ranks(RANKS, shard_size) as ranks:
        model = build_on_meta(config)
        select_trainable(model, "new_blocks")
        objective = NextToken(model)
        shard(objective, ranks, torch.bfloat16, TrainSettings(frozen=frozen))
        return record_micro_batch(objective, ROWS, TOKENS, clip=1.0)


def settings(**train: Any) -> Settings:
    """Settings of a run with the micro-batches of the real one."""
    batch = {"batch_size": RANKS * MICRO_BATCHES * ROWS, "micro_batch_size": ROWS}
    return Settings(
        model=ModelSettings(path="tiny"),
        data=DataSettings(train=("-",), seq_len=TOKENS),
        train=TrainSettings(**(batch | train)),
    )


@functools.cache
def simulation(ranks: int = RANKS, ranks_per_node: int = 8, **train: Any) -> dict[str, Any]:
    """The simulation of the expanded model with these options of `train`; not to be changed."""
    return simulate(settings(**train), CONFIG, Options(ranks, ranks_per_node))


def rows_of(found: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    rows = found["traffic"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("frozen, shard_size", LAYOUTS)
def test_collectives_are_those_of_real_processes(
    real: list[dict[str, Any]], frozen: Frozen, shard_size: int
) -> None:
    """The calls of two real steps of two micro-batches agree in order, unit, group and bytes."""
    calls = simulated(frozen, shard_size)
    batch = [call for call in calls if call.phase != "step"]
    step = [call for call in calls if call.phase == "step"]
    # Between groups gradients go once a step.
    early = [call for call in batch if call.operation != "all-reduce"]
    expected = (early * (MICRO_BATCHES - 1) + batch + step) * STEPS
    seen = real[0][f"{shard_size} {frozen}"]["collectives"]
    assert [Collective(**call | {"ranks": tuple(call["ranks"])}) for call in seen] == expected
    assert len(batch) > 4 and step


@pytest.mark.parametrize("frozen, shard_size", LAYOUTS)
def test_shards_are_those_of_real_ranks(
    real: list[dict[str, Any]], frozen: Frozen, shard_size: int
) -> None:
    """The largest tensor of each kind of unit has the same shape on the first and last rank."""
    found = simulation(frozen=frozen, shard_size=shard_size)
    key = f"{shard_size} {frozen}"
    first, last = real[0][key]["shapes"], real[-1][key]["shapes"]
    kinds = {"frozen block below": BELOW, "trained block": NEW, "frozen block above": ABOVE}
    for unit in found["units"]:
        where = ""
        if unit["unit"] in kinds:
            layers = kinds[unit["unit"]]
            assert unit["count"] == len(layers)
            where = f"model.layers.{layers[0]}."
        name = where + unit["largest"]
        assert (unit["first_rank"], unit["last_rank"]) == (first[name], last[name])
    assert len(found["units"]) == 4
    if frozen == "shard" and not shard_size:
        assert found["units"][0]["first_rank"] == [16, 32]  # of 61 rows
        assert found["units"][0]["last_rank"] == [13, 32]


def test_frozen_blocks_below_the_first_new_one_are_not_in_backward() -> None:
    """Backward gathers what lies above, and no frozen unit is ever reduced."""
    calls = simulated("shard", 0)
    below = {f"model.layers.{i}" for i in BELOW} | {""}
    backward = {call.unit for call in calls if call.phase == "backward"}
    assert below <= {call.unit for call in calls if call.phase == "forward"}
    assert not below & backward
    reduced = {call.unit for call in calls if call.operation == "reduce-scatter"}
    assert reduced == {f"model.layers.{i}" for i in NEW}


def test_replicated_frozen_weights_cost_no_traffic() -> None:
    """Nothing frozen is moved; if gathered in forward, it is not moved again in backward."""
    found = simulation(frozen="replicate", shard_size=0)
    assert rows_of(found, weights="trained") and not rows_of(found, weights="frozen")
    kept = simulation(frozen="gather", shard_size=0)
    assert rows_of(kept, weights="frozen", phase="forward")
    assert not rows_of(kept, weights="frozen", phase="backward")


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("float32", 4)])
def test_bytes_per_step_follow_from_the_sizes(dtype: Any, size: int) -> None:
    """A ring of n moves (n - 1) / n of all that is gathered (bf16) and reduced (fp32)."""
    found = simulation(dtype=dtype)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 50 * 32 + 2 * 32
    padded = block + 2 * 2 * 32  # gate_proj and up_proj: 50 rows in 4 parts of 13
    root = 2 * 64 * 32 + 32  # 61 rows in 4 parts of 16
    moved = MICRO_BATCHES * 3 / 4
    expected = {
        ("forward", "all-gather", "frozen"): (2 * padded + root) * size * moved,
        ("forward", "all-gather", "trained"): 2 * padded * size * moved,
        ("backward", "all-gather", "frozen"): padded * size * moved,
        ("backward", "all-gather", "trained"): 2 * padded * size * moved,
        ("backward", "reduce-scatter", "trained"): 2 * padded * 4 * moved,
    }
    seen = {
        (row["phase"], row["operation"], row["weights"]): row["sent_bytes"]
        for row in found["traffic"]
        if row["phase"] != "step"
    }
    assert seen == expected
    assert found["sent_bytes"] == sum(row["sent_bytes"] for row in found["traffic"])
    (norm,) = rows_of(found, phase="step")
    assert norm["calls"] == 1 and norm["sent_bytes"] < 1000


def test_with_groups_of_a_machine_only_gradients_leave_it() -> None:
    """HSDP on 4 machines of 2 sends only the new blocks' all-reduce between them."""
    found = simulation(8, 2, batch_size=32, shard_size=2)
    (row,) = rows_of(found, operation="all-reduce", phase="backward")
    reduce = rows_of(found, operation="reduce-scatter")[0]
    shard_bytes = reduce["sent_bytes"]  # of groups of 2: half of what is reduced, as the shard
    once = shard_bytes / found["micro_batches"]
    assert row["between_nodes_bytes"] == row["sent_bytes"] == 2 * 3 / 4 * once
    assert all(not other["between_nodes_bytes"] for other in found["traffic"] if other is not row)
    assert found["between_nodes_bytes"] == row["sent_bytes"]
    flat = simulation(8, 2, batch_size=32)
    assert flat["between_nodes_bytes"] == flat["sent_bytes"] / 2  # every second link of the ring


@pytest.mark.parametrize(
    ("ranks", "shard_size", "per_node", "expected"),
    [
        (8, 0, 8, [0.0]),  # one machine
        (8, 0, 4, [2 / 8]),
        (8, 0, 3, [3 / 8]),  # the third machine is not full
        (8, 4, 4, [1.0, 0.0]),  # replicas, shards
        (8, 2, 4, [2 / 4, 0.0]),
        (12, 6, 4, [1.0, 2 / 6]),  # a group lies on one machine and a half
        (8, 4, 6, [1.0, 2 / 4]),  # the first group is on one machine, the second is not
    ],
)
def test_links_between_machines_follow_the_groups(
    ranks: int, shard_size: int, per_node: int, expected: list[float]
) -> None:
    """The worst group counts: the part of its ring's links that joins two machines."""
    with fake_ranks(ranks, shard_size) as group:
        found = links_between_nodes(group.mesh, per_node)
    assert list(found.values()) == expected
    assert all(members[0] == 0 for members in found)


@pytest.mark.parametrize("ranks, shard_size", [(1, 0), (4, 1)])
def test_one_part_is_not_gathered(ranks: int, shard_size: int) -> None:
    """Alone, a rank communicates nothing; alone in its group, gradients only."""
    found = simulation(ranks, shard_size=shard_size)
    moved = {row["operation"] for row in found["traffic"] if row["sent_bytes"]}
    assert moved == ({"all-reduce"} if shard_size else set())


def test_tied_embeddings_are_one_tensor() -> None:
    """They are gathered once and counted once."""
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    (root,) = [c for c in simulated("shard", 0, tied) if c.unit == "" and c.phase != "step"]
    assert root.bytes == (64 * 32 + 32) * 2
    assert simulate(settings(), tied, Options(4))["units"][0]["parameters"] == 61 * 32 + 32


def test_memory_is_the_plan_for_that_many_ranks() -> None:
    """The plan is for the layout that was asked for and bf16, not for this process."""
    wanted = settings(frozen="replicate", shard_size=2)
    model = build_on_meta(CONFIG)
    select_trainable(model, "new_blocks")
    expected = estimate_memory(wanted, model, torch.bfloat16, torch.device("cpu"), RANKS)
    found = simulation(frozen="replicate", shard_size=2)
    assert found["memory_bytes"] == expected
    offloaded = simulation(offload=True)
    assert offloaded["memory_bytes"]["fp32 masters"] == 0
    assert offloaded["traffic"] == simulation(dtype="auto")["traffic"]


def test_training_everything_has_no_frozen_part() -> None:
    """The root is reduced too, and a model that was never expanded will do."""
    found = simulate(settings(trainable="all"), BASE, Options(RANKS))
    assert found["parameters"]["frozen"] == 0
    assert {row["weights"] for row in found["traffic"]} == {"trained"}
    assert [unit["unit"] for unit in found["units"]] == ["embeddings, norm, head", "trained block"]


def test_a_collective_that_is_not_known_is_not_passed_over() -> None:
    """A total without it would be wrong in silence."""
    with fake_ranks(2), Recorder(), pytest.raises(KeyError, match="broadcast"):
        dist.broadcast(torch.zeros(1), src=0)


# ---- The command --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run(*arguments)`: the command in this process; returns what it printed."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
        command()
        return capsys.readouterr().out

    return call


@pytest.fixture
def base_json(tmp_path: Path) -> str:
    """The base's config.json, in the directory of a checkpoint without weights."""
    (tmp_path / "config.json").write_text(BASE.to_json(), encoding="utf-8")
    return str(tmp_path)


@pytest.mark.slow
def test_a_llama2_70b_on_512_ranks_fits_a_small_machine() -> None:
    """The shipped preset of 100 blocks takes less than 4 GB and 60 s of one core, in a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    launch = [sys.executable, str(ROOT / "benchmarks" / "simulate.py"), "--json", "--ranks", "512"]
    launch += ["--config", "configs/llama2-70b.toml", "--bandwidth", "50"]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60
    assert after.ru_maxrss < 4 * 2**20  # KiB
    found = json.loads(done.stdout)
    assert found["layers"] == 100 and found["nodes"] == 64 and found["micro_batches"] == 2
    assert found["parameters"] == {
        "total": 86_089_736_192,
        "trainable": 17_113_088_000,
        "frozen": 68_976_648_192,
    }
    embeddings = found["units"][0]
    assert embeddings["first_rank"] == [63, 8192] and embeddings["last_rank"] == [0, 8192]
    calls = {(r["phase"], r["operation"], r["weights"]): r["calls"] for r in found["traffic"]}
    assert calls == {
        ("forward", "all-gather", "frozen"): 2 * 81,
        ("forward", "all-gather", "trained"): 2 * 20,
        ("backward", "all-gather", "frozen"): 2 * 76,
        ("backward", "all-gather", "trained"): 2 * 20,
        ("backward", "reduce-scatter", "trained"): 2 * 20,
        ("step", "all-reduce", "trained"): 1,
    }
    assert found["between_nodes_bytes"] == pytest.approx(found["sent_bytes"] / 8)
    assert found["network_s"] == pytest.approx(found["between_nodes_bytes"] / 50e9)


def test_options_of_training_decide(run: Callable[..., str], base_json: str) -> None:
    """A base is expanded on the way, and train.py's options stand beside the command's own."""
    options = ["--model.path", base_json, "--num-new-blocks", "2", "--ranks", "4"]
    options += ["--train.batch-size", "8", "--data.seq-len", "8", "--train.shard-size", "2"]
    options += ["--train.frozen", "gather", "--ranks-per-node", "2"]
    found = json.loads(run(*options, "--json"))
    assert found == simulation(4, 2, frozen="gather", shard_size=2) | {"model": base_json}
    text = run(*options, "--bandwidth", "1")
    for told in ("4 layers", "4 on 2 machine(s)", "61, 32", "reduce-scatter", "estimate: at least"):
        assert told in text


def test_the_text_tells_every_row_and_part() -> None:
    """It tells each kind of unit, each collective and each part of memory."""
    found = simulation(dtype="auto")
    text = render(found, settings())
    assert "estimate" not in text  # without a bandwidth
    for row in found["traffic"]:
        assert re.search(rf"^{row['phase']} +{row['operation']} +{row['weights']} ", text, re.M)
    for unit in found["units"]:
        assert f"{unit['unit']} " in text
    for part, size in found["memory_bytes"].items():
        assert not size or part == "total" or part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks is 0, expected 1 or more"),
        (["--ranks-per-node", "0"], "--ranks-per-node is 0"),
        (["--num-new-blocks", "-1"], "--num-new-blocks is -1"),
        (["--num-new-blocks", "3"], "does not split 2 layers .* choose one of 1, 2"),
        (["--bandwidth", "nan"], "--bandwidth is nan"),
        (["--train.batch-size", "6"], r"batch_size 6 is not a multiple of 4 .* are: 4 and 8"),
        (["--train.shard-size", "3"], "shard_size 3 does not divide 4"),
        (["--num-new-blocks", "0"], "not an expanded model; add --num-new-blocks N"),
        (["--model.path", "nowhere"], "model.path nowhere: does not exist; .* config.json"),
        (["--model.path", ""], "give model.path"),
    ],
)
def test_mistakes_are_named(
    run: Callable[..., str], base_json: str, arguments: list[str], message: str
) -> None:
    """The value and the fix are told before anything is simulated."""
    good = ["--ranks", "4", "--num-new-blocks", "2", "--train.batch-size", "8"]
    with pytest.raises(ConfigError, match=message):
        run(*good, "--model.path", base_json, *arguments)


def test_a_mistake_ends_the_command_with_status_2(
    run: Callable[..., str], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    """It prints one message and no traceback."""
    words = ["--ranks", "4", "--config", tmp_path / "none.toml"]
    found = run_command(lambda words: run(*words), *words)
    assert found == (2, "", f"ConfigError: {tmp_path}/none.toml: no such preset\n")


def test_an_unknown_option_is_refused(run: Callable[..., str], base_json: str) -> None:
    """The message names it, and what was meant."""
    with pytest.raises(ConfigError, match=r"frozzen: .*mean --train\.frozen"):
        run("--ranks", "4", "--model.path", base_json, "--train.frozzen", "shard")


def test_a_directory_or_a_file_names_the_model(base_json: str) -> None:
    """Weights are not looked for."""
    assert read_config(base_json, 0) == read_config(f"{base_json}/config.json", 0) == BASE
    assert read_config(base_json, 2) == CONFIG


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= address | {"WORLD_SIZE": str(RANKS)}
    # All ranks have the imports of this process, with the one that FSDP would make in each.
    importlib.import_module("torch._dynamo")
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=worker, args=(Path(sys.argv[1]), i)) for i in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(process.exitcode or 0 for process in ranks))
