"""Safetensors files, read tensor by tensor after their header was checked.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range) and the bytes.
Where memory must stay small, tensors are read and not mapped: mapped pages count as resident until
the kernel takes them back.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from llamapro.errors import CheckpointError
from llamapro.files import MAX_JSON_BYTES, parse_json, refuse_large
from llamapro.known_hashes import known_hashes

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
MAX_TENSORS = 1 << 16  # a LLaMA of 1,000 layers has 9,003


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

    @property
    def part(self) -> str:
        """The place of the bytes in the file, as a name."""
        return f"{self.offset}+{self.nbytes}"

    def chunks(self) -> Iterator[memoryview]:
        """Yields the bytes in pieces of at most 1 MiB; each is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.nbytes)))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, CHUNK_BYTES):
                chunk = buffer[: self.nbytes - start]
                self._check_size(file.readinto(chunk), len(chunk))
                yield chunk

    def read(self) -> Tensor:
        """Returns a copy of the tensor in fresh memory."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            found = file.readinto(flat.numpy())  # type: ignore[arg-type]
            self._check_size(found, self.nbytes)
        return flat.view(DTYPES[self.dtype]).view(self.shape)

    def map(self) -> Tensor:
        """Returns the tensor in its file, unread: pages come when touched, and go with it."""
        if not self.nbytes or self.offset % DTYPES[self.dtype].itemsize:
            return self.read()  # no tensor may lie at an odd address
        # Copy on write, because torch wants writable memory; nothing is written.
        pages = np.memmap(self.file, np.uint8, "c", self.offset, self.nbytes)
        return torch.from_numpy(pages).view(DTYPES[self.dtype]).view(self.shape)

    def _check_size(self, found: int, expected: int) -> None:
        if found != expected:
            raise CheckpointError(f"{self.file}: ends inside tensor {self.name!r}")

    def sha256(self) -> str:
        """Returns the SHA-256 of the bytes, in hexadecimal."""
        return sha256_of(self.chunks())


def read_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns name -> where it is stored, and the metadata; raises CheckpointError."""
    refuse_large(file)
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{file}: not a complete safetensors file: {size:,} bytes, header claims "
                    f"{length:,} (at most {MAX_JSON_BYTES:,}); fetch or convert it again"
                )
            text = handle.read(length)
        if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:  # parsed, each takes kilobytes
            raise ValueError(f"its header lists {count:,} tensors, over {MAX_TENSORS:,}")
        # The library takes a name that comes twice for one tensor; `parse_json` refuses it.
        header = parse_json(text)
        with safe_open(file, "pt"):  # the library checks shapes, byte ranges and the file's size
            pass
        metadata = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES or len(entry["shape"]) > MAX_DIMS:
                raise ValueError(
                    f"{name[:80]!r} is {entry['dtype']} {str(entry['shape'])[:80]}, not supported"
                )
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: truncated or damaged, or not a safetensors file: {size:,} bytes "
            f"({str(error)[:300]}); fetch or convert it again"
        ) from None
    start = 8 + length
    return {
        name: StoredTensor(
            name, entry["dtype"], tuple(entry["shape"]), file, start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }, metadata


def sha256_of(chunks: Iterable[memoryview | bytes]) -> str:
    """Returns one SHA-256, in hexadecimal, of bytes that come in pieces."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def combine_hashes(hashes: Iterable[tuple[TensorSpec, str]]) -> str:
    """Returns one SHA-256 for a set of tensors, whatever their order and files."""
    lines = sorted(f"{t.name} {t.dtype} {list(t.shape)} {digest}\n" for t, digest in hashes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_tensors(
    tensors: Iterable[StoredTensor], label: str, cache_dir: str | Path | None = None
) -> dict[str, str]:
    """Returns name -> SHA-256 of the bytes; shows a progress bar with this label.

    With `cache_dir`, tensors of files that have not changed since they were hashed are not read.
    """
    tensors = list(tensors)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        known = {
            file: stack.enter_context(known_hashes(file, cache_dir))
            for file in dict.fromkeys(tensor.file for tensor in tensors)
        }
        wanted = [t for t in tensors if t.part not in known[t.file]]
        total = sum(t.nbytes for t in wanted)
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
            for tensor, digest in zip(wanted, pool.map(StoredTensor.sha256, wanted), strict=True):
                known[tensor.file][tensor.part] = digest
                bar.update(tensor.nbytes)
        return {tensor.name: known[tensor.file][tensor.part] for tensor in tensors}


def all_finite(numbers: Tensor) -> bool:
    """Says whether no number is NaN or infinite, in one pass over a tensor that is not empty.

    `isfinite` makes several: in bf16 on a CPU it takes 20 times as long, more than hashing.
    """
    low, high = numbers.aminmax()  # a NaN is both
    return bool(low.isfinite() & high.isfinite())


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Says whether two tensors have the same dtype, shape and bytes: -0.0 is not 0.0 here."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = (x.contiguous().view(-1).view(torch.uint8).numpy() for x in (one, other))
    even = a.size // 8 * 8  # by words of 8 bytes, six times as fast as by single ones
    words_agree = np.array_equal(a[:even].view(np.int64), b[:even].view(np.int64))
    return words_agree and np.array_equal(a[even:], b[even:])


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes in row-major order, without a second copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
