"""User errors: one message without a traceback, and exit status 2."""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake of the user; its message names the file or field, the value and the fix."""


class ConfigError(UserError):
    """A setting or a `config.json` field is missing, unknown or impossible."""


class DivergedError(UserError):
    """A gradient is not finite, so training cannot continue at this learning rate."""


class LostProcessError(UserError):
    """Another process of the run has ended; its own message, or the system's, says why."""


class CheckpointError(UserError):
    """A checkpoint file is missing or damaged, or does not fit the model or its base."""


class DataError(UserError):
    """A corpus or tokenizer file is missing, empty or unreadable, or has another vocabulary."""


def shorten(text: str) -> str:
    """Returns a message whose lines have at most 2,000 characters: values of strangers may be long.

    Both ends stay: the file's name, and the fix.
    """
    lines = (s if len(s) <= 2000 else f"{s[:1200]} ... {s[-700:]}" for s in text.split("\n"))
    return "\n".join(lines)


def speaks() -> bool:
    """Returns whether this process speaks for its machine: the first rank there, or no rank."""
    local = os.environ.get("LOCAL_RANK", "")
    return "RANK" not in os.environ or not local.isdecimal() or int(local) == 0


def note(text: str) -> None:
    """Says on standard error what people should see at once; standard output has the result."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def warn(text: str) -> None:
    """Says on standard error, once, what a user should know of an input that is taken all the same.

    Under torchrun the first rank of a machine speaks for all.
    """
    if speaks():
        note(f"warning: {shorten(text)}")


@contextmanager
def needed(what: str, extra: str, kind: Callable[[str], Exception] = ConfigError) -> Iterator[None]:
    """Turns a failed import into an error that names the extra to install and what failed."""
    try:
        yield
    except ImportError as error:  # also of a package that is there and broken
        raise kind(f"{what}: pip install -e '.[{extra}]' ({error})") from None


def suggest(name: str, known: list[str], cutoff: float = 0.6) -> str:
    """Returns " (did you mean 'x'?)" with the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Problems:
    """Collects problems, so that one error names everything the user has to repair.

    Its length is the number of problems; `listed`, and the error, has the first `limit` of them.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._count = 0
        self.listed: list[str] = []

    def __len__(self) -> int:
        return self._count

    def add(self, *problems: str) -> None:
        """Adds problems; each says where it is, what it is and, if known, how to repair it."""
        self._count += len(problems)
        self.listed += problems[: self._limit - len(self.listed)]

    def text(self, head: str, one_per_line: bool = False) -> str:
        """Returns "head: a; b; and 3 more", or "" if there are no problems."""
        if not self:
            return ""
        more = self._count - len(self.listed)
        shown = self.listed + [f"and {more:,} more"] * (more > 0)
        return f"{head}:" + (
            "\n  " + "\n  ".join(shown) if one_per_line else " " + "; ".join(shown)
        )

    def check(self, kind: type[UserError], head: str, one_per_line: bool = False) -> None:
        """Raises an error of this kind with the `text` of the problems, if there are any."""
        if text := self.text(head, one_per_line):
            raise kind(text)
