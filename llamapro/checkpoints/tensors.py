"""Safetensors files: read tensor by tensor, and believed in nothing before it was checked.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range) and the bytes.
Tensors are read with plain reads, not mapped, where memory must stay small: mapped pages count as
resident until the kernel wants them back.
"""

import hashlib
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llamapro.errors import CheckpointError
from llamapro.files import MAX_JSON_BYTES, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK_BYTES = 1 << 20  # read, hashed and written while it is in the cache
MAX_DIMS = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: its bytes start at `offset`."""

    file: Path
    offset: int

    def chunks(self) -> Iterator[memoryview]:
        """Yields the bytes in pieces of at most 1 MiB; each is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.nbytes)))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    raise CheckpointError(f"{self.file}: ends inside tensor {self.name!r}")
                yield buffer[:count]
                left -= count

    def read(self) -> Tensor:
        """Returns a copy of the tensor in fresh memory."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        view, at = memoryview(flat.numpy()), 0  # type: ignore[arg-type]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            while at < self.nbytes:
                count = file.readinto(view[at:])
                if not count:
                    raise CheckpointError(f"{self.file}: ends inside tensor {self.name!r}")
                at += count
        return flat.view(DTYPES[self.dtype]).view(self.shape)

    def map(self) -> Tensor:
        """Returns the tensor in its file, unread: pages come when touched, and go with it."""
        if not self.nbytes or self.offset % DTYPES[self.dtype].itemsize:
            return self.read()  # no tensor may lie at an odd address
        inset = self.offset % mmap.ALLOCATIONGRANULARITY
        start, size = self.offset - inset, inset + self.nbytes
        with open(self.file, "rb") as file:
            # Copy on write, because torch wants writable memory; nothing is written.
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
        flat = torch.frombuffer(pages, dtype=torch.uint8, count=self.nbytes, offset=inset)
        return flat.view(DTYPES[self.dtype]).view(self.shape)

    def sha256(self) -> str:
        """Returns the SHA-256 of the bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads what a safetensors file holds, and checks that all of it is there, and nothing else.

    Nothing it says is believed before it is compared with the size of the file: tensors lie side by
    side from the header to the end, as the format demands. So no tensor takes more memory than the
    file has bytes.

    Raises:
        CheckpointError: naming the file, if it is missing, truncated or not safetensors.
    """
    return _read_header(file)[0]


def read_metadata(file: Path) -> dict[str, str]:
    """Returns the texts in a safetensors file's header, after all checks of `read_header`."""
    return _read_header(file)[1]


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")
    if not file.is_file():
        raise CheckpointError(f"{file}: not a plain file")
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{file}: not a complete safetensors file: {size:,} bytes, header claims "
                    f"{length:,} (at most {MAX_JSON_BYTES:,}); fetch or convert it again"
                )
            header = parse_json(handle.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("'__metadata__' holds more than text")
        data = 8 + length
        tensors = {name: _tensor(name, entry, file, data) for name, entry in header.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from None
    at = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise CheckpointError(
                f"{file}: damaged: {tensor.name[:80]!r} starts at byte {tensor.offset:,}, but the "
                f"tensors before it end at {at:,}"
            )
        at += tensor.nbytes
    if size != at:
        raise CheckpointError(
            f"{file}: truncated or damaged: {size:,} bytes, its header describes {at:,}; "
            "fetch or convert it again"
        )
    return tensors, metadata


def _tensor(name: str, entry: Any, file: Path, data: int) -> StoredTensor:
    """Reads one entry of a header whose data starts at `data`; raises ValueError if it is wrong."""

    def are_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)

    fields: list[Any] = [
        entry.get(key) if isinstance(entry, dict) else None
        for key in ("dtype", "shape", "data_offsets")
    ]
    dtype, shape, places = fields
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name[:80]!r} has unknown dtype {str(dtype)[:80]!r}")
    if not are_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{name[:80]!r} has shape {str(shape)[:80]}")
    if not are_sizes(places) or len(places) != 2:
        raise ValueError(f"{name[:80]!r} has data_offsets {str(places)[:80]}")
    tensor = StoredTensor(name, dtype, tuple(shape), file, data + places[0])
    if places[1] - places[0] != tensor.nbytes:
        raise ValueError(
            f"{name[:80]!r} {dtype} {shape} has a byte range of {places[1] - places[0]:,}, "
            f"expected {tensor.nbytes:,}"
        )
    return tensor


def combine_hashes(hashes: Iterable[tuple[TensorSpec, str]]) -> str:
    """Returns one SHA-256 for a set of tensors, whatever their order and files."""
    lines = sorted(f"{t.name} {t.dtype} {list(t.shape)} {digest}\n" for t, digest in hashes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_tensors(tensors: Iterable[StoredTensor], label: str) -> dict[str, str]:
    """Returns name -> SHA-256 of the bytes, read by two threads, with a progress bar."""
    tensors = list(tensors)
    total = sum(t.nbytes for t in tensors)
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar,
    ):
        hashes = {}
        for tensor, digest in zip(tensors, pool.map(StoredTensor.sha256, tensors), strict=True):
            hashes[tensor.name] = digest
            bar.update(tensor.nbytes)
    return hashes


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes in row-major order, without a second copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


ChunksOf = Callable[[TensorSpec], Iterable[memoryview | bytes]]
