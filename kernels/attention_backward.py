"""Gradients of causal attention (Triton).

With p = exp((q . k - lse) / sqrt(D)), which forward's lse (in the units of q . k) makes a softmax
without a pass over the keys, and an output gradient `dout`, for query t and key n:

    delta_t = dout_t . out_t,    ds = p * (dout_t . v_n - delta_t)
    dv_n = sum_t p dout_t,    dk_n = sum_t ds q_t / sqrt(D),    dq_t = sum_n ds k_n / sqrt(D)

The sums for keys run over the queries of all heads of a group; only pairs that see each other
count: first[t] <= n <= p_t for a query at position p_t = S - T + t, or, which is the same pairs,
n <= p_t <= last[n] for a key.

Kernels (Dao et al., 2022; Dao, 2023):
- delta: one program owns DELTA_ROWS queries of one head; reads out and dout, writes delta in fp32.
- key_value: one program owns a tile of keys of one key/value head. It goes through the query tiles
  of all heads of its group that see them and keeps dk and dv in fp32 registers until the end: no
  atomics, so the result is the same every time, and no copies of k and v per head.
- query: one program owns a tile of queries of one head and goes through its keys as forward does.
  q . k and dout . v are computed a second time: 7 matrix products in all.
- key_value with ACCUMULATE_DQ, the single pass: 5 products. Each program adds its share of dq to an
  fp32 buffer by atomics (Hopper: one TMA reduction per tile), in an order that varies from run to
  run, and dq with it in its last bits.

p and ds are fp32, rounded to the tensors' dtype as factors of a product; all sums are fp32. Tiles
are visited and masked as in forward, see attention.py, where the shape legend stands too.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamapro.kernels import device, tiles
from llamapro.kernels.tiles import key_tiles, load_rows, store_rows

LN_2 = tl.constexpr(math.log(2))
DELTA_ROWS = 64


@triton.jit
def _delta_kernel(
    out_ptr, dout_ptr, delta_ptr, T, dout_stride_b, dout_stride_t, dout_stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) in fp32. Grid: (H, B, tiles of queries)."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row = tl.program_id(2) * ROWS
    H = tl.num_programs(0)
    out = load_rows(
        out_ptr, batch, row, head, T, tl.cast(T, tl.int64) * H * D, H * D, D,
        ROWS, D, BLOCK_D, True, False,
    )  # fmt: skip
    dout = load_rows(
        dout_ptr, batch, row, head, T, dout_stride_b, dout_stride_t, dout_stride_h,
        ROWS, D, BLOCK_D, True, False,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = row + tl.arange(0, ROWS)
    base = (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(delta_ptr + base + rows, delta, mask=rows < T)


@triton.jit
def _visit_queries(
    dk, dv, k, v, keys, last, q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    batch, kv_head, GROUP, H, T, S, scale, start, count, a, skip,
    q_stride_b, q_stride_t, q_stride_h, dout_stride_b, dout_stride_t, dout_stride_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
    ACCUMULATE_DQ: tl.constexpr, REDUCE_BY_TMA: tl.constexpr,
):  # fmt: skip
    """Adds `count` query tiles of each head of a group to dk, dv, as one loop over all of them.

    They begin at tile `start`; from tile a on, they are `skip` tiles further.
    """
    head = kv_head * GROUP
    tile = start
    for _ in tl.range(0, GROUP * count):
        row = tile * ROWS
        if MASKED:
            row += tl.where(tile < a, 0, skip) * ROWS
        rows = row + tl.arange(0, ROWS)
        q = load_rows(
            q_ptr, batch, row, head, T, q_stride_b, q_stride_t, q_stride_h,
            ROWS, D, BLOCK_D, MASKED, TMA,
        )  # fmt: skip
        dout = load_rows(
            dout_ptr, batch, row, head, T, dout_stride_b, dout_stride_t, dout_stride_h,
            ROWS, D, BLOCK_D, MASKED, TMA,
        )  # fmt: skip
        # Rows past T are zeros in all four: p is 1, and adds nothing.
        of_head = (tl.cast(batch, tl.int64) * H + head) * T
        lse = tl.load(lse_ptr + of_head + rows, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + of_head + rows, mask=rows < T, other=0.0)
        # All (COLUMNS, ROWS), so that p and ds are ready to be left factors. What is subtracted
        # from a product is where its sum begins: that takes fewer registers than after it.
        dp = tl.zeros((COLUMNS, ROWS), tl.float32) - delta[None, :]
        dp = tl.dot(v, dout.T, dp, input_precision="ieee")  # dout . v - delta
        s = tl.zeros((COLUMNS, ROWS), tl.float32) - lse[None, :]
        p = tl.exp2(tl.dot(k, q.T, s, input_precision="ieee") * scale)
        if MASKED:
            pos = S - T + rows
            sees = keys[:, None] <= pos[None, :]
            if BOUNDED:
                sees &= pos[None, :] <= last[:, None]
            p = tl.where(sees, p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = (p * dp).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if ACCUMULATE_DQ:
            dq = tl.dot(ds.T, k, input_precision="ieee")
            if REDUCE_BY_TMA:
                dq_ptr.atomic_add([batch, row, head, 0], dq.reshape(1, ROWS, 1, BLOCK_D))
            else:
                d = tl.arange(0, BLOCK_D)
                dq_tile = dq_ptr + ((tl.cast(batch, tl.int64) * T + row) * H + head) * D
                offsets = tl.arange(0, ROWS)[:, None] * (H * D) + d[None, :]
                is_inside = (rows < T)[:, None] & (d < D)[None, :]
                tl.atomic_add(dq_tile + offsets, dq, mask=is_inside, sem="relaxed")
        tile += 1
        is_last = tile == start + count
        head = tl.where(is_last, head + 1, head)
        tile = tl.where(is_last, start, tile)
    return dk, dv


@triton.jit
def _attention_key_value_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, last_ptr, dq_ptr, dk_ptr, dv_ptr,
    T, S, GROUP, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dout_stride_b, dout_stride_t, dout_stride_h,
    last_stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr, ACCUMULATE_DQ: tl.constexpr,
    REDUCE_BY_TMA: tl.constexpr,
):  # fmt: skip
    """dk, dv of one tile of keys of one head. Grid: (KV, B, tiles of keys), long ones first."""
    kv_head = tl.program_id(0)
    batch = tl.program_id(1)
    key = tl.program_id(2) * COLUMNS
    KV = tl.num_programs(0)
    keys = key + tl.arange(0, COLUMNS)

    # The query tiles: masked at the diagonal [start, a), unmasked [a, b), masked where the keys go
    # out of sight and at the end of T [b, end).
    start = tl.maximum(key - (S - T), 0) // ROWS
    end = tl.cdiv(T, ROWS)
    b = T // ROWS
    last = keys  # not read without bounds
    if BOUNDED:
        last_ptr += tl.cast(batch, tl.int64) * last_stride_b
        last = tl.load(last_ptr + keys, mask=keys < S, other=-1)
        stop = tl.load(last_ptr + tl.minimum(key + COLUMNS, S) - 1) + 1 - (S - T)
        end = tl.cdiv(tl.minimum(tl.maximum(stop, 0), T), ROWS)
        stop = tl.load(last_ptr + key) + 1 - (S - T)
        b = tl.minimum(tl.maximum(stop, 0), T) // ROWS
    a = tl.minimum(tl.cdiv(tl.maximum(key + COLUMNS - 1 - (S - T), 0), ROWS), end)
    b = tl.maximum(a, b)

    dk = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    k = load_rows(
        k_ptr, batch, key, kv_head, S, k_stride_b, k_stride_t, k_stride_h,
        COLUMNS, D, BLOCK_D, True, False,
    )  # fmt: skip
    v = load_rows(
        v_ptr, batch, key, kv_head, S, v_stride_b, v_stride_t, v_stride_h,
        COLUMNS, D, BLOCK_D, True, False,
    )  # fmt: skip
    dk, dv = _visit_queries(
        dk, dv, k, v, keys, last, q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
        batch, kv_head, GROUP, KV * GROUP, T, S, scale, start, end - start - (b - a), a, b - a,
        q_stride_b, q_stride_t, q_stride_h, dout_stride_b, dout_stride_t, dout_stride_h,
        ROWS, COLUMNS, D, BLOCK_D, TMA, True, BOUNDED, ACCUMULATE_DQ, REDUCE_BY_TMA,
    )  # fmt: skip
    dk, dv = _visit_queries(
        dk, dv, k, v, keys, last, q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
        batch, kv_head, GROUP, KV * GROUP, T, S, scale, a, b - a, a, 0,
        q_stride_b, q_stride_t, q_stride_h, dout_stride_b, dout_stride_t, dout_stride_h,
        ROWS, COLUMNS, D, BLOCK_D, TMA, False, BOUNDED, ACCUMULATE_DQ, REDUCE_BY_TMA,
    )  # fmt: skip

    dk *= scale * LN_2
    store_rows(
        dk_ptr, dk, batch, key, kv_head, S, tl.cast(S, tl.int64) * KV * D, KV * D, D,
        COLUMNS, D, BLOCK_D, TMA,
    )  # fmt: skip
    store_rows(
        dv_ptr, dv, batch, key, kv_head, S, tl.cast(S, tl.int64) * KV * D, KV * D, D,
        COLUMNS, D, BLOCK_D, TMA,
    )  # fmt: skip


@triton.jit
def _visit_keys(
    dq, q, dout, lse, delta, pos, first, k_ptr, v_ptr, batch, kv_head, S, scale,
    start, end, a, skip,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles start .. end - 1 to dq; from tile a on, `skip` tiles further."""
    for i in tl.range(start, end):
        n = i * COLUMNS
        if MASKED:
            n += tl.where(i < a, 0, skip) * COLUMNS
        k = load_rows(
            k_ptr, batch, n, kv_head, S, k_stride_b, k_stride_t, k_stride_h,
            COLUMNS, D, BLOCK_D, MASKED, TMA,
        )  # fmt: skip
        v = load_rows(
            v_ptr, batch, n, kv_head, S, v_stride_b, v_stride_t, v_stride_h,
            COLUMNS, D, BLOCK_D, MASKED, TMA,
        )  # fmt: skip
        dp = tl.zeros((ROWS, COLUMNS), tl.float32) - delta[:, None]
        dp = tl.dot(dout, v.T, dp, input_precision="ieee")  # dout . v - delta
        s = tl.zeros((ROWS, COLUMNS), tl.float32) - lse[:, None]
        p = tl.exp2(tl.dot(q, k.T, s, input_precision="ieee") * scale)
        if MASKED:
            keys = n + tl.arange(0, COLUMNS)
            sees = keys[None, :] <= pos[:, None]
            if BOUNDED:
                sees &= keys[None, :] >= first[:, None]
            p = tl.where(sees, p, 0.0)
        ds = (p * dp).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_query_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, first_ptr, dq_ptr,
    T, S, GROUP, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dout_stride_b, dout_stride_t, dout_stride_h,
    first_stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head. Grid: (H, B, tiles of queries), long ones first."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row = (tl.num_programs(2) - 1 - tl.program_id(2)) * ROWS
    H = tl.num_programs(0)
    kv_head = head // GROUP
    rows = row + tl.arange(0, ROWS)
    pos = S - T + rows

    first = pos  # not read without bounds
    if BOUNDED:
        first_ptr += tl.cast(batch, tl.int64) * first_stride_b
        first = tl.load(first_ptr + rows, mask=rows < T, other=0)
    start, a, b, end = key_tiles(first_ptr, row, T, S, ROWS, COLUMNS, BOUNDED)

    q = load_rows(
        q_ptr, batch, row, head, T, q_stride_b, q_stride_t, q_stride_h,
        ROWS, D, BLOCK_D, True, False,
    )  # fmt: skip
    dout = load_rows(
        dout_ptr, batch, row, head, T, dout_stride_b, dout_stride_t, dout_stride_h,
        ROWS, D, BLOCK_D, True, False,
    )  # fmt: skip
    base = (tl.cast(batch, tl.int64) * H + head) * T
    lse = tl.load(lse_ptr + base + rows, mask=rows < T, other=0.0)
    delta = tl.load(delta_ptr + base + rows, mask=rows < T, other=0.0)
    dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dq = _visit_keys(
        dq, q, dout, lse, delta, pos, first, k_ptr, v_ptr, batch, kv_head, S, scale, a, b, a, 0,
        k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
        ROWS, COLUMNS, D, BLOCK_D, TMA, False, BOUNDED,
    )  # fmt: skip
    dq = _visit_keys(
        dq, q, dout, lse, delta, pos, first, k_ptr, v_ptr, batch, kv_head, S, scale,
        start, end - (b - a), a, b - a,
        k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
        ROWS, COLUMNS, D, BLOCK_D, TMA, True, BOUNDED,
    )  # fmt: skip

    dq *= scale * LN_2
    store_rows(
        dq_ptr, dq, batch, row, head, T, tl.cast(T, tl.int64) * H * D, H * D, D,
        ROWS, D, BLOCK_D, TMA,
    )  # fmt: skip


