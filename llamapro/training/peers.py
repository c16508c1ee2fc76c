"""Notices that another process of a run has ended: killed, out of memory, its machine gone.

torchrun ends the other processes of one machine. Elsewhere they would wait for the lost one for
half an hour while they start, and end with a traceback of the connection later.
"""

import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from llamapro.errors import LostProcessError, note, speaks

BEAT_S = 2.0  # between two signs of life
SILENT_S = 60.0  # a process that has given signs and then none for this long has ended
START_S = 1800.0  # one that has given none may still be importing PyTorch from a slow disk
LEAVE_S = 10.0  # for this process to end by itself when the store is gone
_GONE = re.compile(r"gloo/transport|remote process|ncclRemoteError")
_DONE = b"done"


@contextmanager
def loss_is_said() -> Iterator[None]:
    """Makes a LostProcessError of the error in an operation whose other side has gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistNetworkError) and not _GONE.search(str(error)):
            raise
        raise LostProcessError(
            "another process of this run has ended, or cannot be reached: look for its own "
            "message, or whether it was killed (out of memory?). The same command goes on from the "
            f"last training checkpoint ({str(error).strip().splitlines()[0][:160]})"
        ) from None


@contextmanager
def watched(store: Any, rank: int, size: int, phase: str) -> Iterator[None]:
    """Ends this process with one message if another one dies while the body runs in all of them.

    The main process watches all others, and they watch it. Nothing may be lost in the body. The
    phase names what it does, the same everywhere; the store is where the processes met.
    """
    with loss_is_said():
        # A connection of its own: in the other one somebody may wait for minutes.
        store = dist.PrefixStore(f"alive-{phase}", store.clone())  # type: ignore[attr-defined]
        store.set(str(rank), "begun")  # now: one that has given no sign has half an hour
    is_over = Event()
    watcher = Thread(target=_watch, args=(store, rank, size, phase, is_over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join(LEAVE_S)
        with suppress(RuntimeError):
            store.set(str(rank), _DONE)


def _watch(store: Any, rank: int, size: int, phase: str, is_over: Event) -> None:
    now = time.monotonic()
    until = {other: now + START_S for other in (range(1, size) if rank == 0 else [0])}
    heard: dict[int, bytes] = {}
    for beat in itertools.count():
        if is_over.wait(BEAT_S if beat else 0):
            return
        try:
            store.set(str(rank), str(beat))
            for other in [other for other in until if store.check([str(other)])]:
                if (sign := store.get(str(other))) == _DONE:
                    del until[other]
                elif sign != heard.get(other):
                    heard[other], until[other] = sign, time.monotonic() + SILENT_S
            lost = [f"rank {other}" for other in until if time.monotonic() > until[other]]
        except RuntimeError:
            lost = ["the process where all of them meet"]
            if is_over.wait(LEAVE_S):
                return
        if lost:
            if speaks():
                note(
                    f"LostProcessError: {lost[0]} gave no sign of life while the processes were "
                    f"{phase}: look for its own message, or whether it was killed. Nothing was "
                    "lost: give the same command again"
                )
            os._exit(2)
