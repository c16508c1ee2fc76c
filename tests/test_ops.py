"""The reference arithmetic against explicit formulas and Hugging Face's own modules."""

import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llamapro import backends, ops
from llamapro.kernels import cpu

VOCAB, HIDDEN, TOKENS = 97, 16, 23
CHUNK_TOKENS = 5  # 23 tokens are four full chunks and one of three


@pytest.fixture(params=["torch", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on the formulas and on the memory-saving functions."""
    with backends.use(request.param):
        yield request.param


only_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "logits_at_once", lambda *_: VOCAB * CHUNK_TOKENS)


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    return x, weight, torch.randint(VOCAB, (TOKENS,), generator=generator)


@pytest.mark.parametrize("ignored", [(), (0, 5, 6, 7, 8, 9, 22)], ids=["none", "some"])
def test_chunked_loss_equals_cross_entropy_in_value_and_gradient(
    ignored: tuple[int, ...], small_chunks: None
) -> None:
    """Chunks of 5 tokens give the unchunked sum, count and both gradients, a whole one ignored."""
    x, weight, targets = loss_inputs()
    targets[list(ignored)] = ops.IGNORE_INDEX
    loss_sum, count = ops.linear_cross_entropy(x, weight, targets)
    assert loss_sum.dtype == torch.float32 and count.dtype == torch.int64
    assert count == TOKENS - len(ignored)
    found = torch.autograd.grad(loss_sum, (x, weight))

    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=-100, reduction="sum")
    wanted = torch.autograd.grad(expected, (x, weight))
    torch.testing.assert_close(loss_sum, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_all_targets_ignored_is_no_loss_no_count_and_zero_gradients(small_chunks: None) -> None:
    """Nothing is divided by the number of targets: 0, 0, and finite zero gradients."""
    x, weight, targets = loss_inputs()
    loss_sum, count = ops.linear_cross_entropy(
        x, weight, torch.full_like(targets, ops.IGNORE_INDEX)
    )
    assert loss_sum == 0 and count == 0
    for gradient in torch.autograd.grad(loss_sum, (x, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@only_cpu
def test_chunked_loss_never_keeps_the_logits(small_chunks: None) -> None:
    """Under a frozen head, nothing that waits for backward is as large as one chunk's logits."""
    x, weight, targets = loss_inputs()
    weight.requires_grad_(False)  # its gradient, made in forward, would wait
    largest = 0

    def see(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor is not weight else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        ops.linear_cross_entropy(x, weight, targets)
    assert largest < VOCAB * CHUNK_TOKENS


def test_loss_of_bf16_logits_is_taken_in_fp32() -> None:
    """The sum over bf16 hidden states is that of the bf16 logits cast up, in fp32."""
    x, weight, targets = (t.bfloat16() if t.is_floating_point() else t for t in loss_inputs())
    loss_sum, _ = ops.linear_cross_entropy(x, weight, targets)
    expected = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")
    assert loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum, expected, rtol=1e-6, atol=0)


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def turned(x: Tensor) -> Tensor:
    return ops.rope(x, *ops.rope_table(torch.arange(5), ops.rope_frequencies(8, 100.0), x.dtype))


# What each op computes, of which inputs, and how many elements it may keep beside them.
KEPT: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), [double(2, 5, 8), double(8, seed=1)], 0),
    "swiglu": (ops.swiglu, [double(2, 5, 8), double(2, 5, 8, seed=1)], 0),
    "rope": (turned, [double(2, 5, 3, 8)], 2 * 5 * 8),
    "linear": (ops.linear, [double(2, 5, 8), double(3, 8, seed=1)], 0),
}


@pytest.mark.parametrize("name", KEPT)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """By finite differences in fp64, of every input."""
    function, given, _ = KEPT[name]
    assert torch.autograd.gradcheck(function, given)


@only_cpu
@pytest.mark.parametrize("name", KEPT)
def test_nothing_but_inputs_and_tables_waits_for_backward(name: str) -> None:
    """Autograd would keep up to three tensors more of the size of the input."""
    function, given, extra = KEPT[name]
    kept = {}

    def see(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        function(*given)
    for tensor in given:
        kept.pop(tensor.untyped_storage()._cdata, None)
    assert sum(tensor.numel() for tensor in kept.values()) <= extra


@only_cpu
@pytest.mark.parametrize("has_onednn", [True, False])
def test_fp32_products_are_as_exact_as_torchs(
    has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and both gradients, of strided rows too; with a graph and without, the same bits."""
    monkeypatch.setattr(cpu, "HAS_ONEDNN", has_onednn and cpu.HAS_ONEDNN)
    x, weight, grad = (
        double(*shape, seed=i).detach()
        for i, shape in enumerate([(2, 33, 64), (48, 64), (2, 33, 48)])
    )

    def results(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in (x[:, ::2], weight)]
        y = function(*given)
        if function is cpu.linear and has_onednn:  # torch's own are not always the same
            assert torch.equal(y, function(*(t.detach() for t in given)))
        return [y, *torch.autograd.grad(y, given, grad[:, ::2].to(dtype))]

    exact = results(F.linear, torch.float64)
    found, plain = results(cpu.linear, torch.float32), results(F.linear, torch.float32)
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        rounding = torch.finfo(torch.float32).eps * true.abs().max()
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + rounding


@only_cpu
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_fp32_products_are_compiled() -> None:
    """torch.compile has oneDNN's products of its own, and none for a weight in plain layout."""
    x, weight = (double(*s, seed=0).detach().float().requires_grad_() for s in ((33, 64), (48, 64)))
    values = [f(x, weight) for f in (torch.compile(cpu.linear), F.linear)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), (x, weight)) for y in values))