@torch.library.custom_op("llamapro::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    needs_dq: bool,
    needs_dkv: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the shapes and dtype of q, k, v; those not asked for have no elements.

    Args:
        dout: (B, T, H, D), any strides.
        out, lse: what forward returned.
        first, last: the bounds of `attention`; dq takes the one, dk and dv the other.
    """
    B, T, H, D = q.shape
    S, KV = k.shape[1:3]
    options: dict[str, Any] = {"dtype": q.dtype, "device": q.device}
    dq = torch.empty(q.shape if needs_dq else (0,), **options)
    dk = torch.empty(k.shape if needs_dkv else (0,), **options)
    dv = torch.empty(k.shape if needs_dkv else (0,), **options)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()

    architecture = device.architecture(q.device)
    tma = tiles.uses_tma(architecture, q.dtype)
    block_d = tiles.padded(D)
    q, k, v, dout = (tiles.with_readable_rows(x, tma) for x in (q, k, v, dout))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    scale = math.log2(math.e) / math.sqrt(D)
    with torch.cuda.device_of(q):
        delta = torch.empty_like(lse)
        _delta_kernel[(H, B, triton.cdiv(T, DELTA_ROWS))](
            out, dout, delta, T, *dout.stride()[:3], ROWS=DELTA_ROWS, D=D, BLOCK_D=block_d
        )
        in_one_pass = needs_dq and needs_dkv and not deterministic and block_d <= 128
        if needs_dkv:
            if last is not None:
                last = last.contiguous()
            kernel = "single_pass" if in_one_pass else "key_value"
            tile = tiles.tile(kernel, architecture, block_d, q.dtype)
            dq_sum = None
            # The interpreter has no TMA reduction.
            reduce_by_tma = in_one_pass and tma and not device.is_interpreted()
            if in_one_pass:
                dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            _attention_key_value_kernel[(KV, B, triton.cdiv(S, tile.columns))](
                tiles.described(q, tile.rows, tma), k, v, tiles.described(dout, tile.rows, tma),
                lse, delta, last,
                tiles.described(dq_sum, tile.rows, True) if reduce_by_tma else dq_sum,
                tiles.described(dk, tile.columns, tma), tiles.described(dv, tile.columns, tma),
                T, S, H // KV, scale, *strides, tiles.batch_stride(last),
                ROWS=tile.rows, COLUMNS=tile.columns, D=D, BLOCK_D=block_d, TMA=tma,
                BOUNDED=last is not None, ACCUMULATE_DQ=in_one_pass, REDUCE_BY_TMA=reduce_by_tma,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            if dq_sum is not None:
                torch.mul(dq_sum, 1 / math.sqrt(D), out=dq)
        if needs_dq and not in_one_pass:
            if first is not None:
                first = first.contiguous()
            tile = tiles.tile("query", architecture, block_d, q.dtype)
            _attention_query_kernel[(H, B, triton.cdiv(T, tile.rows))](
                q, tiles.described(k, tile.columns, tma), tiles.described(v, tile.columns, tma),
                dout, lse, delta, first, tiles.described(dq, tile.rows, tma),
                T, S, H // KV, scale, *strides, tiles.batch_stride(first),
                ROWS=tile.rows, COLUMNS=tile.columns, D=D, BLOCK_D=block_d, TMA=tma,
                BOUNDED=first is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    needs_dq: bool,
    needs_dkv: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if needs_dq else (0,)),
        k.new_empty(k.shape if needs_dkv else (0,)),
        k.new_empty(k.shape if needs_dkv else (0,)),
    )
