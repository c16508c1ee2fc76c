"""PyTorch's `.pth` files: pickles in a zip archive, read without believing either.

`torch.load(weights_only=True)` runs no code of the file, but takes memory that a few bytes ask for.
So before it, archive and pickle are looked through, and nothing but plain tensors is let in.
"""

import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from llamapro.errors import CheckpointError

# What torch.load raises for a damaged file, depending on which byte is wrong.
_DAMAGED = (
    *(OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError),
    *(zipfile.BadZipFile, NotImplementedError),
)
# What a dictionary of tensors asks for. torch.load allows more, such as a bytearray of any size.
_ALLOWED = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
)
MAX_PICKLE_BYTES = 1 << 22  # a shard's names and shapes; LLaMA-65B's take 0.2 MB


def load_pth(file: Path) -> dict[str, Tensor]:
    """Maps a `.pth` file; only plain tensors come out of it, whatever its pickle asks for.

    Raises:
        CheckpointError: it is missing, damaged, holds more than plain tensors, or would take more
            memory than it has bytes.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: not a plain file")  # opening a pipe would wait for ever
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            magic = handle.read(2)
        if magic == b"\x80\x02":
            raise CheckpointError(
                f"{file}: in PyTorch's format from before 1.6, which cannot be mapped; save it "
                "again with torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)"
            )
        _refuse_absurd(file, size)
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file}: refused; nothing was executed: its pickle "
            + (f"asks for {asked[1]!r}, not only plain tensors" if asked else "is damaged")
        ) from None
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{file}: {size:,} bytes, not a complete PyTorch file ({reason}); fetch it again"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided and t.ndim
        for name, t in tensors.items()
    ):
        raise CheckpointError(f"{file}: refused; nothing was executed: not only plain tensors")
    for name, t in tensors.items():
        # A stride of 0 shows one number as a tensor of any size.
        if t.nbytes > t.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file}: refused: {name[:80]!r} {list(t.shape)} has fewer numbers than its shape"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _refuse_absurd(file: Path, size: int) -> None:
    """Raises CheckpointError for what would take more memory than the file has bytes.

    PyTorch stores what it saves as it is; a few compressed bytes could stand for gigabytes.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise CheckpointError(
                    f"{file}: refused: {entry.filename[:80]!r} is compressed or claims "
                    f"{entry.file_size:,} bytes; PyTorch saves a file of {size:,} bytes plainly"
                )
        for entry in entries:
            if not entry.filename.lower().endswith(".pkl"):  # torch finds DATA.PKL, too
                continue
            if entry.file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{file}: refused: {entry.filename[:80]!r} has {entry.file_size:,} bytes, over "
                    f"{MAX_PICKLE_BYTES:,}"
                )
            for opcode, asked, _ in pickletools.genops(archive.read(entry)):
                if opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(asked)):
                    name = str(asked).replace(" ", ".")[:80]
                    raise CheckpointError(
                        f"{file}: refused; nothing was executed: its pickle asks for {name!r}, not "
                        "only plain tensors"
                    )
