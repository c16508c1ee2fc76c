"""Gradients of causal attention (Triton).

With p = exp((q . k - lse) / sqrt(D)) and an output gradient `dout`, for query t and key n:

    delta_t = dout_t . out_t,    ds = p * (dout_t . v_n - delta_t)
    dv_n = sum_t p dout_t,    dk_n = sum_t ds q_t / sqrt(D),    dq_t = sum_n ds k_n / sqrt(D)

Forward's lse, in the units of q . k, makes p a softmax without another pass over the keys. The sums
for keys run over the queries of all heads of a group. Only pairs that see each other count. For a
query at position p_t = S - T + t they are first[t] <= n <= p_t. For a key the same pairs are
n <= p_t <= last[n].

Three kernels (Dao et al., 2022; Dao, 2023), 7 matrix products in all, no atomics, so that the
result is the same every time:
- delta. Grid (H, B, tiles of queries). A program owns DELTA_ROWS queries of one head. It reads out
  and dout and writes delta in fp32.
- key_value. Grid (KV, B, tiles of keys). A program owns a tile of keys of one key/value head. It
  goes through the query tiles of all heads of its group that see them, keeps dk and dv in fp32
  registers, and writes both at the end. There are no copies of k and v per head.
- query. Grid (H, B, tiles of queries). A program owns a tile of queries of one head, goes through
  its keys as forward does, and writes dq. It computes q . k and dout . v a second time.

Precision: p and ds are fp32 and are rounded to the tensors' dtype as factors of a product. All sums
are fp32. Tiles are visited and masked as in forward: see attention.py, which has the shape legend.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamapro.kernels import device, tiles
from llamapro.kernels.tensors import dense_like, operator
from llamapro.kernels.tiles import key_tiles, load_rows, store_rows

LN_2 = tl.constexpr(math.log(2))
DELTA_ROWS = 64


@triton.jit
def _delta_kernel(
    out_ptr, dout_ptr, delta_ptr, T,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes delta = rowsum(out * dout) in fp32."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row = tl.program_id(2) * ROWS
    H = tl.num_programs(0)
    out = load_rows(out_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, True, False)
    dout = load_rows(dout_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, True, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = row + tl.arange(0, ROWS)
    base = (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(delta_ptr + base + rows, delta, mask=rows < T)


@triton.jit
def _visit_queries(
    dk, dv, k, v, keys, last, q_ptr, dout_ptr, lse_ptr, delta_ptr,
    batch, kv_head, GROUP, H, T, S, scale, start, count, a, skip,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds `count` query tiles of each head of a group to dk and dv.

    The tiles begin at `start`; from tile a on, they are `skip` tiles further.
    """
    # One loop over all heads, not two nested ones: loads of the next head's tiles are in flight
    # while the last tiles of this head are computed.
    head = kv_head * GROUP
    tile = start
    for _ in tl.range(0, GROUP * count):
        row = tile * ROWS
        if MASKED:
            row += tl.where(tile < a, 0, skip) * ROWS
        rows = row + tl.arange(0, ROWS)
        q = load_rows(q_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, MASKED, TMA)
        dout = load_rows(dout_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, MASKED, TMA)
        # Rows past T are zeros in q, dout, lse and delta: there p is 1, and adds nothing.
        of_head = (tl.cast(batch, tl.int64) * H + head) * T
        lse = tl.load(lse_ptr + of_head + rows, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + of_head + rows, mask=rows < T, other=0.0)
        # Both products are (COLUMNS, ROWS), so that p and ds are ready to be left factors. Their
        # sums start at what is to be subtracted, which takes fewer registers than subtracting it
        # afterwards.
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
        # After a head's last tile comes the next head's first.
        tile += 1
        is_last = tile == start + count
        head = tl.where(is_last, head + 1, head)
        tile = tl.where(is_last, start, tile)
    return dk, dv


