"""The attention kernels against PyTorch and fp64: values and every gradient."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llamapro import backends, ops

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import attention, tiles

Function = Callable[..., Any]
Check = Callable[..., None]
Results = Callable[..., list[Tensor]]


class Shape(NamedTuple):
    """B, T, S, H, KV, D."""

    B: int = 1
    T: int = 20
    S: int = 40
    H: int = 1
    KV: int = 1
    D: int = 16


@pytest.fixture(params=["pointers", "tma"])
def tma(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to read a tile; the interpreter can play TMA, a GPU has it or not."""
    if device == "cpu":
        architecture = 90 if request.param == "tma" else 80
        monkeypatch.setattr(attention.device, "architecture", lambda _: architecture)
    elif (attention.device.architecture(torch.device(device)) == 90) != (request.param == "tma"):
        pytest.skip("the other way on this GPU")
    return request.param == "tma"


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """[q, k, v], and an output gradient."""
    B, T, S, H, KV, D = shape
    generator = torch.Generator().manual_seed(T + S + D)
    sizes = [(B, T, H, D), (B, S, KV, D), (B, S, KV, D), (B, T, H, D)]
    q, k, v, dout = (torch.randn(s, generator=generator).to(device, dtype) for s in sizes)
    return [q, k, v], dout


@pytest.fixture
def check(compare: Function, in_torch: Callable[[Function], Function]) -> Check:
    """`check([q, k, v], [dout], [bounds])`: output and gradients by the error rule.

    Beside PyTorch's own fused kernel, which also recomputes the softmax from its log-sum-exp.
    """
    fused = backends.use("cpu")(ops.attention)
    return partial(compare, attention.attention, fused, exact=in_torch(ops.attention))


@pytest.mark.parametrize("size", [8, 40, 64, 80, 96, 128, 256])
def test_every_head_dim_is_as_exact_as_torch(
    size: int, device: str, half: torch.dtype, small_tiles: None, check: Check
) -> None:
    """Output and gradients; powers of two and not."""
    qkv, dout = inputs(Shape(D=size), half, device)
    check(qkv, [dout])


@pytest.mark.parametrize(
    "shape", [Shape(T=1, S=70), Shape(T=37, S=70), Shape(T=64, S=64, H=2), Shape(B=2, H=2)], ids=str
)
def test_output_and_gradients_are_as_exact_as_torch(
    shape: Shape, dtype: torch.dtype, device: str, small_tiles: None, check: Check
) -> None:
    """One query, fewer queries than keys, whole tiles, and several batches and heads."""
    qkv, dout = inputs(shape, dtype, device)
    check(qkv, [dout])


@pytest.mark.parametrize("shape", [Shape(D=8), Shape(T=37, S=70, D=40), Shape(B=2, D=128)], ids=str)
def test_tiles_read_by_tma_are_right(
    shape: Shape, device: str, half: torch.dtype, small_tiles: None, tma: bool, check: Check
) -> None:
    """Incomplete tiles in T, S and D, whichever way they are read."""
    qkv, dout = inputs(shape, half, device)
    check(qkv, [dout])


def test_tiles_of_the_table_are_right(
    device: str, half: torch.dtype, tma: bool, check: Check
) -> None:
    """The sizes that are launched, on one shape with an incomplete tile."""
    qkv, dout = inputs(Shape(T=150, S=200, D=64), half, device)
    check(qkv, [dout])


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)], ids=str)
def test_each_query_head_reads_its_key_head(
    heads: tuple[int, int], device: str, half: torch.dtype, small_tiles: None, check: Check
) -> None:
    """Groups of 1, 4 and 3; each head's values are of another size, so none passes for another.

    Gradients of a key head are the sum over its group, of all heads and nothing else.
    """
    H, KV = heads
    (q, k, v), dout = inputs(Shape(T=20, S=20, H=H, KV=KV), half, device)
    dout = dout * torch.arange(1, H + 1, device=device).to(half)[:, None]
    v = v * torch.arange(1, KV + 1, device=device).to(half)[:, None]
    check([q, k, v], [dout])


DOCUMENTS = {  # lengths
    "one": (70,),
    "three": (33, 1, 36),
    "short": (1, 1, 5, 40, 16, 6, 1),
}


def bounds_of(
    lengths: tuple[int, ...] | None, window: int | None, T: int, S: int, device: str
) -> ops.AttentionBounds:
    documents = None
    if lengths is not None:
        numbers = torch.arange(len(lengths), dtype=torch.int32)
        documents = numbers.repeat_interleave(torch.tensor(lengths))[None].to(device)
    return ops.attention_bounds(T, S, window, documents, device)


