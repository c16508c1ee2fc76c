"""The model's arithmetic as plain functions of tensors, and the switch to its Triton kernels.

What is written out here is plain PyTorch in the order and precision of Hugging Face: the reference
that every kernel must match, with the same signature and meaning. `use` chooses between the two:

    with ops.use("triton,attention=torch"): ...

Shapes: B batch, T query length, S key length (past + T), C hidden size, H query heads, KV key/value
heads, D head dim, F FFN size, V vocabulary, N tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llamapro.config import RopeScaling
from llamapro.kernels import cpu as functional
from llamapro.kernels.cpu import IGNORE_INDEX as IGNORE_INDEX

OPS = ("rms_norm", "rope", "attention", "swiglu", "linear_cross_entropy")  # can be switched
_backends: dict[str, str] = dict.fromkeys(OPS, "auto")

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


class BackendError(ValueError):
    """An op was told to use Triton, where its kernel cannot run."""


def parse(choice: str) -> dict[str, str]:
    """Reads a choice of backends such as "auto" or "triton,attention=torch".

    Returns:
        For each of `OPS`: "auto" (Triton on a GPU wherever the kernel can run), "torch", "triton".

    Raises:
        ValueError: an unknown op or backend.
    """
    backends = dict.fromkeys(OPS, "auto")
    for part in choice.split(","):
        op, _, backend = part.strip().rpartition("=")
        if op and op not in OPS:
            raise ValueError(f"{choice!r}: no op {op!r} (known: {', '.join(OPS)})")
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"{choice!r}: no backend {backend!r} (known: auto, torch, triton)")
        backends |= {op: backend} if op else dict.fromkeys(OPS, backend)
    return backends


@contextmanager
def use(choice: str = "auto") -> Iterator[None]:
    """Computes with these backends inside the with-block; see `parse` for how to name them."""
    before = dict(_backends)
    _backends.update(parse(choice))
    try:
        yield
    finally:
        _backends.update(before)


def choose(op: str, device: torch.device, dtype: torch.dtype, size: int) -> tuple[str, str]:
    """Returns which backend computes an op, "torch" or "triton", and why.

    Args:
        op: one of `OPS`.
        device, dtype: of its input.
        size: of the input's last axis: C, D (rope, attention) or F.

    Raises:
        BackendError: "triton" was asked for, and the kernel cannot take such input.
    """
    asked = _backends[op]
    if asked == "torch":
        return "torch", "asked for"
    if asked == "auto" and device.type != "cuda":
        return "torch", f"device is {device.type}"
    reason = _cannot_run(op, device, dtype, size)
    if asked == "auto":
        return ("torch", reason) if reason else ("triton", f"device is {device.type}")
    if reason:
        raise BackendError(f"{op}: the Triton kernel cannot run: {reason}")
    return "triton", "asked for"


def summary(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Says in one line which backend computes each op of a model, and why.

    Args:
        config: the model's `ModelConfig`.

    Raises:
        BackendError: as `choose`.
    """
    sizes = dict.fromkeys(OPS, config.hidden_size) | {"swiglu": config.intermediate_size}
    sizes |= {"rope": config.head_dim, "attention": config.head_dim}
    chosen: dict[tuple[str, str], list[str]] = {}
    for op, size in sizes.items():
        chosen.setdefault(choose(op, device, dtype, size), []).append(op)
    lines = []
    for (backend, why), names in chosen.items():
        lines.append(f"{'all' if len(chosen) == 1 else ', '.join(names)}: {backend} ({why})")
    return "; ".join(lines)


