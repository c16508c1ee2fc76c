"""The tiles of the attention kernels: their sizes, and how one is read from memory.

A tile is BLOCK consecutive rows (tokens) of one head of a tensor (B, T, H, D). Its width is
BLOCK_D, the next power of two of the head dim D, because tensor cores need one; the columns past D
are zeros.

A tile is read in one of two ways:
- By TMA, Hopper's copy engine. The host describes the tensor once (address, shape, strides, tile)
  and one thread asks for a tile by its coordinates. Rows past T and columns past D arrive as zeros.
- By pointers. Every thread computes its addresses and masks what lies outside.

TMA brings the tiles that a loop goes through. They are right or transposed factors of the products.
The tile that a program keeps throughout is read by pointers even on Hopper. It is a left factor,
and the compiler leaves a left factor in shared memory only if no reshape stands between load and
product. In registers, k and v of the backward pass would spill.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """The block of one program, and the resources it runs with."""

    rows: int  # queries per tile
    columns: int  # keys per tile
    num_warps: int  # warps of 32 threads per program
    num_stages: int  # how many loop iterations' loads are in flight at once


# Keys: (kernel, architecture, BLOCK_D, bytes per element). Smaller head dims take the entry of 64.
# All entries compile without spilled registers on Triton 3.9, with and without bounds. They
# start from published sizes, shrunk where those spill, and have not been timed here.
TILES: dict[tuple[str, int, int, int], Tile] = {
    # Hopper, forward: what PyTorch's Inductor found for FlexAttention on H100, with 8 warps.
    ("forward", 90, 64, 2): Tile(128, 128, 8, 3),
    ("forward", 90, 128, 2): Tile(128, 64, 8, 3),
    ("forward", 90, 256, 2): Tile(128, 64, 8, 2),
    # Hopper, backward: 64 x 128 is FlashAttention-3's tile for causal dk and dv, and 128 x 64 is
    # the same turned around for dq. At D = 256, dk and dv of 64 keys fill the registers, which
    # leaves room for few query rows at a time.
    ("key_value", 90, 64, 2): Tile(64, 128, 8, 3),
    ("key_value", 90, 128, 2): Tile(64, 128, 8, 2),
    ("key_value", 90, 256, 2): Tile(16, 64, 8, 2),
    ("query", 90, 64, 2): Tile(128, 128, 8, 2),
    ("query", 90, 128, 2): Tile(128, 64, 8, 2),
    ("query", 90, 256, 2): Tile(64, 64, 8, 2),
    # Ampere: FlashAttention-2's 128 x 64 and 64 x 128, halved until they neither spill nor pass the
    # 99 KiB of shared memory of Ada and consumer cards. An A100 has 163 KiB, room for larger tiles.
    ("forward", 80, 64, 2): Tile(128, 64, 8, 3),
    ("forward", 80, 128, 2): Tile(64, 64, 8, 2),
    ("forward", 80, 256, 2): Tile(64, 32, 8, 2),
    ("key_value", 80, 64, 2): Tile(64, 128, 8, 2),
    ("key_value", 80, 128, 2): Tile(64, 64, 8, 2),
    ("key_value", 80, 256, 2): Tile(32, 32, 8, 1),
    ("query", 80, 64, 2): Tile(128, 64, 8, 2),
    ("query", 80, 128, 2): Tile(64, 64, 8, 2),
    ("query", 80, 256, 2): Tile(64, 32, 8, 1),
    # fp32, on any architecture: a product without tensor cores holds whole rows and columns in
    # registers. These are the largest tiles that do not spill.
    ("forward", 80, 64, 4): Tile(32, 32, 4, 1),
    ("forward", 80, 128, 4): Tile(32, 32, 8, 1),
    ("forward", 80, 256, 4): Tile(16, 16, 4, 1),
    ("key_value", 80, 64, 4): Tile(32, 32, 4, 1),
    ("key_value", 80, 128, 4): Tile(16, 32, 8, 1),
    ("key_value", 80, 256, 4): Tile(16, 16, 8, 1),
    ("query", 80, 64, 4): Tile(32, 32, 4, 1),
    ("query", 80, 128, 4): Tile(32, 16, 8, 1),
    ("query", 80, 256, 4): Tile(16, 16, 8, 1),
}


def tile(kernel: str, architecture: int, block_d: int, dtype: torch.dtype) -> Tile:
    """Returns the tile of a kernel: "forward", "query" or "key_value"."""
    if not uses_tma(architecture, dtype):
        architecture = 80
    return TILES[kernel, architecture, max(block_d, 64), dtype.itemsize]


def padded(head_dim: int) -> int:
    """Returns BLOCK_D: the head dim's next power of two, at least the 16 of a tensor core."""
    return max(16, triton.next_power_of_2(head_dim))


