"""What the tests of training share: train.py in this process, one rank, ranks that start fast."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.expansion import interleave
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
