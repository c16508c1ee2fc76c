"""Writes a checkpoint from the tensors of others; expand, merge and strip are plans for it.

A plan is a list of targets. The bytes stream from file to file, so memory holds one tensor of the
two threads that write, whatever the model's size, and a tensor is hashed while it is copied.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from llamapro.checkpoints.tensors import (
    CHUNK_BYTES,
    DTYPES,
    StoredTensor,
    TensorSpec,
    hashing,
    tensor_chunks,
)
from llamapro.checkpoints.writing import MAX_SHARD_BYTES, write_checkpoint
from llamapro.files import output_directory

Part = Callable[[], Iterator[memoryview | bytes]]


@dataclass(frozen=True)
class Target(TensorSpec):
    """A tensor of the result; its bytes are those of the parts, one after the other."""

    parts: Sequence[Part]


def hashed(stored: StoredTensor, name: str, hashes: dict[str, str]) -> Part:
    """Returns a part that copies a tensor and notes the SHA-256 of its bytes as `hashes[name]`."""
    return lambda: hashing(stored.chunks(), partial(hashes.__setitem__, name))


def converted(stored: StoredTensor, dtype: str) -> Part:
    """Returns a part that is a tensor in another dtype, such as fp32 masters in the model's."""
    return lambda: tensor_chunks(stored.read().to(DTYPES[dtype]))


def zeros(nbytes: int) -> Part:
    """Returns a part of zero bytes."""
    chunk = memoryview(bytearray(min(CHUNK_BYTES, nbytes)))
    return lambda: (chunk[: nbytes - start] for start in range(0, nbytes, CHUNK_BYTES))


@contextmanager
def rewritten(
    out_dir: Path,
    targets: Sequence[Target],
    label: str,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    written: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Writes all targets; the body checks them and adds the files that belong beside the weights.

    `written` gets each file of weights when it is complete and still in the machine's memory.

    `out_dir` appears when the body has succeeded; errors are those of `files.output_directory`.
    """
    parts = {target.name: target.parts for target in targets}

    def chunks_of(spec: TensorSpec) -> Iterator[memoryview | bytes]:
        return chain.from_iterable(part() for part in parts[spec.name])

    with output_directory(out_dir, force) as aside:
        write_checkpoint(aside, targets, chunks_of, max_shard_bytes, label, written)
        yield aside