@pytest.mark.parametrize(
    "documents, window, T",
    [
        (None, 7, 70),
        (None, 32, 70),
        (None, 50, 41),
        (None, 70, 70),
        (None, 1000, 41),
        ("one", None, 70),
        ("three", None, 70),
        ("short", None, 70),
        ("short", 6, 41),
        ("three", 32, 70),
    ],
)
def test_bounds_are_kept(
    documents: str | None,
    window: int | None,
    T: int,
    device: str,
    half: torch.dtype,
    small_tiles: None,
    check: Check,
) -> None:
    """Windows of 1 key to more than there are, documents of 1 token and more, and both."""
    H = 2 if documents and window else 1
    qkv, dout = inputs(Shape(T=T, S=70, H=H), half, device)
    lengths = DOCUMENTS[documents] if documents else None
    bounds = bounds_of(lengths, window, T, 70, device)
    check(qkv, [dout], [bounds])


def test_window_holds_itself_and_no_key_more(device: str, small_tiles: None) -> None:
    """Position i sees i - window < j <= i; with one-hot values, the output shows exactly those."""
    T, window = 40, 7
    (q, k, _), _ = inputs(Shape(T=T, S=T, D=40), torch.float32, device)
    v = torch.eye(T, device=device)[None, :, None]  # (1, S, 1, D): key j is the unit vector j
    out = attention.attention(q, k, v, ops.attention_bounds(T, T, window, device=device))
    t, n = torch.arange(T)[:, None], torch.arange(T)[None]
    assert torch.equal(out[0, :, 0].cpu() > 0, (n <= t) & (n > t - window))


def test_lone_key_gives_its_value_and_no_gradient_of_scores(
    device: str, small_tiles: None, results: Results
) -> None:
    """A window of 1 makes out v and dv dout; dq and dk are 0 but for fp32 rounding.

    The error rule says nothing here, because only the rounding of either implementation is left.
    """
    (q, k, v), dout = inputs(Shape(T=40, S=40, H=2, KV=2), torch.float32, device)
    bounds = ops.attention_bounds(40, 40, 1, device=device)
    out, dq, dk, dv = results(attention.attention, [q, k, v], [dout], [bounds])
    assert torch.equal(out, v)
    torch.testing.assert_close(dv, dout, rtol=1e-5, atol=0)  # p is 2^0 but for the rounding of lse
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_bounds_may_differ_by_batch_row(
    device: str, half: torch.dtype, small_tiles: None, check: Check
) -> None:
    """(B, T) bounds, in any layout; other documents in every row."""
    qkv, dout = inputs(Shape(B=2, T=70, S=70), half, device)
    each = [bounds_of(DOCUMENTS[name], 30, 70, 70, device) for name in ("three", "short")]
    rows = (torch.cat(pair) for pair in zip(*each, strict=True))
    bounds = ops.AttentionBounds(*(x.T.contiguous().T for x in rows))
    check(qkv, [dout], [bounds])


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_tiles_out_of_sight_are_not_visited(
    device: str, half: torch.dtype, small_tiles: None, results: Results
) -> None:
    """NaN in an unseen document spoils nothing; in a masked tile it would, as 0 * NaN."""
    (q, k, v), dout = inputs(Shape(T=96, S=96), half, device)
    lengths = (32, 32, 32)  # whole tiles: none holds keys of two documents
    poisoned = slice(32, 64)
    for x in (q, k, v, dout):
        x[:, poisoned] = float("nan")
    bounds = bounds_of(lengths, None, 96, 96, device)
    for x in results(attention.attention, [q, k, v], [dout], [bounds]):
        assert x[:, poisoned].isnan().all()
        assert x[:, :32].isfinite().all() and x[:, 64:].isfinite().all()


def test_every_layout_is_read(
    layout: str,
    in_layout: Callable[[Tensor, str], Tensor],
    device: str,
    half: torch.dtype,
    small_tiles: None,
    tma: bool,
    check: Check,
) -> None:
    """q, k, v and the output gradient in every layout; none of them is changed."""
    qkv, dout = inputs(Shape(B=2, D=24), half, device)
    arguments = [in_layout(x, layout) for x in (*qkv, dout)]
    before = [x.clone() for x in arguments]
    check(arguments[:3], arguments[3:])
    assert all(map(torch.equal, arguments, before))


