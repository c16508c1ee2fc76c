"""Tests of the kernels that only a GPU can run: `pytest -m gpu tests/kernels`.

Races and determinism, addresses beyond 2^31 elements, reads and writes out of bounds as
compute-sanitizer sees them, bf16 training, and Inductor. Each test is a function of a device and of
sizes, so that its code can also be run small in the interpreter.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import backends, ops
from llamapro.model import build_on_meta, load_tensors
from llamapro.training.objective import NextToken

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The GPU, its memory given back afterwards."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    yield torch.device("cuda")
    torch.cuda.empty_cache()


def needs_free(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free} are free")


def random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


# ---- Determinism --------------------------------------------------------------------------------


def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The output of attention and its three gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention.attention(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def check_attention_repeats(device: torch.device, dtype: torch.dtype, T: int, runs: int) -> None:
    q, dout = (random(1, T, 32, 128, device=device, dtype=dtype) for _ in range(2))
    k, v = (random(1, T, 8, 128, device=device, dtype=dtype) for _ in range(2))
    first = gradients(q, k, v, dout)
    for _ in range(runs):
        for x, y in zip(gradients(q, k, v, dout), first, strict=True):
            assert torch.equal(x, y)


def test_attention_gives_the_same_bits_50_times(gpu: torch.device) -> None:
    """S 4096, 32 heads, 8 key/value heads: output and every gradient."""
    check_attention_repeats(gpu, torch.bfloat16, T=4096, runs=50)


# ---- More than 2^31 elements --------------------------------------------------------------------


def check_attention_of_many(device: torch.device, dtype: torch.dtype, shape: Any) -> None:
    B, T, H, KV, D = shape
    q = random(B, T, H, D, device=device, dtype=dtype)
    k, v = (random(B, T, KV, D, device=device, dtype=dtype) for _ in range(2))
    q_alone, k_alone, v_alone = (x[-1:].contiguous() for x in (q, k, v))
    alone = gradients(q_alone, k_alone, v_alone, q_alone)
    for x, expected in zip(gradients(q, k, v, q), alone, strict=True):
        assert torch.equal(x[-1:], expected)


def test_attention_of_more_than_2_31_elements(gpu: torch.device) -> None:
    """The last of 129 sequences, as if it were alone: outputs and gradients."""
    needs_free(60)
    check_attention_of_many(gpu, torch.bfloat16, (129, 4096, 32, 8, 128))


def check_rows_of_many(device: torch.device, dtype: torch.dtype, N: int, C: int) -> None:
    """The last rows of each op that works row by row, as if they were alone; and backward."""
    tail = 5
    weight = random(C, device=device, dtype=dtype)

    def both(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        asked = [x.detach().requires_grad_() for x in inputs]
        out = function(*asked)
        outputs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outputs, asked, [x.detach() for x in outputs])
        return [x.detach() for x in (*outputs, *grads)]

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm.add_rms_norm(x, residual, weight, 1e-5)

    x, y = (random(N, C, device=device, dtype=dtype) for _ in range(2))
    for function, inputs in (
        (lambda x: rms_norm.rms_norm(x, weight, 1e-5), (x,)),
        (add_norm, (x, y)),
        (swiglu.swiglu, (x, y)),
    ):
        found = [z[-tail:].clone() for z in both(function, *inputs)]
        expected = both(function, *(z[-tail:].contiguous() for z in inputs))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_norms_and_swiglu_of_more_than_2_31_elements(gpu: torch.device) -> None:
    """rms_norm, add_rms_norm, swiglu: forward and the gradients of their inputs."""
    needs_free(60)
    check_rows_of_many(gpu, torch.bfloat16, N=(1 << 18) + 8, C=8192)


def check_rope_of_many(device: torch.device, dtype: torch.dtype, shape: Any) -> None:
    B, T, H, KV, D = shape
    q, k = (random(B, T, n, D, device=device, dtype=dtype) for n in (H, KV))
    cos, sin = ops.rope_table(
        torch.arange(T, device=device), ops.rope_frequencies(D, 10000.0, device=device), dtype
    )
    for x in (q, k):
        alone = rope.rope(x[-1:].contiguous(), cos, sin)
        assert torch.equal(rope.rope(x, cos, sin)[-1:], alone)


def test_rope_of_more_than_2_31_elements(gpu: torch.device) -> None:
    """The last of 129 sequences, as if it were alone."""
    needs_free(24)
    check_rope_of_many(gpu, torch.bfloat16, (129, 4096, 32, 8, 128))


def check_loss_of_many(device: torch.device, dtype: torch.dtype, N: int, V: int) -> None:
    x = random(N, 64, device=device, dtype=dtype).requires_grad_()
    weight = random(V, 64, device=device, dtype=dtype)
    targets = torch.randint(V, (N,), device=device)
    loss, count = cross_entropy.linear_cross_entropy(x, weight, targets)
    (found,) = torch.autograd.grad(loss, x)
    with backends.use("torch"):
        expected_loss, expected_count = ops.linear_cross_entropy(x, weight, targets)
        (expected,) = torch.autograd.grad(expected_loss, x)
    assert count == expected_count
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0.0)
    for part in (slice(0, 64), slice(-64, None)):
        scale = expected[part].float().abs().max().item()
        torch.testing.assert_close(found[part], expected[part], rtol=0.0, atol=0.03 * scale)


def test_cross_entropy_of_more_than_2_31_logits_at_once(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk of all of them: V 128256, 17000 tokens."""
    needs_free(24)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 1 << 33)
    check_loss_of_many(gpu, torch.bfloat16, N=17000, V=128256)


