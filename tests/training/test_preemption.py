"""A signal saves everything and stops the run; the same command continues it."""

import itertools
import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamapro import cli
from llamapro.checkpoints.run import read_metrics, training_checkpoints
from llamapro.scripts import train
from llamapro.training.data import Data
from llamapro.training.job import Job
from llamapro.training.preemption import Stopped, StopRequest
from llamapro.training.state import RunState

ELASTIC = {"TORCHELASTIC_RUN_ID": "x"}  # of a process that torchrun started


def train_signalled(
    place: str, rank: str, count: int, name: str, words: Sequence[str] | None = None
) -> None:
    """Is train.py, but one rank sends itself a signal just before a call of one of its functions.

    Args:
        place: name of the function.
        rank: which one is signalled, on its first start.
        count: number of the call.
        name: of the signal.
        words: arguments of train.py; those of the command line if None.
    """
    owners = {"tokenize": Job, "batch": Data, "to_json": RunState}
    owner: Any = owners.get(place, train)
    original, calls = getattr(owner, place), itertools.count(1)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if next(calls) == count and os.environ["RANK"] == rank and is_first_start:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*args, **kwargs)

    setattr(owner, place, signalled)
    train.main(words)


def wait_signalled(words: Sequence[str], delay: float) -> None:
    """Is train.py; rank 1 gets a signal while, or just before, rank 0 tokenises for long."""
    load_data = train.load_data

    def soon(*args: Any) -> Any:
        if delay:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        return load_data(*args)

    def tokenize(_: Job) -> Any:
        time.sleep(200)
        raise AssertionError("nothing woke it")

    if os.environ["RANK"] == "1":
        train.load_data = soon  # type: ignore[assignment]
    Job.tokenize = tokenize  # type: ignore[method-assign]
    train.main(words)


def options(pro: Path, run_dir: Path, micro_batch_size: int = 2) -> list[str]:
    """4 steps, evaluation and saving every 2."""
    words = ["--model.path", str(pro)]
    words += ["--data.train", os.__file__, "--data.val", f"code={signal.__file__}"]
    words += ["--data.seq-len", "32", "--data.cache-dir", str(run_dir / "cache")]
    words += ["--train.steps", "4", "--train.batch-size", "4"]
    words += ["--train.micro-batch-size", str(micro_batch_size)]
    words += ["--eval.every", "2", "--eval.sequences", "8", "--save.every", "2"]
    return [*words, "--run-dir", str(run_dir)]


def evaluated(run_dir: Path) -> list[int]:
    """The steps at which the run was evaluated to the end."""
    return [r["step"] for r in read_metrics(run_dir) if r["kind"] == "eval"]