def test_only_what_is_not_dense_is_copied(device: str, half: torch.dtype) -> None:
    """A whole tensor is read in place; slices of one, or an odd address, are copied."""
    whole = torch.zeros(2, 100, 2, 64, dtype=half, device=device)
    assert tiles.dense(whole) is whole and tiles.dense(whole[1:]).data_ptr() == whole[1:].data_ptr()
    odd = torch.zeros(whole.numel() + 1, dtype=half, device=device)[1:].view(whole.shape)
    for x in (
        whole[:, :37],
        whole[..., 1:33],
        whole.transpose(1, 2),
        whole[:1].expand(2, -1, -1, -1),
        odd,
    ):
        copied = tiles.dense(x)
        assert copied.is_contiguous() and copied.data_ptr() % 16 == 0 and torch.equal(copied, x)


@pytest.mark.usefixtures("guarded")
def test_nothing_is_written_outside_and_nothing_left_out(
    device: str, half: torch.dtype, small_tiles: None, tma: bool, check: Check
) -> None:
    """Incomplete tiles in T, S and D, into guarded outputs."""
    qkv, dout = inputs(Shape(B=2, T=37, S=70, D=40), half, device)
    check(qkv, [dout])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
def test_scores_of_any_size_are_finite(device: str, small_tiles: None, results: Results) -> None:
    """Scores of +-10^4 have infinite exponentials, seen or not."""
    (q, k, v), dout = inputs(Shape(T=40, S=40), torch.float32, device)
    for sign in (1, -1):
        extreme = [q.abs() * 100 * sign, k.abs() * 100, v]
        found = results(attention.attention, extreme, [dout])
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("sizes", [Shape(T=0, S=5), Shape(H=0, KV=0)], ids=str)
def test_no_queries_or_heads_give_no_output_and_zero_gradients(
    sizes: Shape, device: str, results: Results
) -> None:
    """Keys that nobody looks at have a gradient of 0."""
    qkv, dout = inputs(sizes, torch.float32, device)
    out, *gradients = results(attention.attention, qkv, [dout])
    assert out.shape == qkv[0].shape
    for x, gradient in zip(qkv, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_wrong_shapes_and_dtypes_are_refused(device: str) -> None:
    """A kernel would read other memory."""
    (q, k, v), _ = inputs(Shape(T=8, S=8, H=4, KV=2), torch.float32, device)
    first, last = ops.attention_bounds(8, 8, 4, device=device)
    for arguments, message in [
        ((q, k[:, :7], v), "not \\(B, T, H, D\\)"),
        ((q, k[:, :7], v[:, :7]), "not \\(B, T, H, D\\)"),
        ((q[:, :, :3], k, v), "not \\(B, T, H, D\\)"),
        ((q, k[..., :8], v[..., :8]), "not \\(B, T, H, D\\)"),
        ((q, k.half(), v), "dtypes"),
        ((q[..., :12], k[..., :12], v[..., :12]), "head dim 12 is not a multiple of 8"),
        ((q, k, v, (first[:, 1:], last)), "bounds.first"),
        ((q, k, v, (first, last.long())), "bounds.last"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention.attention(*arguments)
    for size in (0, 12, 264):
        assert "head dim" in attention.unsupported(torch.device(device), torch.float16, size)


@pytest.mark.parametrize("bounded", [False, True])
def test_operator_is_registered_correctly(
    bounded: bool, device: str, small_tiles: None, opcheck: Function
) -> None:
    """The operator passes PyTorch's check with bounds and without."""
    (q, k, v), _ = inputs(Shape(T=20, S=20), torch.float32, device)
    first = ops.attention_bounds(20, 20, 7, device=device).first if bounded else None
    opcheck(torch.ops.llamapro.attention_forward.default, (q, k, v, first))


def test_lse_is_the_log_of_the_sum_of_exponentials(device: str, small_tiles: None) -> None:
    """The saved lse is in the units of q . k, which is times sqrt(D)."""
    (q, k, v), _ = inputs(Shape(T=37, S=70, H=2, KV=2), torch.float32, device)
    _, lse = attention.attention_forward(q, k, v, None)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double())
    hidden = torch.ones(37, 70, dtype=torch.bool, device=device).triu(70 - 37 + 1)
    scores = scores.masked_fill(hidden, float("-inf")) / math.sqrt(16)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) * 4, rtol=1e-6, atol=1e-5)
