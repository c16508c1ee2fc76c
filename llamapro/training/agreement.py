"""Processes on several machines train on the same things, or all of them end with one message.

Each process reads its own command line, code and disk. What differs among them would change the
run in silence, or make some wait for ever in an operation that the others do not start. So they
compare it before they start, and a mistake on one machine ends the run on all.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from llamapro import __version__, kernels, scripts
from llamapro.checkpoints.run import MANIFEST_FILE, find_damage
from llamapro.errors import ConfigError, Problems, UserError
from llamapro.text.store import INDEX_FILE, TokenStore
from llamapro.training import distributed, peers
from llamapro.training.lock import LOCK_FILE
from llamapro.training.settings import Settings

T = TypeVar("T")
Facts = dict[str, str]  # what must be the same everywhere: name -> value
# Settings that may differ, because the main process alone uses them.
LOCAL = {"config", "json", "processes", "data.workers", "log_to"}
FIX = "give every machine the same command, code and files"
HEAR_S = 10.0  # for the others to read why the run ends, and for a shared directory to show a file


# ---- Before the process group is up ------------------------------------------------------------


def open_together(open_job: Callable[[], T], describe: Callable[[T], Facts]) -> T:
    """Opens a run's inputs in every process that torchrun started, and compares their facts.

    Raises:
        UserError, SystemExit: what `open_job` raised here.
        ConfigError: it failed elsewhere, or the processes differ; the same message everywhere.
        LostProcessError: another process has ended.
    """
    if distributed.world_size() == 1:
        return open_job()
    store, rank, size = distributed.meeting_place()
    mine: dict[str, Any] = {"where": f"rank {rank} on {socket.gethostname()}", "facts": {}}
    failure: UserError | SystemExit | None = None
    with peers.loss_is_said(), peers.watched(store, rank, size, "opening their files"):
        try:
            job = open_job()
            mine["facts"] = describe(job)
        except UserError as error:
            failure, mine["error"] = error, f"{type(error).__name__}: {error}"
        except SystemExit as error:
            failure, mine["error"] = error, "its command line cannot be used"
        store.set(f"opened-{rank}", json.dumps(mine))
        if rank == 0:
            found = [json.loads(_poll(store, f"opened-{other}")) for other in range(size)]
            store.set("verdict", json.dumps(difference(found)))
        verdict = json.loads(_poll(store, "verdict"))
        if failure or verdict:
            store.add("heard", 1)  # the store goes with the first process that ends
            until = time.monotonic() + HEAR_S
            while store.add("heard", 0) < size and time.monotonic() < until:
                time.sleep(0.05)
            raise failure or ConfigError(verdict)
        return job


def _poll(store: Any, key: str) -> bytes:
    """Waits for a key; in Python, where a signal's handler can run."""
    while not store.check([key]):
        time.sleep(0.02)
    return store.get(key)


def difference(found: list[dict[str, Any]]) -> str:
    """Returns in words what is wrong with, or differs among, the processes; "" for nothing."""
    for process in found:
        if "error" in process:
            return f"{process['where']}: {process['error']}"
    first, wrong = found[0], Problems(limit=4)
    for name in dict.fromkeys(name for process in found for name in process["facts"]):
        value = first["facts"].get(name, "not there")
        for process in found:
            if (other := process["facts"].get(name, "not there")) != value:
                wrong.add(f"{name} is {value} on {first['where']}, {other} on {process['where']}")
                break
    text = wrong.text("the processes of this run differ")
    return f"{text}; {FIX}" if text else ""


def facts(settings: Settings) -> Facts:
    """Returns settings, code and versions, which must be the same in every process."""
    found = {k: json.dumps(v) for k, v in settings.flat().items() if k not in LOCAL}
    return found | {"the code of llamapro": code_hash(), "PyTorch": torch.__version__}


def code_hash() -> str:
    """Returns version and hash of the sources; the version does not show an edited line."""
    digest = hashlib.sha256()
    files = [*Path(__file__).parents[1].rglob("*.py"), *Path(kernels.__file__).parent.glob("*.py")]
    for file in sorted([*files, Path(scripts.__path__[0]) / "train.py"]):
        digest.update(file.read_bytes())
    return f"{__version__}, {digest.hexdigest()[:16]}"


# ---- With the process group: the files of each machine -----------------------------------------


@dataclass(frozen=True)
class Seen:
    """The inputs of the main process, for a process of every other machine to compare."""

    files: dict[Path, str]  # text of the run directory's lock, and of the manifest to resume from
    stores: dict[str, tuple[Path, str]]  # label -> path and hash of each corpus
    tensors: dict[str, str]  # name -> SHA-256 of each tensor of `model.path`

    @classmethod
    def of(
        cls,
        run_dir: Path,
        resume_from: Path | None,
        stores: dict[str, TokenStore],
        tensors: dict[str, str],
    ) -> "Seen":
        """Reads it, on the main process."""
        files = [run_dir / LOCK_FILE] + ([resume_from / MANIFEST_FILE] if resume_from else [])
        paths = {label: (store.path, store.sha256) for label, store in stores.items()}
        return cls({file: file.read_text("utf-8") for file in files}, paths, tensors)

    def check(
        self, run_dir: Path, resume_from: Path | None, fingerprint: str, tensors: dict[str, str]
    ) -> None:
        """Raises ConfigError if this machine has something else; names it, and what to share."""
        here = socket.gethostname()
        for file, text in self.files.items():
            if not _is_visible(file) or file.read_text("utf-8") != text:
                raise ConfigError(_not_shared(f"run_dir {run_dir}", file))
        for problem in find_damage(resume_from) if resume_from else ():
            raise ConfigError(f"{problem}, as {here} sees it")
        for label, (path, sha256) in self.stores.items():
            if not _is_visible(path / INDEX_FILE):
                raise ConfigError(_not_shared(f"data.cache_dir {path.parent}", path))
            if (found := TokenStore(path, fingerprint).sha256) != sha256:
                raise ConfigError(f"data {label!r} on {here}: sha256 {found}, not {sha256}; {FIX}")
        for name, sha256 in self.tensors.items():
            if (found := tensors.get(name, "")) != sha256:
                raise ConfigError(
                    f"model.path on {here} is another model than on the main process's machine: "
                    f"{name!r} has sha256 {found[:16]}..., not {sha256[:16]}...; {FIX}"
                )


def _not_shared(name: str, file: Path) -> str:
    return (
        f"{name}: {socket.gethostname()} does not see {file.name} as the main process wrote it; "
        "put it on a file system that all machines share"
    )


def _is_visible(file: Path) -> bool:
    """Whether a file is there; a network file system may take seconds to show it."""
    until = time.monotonic() + HEAR_S
    while not file.exists() and time.monotonic() < until:
        for folder in (file.parent.parent, file.parent):
            if folder.is_dir():
                os.listdir(folder)  # asks the server
        time.sleep(0.2)
    return file.exists()