def uses_tma(architecture: int, dtype: torch.dtype) -> bool:
    """Says whether tiles are read by TMA: on Hopper, in 16-bit dtypes. fp32 tiles are small."""
    return architecture == 90 and dtype.itemsize == 2


def dense(x: Tensor) -> Tensor:
    """Returns x (B, T, H, D), copied only if it is not contiguous or not aligned to 16 bytes.

    TMA demands that address, and pointers would otherwise take one instruction per element.
    """
    is_dense = x.is_contiguous() and x.data_ptr() % 16 == 0
    # Not x.contiguous(), which returns x itself if it is only unaligned.
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)


def described(x: Tensor, block: int, tma: bool) -> Tensor | TensorDescriptor:
    """Returns x (B, T, H, D) as `load_rows` takes it; for TMA, described in tiles of one head."""
    if not tma:
        return x
    shape = [1, block, 1, padded(x.shape[-1])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape)


def batch_stride(bound: Tensor | None) -> int:
    """Returns the step from one batch row of a contiguous bound (B or 1, length) to the next."""
    return 0 if bound is None or bound.shape[0] == 1 else bound.stride(0)


@triton.jit
def _rows_at(
    x, batch, row, head, num_rows, num_heads,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns pointers to a tile of x, contiguous, and where they are inside its rows and D."""
    t = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    stride_t = num_heads * D
    # The tile's start takes 64 bits, as B * T * H * D can pass 2^31. Inside, 32 are enough. Two
    # sums: as one product, a tile of D = 32 spills registers on sm_80.
    x += tl.cast(batch, tl.int64) * num_rows * stride_t
    x += tl.cast(row, tl.int64) * stride_t + head * D
    is_inside = (row + t < num_rows)[:, None] & (d < D)[None, :]
    return x + t[:, None] * stride_t + d[None, :], is_inside


@triton.jit
def load_rows(
    x, batch, row, head, num_rows, num_heads,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Reads rows row .. row + BLOCK - 1 of one head, (BLOCK, BLOCK_D); zeros past num_rows and D.

    EDGE says that rows of the tile may be past num_rows.
    """
    if TMA:
        block = x.load([batch, row, head, 0]).reshape(BLOCK, BLOCK_D)
    else:
        at, is_inside = _rows_at(x, batch, row, head, num_rows, num_heads, BLOCK, D, BLOCK_D)
        if EDGE:
            block = tl.load(at, mask=is_inside, other=0.0)
        elif D < BLOCK_D:
            block = tl.load(at, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
        else:
            block = tl.load(at)
    return block


@triton.jit
def store_rows(
    x, block, batch, row, head, num_rows, num_heads,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes a tile to x and leaves out what lies past num_rows and D."""
    if TMA:
        x.store([batch, row, head, 0], block.to(x.dtype).reshape(1, BLOCK, 1, BLOCK_D))
    else:
        at, is_inside = _rows_at(x, batch, row, head, num_rows, num_heads, BLOCK, D, BLOCK_D)
        tl.store(at, block.to(x.dtype.element_ty), mask=is_inside)


@triton.jit
def key_tiles(
    first_ptr, row, T, S,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Returns the tiles of keys that the queries row .. row + ROWS - 1 see, as start, a, b, end.

    They are tile numbers. Tiles [start, a) are masked at `first`, every row sees all of tiles
    [a, b), and tiles [b, end) are masked at the diagonal.
    """
    # `first` does not decrease along the rows, so its values at both ends of the tile bound it.
    end = tl.cdiv(tl.minimum(S, S - T + row + ROWS), COLUMNS)
    start = 0
    a = 0
    if BOUNDED:
        # No row sees a key before `start`; no row has a key before its `first` from tile a on.
        start = tl.load(first_ptr + row) // COLUMNS
        a = tl.load(first_ptr + tl.minimum(row + ROWS, T) - 1)
        a = tl.minimum(tl.cdiv(a, COLUMNS), end)
    # The first row, which sees least at the diagonal, sees all of the tiles before b.
    b = tl.maximum(a, (S - T + row + 1) // COLUMNS)
    return start, a, b, end