# ---- Out of bounds ------------------------------------------------------------------------------

EVERY_KERNEL = """
    import torch
    from llamapro import ops
    from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu

    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float32) if where == "cuda" else (torch.float32,)

    def random(*shape, dtype):
        return torch.randn(shape, device=where, dtype=dtype).requires_grad_()

    def backward(out, *inputs):
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])

    for dtype in dtypes:  # no length is a multiple of any tile
        for D in (40, 128):
            q = random(2, 45, 4, D, dtype=dtype)
            k, v = (random(2, 77, 2, D, dtype=dtype) for _ in range(2))
            for bounds in (None, ops.attention_bounds(45, 77, window=20, device=where)):
                backward(attention.attention(q, k, v, bounds), q, k, v)
        x, y = (random(7, 1000, dtype=dtype) for _ in range(2))
        weight = random(1000, dtype=dtype)
        backward(rms_norm.rms_norm(x, weight, 1e-5), x, weight)
        backward(rms_norm.add_rms_norm(x, y, weight, 1e-5), x, y, weight)
        backward(swiglu.swiglu(x, y), x, y)
        x = random(3, 13, 5, 24, dtype=dtype)
        cos, sin = ops.rope_table(
            torch.arange(13, device=where), ops.rope_frequencies(24, 1e4, device=where), dtype
        )
        backward(rope.rope(x, cos, sin), x)
        x, weight = random(9, 24, dtype=dtype), random(1003, 24, dtype=dtype)
        targets = torch.tensor([0, 1, 1002, -100, 5, 6, -100, 8, 9], device=where)
        loss, _ = cross_entropy.linear_cross_entropy(x, weight, targets)
        backward(loss, x, weight)
    print("all kernels ran")
"""


def test_no_kernel_reads_or_writes_out_of_bounds(gpu: torch.device, tmp_path: Path) -> None:
    """compute-sanitizer's memcheck, each tensor in an allocation of its own."""
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not installed")
    script = tmp_path / "every_kernel.py"
    script.write_text(textwrap.dedent(EVERY_KERNEL))
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "3", sys.executable, str(script)],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all kernels ran" in done.stdout, done.stdout[-4000:]


# ---- The whole model ----------------------------------------------------------------------------


def losses(
    device: torch.device, config: Any, tensors: dict[str, Tensor], backend: str, steps: int
) -> list[float]:
    """The loss of each training step, AdamW on the same four batches over and over."""
    model = build_on_meta(config)
    load_tensors(model, {name: tensor.to(device) for name, tensor in tensors.items()})
    objective = NextToken(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(config.vocab_size, (4, 2, 65), generator=generator).to(device)
    found = []
    with backends.use(backend):
        for step in range(steps):
            tokens = batches[step % 4]
            loss_sum, count = objective(tokens[:, :-1], tokens[:, 1:])
            loss = loss_sum / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def check_training(
    device: torch.device, dtype: torch.dtype, config: Any, random_tensors: Any, steps: int
) -> None:
    exact = losses(device, config, random_tensors(config), "torch", steps)
    tensors = random_tensors(config, dtype)
    plain = losses(device, config, {n: t.clone() for n, t in tensors.items()}, "torch", steps)
    ours = losses(device, config, {n: t.clone() for n, t in tensors.items()}, "triton", steps)
    assert exact[-1] < exact[0] - 0.5  # it learns
    error = max(abs(x - y) for x, y in zip(ours, exact, strict=True))
    allowed = max(abs(x - y) for x, y in zip(plain, exact, strict=True))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact[0]


def test_training_with_the_kernels_is_as_exact_as_with_torch(
    gpu: torch.device, tiny_config: Any, random_tensors: Any
) -> None:
    """20 steps in bf16: the losses are as near to those of fp32 as plain PyTorch's."""
    check_training(gpu, torch.bfloat16, tiny_config(), random_tensors, steps=20)


def check_compiled(
    device: torch.device, dtype: torch.dtype, config: Any, random_tensors: Any, backend: str
) -> None:
    model = build_on_meta(config)
    load_tensors(model, {name: x.to(device) for name, x in random_tensors(config, dtype).items()})
    tokens = torch.randint(config.vocab_size, (2, 33), device=device)

    def results(forward: Callable[..., Any]) -> list[Tensor]:
        loss_sum, _ = forward(tokens[:, :-1], tokens[:, 1:])
        return [loss_sum, *torch.autograd.grad(loss_sum, list(model.parameters()))]

    with backends.use("triton"):
        expected = results(NextToken(model))
        torch.compiler.reset()
        found = results(torch.compile(NextToken(model), backend=backend, fullgraph=True))
    for x, y in zip(found, expected, strict=True):
        scale = y.float().abs().max().item()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=0.0, atol=8 * eps * scale)


def test_inductor_compiles_the_model_as_one_graph(
    gpu: torch.device, tiny_config: Any, random_tensors: Any
) -> None:
    """The graph has every kernel, forward and backward; the numbers differ by rounding only."""
    check_compiled(gpu, torch.bfloat16, tiny_config(), random_tensors, "inductor")
