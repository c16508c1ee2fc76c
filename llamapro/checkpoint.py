"""Checkpoint directories in Hugging Face layout: opened with every check, read tensor by tensor.

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range) and
the bytes. Tensors are read with plain reads, not mapped, where memory must stay small: mapped pages
count as resident until the kernel wants them back. Whole models are mapped (`load`), so that they
cost one copy, shared between the processes of a machine.
"""

import hashlib
import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from llamapro.config import CheckpointError, ModelConfig
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What travels with the weights: tokenizer, generation settings, licence texts.
COMPANION_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
)
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
# What reading and parsing a damaged JSON text raises; RecursionError where it nests too deep.
_UNREADABLE = (OSError, ValueError, RecursionError)


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
    """Reads what a safetensors file holds, and checks that all of it is there.

    Raises:
        CheckpointError: naming the file, if it is missing, truncated or not safetensors.
    """
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            # Refuse an absurd length before reading it; the format's own limit is 100 MB.
            if size < 8 or length > min(size - 8, 100_000_000):
                raise CheckpointError(
                    f"{file}: not a complete safetensors file: {size:,} bytes, "
                    f"header claims {length:,}; fetch or convert it again"
                )
            header = json.loads(handle.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{file}: {name!r} has unknown dtype {entry['dtype']!r}")
            start, end = entry["data_offsets"]
            tensor = StoredTensor(
                name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + start
            )
            if start < 0 or end - start != tensor.nbytes:
                raise CheckpointError(
                    f"{file}: {name!r} {tensor.dtype} {list(tensor.shape)} has a byte range of "
                    f"{end - start:,}, expected {tensor.nbytes:,}"
                )
            tensors[name] = tensor
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from None
    expected = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size != expected:
        raise CheckpointError(
            f"{file}: truncated or damaged: {size:,} bytes, its header describes {expected:,}; "
            "fetch or convert it again"
        )
    return tensors


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


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory whose files were found complete and of the right shapes.

    Attributes:
        path: the directory.
        config: its `config.json`.
        tensors: name -> where it is stored, in the order of the model's own parameters.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Opens a directory; reads headers only.

        Raises:
            ConfigError: `config.json` is missing or cannot be represented.
            CheckpointError: naming the file, and every tensor that is missing, unexpected or of
                another shape than `config.json` says.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint directory")
        files = _weight_files(path)
        config = ModelConfig.from_file(path / "config.json")
        stored: dict[str, StoredTensor] = {}
        for file in files:
            stored.update(read_header(file))
        return cls(path, config, _match(path, config, stored))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the bytes."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += tensor.nbytes
        return DTYPES[count.most_common(1)[0][0]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def sha256(self) -> str:
        """Returns the identity of the weights: names, dtypes, shapes and bytes, not the files."""
        hashes = hash_tensors(self.tensors.values(), f"hash {self.path.name}")
        return combine_hashes((t, hashes[t.name]) for t in self.tensors.values())

    def layer(self, index: int) -> dict[str, StoredTensor]:
        """Returns one block's tensors under their names inside the block."""
        prefix = f"model.layers.{index}."
        found = {n: t for n, t in self.tensors.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def companions(self) -> list[Path]:
        """Returns the tokenizer, generation and licence files beside the weights."""
        return sorted(f for pattern in COMPANION_FILES for f in self.path.glob(pattern))

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns name -> mapped tensor, converted only where another dtype is asked for."""
        tensors = {}
        for file in sorted({t.file for t in self.tensors.values()}):
            try:
                tensors.update(load_file(file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: {error}") from None
        return {name: tensors[name].to(dtype or tensors[name].dtype) for name in self.tensors}

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> LlamaForCausalLM:
        """Returns the model with these weights, frozen and in evaluation mode.

        Costs one copy of the weights: the model is built on the meta device and the mapped tensors
        are assigned to it.
        """
        model = build_on_meta(self.config)
        load_tensors(model, self.state_dict(dtype))
        return model.to(device).requires_grad_(False).eval()


def _weight_files(path: Path) -> list[Path]:
    """Lists the shards, from the index if there is one."""
    index = path / INDEX_FILE
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
        for name in names:
            # A name with a path could read files the user never meant to hand over.
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise CheckpointError(f"{index}: shard name {name!r} is not a plain file name")
            if not (path / name).is_file():
                raise CheckpointError(f"{path / name}: missing, but {INDEX_FILE} lists it")
        return [path / name for name in names]
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    if any(path.glob("*.pth")):
        fix = f"this is a Meta release: run 'convert.py from-meta {path} OUT_DIR' first"
    elif any(path.glob("pytorch_model*.bin")):
        fix = "pickled weights (pytorch_model*.bin) are not read: save the model as safetensors"
    else:
        fix = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    raise CheckpointError(f"{path}: no weights found; {fix}")


def _match(
    path: Path, config: ModelConfig, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Checks names and shapes against the configuration; returns them in the model's order."""
    expected = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    # Written by old versions of transformers; both are derived, neither is read.
    derived = [n for n in stored if n.endswith("rotary_emb.inv_freq")]
    derived += ["lm_head.weight"] if config.tie_word_embeddings else []
    wrong = []
    for name, shape in expected.items():
        if name not in stored:
            wrong.append(f"missing tensor {name!r}, expected {list(shape)}")
        elif stored[name].shape != shape:
            found = stored[name]
            wrong.append(
                f"{found.file.name}: {name!r} is {list(found.shape)}, "
                f"config.json says {list(shape)}"
            )
    for name in stored:
        if name not in expected and name not in derived:
            wrong.append(f"{stored[name].file.name}: unexpected tensor {name!r}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"{path}: " + "; ".join(wrong[:8]) + more)
    return {name: stored[name] for name in expected}


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes in row-major order, without a second copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


ChunksOf = Callable[[TensorSpec], Iterable[memoryview | bytes]]
