"""The frame of every command: an error is one message and exit status 2, a result is printed."""

import errno
import io
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import FrameType
from typing import Any, NoReturn

from llamapro.errors import ConfigError, LostProcessError, UserError, note, shorten, speaks
from llamapro.formatting import finite, flatten

_NO_FILE = {  # what an error means that names no file
    errno.ENOSPC: "standard output: {}",
    errno.EMFILE: "{}: allow this process more, 'ulimit -n' shows how many",
    errno.ENOENT: "{}: set TMPDIR",  # of `tempfile`
}


def run(main: Callable[[], None], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Runs a command and exits: 0 on success, 2 on a user's mistake, 130 or 143 on a signal.

    SIGTERM is raised as SystemExit, so that partial output is removed as after Ctrl-C.

    Args:
        leave: ends the process. `os._exit` skips the interpreter's teardown, during which gloo's
            threads sometimes abort a process whose work is done.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # Each tensor that is mapped holds a descriptor, and many systems allow 1,024 until one asks.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in ("stdout", "stderr"):  # None if the caller closed it, as in '>&-'
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that a poor terminal cannot show
    status = 0
    try:
        for word in sys.argv:
            if word.encode(errors="replace").decode() != word:
                raise ConfigError(
                    f"{word!a} on the command line is not UTF-8; rename the file or folder"
                )
        main()
        sys.stdout.flush()
    except UserError as error:
        message = shorten(f"{type(error).__name__}: {error}")
        if not isinstance(error, LostProcessError):  # the other one is the first that failed
            _tell_launcher(message)
        status = _fail(message, 2)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away, as in '| head'.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.filename is None and error.errno not in _NO_FILE:
            raise
        message = f"{error.filename}: {error.strerror}"
        if error.filename is None:
            message = _NO_FILE[error.errno or 0].format(error.strerror)
            if error.errno == errno.ENOSPC:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = shorten(message)
        _tell_launcher(message)
        status = _fail(message, 2)
    sys.stderr.flush()
    leave(status)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(_fail("terminated", 143))


def _tell_launcher(message: str) -> None:
    """Writes the message to the file that torchrun reads, so that its report ends with it.

    Every rank writes its own: torchrun may take any of them for the first that failed.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(file, "w", encoding="utf-8") as out:
            json.dump({"message": {"message": message, "extraInfo": extra}}, out)


def _fail(message: str, status: int) -> int:
    # Under torchrun every rank of a machine meets the same mistake, so the first one reports it.
    # Another machine may lack a file that this one has. `train.py --processes` sets the second
    # variable, and prints what its ranks write to their error files.
    if speaks() and "LLAMAPRO_LAUNCHED" not in os.environ:
        rank = os.environ.get("RANK") or "0"
        where = "" if rank == "0" else f"rank {rank} on {socket.gethostname()}: "
        note(f"{where}{message}")
    return status


def arguments(kind: Any, argv: Sequence[str] | None, prog: str, **more: Any) -> Any:
    """Reads a command line into a dataclass, or one of several; the texts below fields are help.

    Help breaks its lines where a text does, so a text is one line, or each line is a sentence.
    Raises ConfigError if an option of several values is given twice.
    """
    import tyro

    # A flag has its opposite where a `default`, such as a preset, may have set it.
    pairs = () if "default" in more else (tyro.conf.FlagCreatePairsOff,)
    options = (*pairs, tyro.conf.OmitSubcommandPrefixes)
    found = tyro.cli(kind, prog=prog, args=argv, config=options, **more)
    words = [word.partition("=")[0].replace("_", "-") for word in argv or sys.argv[1:]]
    for name, value in flatten(asdict(found[0] if isinstance(found, tuple) else found)).items():
        option = f"--{name}".replace("_", "-")
        if value and isinstance(value, tuple) and words.count(option) > 1:
            raise ConfigError(f"{option}: given twice, and the last would count; name all at once")
    return found


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints the result on standard output: one JSON object, or the text for people."""
    print(json.dumps(finite(result), allow_nan=False) if as_json else text, flush=True)
