"""Ranks for benchmarks/forked_faults.py that start within a second, and the faults that hit them.

A process that has imported PyTorch once forks the ranks of every start; `Ranks` talks to it. It
has shim.c preloaded, where there is a C compiler, so the file system can lack something or fail.
"""

import errno
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fault_judge import REMOVED, Start

SHIM = Path(__file__).with_name("shim.c")
LIMIT_S = 240.0  # a start takes seconds; one that takes so long hangs
FULL_DISK = {"ENOSPC while writing": errno.ENOSPC, "EIO while writing": errno.EIO}
FILE_LIMIT = "file size limit"  # the kernel's own: EFBIG
# A call of the file system that fails, once or for ever, and among how many the first is drawn.
BROKEN = {
    "rename fails": ("rename:5", 12), "fsync fails": ("fsync:5", 60),
    "directory fsync fails": ("fsyncdir:5", 30), "unlink fails": ("unlink:13", 40),
    "rmdir fails": ("rmdir:16", 12), "flock fails": ("flock:37", 8),
    "opendir fails": ("opendir:5", 60), "write fails": ("write:5", 60),
    "pwrite fails": ("pwrite:28", 60),
}  # fmt: skip
BARE = "pwrite:22,lseek:29,fallocate:95,fsyncdir:22,flock:38"  # what is optional, all of it missing
PAUSE = "SIGSTOP, then SIGCONT"
RUNNING = (
    "SIGKILL rank 0", "SIGKILL rank 1", "SIGKILL all workers", "SIGTERM to a worker",
    "SIGINT to a worker", "SIGHUP to a worker", "SIGUSR1 to a worker", "SIGUSR2 to a worker",
    PAUSE, REMOVED, *FULL_DISK, FILE_LIMIT, *BROKEN,
)  # fmt: skip


class Ranks:
    """Starts the command in forked ranks and lets faults come."""

    def __init__(self, home: Path) -> None:
        """Starts the process that forks; `home` takes its files."""
        self._home, self._number = home, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if shutil.which("gcc"):
            shim = home / "shim.so"
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, SHIM, "-ldl"], check=True)
            environment["LD_PRELOAD"] = str(shim)
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(60)

    def start(
        self,
        words: list[list[str]],
        run_dir: Path,
        kind: str,
        target: int,
        rng: random.Random,
        is_bare: bool = False,
        is_apart: bool = False,
    ) -> Start:
        """Starts one rank for each command line; a fault ("": none) comes after a step.

        Args:
            words: the command line of each rank.
            run_dir: of the run; only files below it fail.
            kind: one of `RUNNING`.
            target: the step; 0 is before the first.
            rng: draws the moment.
            is_bare: the file system lacks all that is optional.
            is_apart: the ranks are on machines of their own, and nobody ends the others if one
                ends. They work in folders node-0 and node-1 of `nodes`, if there are any.
        """
        assert self._server.stdin and self._server.stdout
        self._number += 1
        pipe = self._home / f"output-{self._number}"
        os.mkfifo(pipe)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        request: dict[str, Any] = {"words": words, "port": store.port, "pipe": str(pipe)}
        request |= {"apart": is_apart, "shim": {"SHIM_UNDER": str(run_dir), "SHIM_FAIL": ""}}
        if is_bare:
            request["shim"]["SHIM_FAIL"] = BARE
        if kind in FULL_DISK:
            request["disk"] = [kind, rng.randrange(1, 200)]
        elif kind in BROKEN:
            call, calls = BROKEN[kind]
            first = rng.randrange(1, calls)
            last = rng.choice([first, first + 1_000_000])
            request["shim"] |= {"SHIM_TELL": "1", "SHIM_FAIL": f"{call}:{first}:{last}"}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        pids = json.loads(self._server.stdout.readline())
        result = Start()
        watchdog = threading.Timer(LIMIT_S, self._give_up, (pids, result))
        watchdog.start()
        try:
            self._watch(pipe, pids, result, run_dir, kind, target, rng)
        finally:
            watchdog.cancel()
        result.statuses = json.loads(self._server.stdout.readline())
        result.status = next((s for s in result.statuses if s), 0)
        if kind in FULL_DISK or kind == FILE_LIMIT or kind in BROKEN:
            failed = [line for line in result.output if re.search("injected|File too large", line)]
            result.is_hit, result.after = bool(failed), "".join(failed[:1])[-120:]
        pipe.unlink()
        return result

    @staticmethod
    def _give_up(pids: list[int], result: Start) -> None:
        result.hung = True
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _watch(
        self,
        pipe: Path,
        pids: list[int],
        result: Start,
        run_dir: Path,
        kind: str,
        target: int,
        rng: random.Random,
    ) -> None:
        """Reads the output to its end, and strikes once."""
        trigger = re.compile(rf" *{target}/" if target else r"steps +\d")
        delay_s = rng.choice([0.01, 0.08]) * rng.random()  # a save takes about 0.03 s
        started = time.monotonic()
        with open(pipe, encoding="utf-8", errors="replace") as output:
            for line in output:
                result.output.append(line.rstrip("\n"))
                if not result.first_step_s and re.match(r" *\d+/\d+ ", line):
                    result.first_step_s = time.monotonic() - started
                is_due = not result.is_hit and kind and kind not in (*FULL_DISK, *BROKEN)
                if is_due and trigger.match(line):
                    result.after = f"step {target or line.strip()} + {1000 * delay_s:.1f} ms"
                    time.sleep(delay_s)
                    result.is_hit = strike(kind, pids, run_dir, rng)


