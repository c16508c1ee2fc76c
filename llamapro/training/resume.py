"""Resuming: which training checkpoint a run goes on from, whether it still may, and alone.

A run is what it was only with the same frozen weights, tokenizer and corpora. Paths do not say so:
their contents are hashed when a run starts, kept in every `state.json`, and compared on resume.
"""

import fcntl
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import load_state, newest_intact
from llamapro.checkpoints.tensors import combine_hashes, hash_tensors
from llamapro.errors import CheckpointError, ConfigError
from llamapro.files import make_directory
from llamapro.text.store import TokenStore
from llamapro.training.distributed import Ranks

LOCK_FILE = "lock"


# ---- Where to go on ----------------------------------------------------------------------------


def find_resume_point(
    run_dir: Path, ranks: Ranks
) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """Finds where to go on; the main rank reads and hashes, every rank must call it.

    Returns:
        The newest intact training checkpoint and its state, None and None in a fresh run, and one
        message for each newer one that is damaged.

    Raises:
        CheckpointError: on every rank, if there are training checkpoints and none is intact.
    """
    error, path, state = None, None, None
    damaged: list[str] = []
    if ranks.is_main:
        try:
            path, damaged = newest_intact(run_dir)
            state = load_state(path) if path else None
        except CheckpointError as failure:
            error = str(failure)
    error, path, state, damaged = ranks.from_main((error, path, state, damaged))
    if error:
        raise CheckpointError(error)
    return path, state, damaged


# ---- Identity: what must be the same for a run to go on -----------------------------------------


def make_identity(
    checkpoint: Checkpoint | None,
    trainable: Iterable[str],
    tokenizer_sha256: str,
    stores: dict[str, TokenStore],
) -> dict[str, Any]:
    """Hashes what a run is made of; it reads all of the frozen weights.

    Args:
        checkpoint: what is trained; None if from random weights.
        trainable: names of its tensors that train; the others are frozen.
        tokenizer_sha256: the tokenizer's fingerprint.
        stores: label -> tokens of each corpus, such as "train data/code" or "replay", whose bytes
            are what was written (`corpus.tokenize` sees to it).

    Returns:
        JSON-able, for `state["identity"]`: base, tokenizer, data.
    """
    names = set(trainable)
    tensors = checkpoint.tensors.values() if checkpoint else ()
    frozen = [tensor for tensor in tensors if tensor.name not in names]
    hashes = hash_tensors(frozen, "hash frozen weights") if frozen else {}
    return {
        "base": combine_hashes((tensor, hashes[tensor.name]) for tensor in frozen),
        "tokenizer": tokenizer_sha256,
        "data": {
            label: {"tokens": store.tokens, "sha256": store.sha256}
            for label, store in stores.items()
        },
    }


def check_identity(
    saved: Any, identity: dict[str, Any], run_dir: Path, allowed: Sequence[str] = ()
) -> None:
    """Refuses to go on with other weights, another tokenizer or other tokens.

    Args:
        saved: what `make_identity` returned when the training checkpoint was saved.
        identity: what `make_identity` returns now.
        run_dir: the run directory, for the message.
        allowed: settings (`resume.allow`) whose things may differ.

    Raises:
        ConfigError: naming everything that differs.
        CheckpointError: the training checkpoint does not hold an identity.
    """
    try:
        before = _named(saved)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{run_dir}: its training checkpoints do not say which base, tokenizer and data they "
            "were made with; choose another --run-dir"
        ) from None
    now = _named(identity)
    changed = {
        thing: f"{thing[1]} was {before.get(thing, 'not there')}, is {now.get(thing, 'not there')}"
        for thing in before | now
        if before.get(thing) != now.get(thing) and thing[0] not in allowed
    }
    if changed:
        shown = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1...", "; ".join(changed.values()))
        settings = " ".join(dict.fromkeys(setting for setting, _ in changed))
        raise ConfigError(
            f"{run_dir} holds a run made of other things: {shown}; put them back to continue it, "
            f"choose another --run-dir, or allow them: --resume.allow {settings}"
        )


def _named(identity: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Returns (setting that names it, name) -> value as text, for each thing that can differ."""
    named = {
        ("model.path", "the frozen base model"): f"sha256 {identity['base']}",
        ("model.tokenizer", "the tokenizer"): f"sha256 {identity['tokenizer']}",
    }
    for label, found in identity["data"].items():
        kind = label.split(" ", 1)[0]  # "train" or "val"
        text = f"{found['tokens']:,} tokens (sha256 {found['sha256']})"
        setting = "replay.data" if kind == "replay" else f"data.{kind}"
        named[setting, f"data {label!r}"] = text
    return named


# ---- One run in a run directory -----------------------------------------------------------------


class RunLock:
    """Keeps a second run out of a run directory; for one process, `locked` is for all ranks.

    The kernel holds the lock and releases it when the process ends, however it ends. The file
    `lock` says who has it. A run directory that was made for it and is still empty goes again.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file = run_dir / LOCK_FILE

    def __enter__(self) -> Self:
        """Takes the lock; raises ConfigError if another run has it or there can be none."""
        try:
            while not self._take():
                pass
        except BlockingIOError:
            raise ConfigError(
                f"{self._run_dir}: another run is writing here ({self._holder()}); wait for it, "
                "stop it, or choose another --run-dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self._file}: cannot be locked: {error.strerror}; choose another --run-dir"
            ) from None
        return self

    def _take(self) -> bool:
        """Opens and locks; False if the file was removed in between, by the one who had it."""
        self._is_new = not self._run_dir.exists()
        make_directory(self._run_dir)
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._fd), os.stat(self._file)):
                raise FileNotFoundError
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        except FileNotFoundError:
            os.close(self._fd)
            return False
        except OSError:
            os.close(self._fd)
            raise
        return True

    def _holder(self) -> str:
        with suppress(OSError, ValueError):
            return self._file.read_text(encoding="utf-8")[:200].strip() or "it has just started"
        return "it has just ended"

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.unlink()
            if self._is_new:
                self._run_dir.rmdir()  # fails, as it should, if anything was written
        os.close(self._fd)


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Holds the run directory's lock on the main rank while the body runs; every rank must enter.

    Raises:
        ConfigError: on every rank, if another run has it.
    """
    error = None
    with ExitStack() as stack:
        if ranks.is_main:
            try:
                stack.enter_context(RunLock(run_dir))
            except ConfigError as failure:
                error = str(failure)
        if error := ranks.from_main(error):
            raise ConfigError(error)
        yield
