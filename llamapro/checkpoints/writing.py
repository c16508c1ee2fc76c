"""Streams safetensors into a directory, shard by shard.

Memory stays at one piece of one tensor, because the header only needs names, dtypes and shapes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from tqdm import tqdm

from llamapro import filesystem
from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE
from llamapro.checkpoints.tensors import (
    DTYPE_CODES,
    DTYPES,
    StoredTensor,
    TensorSpec,
    all_finite,
    tensor_chunks,
)
from llamapro.errors import CheckpointError
from llamapro.files import write_json

MAX_SHARD_BYTES = 5 * 10**9
Part = Callable[[], Iterable[memoryview | bytes]]  # returns bytes in pieces


@dataclass(frozen=True)
class Target(TensorSpec):
    """A tensor to write; its bytes are those of the parts, one after the other."""

    parts: Sequence[Part]

    def chunks(self) -> Iterator[memoryview | bytes]:
        """Yields the bytes in pieces; each is written before the next is asked for."""
        return chain.from_iterable(part() for part in self.parts)


def in_memory(tensors: Mapping[str, Tensor]) -> list[Target]:
    """Returns tensors that are in memory as targets."""
    return [
        Target(name, DTYPE_CODES[t.dtype], tuple(t.shape), [partial(tensor_chunks, t)])
        for name, t in tensors.items()
    ]


def hashed(source: StoredTensor | Target, key: str, hashes: dict[str, str]) -> Part:
    """Returns a part that copies a tensor and notes the SHA-256 of its bytes as `hashes[key]`."""

    def chunks() -> Iterator[memoryview | bytes]:
        digest = hashlib.sha256()
        for chunk in source.chunks():
            digest.update(chunk)
            yield chunk
        hashes[key] = digest.hexdigest()

    return chunks


def converted(stored: StoredTensor, dtype: str) -> Part:
    """Returns a part that is a tensor in a dtype, such as fp32 masters in the model's."""
    if stored.dtype == dtype:
        return stored.chunks
    return lambda: tensor_chunks(stored.read().to(DTYPES[dtype]))


def write_safetensors(
    file: Path, targets: Sequence[Target], metadata: dict[str, str] | None = None, threads: int = 1
) -> None:
    """Writes one safetensors file; with one thread tensor after tensor.

    The header takes `metadata`, texts. Raises OSError, whose `filename` names the file, if it
    cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for target in targets:
        start, at = at, at + target.nbytes
        shape, offsets = list(target.shape), [start, at]
        header[target.name] = {"dtype": target.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    try:
        with open(file, "wb", buffering=0) as out:
            lacking = filesystem.lacks(file.parent)
            in_order = filesystem.RANDOM_WRITES in lacking
            # Takes the space at once: a full disk is found before the work, and writing is faster.
            if not lacking & {filesystem.RESERVING, filesystem.RANDOM_WRITES}:
                os.posix_fallocate(out.fileno(), 0, 8 + len(text) + at)
            _write_at(out.fileno(), len(text).to_bytes(8, "little") + text, 0, in_order)

            def write(target: Target, start: int) -> None:
                end = start
                for chunk in target.chunks():
                    end = _write_at(out.fileno(), chunk, end, in_order)
                if end - start != target.nbytes:
                    raise AssertionError(f"{target.name}: {end - start} bytes, not {target.nbytes}")

            ends = accumulate((target.nbytes for target in targets), initial=8 + len(text))
            if threads == 1 or in_order:
                for target, start in zip(targets, ends, strict=False):
                    write(target, start)
            else:
                pool = ThreadPoolExecutor(threads)
                try:
                    list(pool.map(write, targets, ends))
                finally:
                    pool.shutdown(cancel_futures=True)
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def _write_at(fd: int, data: memoryview | bytes, at: int, in_order: bool) -> int:
    """Writes all of the data, at the end of the file if `in_order`; returns the place after it."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view) if in_order else os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    return at


def write_checkpoint(
    directory: Path,
    targets: Sequence[Target],
    label: str = "write",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    written: Callable[[Path], None] | None = None,
) -> None:
    """Writes `model*.safetensors`, with Hugging Face's index if it takes more than one file.

    `directory` must exist. Two threads write, so memory holds two tensors at most, whatever the
    model's size. A file is larger than `max_shard_bytes` only if a single tensor is. `written` is
    called in a thread with one complete file after the other, while the next is written and this
    one is still in the machine's memory. Raises CheckpointError if a number is NaN or infinite,
    perhaps only in the dtype that is written.
    """
    shards: list[list[Target]] = [[]]
    for target in targets:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + target.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(target)
    total = sum(target.nbytes for target in targets)
    weight_map: dict[str, str] = {}
    lock, call = Lock(), Future[None]()
    call.set_result(None)
    bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(1) as beside:

        def counted(target: Target) -> Iterator[memoryview | bytes]:
            dtype = DTYPES[target.dtype]
            for chunk in target.chunks():
                if not all_finite(torch.frombuffer(chunk, dtype=dtype)):
                    fix = "choose --dtype bfloat16, or fetch" if "from-" in label else "fetch"
                    raise CheckpointError(
                        f"{label}: {target.name!r} would hold NaN or infinity in {target.dtype}: "
                        f"the source does, or has numbers over {torch.finfo(dtype).max:g}; nothing "
                        f"was written; {fix} or train the source again"
                    )
                yield chunk
                with lock:
                    bar.update(len(chunk))

        for number, shard in enumerate(shards, 1):
            name = SINGLE_FILE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            checked = [replace(target, parts=[partial(counted, target)]) for target in shard]
            write_safetensors(directory / name, checked, threads=2)
            weight_map |= {target.name: name for target in shard}
            if written is not None:
                call.result()  # an error is raised soon, and no file has to wait long
                call = beside.submit(written, directory / name)
        call.result()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX_FILE, index)
