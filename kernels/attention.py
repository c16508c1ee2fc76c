"""Flash attention: causal attention that never holds its T x S matrix. Forward (Triton).

For each query t of a head, at position p = S - T + t, over the keys n that it sees:

    s_n = q . k_n / sqrt(D),    out = sum_n softmax(s)_n v_n,    lse = sqrt(D) ln sum_n exp(s_n)

The query sees the keys first[t] <= n <= p. `first` comes from a sliding window or from packed
documents, and is 0 without them. Softmax is computed online (Milakov & Gimelshein, 2018; Dao et
al., 2022): the running maximum m, sum and output are corrected whenever a tile of keys raises the
maximum. Exponentials are powers of two, because 1/sqrt(D) * log2 e is one factor and exp2 is one
instruction.

Grid: (H, B, tiles of queries). One program owns one tile of ROWS queries of one head of one batch
row. It reads its queries once and its keys and values tile after tile, and writes ROWS x D outputs
and ROWS log-sum-exps. Neighbouring programs are the heads of a group, which read the same keys from
the L2 cache. The last queries see most keys and start first, so that no long tile is left to the
end.

The program knows beforehand which keys it needs, because `first` does not decrease from row to row.
It does not visit tiles that no row sees, and does not mask tiles that every row sees whole. Only
the edges, at the diagonal and at `first`, are compared element by element:

                    first edge        unmasked        diagonal
        tiles   [start ........ a) [a ............ b) [b ....... end)

Precision: products are of the tensors' dtype with fp32 sums. Softmax is in fp32, and its numerators
are rounded to the dtype of v before the second product (FlashAttention-2, Dao 2023). fp32 tensors
are multiplied in fp32, not in TF32. Hopper reads tiles by TMA, see tiles.py (FlashAttention-3, Shah
et al., 2024).

Shapes: B batch, T query length, S key length, H query heads, KV key/value heads, D head dim.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamapro.kernels import device, tiles
from llamapro.kernels.attention_backward import attention_backward
from llamapro.kernels.tensors import dense_like, needed, operator
from llamapro.kernels.tiles import key_tiles, load_rows, store_rows

MAX_HEAD_DIM = 256


@triton.jit
def _attend(
    acc, total, m, q, pos, first, k_ptr, v_ptr, batch, kv_head, S, KV, scale,
    start, end, a, skip,
    COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles start .. end - 1 to the softmax; from tile a on, `skip` tiles further.

    `skip` lets one loop visit both masked edges and leave out the unmasked tiles between them.
    """
    for i in tl.range(start, end):
        n = i * COLUMNS
        if MASKED:
            n += tl.where(i < a, 0, skip) * COLUMNS
        k = load_rows(k_ptr, batch, n, kv_head, S, KV, COLUMNS, D, BLOCK_D, MASKED, TMA)
        # "ieee" keeps fp32 tensors from being rounded to TF32.
        s = tl.dot(q, k.T, input_precision="ieee")  # (ROWS, COLUMNS)
        if MASKED:
            keys = n + tl.arange(0, COLUMNS)
            sees = keys[None, :] <= pos[:, None]
            if BOUNDED:
                sees &= keys[None, :] >= first[:, None]
            s = tl.where(sees, s, float("-inf"))
        # m is of the scaled scores, in powers of two: scale is log2 e / sqrt(D).
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        subtracted = m_new
        if MASKED:  # in a row that has seen no key yet, -inf - -inf would be NaN
            subtracted = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale - subtracted[:, None])
        # What was summed so far is relative to the old maximum.
        correction = tl.exp2(m - subtracted)
        acc = acc * correction[:, None]
        v = load_rows(v_ptr, batch, n, kv_head, S, KV, COLUMNS, D, BLOCK_D, MASKED, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        total = total * correction + tl.sum(p, 1)
        m = m_new
    return acc, total, m


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, T, S, GROUP, scale, first_stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Attends from one tile of queries of one head to all keys it sees (module docstring)."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
    # Programs start in order of their number: the last tile of queries has number 0.
    row = (tl.num_programs(2) - 1 - tl.program_id(2)) * ROWS
    H = tl.num_programs(0)
    KV = H // GROUP
    kv_head = head // GROUP
    rows = row + tl.arange(0, ROWS)
    pos = S - T + rows

    first = pos  # not read without bounds
    if BOUNDED:
        first_ptr += tl.cast(batch, tl.int64) * first_stride_b
        first = tl.load(first_ptr + rows, mask=rows < T, other=0)
    start, a, b, end = key_tiles(first_ptr, row, T, S, ROWS, COLUMNS, BOUNDED)

    # Rows past T, in the last tile, are computed like the others and not stored.
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    q = load_rows(q_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, True, False)
    # Unmasked tiles first, then both edges. Softmax does not depend on the order.
    acc, total, m = _attend(
        acc, total, m, q, pos, first, k_ptr, v_ptr, batch, kv_head, S, KV, scale,
        a, b, a, 0, COLUMNS, D, BLOCK_D, TMA, False, BOUNDED,
    )  # fmt: skip
    acc, total, m = _attend(
        acc, total, m, q, pos, first, k_ptr, v_ptr, batch, kv_head, S, KV, scale,
        start, end - (b - a), a, b - a, COLUMNS, D, BLOCK_D, TMA, True, BOUNDED,
    )  # fmt: skip

    # Divided by scale, lse has the units of q . k: backward subtracts it before it scales.
    base = (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(lse_ptr + base + rows, (m + tl.log2(total)) / scale, mask=rows < T)
    acc = acc / total[:, None]
    store_rows(out_ptr, acc, batch, row, head, T, H, ROWS, D, BLOCK_D, TMA)


@operator("attention_forward")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the output (B, T, H, D) and lse (B, H, T), fp32, in the units of q . k."""
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    out, lse = _outputs(q)
    if not out.numel():
        return out, lse
    if first is not None:
        first = first.contiguous()
    architecture = device.architecture(q.device)
    tma = tiles.uses_tma(architecture, q.dtype)
    block_d = tiles.padded(D)
    tile = tiles.tile("forward", architecture, block_d, q.dtype)
    q, k, v = (tiles.dense(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        _attention_forward_kernel[(H, B, triton.cdiv(T, tile.rows))](
            q, tiles.described(k, tile.columns, tma), tiles.described(v, tile.columns, tma),
            tiles.described(out, tile.rows, tma), lse, first,
            T, S, H // KV, math.log2(math.e) / math.sqrt(D), tiles.batch_stride(first),
            ROWS=tile.rows, COLUMNS=tile.columns, D=D, BLOCK_D=block_d, TMA=tma,
            BOUNDED=first is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return dense_like(q), torch.empty((B, H, T), dtype=torch.float32, device=q.device)


attention_forward.register_fake(lambda q, k, v, first: _outputs(q))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None
    ) -> Tensor:
        out, lse = attention_forward(q, k, v, first)
        ctx.save_for_backward(q, k, v, out, lse, first, last)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
        gradients = attention_backward(dout, *ctx.saved_tensors, needs_q, needs_k or needs_v)
        return needed(ctx, *gradients)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As `ops.attention`: (B, T, H, D), (B, S, KV, D) twice -> (B, T, H, D), contiguous.

    Gradients are the same bits every time. q, k and v are fp32, fp16 or bf16 with D a multiple of 8
    up to 256, and copied unless they are contiguous and aligned to 16 bytes. `bounds` are an
    `ops.AttentionBounds`. Raises ValueError if shapes or dtypes do not fit each other.
    """
    first, last = (None, None) if bounds is None else bounds
    _check(q, k, v, first, last)
    return _Attention.apply(q, k, v, first, last)


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None) -> None:
    """Refuses shapes and dtypes with which a kernel would read memory outside its tensors."""
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    if k.shape != (B, S, KV, D) or v.shape != k.shape or T > S or (KV and H % KV):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}, not (B, T, H, D), (B, S, KV, D) twice, T <= S")
    if D % 8 or D > MAX_HEAD_DIM:
        raise ValueError(f"head dim {D} is not a multiple of 8 up to {MAX_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}")
    for name, bound, length in (("first", first, T), ("last", last, S)):
        if bound is None:
            continue
        if bound.shape not in ((B, length), (1, length)) or bound.dtype != torch.int32:
            raise ValueError(
                f"bounds.{name} is {tuple(bound.shape)} {bound.dtype}, "
                f"not ({B} or 1, {length}) int32"
            )


def unsupported(device_: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Returns why attention with head dim `size` cannot run there, or None."""
    reason = device.cannot_run(device_, dtype)
    if reason is None and (size % 8 or not 0 < size <= MAX_HEAD_DIM):
        reason = f"head dim {size} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    return reason
