"""Streams safetensors into a directory, shard by shard.

Memory stays at one piece of one tensor, because the header only needs names, dtypes and shapes.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from threading import Lock

import torch
from tqdm import tqdm

from llamapro import filesystem
from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE
from llamapro.checkpoints.tensors import DTYPES, ChunksOf, TensorSpec, all_finite
from llamapro.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9


def write_safetensors(
    file: Path,
    specs: Sequence[TensorSpec],
    chunks_of: ChunksOf,
    metadata: dict[str, str] | None = None,
    threads: int = 1,
) -> None:
    """Writes one safetensors file, tensor after tensor.

    `chunks_of` returns a tensor's bytes in pieces; each is written before the next is asked for.
    With one thread it is called in the order of `specs`. The header takes `metadata`, texts.

    Raises:
        OSError: the file cannot be written; `filename` names it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for spec in specs:
        start, at = at, at + spec.nbytes
        shape, offsets = list(spec.shape), [start, at]
        header[spec.name] = {"dtype": spec.dtype, "shape": shape, "data_offsets": offsets}
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

            def write(spec: TensorSpec, start: int) -> None:
                end = start
                for chunk in chunks_of(spec):
                    end = _write_at(out.fileno(), chunk, end, in_order)
                if end - start != spec.nbytes:
                    raise AssertionError(f"{spec.name}: {end - start} bytes, not {spec.nbytes}")

            ends = accumulate((spec.nbytes for spec in specs), initial=8 + len(text))
            if threads == 1 or in_order:
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


def _write_at(fd: int, data: memoryview | bytes, at: int, in_order: bool) -> int:
    """Writes all of the data, at the end of the file if `in_order`; returns the place after it."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view) if in_order else os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    return at


def write_checkpoint(
    directory: Path,
    specs: Sequence[TensorSpec],
    chunks_of: ChunksOf,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str = "write",
    written: Callable[[Path], None] | None = None,
) -> None:
    """Writes `model*.safetensors`, with Hugging Face's index if it takes more than one file.

    `directory` must exist. Two threads call `chunks_of`. A file is larger than `max_shard_bytes`
    only if a single tensor is. `written` is called with each complete file.

    Raises:
        CheckpointError: a number is NaN or infinite, perhaps only in the dtype that is written.
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
                if not all_finite(torch.frombuffer(chunk, dtype=DTYPES[spec.dtype])):
                    fix = "choose --dtype bfloat16, or fetch" if "from-" in label else "fetch"
                    raise CheckpointError(
                        f"{label}: {spec.name!r} would hold NaN or infinity in {spec.dtype}: the "
                        f"source does, or has numbers over {torch.finfo(DTYPES[spec.dtype]).max:g};"
                        f" nothing was written; {fix} or train the source again"
                    )
                yield chunk
                with lock:
                    bar.update(len(chunk))

        for number, shard in enumerate(shards, 1):
            name = SINGLE_FILE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / name, shard, counted, threads=2)
            weight_map |= {spec.name: name for spec in shard}
            if written is not None:
                written(directory / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
