"""What the tests of training share: train.py in this process, one rank, ranks that start fast."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.conversion.expand import expand_checkpoint
from llamapro.expansion import interleave
from llamapro.scripts import train
from llamapro.training import distributed


def _words(options: dict[str, Any], **changes: Any) -> list[str]:
    changed = options | {key.replace("__", "."): value for key, value in changes.items()}
    words: list[str] = []
    for key, value in changed.items():
        if value is not None:
            words += [f"--{key.replace('_', '-')}", *str(value).split()]
    return words


@pytest.fixture(scope="session")
def words() -> Callable[..., list[str]]:
    """`words(options, **changes)`: {"save.every": 2} or save__every=2 is `--save.every 2`.

    None leaves an option out, and "" is a flag without a value.
    """
    return _words


@pytest.fixture
def alone() -> Iterator[distributed.Ranks]:
    """A group of one process, this one."""
    with distributed.process_group("cpu") as ranks:
        yield ranks


class Ranks(NamedTuple):
    """What processes that trained together left.

    Attributes:
        statuses: exit status of each rank; negative for a signal.
        stdout: of all ranks, in their order.
        stderr: of all ranks, in their order.
    """

    statuses: list[int]
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def fork_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ranks]]:
    """`fork_ranks(processes, file, function, *args) -> Ranks`: calls a function of a file in each.

    The arguments travel as JSON. One process is no rank: it is started alone. If one fails, the
    others are killed, unless they are `apart`, as on several machines.
    """
    command = [sys.executable, str(Path(__file__).with_name("forking.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin and server.stdout

        def fork(
            processes: int, file: str | Path, name: str, *args: Any, apart: bool = False
        ) -> Ranks:
            assert server.stdin and server.stdout
            log = tmp_path_factory.mktemp("ranks")
            store = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            request = {"processes": processes, "port": store.port, "log": str(log)}
            request |= {"file": str(file), "function": name, "args": args}
            request |= {"apart": apart}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            statuses = json.loads(server.stdout.readline())
            told = [
                "".join((log / f"{name}-{rank}").read_text() for rank in range(processes))
                for name in ("stdout", "stderr")
            ]
            return Ranks(statuses, *told)

        yield fork
        server.stdin.close()


@pytest.fixture(scope="session")
def train_on(root: Path, fork_ranks: Callable[..., Ranks]) -> Callable[..., Ranks]:
    """`train_on(processes, words) -> Ranks`: train.py in several processes, all successful."""

    def train(processes: int, words: list[str]) -> Ranks:
        done = fork_ranks(processes, root / "train.py", "main", words)
        assert done.statuses == [0] * processes, done.stderr
        return done

    return train


@pytest.fixture(scope="session")
def pro(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """An expanded model of 3 layers, not to be changed: layer 2 is new."""
    home = tmp_path_factory.mktemp("pro")
    base = write_random_checkpoint(home / "base", tiny_config(num_hidden_layers=2))
    expand_checkpoint(Checkpoint.open(base), home / "pro", interleave(2, 1))
    return home / "pro"


# ---- Small runs ----------------------------------------------------------------------------------

STEPS, SAVE_EVERY = 6, 3


@pytest.fixture(scope="session")
def replay_home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """Two bases, their expansions, the first also with an added token; a corpus."""
    home = tmp_path_factory.mktemp("replay")
    config = tiny_config(num_hidden_layers=2, max_position_embeddings=64)
    layout = interleave(2, 1)
    for number in range(2):
        base = write_random_checkpoint(home / f"base{number}", config, seed=number)
        expand_checkpoint(Checkpoint.open(base), home / f"pro{number}", layout)
    expand_checkpoint(Checkpoint.open(home / "base0"), home / "grown", layout, new_tokens=["<|x|>"])
    (home / "train.txt").write_text("def usage(parser): print(parser.usage)\n" * 60)
    (home / "general.txt").write_text("It was the best of times, it was the worst of times.\n" * 20)
    return home


def _argparse_source() -> str:
    return Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]


def _os_source() -> str:
    return Path(os.__file__).read_text(encoding="utf-8")[:8000]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A base, its expansion (2 new blocks), a bf16 pair of them, and a small corpus."""
    home = tmp_path_factory.mktemp("train")
    config = tiny_config(num_hidden_layers=2)
    for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
        path = write_random_checkpoint(home / f"base{suffix}", config, dtype)
        expand_checkpoint(Checkpoint.open(path), home / f"pro{suffix}", interleave(2, 2))
    for name, module in (("train", _argparse_source()), ("val", _os_source())):
        (home / f"{name}.py").write_text(module, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def arguments(words: Callable[..., list[str]], home: Path) -> Callable[..., list[str]]:
    """`arguments(run_dir, **changes)`: the options of a small run."""

    def arguments(run_dir: Path, **changes: Any) -> list[str]:
        options = {
            "model.path": home / "pro",
            "data.train": home / "train.py",
            "data.val": f"code={home / 'val.py'}",
            "data.seq_len": 32,
            "data.cache_dir": home / "cache",
            "train.steps": STEPS,
            "train.batch_size": 4,
            "train.micro_batch_size": 2,
            "optim.lr": 1e-2,
            "eval.every": SAVE_EVERY,
            "eval.sequences": 3,
            "save.every": SAVE_EVERY,
            "log_every": 1,
            "run_dir": run_dir,
        }
        return words(options, **changes)

    return arguments


@pytest.fixture
def run(arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Trains in this process; returns the run directory."""

    def run(name: str = "run", **changes: Any) -> Path:
        run_dir = tmp_path / name
        train.main(arguments(run_dir, **changes))
        return run_dir

    return run


@pytest.fixture(scope="module")
def straight(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing disturbs; not to be changed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train.main(arguments(run_dir))
    return run_dir


def _metrics(run_dir: Path, kind: str, key: str) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r[key] for r in map(json.loads, lines) if r["kind"] == kind]


def _trained(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(training_checkpoints(run_dir)[-1] / "trainable.safetensors")


def _assert_same_losses(run_dir: Path, expected: Path, kind: str = "train") -> None:
    """fp32 sums in another order: a few units in the last place of a loss near 6."""
    found, losses = (torch.tensor(_metrics(path, kind, "loss")) for path in (run_dir, expected))
    torch.testing.assert_close(found, losses, rtol=2e-6, atol=0)


@pytest.fixture(scope="session")
def argparse_source() -> Callable[[], str]:
    """`argparse_source()`: a text to train on, the start of argparse.py."""
    return _argparse_source


@pytest.fixture(scope="session")
def os_source() -> Callable[[], str]:
    """`os_source()`: a text to validate on, the start of os.py."""
    return _os_source


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path, str, str], list[float]]:
    """`metrics(run_dir, kind, key)`: a field of every line of that kind in metrics.jsonl."""
    return _metrics


@pytest.fixture(scope="session")
def trained() -> Callable[[Path], dict[str, torch.Tensor]]:
    """`trained(run_dir)`: the tensors of the last training checkpoint."""
    return _trained


@pytest.fixture(scope="session")
def assert_same_losses() -> Callable[..., None]:
    """`f(run_dir, expected, kind="train")`: the losses of two runs, up to rounding."""
    return _assert_same_losses
