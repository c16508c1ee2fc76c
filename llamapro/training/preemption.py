"""Ends a run in order: a first SIGTERM or SIGINT asks it to stop, a second ends it at once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llamapro.errors import DataError

# torchrun hands on to its workers what the terminal has sent them already: within this time, two
# signals are one.
SAME_SIGNAL_S = 2.0


class Stopped(BaseException):
    """Raised by a signal inside `StopRequest.interrupting`."""


class StopRequest:
    """Remembers that this process was asked to stop.

    Attributes:
        signal: name of the first SIGTERM or SIGINT, "" before it.
        failure: why the run itself has to end here, "" if it need not.
    """

    def __init__(self) -> None:
        self.signal = ""
        self.failure = ""
        self._at = 0.0
        self._interrupts = False

    @property
    def is_asked(self) -> bool:
        return bool(self.signal or self.failure)

    def fail(self, reason: str) -> None:
        """Asks for a stop in order, after which the command ends with this as a user's mistake."""
        if not self.failure:
            self.failure = reason
            print(f"{reason}; stopping in order", file=sys.stderr, flush=True)

    def raise_failure(self, step: int) -> None:
        """Raises DataError with the reason if the run had to end by itself, at this step."""
        if self.failure:
            raise DataError(f"{self.failure}; stopped in order at step {step}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a first SIGTERM or SIGINT is only remembered; the main thread alone may call."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self._handle) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, it also raises `Stopped`: for long work that nobody waits for in a collective."""
        self._interrupts = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.signal:
            self.signal, self._at = name, now
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one of this machine's processes tells
                text = f"{name}: stopping in order; a second signal ends at once"
                print(text, file=sys.stderr, flush=True)
            if self._interrupts:
                raise Stopped
        elif now - self._at > SAME_SIGNAL_S:
            os._exit(128 + number)
