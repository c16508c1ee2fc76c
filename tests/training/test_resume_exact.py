"""A run that was killed and goes on, on as many processes or on others, is the run that was not.

The processes run resume_worker.py, which notes what they are really given and hold.

Shapes: rows of a sharded weight are 30, 6, 50, 403: over 4 processes uneven, or none on the last.
"""

import json
import signal
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import read_metrics, training_checkpoints
from llamapro.conversion.expand import expand_checkpoint

STEPS, EVERY, BATCH, MICRO_BATCHES = 6, 2, 8, 2
MOMENTS = ("exp_avg", "exp_avg_sq")
NEW = ("model.layers.1.", "model.layers.3.")
WORKER = Path(__file__).with_name("resume_worker.py")


class Run:
    """A run directory and what was seen of every start of it.

    Attributes:
        path: the run directory.
        starts: per start, per rank, a line of every optimizer step.
    """

    def __init__(self, fork_ranks: Callable[..., Any], home: Path, path: Path) -> None:
        self.fork_ranks, self.home, self.path = fork_ranks, home, path
        self.starts: list[list[list[dict[str, Any]]]] = []

    def go(self, processes: int, die: tuple[int, int] = (0, 0), **changes: Any) -> "Run":
        """Starts or continues it.

        Args:
            processes: how many.
            die: rank that is killed, and before which of its forward passes; 0: none is.
            changes: `save__every=2` is `--save.every 2`.
        """
        log = self.path.parent / f"{self.path.name}-{len(self.starts)}"
        log.mkdir(parents=True)
        options = {
            "model.path": self.home / "pro",
            "data.train": f"{self.home}/a.txt {self.home}/b.txt",
            "data.weights": "1.0 1.5",
            "data.val": f"code={self.home}/val.txt",
            "data.seq_len": 16,
            "data.cache_dir": self.home / "cache",
            "data.workers": 1,
            "train.device": "cpu",
            "train.steps": STEPS,
            "train.batch_size": BATCH,
            "train.micro_batch_size": BATCH // MICRO_BATCHES // processes,
            "optim.lr": 1e-2,
            "eval.every": EVERY,
            "eval.sequences": 3,
            "save.every": EVERY,
            "save.keep": STEPS,
            "log_every": 1,
            "run_dir": self.path,
        } | {key.replace("__", "."): value for key, value in changes.items()}
        words = []
        for key, value in options.items():
            words += [f"--{key.replace('_', '-')}", *str(value).split()]
        args = [str(log), *die, words]
        statuses, _, told = self.fork_ranks(processes, WORKER, "train_watched", *args)
        if die[1]:
            assert statuses[die[0]] == -signal.SIGKILL and (log / "killed").exists(), told
        else:
            assert statuses == [0] * processes, told
        notes = [(log / f"steps-{rank}").read_text() for rank in range(processes)]
        self.starts.append([[json.loads(line) for line in note.splitlines()] for note in notes])
        return self

    def samples(self, start: int = -1) -> list[Counter[str]]:
        """What the model was given in each step of a start, on all ranks together."""
        return [
            Counter(row for note in notes for row in note["rows"])
            for notes in zip(*self.starts[start], strict=True)
        ]

    def loaded(self, ranks: range) -> dict[str, Tensor]:
        """What the last start's optimizer began with, put together of these ranks' shards."""
        log = self.path.parent / f"{self.path.name}-{len(self.starts) - 1}"
        parts = [torch.load(log / f"loaded-{rank}.pt", weights_only=True) for rank in ranks]
        whole = {}
        for name in parts[0]:
            shards = [part[name] for part in parts]
            whole[name] = shards[0] if name.endswith(".step") else torch.cat(shards)
        return whole

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def last(self) -> int:
        """The step of the latest training checkpoint."""
        return int(training_checkpoints(self.path)[-1].name.removeprefix("step-"))

    def metrics(self, kind: str, *keys: str) -> dict[int, tuple[float, ...]]:
        """Step -> values of the records of a kind."""
        records = [r for r in read_metrics(self.path) if r["kind"] == kind]
        found = {r["step"]: tuple(r[key] for key in keys) for r in records}
        assert len(found) == len(records), "a step is told twice"
        return found


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A model of odd shapes with 2 new blocks, and sources that last for less than 6 steps."""
    home = tmp_path_factory.mktemp("resume")
    odd = {"hidden_size": 30, "intermediate_size": 50, "vocab_size": 403, "num_hidden_layers": 2}
    odd |= {"num_attention_heads": 5, "num_key_value_heads": 1}
    base = write_random_checkpoint(home / "base", tiny_config(**odd))
    expand_checkpoint(Checkpoint.open(base), home / "pro", expansion.interleave(2, 2))
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    (home / "a.txt").write_text(text[:700])
    (home / "b.txt").write_text(text[700:1200])
    (home / "val.txt").write_text(text[2500:4000])
    return home


@pytest.fixture(scope="module")
def start(
    home: Path, fork_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """`start(processes, die=..., **changes) -> Run`: a new run."""

    def start(*args: Any, **changes: Any) -> Run:
        return Run(fork_ranks, home, tmp_path_factory.mktemp("runs") / "run").go(*args, **changes)

    return start


@pytest.fixture(scope="module")
def straight(start: Callable[..., Run]) -> Callable[..., Run]:
    """`straight(processes, **changes) -> Run`: 6 steps that nothing disturbs, run once."""
    return cache(start)


@pytest.fixture(scope="module")
def resumed(start: Callable[..., Run]) -> Callable[[int], Run]:
    """`resumed(processes) -> Run`: killed in the fifth step, before the second of its two
    micro-batches; from step 3 on it logs, saves and evaluates at other intervals."""

    @cache
    def run(processes: int) -> Run:
        die = (processes - 1, 4 * MICRO_BATCHES + 2)
        run = start(processes, die=die, save__every=3, eval__every=4)
        assert run.last() == 3 and len(run.samples()) == 4
        return run.go(processes, log_every=3, save__every=4, eval__every=2)

    return run


def assert_goes_on_from(run: Run, path: Path, ranks: range) -> None:
    """The last start's optimizer began with the very bytes of this training checkpoint."""
    loaded, step = run.loaded(ranks), int(path.name.removeprefix("step-"))
    stored = load_file(path / "trainable.safetensors") | load_file(path / "optimizer.safetensors")
    names = [name for name in stored if not name.endswith(MOMENTS)]
    assert loaded.keys() == stored.keys() | {f"{name}.step" for name in names}
    for name, tensor in loaded.items():
        expected = torch.tensor(float(step)) if name.endswith(".step") else stored[name]
        assert torch.equal(tensor, expected), name


