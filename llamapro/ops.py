"""The formulas of LLaMA, in plain PyTorch, in the order and precision of Hugging Face.

They are the reference that every other implementation must match. `backends.py` decides which
implementation runs: these formulas, the memory-saving ones of `kernels/cpu.py`, or Triton kernels.

Shapes: B batch, T query length, S key length (past + T), C hidden size, H query heads, KV key/value
heads, D head dim, F FFN size, V vocabulary, N tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamapro.backends import switched
from llamapro.config import ModelConfig
from llamapro.fields import RopeScaling
from llamapro.kernels import IGNORE_INDEX as IGNORE_INDEX


def _wide(x: Tensor) -> Tensor:
    """x in fp32, the precision of all statistics; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@switched("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T, plus the bias if there is one: (..., C), (F, C), (F,) -> (..., F)."""
    return F.linear(x, weight, bias)


@switched("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: (..., C), (C,) -> (..., C) (Zhang & Sennrich, 2019).

    Statistics and scaling are in fp32. The result is cast back to x's dtype *before* the product
    with the weight, as Hugging Face does it.
    """
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@switched("rms_norm")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and norms the sum: (..., C) twice, (C,) -> sum, norm (..., C).

    A kernel needs one pass over memory for both. The sum is rounded to x's dtype.
    """
    total = residual + x
    return total, rms_norm(total, weight, eps)


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angle per position of each pair of a head, theta^(-2i/D), in fp32 (Su et al., 2021).

    Args:
        theta: the base of the exponential; the slowest pair turns by about 1 / theta per position.
        scaling: for contexts longer than the model was first trained with. "linear" slows all
            pairs down. "llama3" (Llama 3.1) slows down the pairs whose wavelength is long against
            the original context, keeps those whose wavelength is short, and blends in between.

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
    """Cosines and sines of every position, computed in fp32 and then cast.

    Positions (B, T) or (T,) and frequencies (D / 2,) give (B, T, D) or (T, D) each. Both halves of
    the last axis are equal.
    """
    angle = positions.float()[..., None] * frequencies  # (..., T, D / 2)
    angle = torch.cat((angle, angle), dim=-1)  # (..., T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary_table(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`rope_table` with the frequencies of a model."""
    theta, scaling = config.rope_theta, config.rope_scaling
    frequencies = rope_frequencies(config.head_dim, theta, scaling, positions.device)
    return rope_table(positions, frequencies, dtype)


@switched("rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (i, i + D/2) of every head of queries or keys by its position's angle.

    x is (B, T, heads, D); cos and sin are those of `rope_table`, (B, T, D) or (T, D).
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)  # every pair by 90 degrees
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)  # the same for all heads


def interleaved_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of Meta's wq or wk for `rope`.

    In a head's D rows Meta's RoPE rotates neighbours (2i, 2i + 1), this one and Hugging Face's
    (i, i + D/2). The product of q and k does not depend on a common order of their rows. The weight
    is (heads * D, ...), with H heads for wq and KV for wk.
    """
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, D / 2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)


def halves_to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Undoes `interleaved_to_halves`."""
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, D / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


class AttentionBounds(NamedTuple):
    """The keys that a query sees, beyond causality. Both rise, or stay, along their last axis."""

    first: Tensor  # (B or 1, T) int32, the first key that query t sees
    last: Tensor  # (B or 1, S) int32, the last position whose query sees key s


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
        documents: (B, S) each position's document, which is all it sees; numbers do not fall.
        device: where the bounds lie, if there are no documents to say it.
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


@switched("attention")
def attention(q: Tensor, k: Tensor, v: Tensor, bounds: AttentionBounds | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al., 2017): query t sees the keys j <= S - T + t.

    Args:
        q: (B, T, H, D), the last T of the S positions.
        k, v: (B, S, KV, D); head h of q reads key/value head h // (H / KV) (Ainslie et al., 2023).
        bounds: from `attention_bounds`: the first key that each query sees.

    Returns:
        (B, T, H, D).
    """
    (T, H, D), (S, KV) = q.shape[1:], k.shape[1:3]
    sees = torch.ones(1, T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if bounds is not None:
        sees = sees & (
            torch.arange(S, device=q.device) >= bounds.first[:, :, None]
        )  # (B or 1, T, S)
    k, v = (x.repeat_interleave(H // KV, dim=2) for x in (k, v))  # (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    scores = scores.masked_fill(~sees[:, None], -math.inf)  # the same for all heads
    return torch.einsum("bhts,bshd->bthd", _wide(scores).softmax(-1).to(q.dtype), v)


@switched("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, with SiLU(x) = x / (1 + exp(-x)); all (..., F) (Shazeer, 2020)."""
    return F.silu(gate) * up


@switched("linear_cross_entropy")
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed token loss -log softmax(x W^T)[target], in fp32.

    The other backends never hold all the logits at once.

    Args:
        x: (N, C).
        weight: (V, C), the output embedding.
        targets: (N,) token ids; `IGNORE_INDEX` (-100) adds neither loss nor count.

    Returns:
        loss_sum: () in nats.
        count: () int64, the number of targets that are not ignored.
    """
    logits = _wide(F.linear(x, weight))  # (N, V)
    loss_sum = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss_sum, (targets != IGNORE_INDEX).sum()


@switched("linear_kl")
def linear_kl(
    x: Tensor, teacher_x: Tensor, weight: Tensor, targets: Tensor, teacher_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher || model) per token, both through one output embedding, in fp32.

    The teacher gets no gradient.

    Args:
        x, teacher_x: (N, C).
        weight: (V, C).
        targets: (N,) token ids; a token whose target is `IGNORE_INDEX` adds neither KL nor count.
        teacher_rows: the teacher's vocabulary is this many first rows of the weight, None all of
            them. It gives later tokens no probability.

    Returns:
        kl_sum: () in nats.
        count: () int64, the number of targets that are not ignored.
    """
    rows = teacher_rows or weight.shape[0]
    log_p = _wide(F.linear(x, weight)).log_softmax(-1)  # (N, V)
    log_q = _wide(F.linear(teacher_x, weight[:rows])).log_softmax(-1).detach()  # (N, rows)
    kl = (log_q.exp() * (log_q - log_p[:, :rows])).sum(-1)  # (N,)
    counts = targets != IGNORE_INDEX
    return kl.where(counts, 0).sum(), counts.sum()
