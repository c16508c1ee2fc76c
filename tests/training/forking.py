"""A process that has imported PyTorch and train.py once, and forks the ranks of every test.

Starting two ranks with torchrun imports PyTorch three times, which takes longer than most tests.
The fixture `fork_ranks` in conftest.py runs this file as a script and talks to it.
"""

import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest  # noqa: F401 (these are imported here once, for every rank)
import sentencepiece  # noqa: F401
import torch._dynamo  # noqa: F401
import tyro  # noqa: F401

from llamapro import cli
from llamapro.scripts import train  # noqa: F401


def serve() -> None:
    """Answers each request, a line of JSON, with the exit statuses of its ranks."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks: dict[int, int] = {}
        for rank in range(request["processes"]):
            if not (pid := os.fork()):
                be_rank(rank, request)
            ranks[pid] = rank
        statuses: dict[int, int] = {}
        while len(statuses) < len(ranks):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            # The others wait for it: end them, as torchrun does on one machine.
            if statuses[pid] and not request["apart"]:
                for other in ranks.keys() - statuses.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([statuses[pid] for pid in ranks]), flush=True)


def be_rank(rank: int, request: dict[str, Any]) -> None:
    """Calls the function as one of the ranks; does not return."""
    signal.alarm(240)  # ends a rank that waits forever; nothing else here looks at a clock
    with (
        open(Path(request["log"]) / f"stdout-{rank}", "wb") as stdout,
        open(Path(request["log"]) / f"stderr-{rank}", "wb") as stderr,
    ):
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
    if (count := request["processes"]) > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        function = getattr(load(request["file"]), request["function"])
        cli.run(lambda: function(*request["args"]), leave=os._exit)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def load(file: str) -> ModuleType:
    """Imports a Python file by its path."""
    name = Path(file).stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve()
