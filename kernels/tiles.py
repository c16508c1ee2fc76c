"""Tiles of the attention kernels: how large they are, and how one is read from memory.

A tile is BLOCK consecutive rows (tokens) of one head of a tensor (B, T, H, D). Its width is the
head dim D padded with zeros to BLOCK_D, the next power of two, as tensor cores need it.

Two ways to read one:
- TMA, Hopper's copy engine: the host describes the tensor once (address, shape, strides, tile) and
  one thread asks for a tile by its coordinates. Rows past T and columns past D arrive as zeros.
- pointers: every thread computes its addresses, and masks what lies outside.

TMA brings the tiles that a loop goes through; they are right factors of the products, or transposed
ones. The tile that a program keeps throughout is read by pointers even so: it is a left factor, and
those the compiler leaves in shared memory only if no reshape stands between load and product. In
registers, k and v of the backward pass would spill.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """What one program works on at a time, and with which resources.

    Attributes:
        rows: queries per tile.
        columns: keys per tile.
        num_warps: warps of 32 threads per program.
        num_stages: how many loop iterations' loads are in flight at once.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# By (kernel, architecture, BLOCK_D, bytes per element); smaller head dims take the entry of 64. All
# of them compile without spilled registers on Triton 3.6 to 3.9, with and without bounds. They are
# published sizes as far as that holds for them, and not timed here.
TILES: dict[tuple[str, int, int, int], Tile] = {
    # Hopper, forward: what PyTorch's Inductor found for FlexAttention on H100, with 8 warps.
    ("forward", 90, 64, 2): Tile(128, 128, 8, 3),
    ("forward", 90, 128, 2): Tile(128, 64, 8, 3),
    ("forward", 90, 256, 2): Tile(128, 64, 8, 2),
    # Hopper, backward: 64 x 128 is FlashAttention-3's tile for causal dk and dv, 128 x 64 the same
    # turned around for dq. For D = 256, dk and dv take all registers at 64 keys; for 64 rows at a
    # time none would be left.
    ("key_value", 90, 64, 2): Tile(64, 128, 8, 3),
    ("key_value", 90, 128, 2): Tile(64, 128, 8, 2),
    ("key_value", 90, 256, 2): Tile(16, 64, 8, 2),
    ("query", 90, 64, 2): Tile(128, 128, 8, 2),
    ("query", 90, 128, 2): Tile(128, 64, 8, 2),
    ("query", 90, 256, 2): Tile(64, 64, 8, 2),
    # FlashAttention-3's 64 x 128 would spill at D = 128, where a tile of dq is held besides.
    ("single_pass", 90, 64, 2): Tile(64, 128, 8, 3),
    ("single_pass", 90, 128, 2): Tile(64, 64, 8, 2),
    # Ampere: FlashAttention-2's 128 x 64 and 64 x 128, halved until they neither spill nor pass the
    # 99 KiB of shared memory of Ada and of consumer cards. An A100 has 163 KiB: room for larger.
    ("forward", 80, 64, 2): Tile(128, 64, 8, 3),
    ("forward", 80, 128, 2): Tile(64, 64, 8, 2),
    ("forward", 80, 256, 2): Tile(64, 32, 8, 2),
    ("key_value", 80, 64, 2): Tile(64, 128, 8, 2),
    ("key_value", 80, 128, 2): Tile(64, 64, 8, 2),
    ("key_value", 80, 256, 2): Tile(32, 32, 8, 1),
    ("query", 80, 64, 2): Tile(128, 64, 8, 2),
    ("query", 80, 128, 2): Tile(64, 64, 8, 2),
    ("query", 80, 256, 2): Tile(64, 32, 8, 1),
    ("single_pass", 80, 64, 2): Tile(32, 128, 8, 2),
    ("single_pass", 80, 128, 2): Tile(32, 64, 8, 2),
    # fp32, on any architecture: products without tensor cores hold whole rows and columns in
    # registers, so these are the largest that do not spill.
    ("forward", 80, 64, 4): Tile(32, 32, 4, 1),
    ("forward", 80, 128, 4): Tile(32, 32, 8, 1),
    ("forward", 80, 256, 4): Tile(16, 16, 4, 1),
    ("key_value", 80, 64, 4): Tile(32, 32, 4, 1),
    ("key_value", 80, 128, 4): Tile(16, 32, 8, 1),
    ("key_value", 80, 256, 4): Tile(16, 16, 4, 1),
    ("query", 80, 64, 4): Tile(32, 32, 4, 1),
    ("query", 80, 128, 4): Tile(32, 16, 8, 1),
    ("query", 80, 256, 4): Tile(16, 16, 8, 1),
    ("single_pass", 80, 64, 4): Tile(16, 32, 4, 1),
    ("single_pass", 80, 128, 4): Tile(32, 32, 8, 1),
}


