"""Signals: a first SIGTERM or SIGINT saves the run and stops it, a second ends it at once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llamapro.errors import DataError

# torchrun passes on a signal that the terminal has already sent to its workers. Two signals within
# this time count as one.
SAME_SIGNAL_S = 2.0


class Stopped(BaseException):
    """Raised by a signal inside `StopRequest.interrupting`."""


class StopRequest:
    """Remembers that this process was asked to stop.

    Attributes:
        signal: name of the first SIGTERM or SIGINT; "" before it.
        failure: why the run cannot continue; "" if it can.
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
        """Asks the run to save and stop; the command then ends with this reason as its error."""
        if not self.failure:
            self.failure = reason
            print(f"{reason}; saving and stopping", file=sys.stderr, flush=True)

    def raise_failure(self, step: int) -> None:
        """Raises DataError with the reason if the run had to end early, at this step."""
        if self.failure:
            raise DataError(f"{self.failure}; saved and stopped at step {step}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Makes a first SIGTERM or SIGINT only remembered; may be entered in the main thread."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self._handle) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Makes it also raise `Stopped`, for long work that no other rank waits for."""
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
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one message per machine
                text = f"{name}: saving and stopping; a second signal ends at once"
                print(text, file=sys.stderr, flush=True)
            if self._interrupts:
                raise Stopped
        elif now - self._at > SAME_SIGNAL_S:
            os._exit(128 + number)
