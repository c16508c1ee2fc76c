"""GGUF files, llama.cpp's format: their metadata, and tensors that are read a few rows at a time.

A file is a header (names, sizes, metadata) and the tensors' bytes. The `gguf` library knows the
quantisations. Its own reader trusts every size in a header and takes seconds for a vocabulary, so
the header is read here, where a damaged or hostile one is refused before it takes memory.
"""

import math
import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamapro.errors import CheckpointError, ConfigError, needed
from llamapro.files import refuse_large

# struct's codes of the format's number types; 8 is a text and 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
MAX_HEADER_BYTES = 1 << 26  # Llama 3's header, with its vocabulary, has 8 MB
MAX_TENSORS = 1 << 16
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PIECE = re.compile(r"\.gguf[.-](split|part)-?\w")  # of a file that was cut anywhere


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file; `kind` is the library's quantisation type, `shape` PyTorch's."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    file: Path
    offset: int
    row_bytes: int

    def read(self, start: int, count: int) -> Tensor:
        """Returns rows of the tensor, dequantised: (count, shape[-1]) in fp32."""
        from gguf.quants import dequantize

        size, at = count * self.row_bytes, self.offset + start * self.row_bytes
        raw = np.fromfile(self.file, np.uint8, size, offset=at)
        if len(raw) < size:
            raise CheckpointError(f"{self.file}: ends inside tensor {self.name!r}")
        with np.errstate(all="ignore"):
            return torch.from_numpy(dequantize(raw.reshape(count, self.row_bytes), self.kind))


def open_gguf(file: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor], list[Path]]:
    """Opens a model in one GGUF file, or in parts of which `file` is any.

    Returns:
        The metadata, the tensors by name, and the files.
    """
    metadata, tensors = _read_file(file)
    count = metadata.get("split.count", 0)
    if type(count) is not int:
        raise CheckpointError(f"{file}: split.count is {count!r}, expected a whole number")
    if count <= 1:
        return metadata, tensors, [file]
    match = _PART.fullmatch(file.name)
    if not match or int(match[3]) != count:
        raise ConfigError(
            f"{file}: is one of {count} parts, but is not named NAME-0000N-of-{count:05d}.gguf; "
            "give all parts their original names"
        )
    files = [file.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for part in files:
        if not part.exists():
            raise ConfigError(f"{part}: missing; all {count} parts of {file.name} must be there")
    parts = [_read_file(part) for part in files]
    for number, (part, (values, _)) in enumerate(zip(files, parts, strict=True)):
        found = (values.get("split.no"), values.get("split.count"))
        if found != (number, count):
            raise CheckpointError(
                f"{part}: split.no and split.count are {found[0]} and {found[1]}, expected "
                f"{number} and {count}; it is another model's part or was renamed"
            )
    merged = {name: tensor for _, tensors in parts for name, tensor in tensors.items()}
    total, expected = sum(len(t) for _, t in parts), parts[0][0].get("split.tensors.count")
    if not len(merged) == total == (total if expected is None else expected):
        raise CheckpointError(
            f"{files[0]}: the parts have {len(merged)} different tensors, split.tensors.count is "
            f"{expected}; they are parts of different models"
        )
    return parts[0][0], merged, files


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads one file's header: metadata, and tensors by name."""
    if not file.exists() or file.is_dir():
        raise ConfigError(f"{file}: no such file; give a model's .gguf file")
    if _PIECE.search(file.name):
        raise ConfigError(f"{file}: a piece of a file; join all: cat PIECES... > MODEL.gguf")
    refuse_large(file)
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            _check_start(file, handle.read(8))
            length = min(size, MAX_HEADER_BYTES)
            with mmap.mmap(handle.fileno(), length, access=mmap.ACCESS_READ) as data:
                return _parse(file, _Header(data, 8), size)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(
            f"{file}: truncated or damaged: {size:,} bytes, {error}; download it again"
        ) from None


def _check_start(file: Path, start: bytes) -> None:
    """Raises CheckpointError if a file does not begin as GGUF of a version that can be read."""
    if start[:4] != b"GGUF" or len(start) < 8:
        raise CheckpointError(
            f"{file}: begins with {start[:4]!r}, not with b'GGUF' and a version: not a GGUF file"
        )
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"{file}: a big-endian file; convert it with llama.cpp's gguf_convert_endian.py, or "
            "download the little-endian one"
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{file}: version {version} of GGUF, expected 2 or 3; convert the model again with "
            "llama.cpp"
        )


class _Header:
    """Takes values from the beginning of a file; raises ValueError where it ends."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"its header asks for {count:,} bytes at byte {self.at:,}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        """Returns a metadata value: a number, a text, or a list of one of these."""
        kind = self.number("I")
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _TEXT:
                if count > (len(self.data) - self.at) // 8:
                    raise ValueError(f"its header has a list of {count:,} texts")
                return [self.text() for _ in range(count)]
            code = f"<{_code(kind)}"
            return np.frombuffer(self.take(count * struct.calcsize(code)), code).tolist()
        if kind == _TEXT:
            return self.text()
        number = self.number(_code(kind))
        # The shortest decimal of the same fp32 number: 1e-05, and not 9.999999747378752e-06.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"its header has a value of unknown type {kind}")
    return _NUMBERS[kind]


def _parse(file: Path, header: _Header, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads counts, metadata and tensors; raises ValueError where they cannot be right."""
    num_tensors, num_values = header.number("Q"), header.number("Q")
    if num_tensors > MAX_TENSORS or num_values > MAX_TENSORS:
        raise ValueError(f"its header claims {num_tensors:,} tensors and {num_values:,} values")
    values = [(header.text(), header.value()) for _ in range(num_values)]
    infos = []
    for _ in range(num_tensors):
        name, dims = header.text(), header.number("I")
        if not 0 < dims <= 4:
            raise ValueError(f"tensor {name[:80]!r} has {dims} dimensions")
        sizes = [header.number("Q") for _ in range(dims)]
        infos.append((name, tuple(reversed(sizes)), header.number("I"), header.number("Q")))
    for names in ([name for name, _ in values], [name for name, *_ in infos]):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"its header names {twice[0][:80]!r} twice")
    metadata = dict(values)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = header.at + -header.at % alignment
    tensors = {}
    for name, shape, code, offset in infos:
        kind, block, block_bytes = _quantisation(file, name, code)
        elements = math.prod(shape)
        if not elements or shape[-1] % block:
            raise ValueError(f"tensor {name[:80]!r} is {kind.name} of shape {list(shape)}")
        end = start + offset + elements // block * block_bytes
        if end > size:
            raise ValueError(f"tensor {name[:80]!r} ends at byte {end:,}")
        row_bytes = shape[-1] // block * block_bytes
        tensors[name] = GGUFTensor(name, kind, shape, file, start + offset, row_bytes)
    return metadata, tensors


def _quantisation(file: Path, name: str, code: int) -> tuple[Any, int, int]:
    """Returns a type of the library, its values per block and its bytes per block."""
    with needed(f"{file}: GGUF needs gguf", "gguf"):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    known, kind = {int(k): k for k in GGML_QUANT_SIZES}, f"type {code}"
    try:
        kind = GGMLQuantizationType(code).name
        block, block_bytes = GGML_QUANT_SIZES[known[code]]
        dequantize(np.zeros((1, block_bytes), np.uint8), known[code])
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(
            f"{file}: tensor {name[:80]!r} is quantised as {kind}, which the gguf library cannot "
            "dequantise; upgrade it (pip install -U gguf), or use another file of this model"
        ) from None
    return known[code], block, block_bytes
