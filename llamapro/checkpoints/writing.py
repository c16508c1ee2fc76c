"""Writing: safetensors streamed shard by shard into a directory that is complete or not there.

Memory stays at one piece of one tensor, because the header only needs names, dtypes and shapes.
"""

import errno
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE
from llamapro.checkpoints.tensors import ChunksOf, TensorSpec
from llamapro.config import ModelConfig
from llamapro.conversion.companions import tokenizer_files
from llamapro.errors import CheckpointError, ConfigError
from llamapro.text.vocabulary import RANKS_NAME, is_ranks

MAX_SHARD_BYTES = 5 * 10**9


def refuse_source(out_dir: str | Path, *sources: str | Path) -> None:
    """Raises ConfigError if writing `out_dir` could destroy what it is made from.

    With `force` an existing directory is replaced: so it must not be a source or contain one. Links
    are followed.

    Args:
        out_dir: the directory to write.
        sources: the directories and files that are read.
    """
    out = Path(out_dir).resolve()
    for source in sources:
        path = Path(source).resolve()
        if out == path:
            relation = "is also the source"
        elif path.is_relative_to(out):
            relation = f"contains the source {source}"
        else:
            continue
        raise ConfigError(f"{out_dir}: {relation}; choose another output directory")


def make_directory(path: str | Path) -> None:
    """Makes a directory and those above it, each on the disk before this returns.

    Without that, a power failure could take away a directory whose files were all written.

    Raises:
        OSError: it cannot be made; `filename` names it.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _fsync(folder.parent)


def refuse_existing(path: str | Path, force: bool = False) -> None:
    """Raises ConfigError if `path` is there and may not be replaced.

    Args:
        path: the directory to write.
        force: a checkpoint may be replaced; nothing else may.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: exists and is not a directory")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise ConfigError(f"{path}: exists and is not empty; choose another or pass --force")
    if path.is_dir() and any(path.iterdir()) and not _is_checkpoint(path):
        raise ConfigError(f"{path}: holds no checkpoint; --force replaces checkpoints only")


@contextmanager
def output_directory(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Gives a new directory beside `path` that takes its place only if the body succeeds.

    A failure, an interrupt or a full disk removes what was written; with `force` the existing
    directory is replaced, and only then.

    Raises:
        ConfigError: as `refuse_existing`; or the directory cannot be made.
        CheckpointError: writing failed; the message names the file.
    """
    path = Path(path).resolve()  # a link to another disk: written there, and the link stays
    refuse_existing(path, force)
    prefix = f".{path.name}.partial-{socket.gethostname()}-"
    try:
        make_directory(path.parent)
        for stale in path.parent.glob(prefix + "*"):  # left by a killed process of this machine
            if not _is_alive(stale.name.removeprefix(prefix)):
                shutil.rmtree(stale, ignore_errors=True)
        aside = path.parent / f"{prefix}{os.getpid()}"
        aside.mkdir()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be created: {error.strerror}") from None
    try:
        yield aside
        for file in aside.rglob("*"):
            _fsync(file)
        _fsync(aside)
        _put_in_place(aside, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CheckpointError(
            f"{error.filename or path}: {'disk full' if full else error.strerror or error} while "
            f"writing {path}; the partial output was removed, nothing else was changed"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, path: Path) -> None:
    """Renames; an existing directory is moved away first and removed last."""
    old = aside.with_name(aside.name.replace(".partial-", ".replaced-"))
    # Between the two renames `path` does not exist; a signal must not land there.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "params.json").exists()


def _is_alive(pid: str) -> bool:
    if pid == str(os.getpid()):  # numbers come again, in a container at every start
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        pass
    return True


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_safetensors(
    file: Path,
    specs: Sequence[TensorSpec],
    chunks_of: ChunksOf,
    metadata: dict[str, str] | None = None,
    threads: int = 1,
) -> None:
    """Writes one safetensors file, tensor after tensor.

    Args:
        file: the file to create.
        specs: what it holds, in order.
        chunks_of: gives a tensor's bytes in pieces, which are written at once and may be reused.
        metadata: text that goes into the header.
        threads: how many tensors are written at a time; with one, `chunks_of` is called in order.

    Raises:
        OSError: the file cannot be written; `filename` names it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    try:
        with open(file, "wb", buffering=0) as out:
            # Takes the space at once: a full disk is found before the work, and writing is faster.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(out.fileno(), 0, 8 + len(text) + at)
            _write_at(out.fileno(), len(text).to_bytes(8, "little") + text, 0)

            def write(spec: TensorSpec, start: int) -> None:
                end = start
                for chunk in chunks_of(spec):
                    end = _write_at(out.fileno(), chunk, end)
                if end - start != spec.nbytes:
                    raise AssertionError(f"{spec.name}: {end - start} bytes, not {spec.nbytes}")

            ends = accumulate((spec.nbytes for spec in specs), initial=8 + len(text))
            if threads == 1:
                for spec, start in zip(specs, ends, strict=False):
                    write(spec, start)
            else:
                pool = ThreadPoolExecutor(threads)
                try:
                    list(pool.map(write, specs, ends))
                finally:
                    pool.shutdown(cancel_futures=True)
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def _write_at(fd: int, data: memoryview | bytes, at: int) -> int:
    """Writes all of the data; returns the place after it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    return at


def write_checkpoint(
    directory: Path,
    specs: Sequence[TensorSpec],
    chunks_of: ChunksOf,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str = "write",
) -> None:
    """Writes `model*.safetensors`, with Hugging Face's index if it takes more than one file.

    Args:
        directory: an existing directory, usually from `output_directory`.
        specs: what it holds, in order.
        chunks_of: as for `write_safetensors`; called by two threads.
        max_shard_bytes: a file is closed before it would pass this; one tensor always fits.
        label: shown by the progress bar.
    """
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    total = sum(s.nbytes for s in specs)
    weight_map: dict[str, str] = {}
    lock = Lock()
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:

        def counted(spec: TensorSpec) -> Iterator[memoryview | bytes]:
            for chunk in chunks_of(spec):
                yield chunk
                with lock:
                    bar.update(len(chunk))

        for number, shard in enumerate(shards, 1):
            name = SINGLE_FILE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / name, shard, counted, threads=2)
            weight_map |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(directory: Path, config: ModelConfig, files: Iterable[Path]) -> None:
    """Writes `config.json` and copies tokenizer, generation and licence files beside it.

    A `tokenizer.model` that comes alone gets the files that transformers needs with it. One of
    Llama 3's ranks goes to `original`, as in Meta's repositories: transformers and llama.cpp take
    what lies beside a tokenizer.json for sentencepiece's.
    """
    (directory / "config.json").write_text(config.to_json(), encoding="utf-8")
    for file in files:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    vocabulary = directory / "tokenizer.model"
    if not vocabulary.exists():
        return
    if not any(directory.glob("tokenizer*.json")):
        for name, content in tokenizer_files(vocabulary, config.max_position_embeddings).items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (directory / name).write_text(text, encoding="utf-8")
    if is_ranks(vocabulary.read_bytes()):
        (directory / RANKS_NAME).parent.mkdir()
        vocabulary.rename(directory / RANKS_NAME)