@triton.jit
def _attention_key_value_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, last_ptr, dk_ptr, dv_ptr,
    T, S, GROUP, scale, last_stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of one tile of keys of one head; the first keys, seen most, come first."""
    kv_head = tl.program_id(0)
    batch = tl.program_id(1)
    key = tl.program_id(2) * COLUMNS
    KV = tl.num_programs(0)
    keys = key + tl.arange(0, COLUMNS)

    # Query tiles [start, a) are masked at the diagonal and tiles [a, b) see all keys of this tile.
    # Tiles [b, end) are masked where the keys go out of sight and at the end of T.
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

    # dk and dv are those of the key/value head: the sums over its whole group of query heads.
    dk = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    k = load_rows(k_ptr, batch, key, kv_head, S, KV, COLUMNS, D, BLOCK_D, True, False)
    v = load_rows(v_ptr, batch, key, kv_head, S, KV, COLUMNS, D, BLOCK_D, True, False)
    dk, dv = _visit_queries(
        dk, dv, k, v, keys, last, q_ptr, dout_ptr, lse_ptr, delta_ptr,
        batch, kv_head, GROUP, KV * GROUP, T, S, scale, start, end - start - (b - a), a, b - a,
        ROWS, COLUMNS, D, BLOCK_D, TMA, True, BOUNDED,
    )  # fmt: skip
    dk, dv = _visit_queries(
        dk, dv, k, v, keys, last, q_ptr, dout_ptr, lse_ptr, delta_ptr,
        batch, kv_head, GROUP, KV * GROUP, T, S, scale, a, b - a, a, 0,
        ROWS, COLUMNS, D, BLOCK_D, TMA, False, BOUNDED,
    )  # fmt: skip

    # scale * ln 2 is 1/sqrt(D): `scale` is that times log2 e, for exp2.
    dk *= scale * LN_2
    store_rows(dk_ptr, dk, batch, key, kv_head, S, KV, COLUMNS, D, BLOCK_D, TMA)
    store_rows(dv_ptr, dv, batch, key, kv_head, S, KV, COLUMNS, D, BLOCK_D, TMA)


@triton.jit
def _visit_keys(
    dq, q, dout, lse, delta, pos, first, k_ptr, v_ptr, batch, kv_head, S, KV, scale,
    start, end, a, skip,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles start .. end - 1 to dq; from tile a on, `skip` tiles further."""
    for i in tl.range(start, end):
        n = i * COLUMNS
        if MASKED:
            n += tl.where(i < a, 0, skip) * COLUMNS
        k = load_rows(k_ptr, batch, n, kv_head, S, KV, COLUMNS, D, BLOCK_D, MASKED, TMA)
        v = load_rows(v_ptr, batch, n, kv_head, S, KV, COLUMNS, D, BLOCK_D, MASKED, TMA)
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
    T, S, GROUP, scale, first_stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Computes dq of one tile of queries of one head; the last queries, seeing most, come first."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
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

    q = load_rows(q_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, True, False)
    dout = load_rows(dout_ptr, batch, row, head, T, H, ROWS, D, BLOCK_D, True, False)
    base = (tl.cast(batch, tl.int64) * H + head) * T
    lse = tl.load(lse_ptr + base + rows, mask=rows < T, other=0.0)
    delta = tl.load(delta_ptr + base + rows, mask=rows < T, other=0.0)
    # Rows past T have q, dout, lse and delta of 0, and are not stored.
    dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dq = _visit_keys(
        dq, q, dout, lse, delta, pos, first, k_ptr, v_ptr, batch, kv_head, S, KV, scale,
        a, b, a, 0, ROWS, COLUMNS, D, BLOCK_D, TMA, False, BOUNDED,
    )  # fmt: skip
    dq = _visit_keys(
        dq, q, dout, lse, delta, pos, first, k_ptr, v_ptr, batch, kv_head, S, KV, scale,
        start, end - (b - a), a, b - a, ROWS, COLUMNS, D, BLOCK_D, TMA, True, BOUNDED,
    )  # fmt: skip

    dq *= scale * LN_2
    store_rows(dq_ptr, dq, batch, row, head, T, H, ROWS, D, BLOCK_D, TMA)


@operator("attention_backward")
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    first: Tensor | None, last: Tensor | None, needs_dq: bool, needs_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dq, dk, dv in the shapes and dtype of q, k, v; those not needed have no elements.

    Args:
        dout: (B, T, H, D); copied like q, k and v.
        out, lse: as forward returned them.
        first, last: the bounds of `attention`. dq reads `first`, dk and dv read `last`.
    """
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    dq, dk, dv = _outputs(q, k, needs_dq, needs_dkv)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()

    architecture = device.architecture(q.device)
    tma = tiles.uses_tma(architecture, q.dtype)
    block_d = tiles.padded(D)
    q, k, v, dout = (tiles.dense(x) for x in (q, k, v, dout))
    scale = math.log2(math.e) / math.sqrt(D)
    with torch.cuda.device_of(q):
        # Both other kernels need delta.
        delta = torch.empty_like(lse)
        _delta_kernel[(H, B, triton.cdiv(T, DELTA_ROWS))](
            out, dout, delta, T, ROWS=DELTA_ROWS, D=D, BLOCK_D=block_d
        )
        if needs_dkv:
            last = None if last is None else last.contiguous()
            tile = tiles.tile("key_value", architecture, block_d, q.dtype)
            _attention_key_value_kernel[(KV, B, triton.cdiv(S, tile.columns))](
                tiles.described(q, tile.rows, tma), k, v, tiles.described(dout, tile.rows, tma),
                lse, delta, last,
                tiles.described(dk, tile.columns, tma), tiles.described(dv, tile.columns, tma),
                T, S, H // KV, scale, tiles.batch_stride(last),
                ROWS=tile.rows, COLUMNS=tile.columns, D=D, BLOCK_D=block_d, TMA=tma,
                BOUNDED=last is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        if needs_dq:
            first = None if first is None else first.contiguous()
            tile = tiles.tile("query", architecture, block_d, q.dtype)
            _attention_query_kernel[(H, B, triton.cdiv(T, tile.rows))](
                q, tiles.described(k, tile.columns, tma), tiles.described(v, tile.columns, tma),
                dout, lse, delta, first, tiles.described(dq, tile.rows, tma),
                T, S, H // KV, scale, tiles.batch_stride(first),
                ROWS=tile.rows, COLUMNS=tile.columns, D=D, BLOCK_D=block_d, TMA=tma,
                BOUNDED=first is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return dq, dk, dv


def _outputs(
    q: Tensor, k: Tensor, needs_dq: bool, needs_dkv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(q, needs_dq), dense_like(k, needs_dkv), dense_like(k, needs_dkv)


@attention_backward.register_fake
def _(dout, q, k, v, out, lse, first, last, needs_dq, needs_dkv):
    return _outputs(q, k, needs_dq, needs_dkv)
