"""Run directories on disk: training checkpoints that are checked byte by byte, and the log.

A training checkpoint holds the files of `LISTED`, and `manifest.json` with size and SHA-256 of
each. They are checked here before a run is resumed or merged.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llamapro.errors import CheckpointError, DataError
from llamapro.files import read_json, write_json

T = TypeVar("T")
TRAINABLE_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"  # written once, when a run starts
LISTED = {TRAINABLE_FILE, OPTIMIZER_FILE, STATE_FILE}  # the files that a manifest lists
# Earlier versions also saved the state of the random generators, from which nothing is drawn.
OLD_LISTED = LISTED | {"rng.safetensors"}
FORMAT_VERSION = 2  # of training checkpoints; the first one's manifests do not say it
MAX_STATE_BYTES = 1 << 26  # a state names every corpus file that was given, and no more

# Values of the log that are read again; null where they were not finite.
_NUMBERS = "loss learning_rate tokens tokens_seen tokens_per_s elapsed_s memory_bytes".split()


def training_checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run's complete training checkpoints, oldest first.

    Raises CheckpointError if their directory cannot be listed: else the run would begin anew.
    """
    folder = run_dir / "checkpoints"
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from None
    return [folder / name for name in sorted(names) if re.fullmatch(r"step-\d{8}", name)]


def write_manifest(path: Path) -> None:
    """Writes `manifest.json`, the last file of a training checkpoint."""
    manifest: dict[str, Any] = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(path.iterdir())
    }
    manifest["format_version"] = FORMAT_VERSION
    write_json(path / MANIFEST_FILE, manifest)


def newest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest training checkpoint whose files are all as they were saved.

    Raises CheckpointError if all are damaged; starting again would lose them silently.

    Returns:
        The checkpoint, or None if the run has none; and a message for each newer damaged one.
    """
    damaged: list[str] = []
    listed = training_checkpoints(run_dir)
    while listed:
        path = listed.pop()
        try:
            read_state(path)
        except CheckpointError as error:
            if not path.exists():  # a running save removed it, and there are newer ones: look again
                listed, damaged = training_checkpoints(run_dir), []
                continue
            damaged.append(str(error))
        else:
            return path, damaged
    if damaged:
        raise CheckpointError(
            f"{run_dir}: no training checkpoint is intact: {'; '.join(damaged)}. Restore one, or "
            f"remove {run_dir / 'checkpoints'} to start anew"
        )
    return None, []


def look_again(call: Callable[[], T]) -> T:
    """Returns what `call` does; calls again where a file that it found is gone when it is read.

    A run that saves meanwhile removes its older training checkpoints.
    """
    for _ in range(10):
        try:
            return call()
        except FileNotFoundError as error:
            gone: BaseException = error
        except CheckpointError as error:
            if not isinstance(error.__cause__ or error.__context__, FileNotFoundError):
                raise
            gone = error
    raise CheckpointError(f"{gone}: gone while it was read")


def read_state(path: Path) -> dict[str, Any]:
    """Checks every file of a training checkpoint and reads `state.json`; raises CheckpointError."""
    for problem in find_damage(path):
        raise CheckpointError(problem)
    return load_state(path)


def find_damage(path: Path) -> Iterator[str]:
    """Checks the files of a training checkpoint one by one; yields what is wrong with each."""
    file = path / MANIFEST_FILE
    try:
        manifest = read_json(file, MAX_STATE_BYTES)
    except CheckpointError as error:
        yield str(error)
        return
    version = manifest.pop("format_version", None)
    if version is not None and version != FORMAT_VERSION:
        yield (
            f"{file}: written by another version of llamapro (format {str(version)[:20]}, this one "
            f"reads {FORMAT_VERSION}); use the version that wrote it"
        )
        return
    if set(manifest) not in (LISTED, OLD_LISTED):
        if version is None and TRAINABLE_FILE not in manifest:
            yield f"{file}: written by an older version of llamapro; use the version that wrote it"
            return
        other = ", ".join(repr(name[:80]) for name in sorted(set(manifest) ^ LISTED)[:3])
        yield f"{file}: damaged: lists other files than it must: {other}"
        return
    for name, entry in manifest.items():
        size, sha256 = (entry.get(k) if isinstance(entry, dict) else 0 for k in ("bytes", "sha256"))
        if type(size) is not int or not re.fullmatch("[0-9a-f]{64}", str(sha256)):
            yield f"{file}: damaged: {name!r} is {str(entry)[:200]}"
        elif problem := _compare(path / name, size, str(sha256)):
            yield problem


def _compare(file: Path, size: int, sha256: str) -> str | None:
    """Returns what is wrong with a file, or None; the cheapest check comes first."""
    if not file.is_file():
        return f"{file}: missing, but {MANIFEST_FILE} lists it"
    try:
        if (found := file.stat().st_size) != size:
            return f"{file}: damaged: {found:,} bytes, {size:,} were saved"
        if file_sha256(file) != sha256:
            return f"{file}: damaged: other bytes than were saved"
    except OSError as error:
        return f"{file}: not readable: {error.strerror}"
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Reads `state.json` of a training checkpoint whose files were checked."""
    file = path / STATE_FILE
    state = read_json(file, MAX_STATE_BYTES)
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


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's `metrics.jsonl` in the order they were written.

    A last line without its end is left out: its process was killed, or is still writing it. Raises
    DataError, with the file and the line, if there is no log or a line is not a record.
    """
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{run_dir}: no {METRICS_FILE}; is this a run directory?") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or not even UTF-8
            record = None
        if isinstance(record, dict) and _is_record(record):
            records.append(record)
        elif number < len(lines):  # only the line that no newline ends can be half-written
            shown = line[:60].decode("utf-8", errors="replace")
            raise DataError(
                f"{path}:{number}: expected a JSON object with 'kind', 'step' and numbers, found "
                f"{shown!r}; remove this line"
            )
    return records


def _is_record(record: dict[str, Any]) -> bool:
    """Whether kind, step and the values that are read of a record are of their types."""
    numbers = [record[key] for key in _NUMBERS if record.get(key) is not None]
    return (
        type(step := record.get("step")) is int
        and 0 <= step < 1 << 63
        and isinstance(record.get("kind"), str)
        and isinstance(record.get("set", ""), str)
        and all(type(value) in (int, float) and abs(value) < 1 << 63 for value in numbers)
    )