def tile(kernel: str, architecture: int, block_d: int, dtype: torch.dtype) -> Tile:
    """Returns the tile of a kernel: "forward", "query", "key_value" or "single_pass"."""
    if not uses_tma(architecture, dtype):
        architecture = 80
    return TILES[kernel, architecture, max(block_d, 64), dtype.itemsize]


def padded(head_dim: int) -> int:
    """Returns BLOCK_D: the head dim's next power of two, at least the 16 of a tensor core."""
    return max(16, triton.next_power_of_2(head_dim))


def uses_tma(architecture: int, dtype: torch.dtype) -> bool:
    """Whether tiles are read by TMA: on Hopper, in 16-bit dtypes (fp32 tiles are small)."""
    return architecture == 90 and dtype.itemsize == 2


def with_readable_rows(x: Tensor, tma: bool) -> Tensor:
    """Returns x (B, T, H, D), copied only if its layout cannot be read well where it lies.

    The last stride must be 1, the address and all other strides multiples of 16 bytes: TMA demands
    it, and pointers would take an instruction for every element. TMA also takes no stride 0 (an
    expanded tensor).
    """
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    is_readable = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    is_readable &= all(step % 16 == 0 and (step > 0 or not tma) for step in steps)
    # Not .contiguous(): that gives back an unaligned x, or one with odd strides in axes of size 1.
    return x if is_readable else x.clone(memory_format=torch.contiguous_format)


def described(x: Tensor, block: int, tma: bool) -> Tensor | TensorDescriptor:
    """Returns what `load_rows` takes: with TMA, x (B, T, H, D) described in tiles of one head."""
    if not tma:
        return x
    shape = [1, block, 1, padded(x.shape[-1])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape)


def batch_stride(bound: Tensor | None) -> int:
    """Returns the step from one batch row of a contiguous bound (B or 1, length) to the next."""
    return 0 if bound is None or bound.shape[0] == 1 else bound.stride(0)


@triton.jit
def load_rows(
    x, batch, row, head, num_rows, stride_b, stride_t, stride_h,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows row .. row + BLOCK - 1 of one head, (BLOCK, BLOCK_D); zeros past num_rows and D.

    Without EDGE no row of the tile is past num_rows.
    """
    if TMA:
        block = x.load([batch, row, head, 0]).reshape(BLOCK, BLOCK_D)
    else:
        t = tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        # Where the tile begins takes 64 bits: B * T * H * D can pass 2^31. Inside, 32 are enough.
        x += tl.cast(batch, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_t
        x += tl.cast(head, tl.int64) * stride_h
        x += t[:, None] * stride_t + d[None, :]
        if EDGE:
            is_inside = (row + t < num_rows)[:, None] & (d < D)[None, :]
            block = tl.load(x, mask=is_inside, other=0.0)
        elif D < BLOCK_D:
            block = tl.load(x, mask=(d < D)[None, :], other=0.0)
        else:
            block = tl.load(x)
    return block


@triton.jit
def store_rows(
    x, block, batch, row, head, num_rows, stride_b, stride_t, stride_h,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes what `load_rows` would read, leaving out what lies past num_rows and D."""
    if TMA:
        block = block.to(x.dtype).reshape(1, BLOCK, 1, BLOCK_D)
        x.store([batch, row, head, 0], block)
    else:
        t = tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        x += tl.cast(batch, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_t
        x += tl.cast(head, tl.int64) * stride_h
        is_inside = (row + t < num_rows)[:, None] & (d < D)[None, :]
        block = block.to(x.dtype.element_ty)
        tl.store(x + t[:, None] * stride_t + d[None, :], block, mask=is_inside)


@triton.jit
def key_tiles(
    first_ptr, row, T, S,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The tiles of keys that the queries row .. row + ROWS - 1 see, as tile numbers.

    Returns start, a, b, end: masked at `first` [start, a), seen whole by every row [a, b), masked
    at the diagonal [b, end). `first` does not decrease, so its values at both ends are enough.
    """
    end = tl.cdiv(tl.minimum(S, S - T + row + ROWS), COLUMNS)
    start = 0
    a = 0
    if BOUNDED:
        start = tl.load(first_ptr + row) // COLUMNS
        a = tl.load(first_ptr + tl.minimum(row + ROWS, T) - 1)
        a = tl.minimum(tl.cdiv(a, COLUMNS), end)
    b = tl.maximum(a, (S - T + row + 1) // COLUMNS)
    return start, a, b, end