def strike(kind: str, pids: list[int], run_dir: Path, rng: random.Random) -> bool:
    """Does what the kind says; False if the run had ended."""
    try:
        if kind == REMOVED:
            if not (run_dir / "metrics.jsonl").exists():
                return False
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.rmtree(run_dir, ignore_errors=True)  # what was written meanwhile
            os.kill(pids[0], 0)
        elif kind == PAUSE:
            pid = rng.choice(pids)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.1, 1.0))
            os.kill(pid, signal.SIGCONT)
        elif kind == FILE_LIMIT:
            size = rng.randrange(2_000, 60_000)
            resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (size, size))
        elif kind == "SIGKILL all workers":
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        else:
            name = getattr(signal, kind.split()[0])
            at = int(kind[-1]) if kind.startswith("SIGKILL") else rng.randrange(len(pids))
            os.kill(pids[min(at, len(pids) - 1)], name)
    except ProcessLookupError:
        return False
    return True


# ---- The process that forks ---------------------------------------------------------------------


def patch_disk(name: str, count: int) -> None:
    """Makes every write of this process fail, from the count-th call on."""

    def failing(place: str) -> Callable[..., Any]:
        original = getattr(os, place)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count -= 1
            if count <= 0:
                print(f"injected {name} in os.{place}", file=sys.stderr, flush=True)
                raise OSError(FULL_DISK[name], os.strerror(FULL_DISK[name]))
            return original(*args, **kwargs)

        return call

    for place in ("mkdir", "posix_fallocate", "pwrite", "fsync", "rename"):
        setattr(os, place, failing(place))


def serve() -> None:
    """Answers each request with the ranks' process numbers and then with their exit statuses."""
    for name in ("torch._dynamo", "sentencepiece", "tyro", "jinja2", "llamapro.scripts.train"):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pids: list[int] = []
        for rank, words in enumerate(request["words"]):
            if not (pid := os.fork()):
                be_rank(rank, words, request)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        statuses: dict[int, int] = {}
        while len(statuses) < len(pids):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] and not request["apart"]:  # as torchrun ends the others
                for other in set(pids) - statuses.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([statuses[pid] for pid in pids]), flush=True)


def be_rank(rank: int, words: list[str], request: dict[str, Any]) -> None:
    """Is `python train.py WORDS` as one of the ranks; does not return."""
    from llamapro import cli
    from llamapro.scripts import train

    out = os.open(request["pipe"], os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    count, is_apart = len(request["words"]), request["apart"]
    if is_apart and (node := Path(request["pipe"]).parent / "nodes" / f"node-{rank}").exists():
        os.chdir(node)
    os.environ |= request["shim"]
    if count > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(request["port"]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"LOCAL_RANK": "0" if is_apart else str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": "1" if is_apart else str(count)}
    sys.argv = ["train.py", *words]
    try:
        if rank == 0 and "disk" in request:
            patch_disk(*request["disk"])
        cli.run(lambda: train.main(words), leave=os._exit)
    except SystemExit as end:  # a signal after the run's end
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(70)


if __name__ == "__main__":
    serve()