def _cannot_run(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    try:
        return _kernel(op).unsupported(device, dtype, size)
    except ModuleNotFoundError as error:
        missing = {"triton": "the package triton", "llamapro.kernels": "this project (pip)"}
        if error.name not in missing:
            raise
        return f"{missing[error.name]} is not installed"


def _kernel(op: str) -> ModuleType:
    if op == "rms_norm":
        from llamapro.kernels import rms_norm as module
    elif op == "rope":
        from llamapro.kernels import rope as module
    elif op == "attention":
        from llamapro.kernels import attention as module
    elif op == "swiglu":
        from llamapro.kernels import swiglu as module
    else:
        from llamapro.kernels import cross_entropy as module
    return module


def _switched(op: str) -> Callable[[Callable[Inputs, Output]], Callable[Inputs, Output]]:
    """Makes a reference function call the kernel of the same name where `choose` says so."""

    def decorate(reference: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
        @wraps(reference)
        def switched(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
            x: Any = args[0]
            # One query would leave a tile of the kernel all but empty.
            is_decoding = op == "attention" and x.shape[1] == 1 and _backends[op] == "auto"
            if is_decoding or choose(op, x.device, x.dtype, x.shape[-1])[0] == "torch":
                return reference(*args, **kwargs)
            return getattr(_kernel(op), reference.__name__)(*args, **kwargs)

        return switched

    return decorate


@_switched("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm `x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich, 2019).

    Statistics and scaling are in fp32; the result is cast back to x's dtype *before* the product
    with the weight, as Hugging Face does it.

    Args:
        x: (..., C).
        weight: (C,).
    """
    return functional.RMSNorm.apply(x, weight, eps)


@_switched("rms_norm")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and norms the sum: `s = residual + x`, `rms_norm(s)`.

    Args:
        x, residual: (..., C).
        weight: (C,).

    Returns:
        s and its norm, both (..., C); s is rounded to x's dtype before it is normed.
    """
    total = residual + x
    return total, functional.RMSNorm.apply(total, weight, eps)


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angles per position of the pairs of a head, in fp32 (Su et al., 2021).

    Args:
        head_dim: D.
        theta: of the slowest pair.
        scaling: for contexts longer than the model was first trained with. "linear" slows all
            pairs down. "llama3" (Llama 3.1) does so with those whose wave is long against the
            original context, keeps those whose wave is short, and blends between the two.
        device: of the result.

    Returns:
        (D / 2,).
    """
    exponent = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency  # in positions
    share = (context / wavelength - low) / (high - low)
    blended = (1 - share) * slow + share * frequency
    is_long, is_short = wavelength > context / low, wavelength < context / high
    return torch.where(is_long, slow, torch.where(is_short, frequency, blended))


def rope_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, computed in fp32 and then cast (Su et al., 2021).

    Args:
        positions: (B, T) or (T,) integer positions.
        frequencies: (D / 2,), from `rope_frequencies`.

    Returns:
        cos, sin: positions.shape + (D,), both halves of the last axis equal (rotate-half layout).
    """
    angle = positions.float()[..., None] * frequencies  # (..., T, D / 2)
    angle = torch.cat((angle, angle), dim=-1)  # (..., T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@_switched("rope")
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (i, i + D/2) of queries and keys by their position's angle.

    Args:
        q: (B, T, H, D).
        k: (B, T, KV, D).
        cos, sin: (B, T, D) or (T, D), from `rope_table`.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # broadcast over heads
    return functional.Rotate.apply(q, cos, sin), functional.Rotate.apply(k, cos, sin)


class AttentionBounds(NamedTuple):
    """Which keys a query sees, beyond causality. Both are non-decreasing along their last axis.

    Attributes:
        first: (B or 1, T) int32, the first key that query t sees.
        last: (B or 1, S) int32, the last position whose query sees key s.
    """

    first: Tensor
    last: Tensor


def attention_bounds(
    queries: int,
    keys: int,
    window: int | None = None,
    documents: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> AttentionBounds:
    """Bounds for a sliding window, for documents packed into one sequence, or for both.

    Args:
        queries, keys: T and S; the queries are the last T of the S positions.
        window: position i sees i - window < j <= i (Mistral, Jiang et al. 2023), itself included.
        documents: (B, S) the number of each position's document, non-decreasing: a position sees
            its own document only.
        device: of the bounds, if documents do not say.
    """
    if documents is None:
        documents = torch.zeros(1, keys, dtype=torch.int32, device=device)
    documents = documents.contiguous()
    first = torch.searchsorted(documents, documents)  # (B, S) where each one's document starts
    last = torch.searchsorted(documents, documents, right=True) - 1  # and where it ends
    if window is not None:
        positions = torch.arange(keys, device=documents.device)
        first = torch.maximum(first, positions - window + 1)
        last = torch.minimum(last, positions + window - 1)
    return AttentionBounds(first[:, keys - queries :].int(), last.int())


@_switched("attention")
def attention(q: Tensor, k: Tensor, v: Tensor, bounds: AttentionBounds | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v with grouped key/value heads (Ainslie et al., 2023).

    The queries are the last T of the S positions: query t sees keys j <= S - T + t.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, KV, D); head h of q reads key/value head h // (H / KV).
        bounds: from `attention_bounds`, what query t sees no further back than.

    Returns:
        (B, T, H, D).
    """
    T, S = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, length, D)
    mask = None
    if bounds is not None or 1 < T < S:
        mask = torch.ones(1, T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if bounds is not None:
            mask = mask & (torch.arange(S, device=q.device) >= bounds.first[:, :, None])
        mask = mask[:, None]  # (B or 1, 1, T, S)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


@_switched("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (Shazeer, 2020). Both (..., F)."""
    return functional.SwiGLU.apply(gate, up)


@_switched("linear_cross_entropy")
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, frozen_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of `softmax(x @ weight.T)`, without holding all logits at once.

    The logits of one chunk of tokens live at a time, and are computed once: forward computes the
    gradient as well. Softmax and sum are in fp32.

    Args:
        x: (N, C).
        weight: (V, C), the output embedding.
        targets: (N,) token ids; `IGNORE_INDEX` (-100) adds neither loss nor count.
        frozen_rows: of the first so many rows of the weight no gradient is computed: it is 0.

    Returns:
        loss_sum: () fp32, in nats.
        count: () int64, the number of targets that are not ignored.
    """

    rows = max(1, logits_at_once(x.device) // weight.shape[0])
    has_graph = torch.is_grad_enabled()  # a Function's own flags do not know of no_grad
    needs = (has_graph and x.requires_grad, has_graph and weight.requires_grad)
    loss_sum = functional.LinearCrossEntropy.apply(x, weight, targets, rows, needs, frozen_rows)
    return loss_sum, (targets != IGNORE_INDEX).sum()


def linear_kl(
    x: Tensor,
    teacher_x: Tensor,
    weight: Tensor,
    targets: Tensor,
    frozen_rows: int = 0,
    teacher_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of KL(teacher || model), both through one output embedding.

    Computed as `linear_cross_entropy`: a chunk's logits at a time, the gradient in forward, softmax
    and sum in fp32. The teacher gets no gradient. It is plain PyTorch on every device.

    Args:
        x: (N, C).
        teacher_x: (N, C), the teacher's.
        weight: (V, C).
        targets: (N,) token ids; where one is `IGNORE_INDEX` the token adds neither KL nor count.
        frozen_rows: of the first so many rows of the weight no gradient is computed: it is 0.
        teacher_rows: how many rows the teacher has, the first ones; None: all. To later tokens it
            gives no probability.

    Returns:
        kl_sum: () fp32, in nats.
        count: () int64, the number of targets that are not ignored.
    """
    rows = max(1, logits_at_once(x.device) // (2 * weight.shape[0]))  # two live at a time
    has_graph = torch.is_grad_enabled()
    needs = (has_graph and x.requires_grad, has_graph and weight.requires_grad)
    more = (rows, needs, frozen_rows, teacher_rows or weight.shape[0])
    kl_sum = functional.LinearKL.apply(x, teacher_x, weight, targets, *more)
    return kl_sum, (targets != IGNORE_INDEX).sum()


def logits_at_once(device: torch.device) -> int:
    """How many logits plain PyTorch holds at a time: 256 MiB in fp32, or what a CPU's cache has."""
    return 1 << 20 if device.type == "cpu" else 1 << 26
