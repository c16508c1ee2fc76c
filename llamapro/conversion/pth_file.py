"""PyTorch's `.pth` files: pickles in a zip archive, from which only plain tensors are taken.

`torch.load(weights_only=True)` runs no code of the file, but may take memory that a few bytes ask
for. So archive and pickle are looked through before it.
"""

import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from llamapro.errors import CheckpointError
from llamapro.files import refuse_large

# A dictionary of tensors asks for these. torch.load allows more, even a bytearray of any size.
_ALLOWED = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
)
MAX_PICKLE_BYTES = 1 << 22  # a shard's names and shapes; LLaMA-65B's take 0.2 MB


def load_pth(file: Path) -> dict[str, Tensor]:
    """Maps the tensors of a `.pth` file; refuses more than plain tensors of the file's own size."""
    refuse_large(file)
    size = file.stat().st_size
    refused = f"{file}: refused; nothing was executed:"
    try:
        with open(file, "rb") as handle:
            if handle.read(2) == b"\x80\x02":
                raise CheckpointError(
                    f"{file}: in PyTorch's format from before 1.6, which cannot be mapped; save it "
                    "again with torch.save(torch.load(OLD, map_location='cpu', weights_only=True), "
                    "NEW)"
                )
        for asked in _asked_for(file, size):
            if not _ALLOWED.fullmatch(asked):
                name = asked.replace(" ", ".")[:80]
                raise CheckpointError(
                    f"{refused} its pickle asks for {name!r}, not only plain tensors"
                )
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch and zipfile raise dozens, depending on which byte is wrong
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{file}: {size:,} bytes, not a complete PyTorch file ({reason}); fetch it again"
        ) from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{refused} not only plain tensors")
    for name, t in tensors.items():
        is_tensor = isinstance(t, Tensor)
        if not (isinstance(name, str) and is_tensor and t.layout == torch.strided and t.ndim):
            kind = f"tensor {list(t.shape)}" if is_tensor else type(t).__name__
            raise CheckpointError(
                f"{refused} not only plain tensors: {name!r:.80} ({kind}); save the dictionary "
                "of the model's tensors alone"
            )
        # A stride of 0 shows one number as a tensor of any size.
        if t.nbytes > t.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file}: refused: {name[:80]!r} {list(t.shape)} has fewer numbers than its shape"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _asked_for(file: Path, size: int) -> list[str]:
    """Returns the classes and functions that the pickle names; refuses a file that would expand."""
    asked = []
    # PyTorch stores what it saves as it is; a few compressed bytes could stand for gigabytes.
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name, nbytes = entry.filename[:80], entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or nbytes > size:
                raise CheckpointError(
                    f"{file}: refused: {name!r} is compressed or claims {nbytes:,} bytes; PyTorch "
                    f"saves a file of {size:,} bytes plainly"
                )
            if entry.filename.lower().endswith(".pkl"):  # torch finds DATA.PKL, too
                if nbytes > MAX_PICKLE_BYTES:
                    raise CheckpointError(
                        f"{file}: refused: {name!r} has {nbytes:,} bytes, over {MAX_PICKLE_BYTES:,}"
                    )
                opcodes = pickletools.genops(archive.read(entry))
                asked += [str(what) for opcode, what, _ in opcodes if opcode.name == "GLOBAL"]
    return asked
