"""A process that is killed ends the others with one message, whatever they wait for."""

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch.distributed as dist

from llamapro.errors import LostProcessError
from llamapro.scripts import train
from llamapro.training import peers
from llamapro.training.job import Job


def be_machine(place: str, rank: str, words: list[str]) -> None:
    """Is train.py on one of two machines; a rank is killed when it comes to a place.

    Args:
        place: a function: "open", "init_process_group" or "train_step". Before the second the
            thread that gives signs has not come to the first.
        rank: the one that is killed.
        words: of the command line.
    """
    peers.BEAT_S, peers.SILENT_S, peers.LEAVE_S = 0.05, 0.5, 0.5
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    owner: Any = {"open": Job, "init_process_group": dist}.get(place, train)
    original = getattr(owner, place)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def silent(target: Any, args: Any, daemon: bool) -> Thread:
        is_early = place == "init_process_group" and os.environ["RANK"] == rank
        return Thread(
            target=(lambda *_: None) if is_early and "connect" in args[3] else target,
            args=args,
            daemon=daemon,
        )

    vars(peers)["Thread"] = silent
    setattr(owner, place, killed)
    train.main(words)


@pytest.mark.parametrize(
    ("place", "rank", "said"),
    [
        ("open", "1", "rank 1 gave no sign of life while the processes were opening their files"),
        ("open", "0", "rank 0 gave no sign of life while"),
        ("init_process_group", "1", "rank 1 gave no sign of life while the processes were connect"),
        ("train_step", "1", "another process of this run has ended, or cannot be reached"),
        ("train_step", "0", "another process of this run has ended, or cannot be reached"),
    ],
)
def test_a_killed_process_ends_the_other_with_one_message(
    fork_ranks: Callable[..., Any], pro: Path, tmp_path: Path, place: str, rank: str, said: str
) -> None:
    """It waits neither for half an hour nor prints the traceback of a connection."""
    words = ["--model.path", str(pro), "--data.train", argparse.__file__, "--data.seq-len", "32"]
    words += ["--data.cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run")]
    words += ["--train.steps", "2", "--train.batch-size", "2"]
    done = fork_ranks(2, __file__, "be_machine", place, rank, words, apart=True)
    assert sorted(done.statuses) == [-signal.SIGKILL, 2], done.stderr
    assert done.stderr.count("LostProcessError: ") == 1 and said in done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_stay_as_they_are() -> None:
    """Only those of a lost connection are taken for a lost process."""
    with pytest.raises(RuntimeError, match="out of memory"), peers.loss_is_said():
        raise RuntimeError("out of memory")
    with pytest.raises(LostProcessError, match="Connection closed by peer"), peers.loss_is_said():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9")