@pytest.fixture(scope="module")
def straight(
    pro: Path, train_on: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What 4 steps without a signal give."""
    run_dir = tmp_path_factory.mktemp("straight")
    train_on(2, options(pro, run_dir))
    return load_file(training_checkpoints(run_dir)[-1] / "trainable.safetensors")


@pytest.mark.parametrize(
    ("place", "rank", "call", "name", "saved"),
    [
        ("batch", 1, 2, "SIGTERM", 1),  # it agrees with the others before it computes
        ("batch", 0, 2, "SIGUSR1", 1),  # which a job can ask its scheduler for
        ("clip_gradients", 1, 3, "SIGINT", 3),  # inside a step, which is finished
        ("evaluate", 0, 2, "SIGTERM", 2),
        ("to_json", 1, 1, "SIGHUP", 2),
        # Before the first of two micro-batches: the step is dropped.
        ("to_device", 1, 3, "SIGTERM", 1),
        ("tokenize", 0, 1, "SIGTERM", 0),  # nothing is earned yet
    ],
    ids=["step", "asked_for", "in_step", "evaluation", "saving", "micro_batch", "data"],
)
def test_a_signal_to_one_process_saves_all_and_the_run_continues_to_the_same_bits(
    place: str,
    rank: int,
    call: int,
    name: str,
    saved: int,
    pro: Path,
    fork_ranks: Callable[..., Any],
    train_on: Callable[..., Any],
    tmp_path: Path,
    straight: dict[str, torch.Tensor],
) -> None:
    """Exit status 0 on every rank, wherever it comes; the same command then ends as if without."""
    words = options(pro, tmp_path, 1 if place == "to_device" else 2)
    done = fork_ranks(2, __file__, "train_signalled", place, str(rank), call, name, words)
    assert done.statuses == [0, 0], done.stderr
    assert f"{saved} steps done, stopped by a signal: the same command continues" in done.stdout
    found = [path.name for path in training_checkpoints(tmp_path)]
    assert found[-1:] == ([f"step-{saved:08d}"] if saved else [])
    assert not list(tmp_path.glob("cache/.partial*"))
    if place not in ("evaluate", "to_device"):
        return  # test_train_disturbed.py continues all of them, in one process
    assert evaluated(tmp_path) == [0]  # it was left in the middle, and is done again below
    done = train_on(2, words)
    assert "4 steps done" in done.stdout and "stopped" not in done.stdout
    assert evaluated(tmp_path) == [0, 2, 4]
    tensors = load_file(training_checkpoints(tmp_path)[-1] / "trainable.safetensors")
    assert tensors.keys() == straight.keys()
    for key, tensor in tensors.items():
        if place == "evaluate":
            assert torch.equal(tensor, straight[key]), key
        else:  # in micro-batches of 1, gradients are summed in another order
            torch.testing.assert_close(tensor, straight[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("delay", [0.5, 0.0])
def test_a_signal_to_a_process_that_waits_acts_at_once(
    pro: Path, fork_ranks: Callable[..., Any], tmp_path: Path, delay: float
) -> None:
    """It reaches the main process, which tokenises and hears of it from the other one."""
    done = fork_ranks(2, __file__, "wait_signalled", options(pro, tmp_path), delay)
    assert done.statuses == [0, 0], done.stderr
    assert "0 steps done, stopped by a signal" in done.stdout


def test_a_signal_before_the_others_have_come_ends_the_process(
    pro: Path, root: Path, tmp_path: Path
) -> None:
    """Nothing is earned while it waits for them, inside PyTorch."""
    command = [sys.executable, str(root / "train.py"), *options(pro, tmp_path)]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment["MASTER_PORT"] = str(port)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + 120
        while time.monotonic() < until:  # until it listens for the other one
            with socket.socket() as other:
                if other.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) in (-signal.SIGTERM, 143)


def test_a_terminal_that_closes_saves_the_run(pro: Path, root: Path, tmp_path: Path) -> None:
    """SIGHUP comes, and nothing can be printed any more."""
    words = [*options(pro, tmp_path), "--train.steps", "100000", "--log-every", "1"]
    terminal, other = pty.openpty()
    command = [sys.executable, str(root / "train.py"), *words, "--log-seconds", "0"]
    streams: dict[str, Any] = {"stdin": other, "stdout": other, "stderr": other}
    with subprocess.Popen(command, start_new_session=True, **streams) as run:
        os.close(other)
        told = b""
        while b" 3/100000" not in told:
            told += os.read(terminal, 4096)
        os.close(terminal)
        os.kill(run.pid, signal.SIGHUP)
        assert run.wait(60) == 0
    steps = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert training_checkpoints(tmp_path)[-1].name == f"step-{steps[-1]:08d}"


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_the_run_ends_with_the_same_bits(
    pro: Path, tmp_path: Path, straight: dict[str, torch.Tensor]
) -> None:
    """SIGKILL in the third step: both start again from step 2, by --max-restarts alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", "1", "--nproc-per-node", "2", __file__, *options(pro, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "step-00000002" in done.stderr and "4 steps done" in done.stdout
    assert evaluated(tmp_path) == [0, 2, 4]
    tensors = load_file(training_checkpoints(tmp_path)[-1] / "trainable.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(tensor, straight[key]), key


def test_a_first_signal_is_remembered_and_handlers_come_back() -> None:
    """Two within two seconds are one: a terminal and torchrun both send it."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.listening():
        assert stop.signal == ""
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_long_work_is_interrupted() -> None:
    """By the signal, and at once if it had come before."""
    stop = StopRequest()
    with stop.listening():
        with pytest.raises(Stopped), stop.interrupting():
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped), stop.interrupting():
            pass


def test_a_second_signal_ends_at_once() -> None:
    """Even while PyTorch waits for other processes, when no handler runs; with its own status."""
    script = """
        import os, signal, threading
        import torch.distributed as dist
        from llamapro.training import preemption as stopping
        stopping.SAME_SIGNAL_S = 0.0
        with stopping.StopRequest().listening():
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            dist.HashStore().get("what nobody sets")
            print("not here", flush=True)
    """
    code = textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "still here\n" and done.stderr.count("second signal") == 1


@pytest.mark.parametrize(
    ("environment", "earlier", "name"),
    [(ELASTIC, "", "SIGTERM"), (ELASTIC, "SIGINT", "SIGINT"), ({}, "", "")],
    ids=["running", "saving", "shell"],
)
def test_a_process_saves_and_ends_when_torchrun_was_killed(
    environment: dict[str, str], earlier: str, name: str
) -> None:
    """Nobody else would end it. One that was asked before goes on saving; a shell may go."""
    child = f"""
        import signal, time; from llamapro.training import preemption
        preemption.SAME_SIGNAL_S, preemption.POLL_S = 0.0, 0.1
        stop = preemption.StopRequest()
        with stop.listening():
            if {earlier!r}:
                signal.raise_signal(signal.{earlier or "SIGINT"})
            print("ready", flush=True)
            until = time.monotonic() + 1
            while stop.signal != "SIGTERM" and time.monotonic() < until:
                time.sleep(0.01)
        raise SystemExit(f"signal: {{stop.signal}}")
    """
    parent = f"""
        import os, subprocess, sys
        words = [sys.executable, "-c", {textwrap.dedent(child)!r}]
        subprocess.Popen(words, stdout=subprocess.PIPE).stdout.readline()
        os.kill(os.getpid(), 9)
    """
    words = [sys.executable, "-c", textwrap.dedent(parent)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == -signal.SIGKILL and f"signal: {name}\n" in done.stderr


if __name__ == "__main__":
    cli.run(lambda: train_signalled("clip_gradients", "1", 3, "SIGKILL"), leave=os._exit)