@pytest.mark.parametrize("H, KV", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("T, S", [(1, 1), (9, 9), (1, 9), (4, 9), (8, 9)])
def test_attention_is_the_causal_softmax_formula(H: int, KV: int, T: int, S: int) -> None:
    """Position by position in fp64: query t sees keys up to S - T + t, head h reads h // (H/KV)."""
    B, D = 2, 8
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64)
    k = torch.randn(B, S, KV, D, generator=generator, dtype=torch.float64)
    v = torch.randn(B, S, KV, D, generator=generator, dtype=torch.float64)
    expected = torch.empty_like(q)
    for t in range(T):
        seen = S - T + t + 1
        for h in range(H):
            kv = h // (H // KV)
            scores = torch.einsum("bd,bsd->bs", q[:, t, h], k[:, :seen, kv]) / math.sqrt(D)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            expected[:, t, h] = torch.einsum("bs,bsd->bd", weights, v[:, :seen, kv])
    torch.testing.assert_close(ops.attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_a_single_query_reads_each_key_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the query heads that share keys are queries of one head: (B, KV, H / KV, D)."""
    shapes, attend = [], F.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Tensor:
        shapes.append((tuple(q.shape), k.shape[1]))
        return attend(q, k, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    for T in (1, 5):
        q, k = torch.randn(2, T, 6, 8), torch.randn(2, 9, 2, 8)
        cpu.attention(q, k, k)
    assert shapes == [((2, 2, 3, 8), 2), ((2, 6, 5, 8), 2)]


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("T, S", [(9, 9), (4, 9), (1, 9)])
def test_bounds_are_the_window_and_the_document(
    window: int | None, is_packed: bool, T: int, S: int
) -> None:
    """Pair by pair: i sees j if i - window < j <= i and both are in one document, else not."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 5], [3] * 9]) if is_packed else None
    first, last = ops.attention_bounds(T, S, window, documents)
    assert first.dtype == last.dtype == torch.int32
    assert first.shape[1] == T and last.shape[1] == S
    for b in range(len(first)):
        for i in range(S - T, S):
            for j in range(S):
                sees = j <= i and (window is None or i - window < j)
                if documents is not None:
                    sees = sees and bool(documents[b, i] == documents[b, j])
                assert (first[b, i - (S - T)] <= j <= i) == sees
                assert (j <= i <= last[b, j]) == sees


@pytest.mark.parametrize("T, S", [(9, 9), (4, 9), (1, 9)])
def test_bounded_attention_sees_what_its_bounds_say(T: int, S: int) -> None:
    """In a window and in documents, each query equals attention over the keys it sees alone."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, T, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, S, 2, 8, generator=generator, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    bounds = ops.attention_bounds(T, S, 4, documents)
    found = ops.attention(q, k, v, bounds)
    for b in range(2):
        for t in range(T):
            at, start = S - T + t, int(bounds.first[b, t])
            seen = k[b : b + 1, start : at + 1], v[b : b + 1, start : at + 1]
            expected = ops.attention(q[b : b + 1, t : t + 1], *seen)
            torch.testing.assert_close(found[b : b + 1, t : t + 1], expected)


def test_adding_and_norming_is_the_sum_and_its_norm() -> None:
    """`residual + x`, rounded, and `rms_norm` of that."""
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 3, 5, 16, generator=generator).bfloat16()
    weight = torch.rand(16, generator=generator).bfloat16()
    total, normed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
def test_rope_is_a_complex_multiplication(theta: float) -> None:
    """(x_i, x_{i+D/2}) as a complex number is turned by position * theta^(-2i/D)."""
    B, T, H, KV, D = 2, 5, 4, 2, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64)
    k = torch.randn(B, T, KV, D, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 50, 51, 300, 2047]])
    cos, sin = ops.rope_table(positions, ops.rope_frequencies(D, theta), torch.float64)

    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.exp(1j * positions[..., None, None] * frequency)  # (B, T, 1, D / 2)
    for x in (q, k):
        rotated = ops.rope(x, cos, sin)
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        expected = torch.cat((turned.real, turned.imag), dim=-1)
        # Angles are fp32: a frequency and its product with the position are each a few half-ulps
        # off, relative to an angle of at most the largest position.
        slack = 4 * torch.finfo(torch.float32).eps * positions.max() * x.abs().max()
        assert (rotated - expected).abs().max() < slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_is_hugging_faces_to_the_bit(dtype: torch.dtype) -> None:
    """Statistics in fp32, cast back, then times weight: the other order gives other bits."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, 33, 64, generator=generator)).to(dtype)
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).to(dtype)
    reference = LlamaRMSNorm(64, eps=1e-5)
    reference.weight.data = weight
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), reference(x))
    if dtype != torch.float32:
        cast_last = F.rms_norm(x.float(), (64,), weight.float(), 1e-5).to(dtype)
        assert not torch.equal(ops.rms_norm(x, weight, 1e-5), cast_last)


