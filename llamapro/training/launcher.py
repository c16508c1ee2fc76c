"""`train.py --processes N` starts the ranks on this machine, as torchrun would, without its report.

A user's mistake is one message, whichever rank finds it first. Signals are passed on to the
ranks, which save and stop.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from llamapro.errors import note
from llamapro.training import agreement, checks, preset
from llamapro.training.distributed import is_rank, world_size
from llamapro.training.job import Job
from llamapro.training.preemption import KINDS

# Tells a rank that this module started it and will show its message.
LAUNCHED = "LLAMAPRO_LAUNCHED"
USER_ERROR = 2  # exit status of a user's mistake


def open_job(script: str, argv: Sequence[str], prog: str) -> Job:
    """Reads the command line and opens what it names, in step with the other ranks.

    A process that is no rank, but was asked for several, starts them and exits with their status.
    Raises UserError for a mistake on any rank; SystemExit after --help, or when all ranks ended.
    """
    started = world_size() if is_rank() else 0  # by torchrun or by `launch`

    def open_here() -> Job:
        settings = preset.parse(argv, prog)
        checks.check(settings, started or max(1, settings.processes))
        if settings.processes > 1 and not started and not settings.dry_run:
            sys.exit(launch(script, argv, settings.processes))
        return Job.open(settings)

    return agreement.open_together(open_here, Job.facts)


def launch(script: str, argv: Sequence[str], processes: int) -> int:
    """Runs a script in several processes that train together; returns the exit status of all."""
    # The ranks meet at this store. Its port is in use from now on, so nobody else can take it.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "llamapro",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        LAUNCHED: "1",
    }
    envs = {
        rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    }
    args = {rank: (script, *argv) for rank in range(processes)}
    # Its log of a failed rank only hides the message of that rank.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").disabled = True
    # Read by `start_processes`, which would raise an exception of its own on a signal.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    with TemporaryDirectory(prefix="llamapro-") as logs:
        running = start_processes("train", sys.executable, args, envs, DefaultLogsSpecs(logs))

        def pass_on(number: int, _frame: object) -> None:
            for pid in running.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        for number in KINDS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
        try:
            result = running.wait()
        finally:
            running.close(signal.SIGKILL)
        if result is None or not result.is_failed():
            return 0
        messages = [_read_message(Path(file)) for _, file in sorted(running.error_files.items())]
        codes = {rank: failure.exitcode for rank, failure in sorted(result.failures.items())}
    if message := next(filter(None, messages), ""):
        note(message)
        return USER_ERROR
    # A rank that only lost the others has this status, and leaves the message to them.
    codes = {rank: code for rank, code in codes.items() if code != USER_ERROR} or codes
    code = next(iter(codes.values()))
    failed = ", ".join(f"rank {rank}" for rank in codes)
    if code > 0:
        note(f"{failed} ended with exit status {code}")
        return code
    why = " (the machine may lack memory)" * (-code == signal.SIGKILL)
    note(f"{failed} was killed by signal {-code}{why}; the same command continues the run")
    return USER_ERROR


def _read_message(file: Path) -> str:
    """Returns the message of a user's mistake that `cli.run` wrote in a rank; "" without one."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