def assert_same_up_to_rounding(run: Run, other: Run) -> None:
    """All losses of all steps; tokens and learning rates are the same.

    Matrix products of other sizes and sums over ranks add the same fp32 numbers in another order.
    Among so few (sums of 16, 30, 50 and 128 terms) that is a few units in the last place of a loss
    near 6, and the updates hand it on: 2e-6 is 17 of them.
    """
    for kind in ("train", "eval"):
        found, expected = run.metrics(kind, "loss"), other.metrics(kind, "loss")
        assert found.keys() == expected.keys()
        for step, value in found.items():
            assert value == pytest.approx(expected[step], rel=2e-6, abs=0), f"{kind} {step}"
    assert run.metrics("train", "tokens", "learning_rate") == other.metrics(
        "train", "tokens", "learning_rate"
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_while_it_accumulates_ends_with_the_same_bits(
    processes: int, resumed: Callable[[int], Run], straight: Callable[..., Run]
) -> None:
    """SIGKILL in an accumulation window, other intervals after it: all numbers, weights, moments
    and data are those of the run that was left alone."""
    whole, run = straight(processes), resumed(processes)
    assert_goes_on_from(run, run.checkpoint(3), range(processes))
    assert run.samples(0) == whole.samples()[:4]
    assert run.samples(1) == whole.samples()[3:]
    keys = ("loss", "grad_norm", "learning_rate", "tokens")
    found, expected = run.metrics("train", *keys), whole.metrics("train", *keys)
    assert list(found) == [1, 2, 3, 6] and list(expected) == [*range(1, 7)]
    assert found.items() <= expected.items()
    found, expected = run.metrics("eval", "loss"), whole.metrics("eval", "loss")
    assert list(found) == [0, 4, 6] and list(expected) == [0, 2, 4, 6]
    assert found.items() <= expected.items()
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = (r.checkpoint(STEPS) / file for r in (whole, run))
        assert first.read_bytes() == second.read_bytes(), file


@pytest.mark.parametrize("trainable", [pytest.param("new_blocks", marks=pytest.mark.slow), "all"])
def test_four_processes_then_two_then_one_are_one_run(
    trainable: str, start: Callable[..., Run], straight: Callable[..., Run]
) -> None:
    """Each killed in the middle of a step and continued on half as many: every step has its
    samples, weights and moments are resharded to the bit, and losses differ by rounding."""
    changes: dict[str, Any] = {"train__trainable": trainable}
    whole = straight(1, **changes)
    run = start(4, die=(2, EVERY * MICRO_BATCHES + 2), **changes)
    samples = run.samples()[:EVERY]
    assert run.last() == EVERY
    run.go(2, die=(0, EVERY * MICRO_BATCHES + 2), **changes)
    assert_goes_on_from(run, run.checkpoint(EVERY), range(2))
    samples += run.samples()[:EVERY]
    assert run.last() == 2 * EVERY
    run.go(1, **changes)
    assert_goes_on_from(run, run.checkpoint(2 * EVERY), range(1))
    assert samples + run.samples() == whole.samples()
    assert_same_up_to_rounding(run, whole)


def test_other_ways_to_spread_the_model_go_on_from_each_other(
    start: Callable[..., Run], straight: Callable[..., Run]
) -> None:
    """From one process to two groups of two with frozen weights on each (HSDP), to two processes
    that keep them gathered: one run."""
    whole = straight(1)
    die = EVERY * MICRO_BATCHES + 2
    run = start(1, die=(0, die))
    run.go(4, die=(3, die), train__shard_size=2, train__frozen="replicate")
    for group in (range(2), range(2, 4)):
        assert_goes_on_from(run, run.checkpoint(EVERY), group)
    assert run.samples()[:EVERY] == whole.samples()[EVERY : 2 * EVERY] and run.last() == 2 * EVERY
    run.go(2, train__frozen="gather")
    assert_goes_on_from(run, run.checkpoint(2 * EVERY), range(2))
    assert run.samples() == whole.samples()[2 * EVERY :]
    assert_same_up_to_rounding(run, whole)


def test_samples_are_a_function_of_the_step_across_an_epoch(straight: Callable[..., Run]) -> None:
    """Each is a whole batch, no two are alike, and some sequences come again; on 1 process as on
    2."""
    samples = straight(1).samples()
    assert len(samples) == STEPS and all(step.total() == BATCH for step in samples)
    assert len({frozenset(step) for step in samples}) == STEPS
    assert sum(samples, Counter()).most_common(1)[0][1] > 1  # some are seen again
    assert straight(2).samples() == samples


@pytest.mark.parametrize("processes", [1, 2])
def test_in_memory_too_only_the_new_blocks_move(
    processes: int, straight: Callable[..., Run], home: Path
) -> None:
    """After every step each frozen tensor has the bytes of the checkpoint; the optimizer holds the
    new blocks and nothing else."""
    tensors = Checkpoint.open(home / "pro").tensors
    ranks = straight(processes).starts[0]
    first = [notes[0]["frozen"] for notes in ranks]
    if processes == 1:
        assert first[0] == {n: t.sha256() for n, t in tensors.items() if not n.startswith(NEW)}
    for notes, frozen in zip(ranks, first, strict=True):
        assert len(notes) == STEPS and len(frozen) + 2 * 9 == len(tensors)
        for note in notes:
            assert note["frozen"] == frozen
            assert set(note["trained"]) == {name for name in tensors if name.startswith(NEW)}