def test_swiglu_applies_silu_to_the_gate_only() -> None:
    """gate / (1 + exp(-gate)) * up."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(ops.swiglu(gate, up), expected, rtol=1e-12, atol=1e-12)


def test_metas_rows_reordered_rotate_as_meta_does() -> None:
    """Scores of interleaved pairs equal scores of halves after the rows are reordered."""
    H, D, C, T = 2, 8, 6, 5
    generator = torch.Generator().manual_seed(0)
    wq, wk, x = (
        torch.randn(*s, generator=generator).double() for s in ((H * D, C),) * 2 + ((T, C),)
    )
    assert torch.equal(ops.halves_to_interleaved(ops.interleaved_to_halves(wq, H), H), wq)
    frequencies = ops.rope_frequencies(D, 100.0).double()
    turn = torch.polar(torch.ones(T, D // 2).double(), torch.arange(T)[:, None] * frequencies)

    def as_meta(weight: Tensor) -> Tensor:  # neighbours are the real and imaginary part
        pairs = torch.view_as_complex((x @ weight.T).view(T, H, D // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    def as_here(weight: Tensor) -> Tensor:
        table = ops.rope_table(torch.arange(T), frequencies.float(), torch.float64)
        heads = (x @ ops.interleaved_to_halves(weight, H).T).view(1, T, H, D)
        return ops.rope(heads, *table)[0]

    expected = torch.einsum("thd,shd->hts", as_meta(wq), as_meta(wk))
    found = torch.einsum("thd,shd->hts", as_here(wq), as_here(wk))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@only_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["linear", "rms_norm", "add_rms_norm", "rope", "attention", "swiglu", "loss", "kl"]
)
def test_the_cpu_backend_is_as_exact_as_the_formulas(
    name: str, dtype: torch.dtype, assert_as_exact_as_torch: Any
) -> None:
    """Outputs and gradients: an error against fp64 of at most twice plain PyTorch's."""
    shapes = {"attention": [(2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)], "rope": [(2, 9, 3, 8)]}
    shapes |= {"linear": [(2, 9, 16), (24, 16)], "rms_norm": [(2, 9, 16), (16,)]}
    shapes |= {"add_rms_norm": [(2, 9, 16), (2, 9, 16), (16,)], "swiglu": [(2, 9, 16)] * 2}
    shapes |= {"loss": [(9, 16), (24, 16)], "kl": [(9, 16), (9, 16), (24, 16)]}
    targets = torch.tensor([3, 23, -100, 0, 7, 7, 1, -100, 2])

    def call(*x: Tensor) -> Any:
        if name == "rope":
            frequencies = ops.rope_frequencies(8, 100.0)
            return ops.rope(*x, *ops.rope_table(torch.arange(9), frequencies, x[0].dtype))
        if name == "loss":
            return ops.linear_cross_entropy(*x, targets)[0]
        if name == "kl":
            return ops.linear_kl(*x, targets, teacher_rows=20)[0]
        return getattr(ops, name)(*x, *([1e-5] if "norm" in name else []))

    def results(choice: str, dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in inputs]
        with backends.use(choice):
            out = call(*given)
            out = out if isinstance(out, tuple) else (out,)
            loss = sum((o.double() * (1 + 0.1 * i)).sum() for i, o in enumerate(out))
            needed = [given[0], given[2]] if name == "kl" else given  # no gradient of the teacher
            return [*(o.detach() for o in out), *torch.autograd.grad(loss, needed)]

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes[name]]
    exact = results("torch", torch.float64)
    for ours, theirs, true in zip(
        results("cpu", dtype), results("torch", dtype), exact, strict=True
    ):
        assert_as_exact_as_torch(ours, theirs, true)
