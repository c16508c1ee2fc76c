"""Signals: a first one of `KINDS` saves the run and stops it, a second ends it at once.

Python runs a signal's handler only between two steps of the interpreter, and a process may wait for
others for minutes inside PyTorch. So a thread hears of every signal, through Python's wakeup
descriptor, at the moment it comes.
"""

import io
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread, main_thread
from types import FrameType
from typing import Any

from llamapro.errors import DataError, note, speaks

# Schedulers send the last two to a job that asks for them.
KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# torchrun passes on a signal that the terminal has already sent to its workers. Two signals within
# this time count as one.
SAME_SIGNAL_S = 2.0
SETTLE_S = 1.0  # after a failure, before what was saved is looked at again
POLL_S = 0.5  # between two looks for a signal to another process, and for the end of torchrun


class Stopped(BaseException):
    """Raised by a signal inside `StopRequest.interrupting`."""


class StopRequest:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.signal = ""  # name of the first signal; "" before it
        self.failure = ""  # why the run cannot continue; "" if it can
        self._interrupts = False
        self._store: Any = None

    @property
    def is_asked(self) -> bool:
        return bool(self.signal or self.failure)

    def fail(self, reason: str) -> None:
        """Asks the run to save and stop; the command then ends with this reason as its error."""
        if not self.failure:
            self.failure = reason
            note(f"{reason}; saving and stopping")

    def settle(self) -> None:
        """Waits after a failure: whoever removes a run directory may still be removing files."""
        if self.failure:
            time.sleep(SETTLE_S)

    def raise_failure(self, step: int) -> None:
        """Raises DataError with the reason if the run had to end early, at this step."""
        if self.failure:
            raise DataError(f"{self.failure}; saved and stopped at step {step}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only remembers a first signal; the main thread alone may enter.

        A signal that is ignored, as nohup does with SIGHUP, stays so. Meanwhile standard error may
        lose its reader, as in `| tee` after Ctrl-C, and nothing fails.
        """
        kinds = [kind for kind in KINDS if signal.getsignal(kind) != signal.SIG_IGN]
        hear, tell = os.pipe()
        os.set_blocking(tell, False)
        wakeup, stderr = signal.set_wakeup_fd(tell, warn_on_full_buffer=False), sys.stderr
        if stderr is sys.__stderr__:
            sys.stderr = _lasting(stderr)
        watcher = Thread(target=self._watch, args=(hear, kinds), daemon=True)
        watcher.start()
        try:
            with _handled(kinds, self._handle):
                yield
        finally:
            signal.set_wakeup_fd(wakeup)
            os.close(tell)  # ends the watcher
            watcher.join()
            os.close(hear)
            sys.stderr = stderr

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Makes a first signal raise `Stopped`, for long work that other ranks only wait for."""
        self._interrupts = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    @contextmanager
    def shared(self, store: Any) -> Iterator[None]:
        """Makes a signal to any process reach the one that is `interrupting`, through their store.

        Every process enters, while the main one works and the others wait for it.
        """
        self._store = store
        if self.signal:  # before anybody could hear of it
            store.set("stop", self.signal)
        try:
            yield
        finally:
            self._store = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Runs in the main thread, when it can."""
        self.signal = self.signal or signal.Signals(number).name
        if self._interrupts:
            raise Stopped
        if self._store is not None:
            self._store.set("stop", self.signal)

    def _watch(self, pipe: int, kinds: list[signal.Signals]) -> None:
        """Runs in a thread of its own, until the other end of the pipe is closed."""
        first_at: float | None = None
        parent, is_started = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        while True:
            if not select.select([pipe], [], [], POLL_S)[0]:
                # torchrun was killed. A process that was asked before is saving: leave it alone.
                if is_started and first_at is None and os.getppid() != parent:
                    os.kill(os.getpid(), signal.SIGTERM)
                if self._interrupts and self._store is not None and self._store.check(["stop"]):
                    signal.pthread_kill(main_thread().ident or 0, signal.SIGTERM)
                continue
            if not (byte := os.read(pipe, 1)):
                return
            if (number := byte[0]) not in kinds:
                continue
            for descriptor in terminals:
                if not os.isatty(descriptor):  # the terminal was closed
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            if first_at is None:
                first_at, self.signal = time.monotonic(), signal.Signals(number).name
                if speaks():  # one message per machine
                    note(f"{self.signal}: saving and stopping; a second signal ends at once")
            elif time.monotonic() - first_at > SAME_SIGNAL_S:
                os._exit(128 + number)


@contextmanager
def default_signals() -> Iterator[None]:
    """Lets a signal end the process while it waits for the others to start: nothing is lost yet."""
    kinds = [k for k in KINDS if signal.getsignal(k) not in (signal.SIG_IGN, None)]
    with _handled(kinds, signal.SIG_DFL):
        yield


@contextmanager
def _handled(kinds: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Gives signals a handler, and at the end the ones that they had."""
    before = [signal.signal(kind, handler) for kind in kinds]
    try:
        yield
    finally:
        for kind, earlier in zip(kinds, before, strict=True):
            signal.signal(kind, earlier)


class _Lasting(io.FileIO):
    """A stream whose reader may go away."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _lasting(stream: Any) -> io.TextIOWrapper:
    """Returns a stream for the same descriptor that never fails."""
    raw: Any = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True)
