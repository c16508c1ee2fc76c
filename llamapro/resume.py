"""Resuming: which training checkpoint a run goes on from, whether it still may, and alone.

A run is what it was only with the same frozen weights, tokenizer and corpora. Paths do not say so:
their contents are hashed when a run starts, kept in every `state.json`, and compared on resume.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from llamapro.blocks import TRAINABLE_FILE, training_checkpoints
from llamapro.checkpoint import Checkpoint, combine_hashes, hash_tensors
from llamapro.config import CheckpointError, ConfigError
from llamapro.data import TokenStore
from llamapro.distributed import Ranks

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
LISTED = {TRAINABLE_FILE, OPTIMIZER_FILE, STATE_FILE}  # by the manifest: these, nothing else
MAX_JSON_BYTES = 1 << 26  # a state names every corpus file that was given, and no more
LOCK_FILE = "lock"


# ---- Integrity: what was saved is still there, to the byte --------------------------------------


def newest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest training checkpoint all of whose files are what was saved.

    Returns:
        It, or None in a run without any, and one message for each newer one that is damaged.

    Raises:
        CheckpointError: all are damaged; to start anew would lose them silently.
    """
    damaged: list[str] = []
    for path in reversed(training_checkpoints(run_dir)):
        try:
            read_state(path)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    if damaged:
        raise CheckpointError(
            f"{run_dir}: no training checkpoint is intact: {'; '.join(damaged)}. Restore one, or "
            f"remove {run_dir / 'checkpoints'} to start anew"
        )
    return None, []


def read_state(path: Path) -> dict[str, Any]:
    """Reads `state.json` after checking every file of the training checkpoint by the manifest.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    file = path / MANIFEST_FILE
    manifest = _read_json(file)
    if set(manifest) != LISTED:
        other = ", ".join(repr(name[:80]) for name in sorted(set(manifest) ^ LISTED)[:3])
        raise CheckpointError(f"{file}: damaged: lists other files than it must: {other}")
    for name, entry in manifest.items():
        size, sha256 = (entry.get(k) if isinstance(entry, dict) else 0 for k in ("bytes", "sha256"))
        if type(size) is not int or not re.fullmatch("[0-9a-f]{64}", str(sha256)):
            raise CheckpointError(f"{file}: damaged: {name!r} is {str(entry)[:200]}")
        _check_file(path / name, size, str(sha256))
    return load_state(path)


def _check_file(file: Path, size: int, sha256: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, but {MANIFEST_FILE} lists it")
    try:
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{file}: damaged: {found:,} bytes, {size:,} were saved")
        if file_sha256(file) != sha256:
            raise CheckpointError(f"{file}: damaged: other bytes than were saved")
    except OSError as error:
        raise CheckpointError(f"{file}: not readable: {error.strerror}") from None


def _read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object of ours; whatever else the file is raises a CheckpointError naming it."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: damaged: {size:,} bytes, over {MAX_JSON_BYTES:,}")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: damaged: holds no JSON object")
    return found


def load_state(path: Path) -> dict[str, Any]:
    """Reads `state.json` of a training checkpoint that `newest_intact` found.

    Raises:
        CheckpointError: naming the file and the entry that is missing or of a wrong type.
    """
    file = path / STATE_FILE
    state = _read_json(file)
    kinds: dict[str, tuple[type, ...]] = {"step": (int,), "tokens": (int,), "eval": (dict,)}
    kinds |= {"elapsed_s": (int, float), "settings": (dict,), "loss": (int, float, type(None))}
    for key, allowed in kinds.items():
        if type(state.get(key)) not in allowed:
            raise CheckpointError(f"{file}: damaged: {key!r} is {str(state.get(key))[:80]!r}")
    if path.name != f"step-{state['step']:08d}":
        raise CheckpointError(f"{file}: 'step' is {state['step']}, but it lies in {path.name}")
    return state


def file_sha256(file: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
    """Hashes what a run is made of; it reads all of the frozen weights and of the tokens.

    Args:
        checkpoint: what is trained; None if from random weights.
        trainable: names of its tensors that train; the others are frozen.
        tokenizer_sha256: the tokenizer's fingerprint.
        stores: label -> tokens of each corpus, such as "train data/code".

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
            label: {"tokens": store.tokens, "sha256": _tokens_sha256(store)}
            for label, store in stores.items()
        },
    }


def _tokens_sha256(store: TokenStore) -> str:
    """Hashes the token stream: files that were only moved or touched give the same."""
    digest = hashlib.sha256(store.index["dtype"].encode())
    for shard in store.index["shards"]:
        with open(store.path / shard["file"], "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def check_identity(state: dict[str, Any], identity: dict[str, Any], run_dir: Path) -> None:
    """Refuses to go on with other weights, another tokenizer or other tokens.

    Args:
        state: of the training checkpoint, with what `make_identity` gave when it was saved.
        identity: what `make_identity` gives now.
        run_dir: of the run.

    Raises:
        ConfigError: naming everything that differs.
        CheckpointError: the state says nothing of it, or no such thing.
    """
    try:
        before = _named(state["identity"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{run_dir}: its training checkpoints do not say which base, tokenizer and data they "
            "were made with; choose another --run-dir"
        ) from None
    now = _named(identity)
    changed = [
        f"{name} was {before.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if changed:
        shown = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1...", "; ".join(changed))
        raise ConfigError(
            f"{run_dir} holds a run made of other things: {shown}; put them back to continue it, "
            "or choose another --run-dir"
        )


def _named(identity: dict[str, Any]) -> dict[str, str]:
    """Returns name -> value as text, one entry for each thing that can differ."""
    named = {
        "the frozen base model": f"sha256 {identity['base']}",
        "the tokenizer": f"sha256 {identity['tokenizer']}",
    }
    for label, found in identity["data"].items():
        named[f"data {label!r}"] = f"{found['tokens']:,} tokens (sha256 {found['sha256']})"
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
        self._run_dir.mkdir(parents=True, exist_ok=True)
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
