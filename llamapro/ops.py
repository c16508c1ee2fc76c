"""The model's arithmetic as plain functions of tensors, in the order and precision of Hugging Face.

These are the reference that every faster implementation must match: same signature, same meaning.

Shapes: B batch, T query length, S key length (past + T), C hidden size, H query heads, KV key/value
heads, D head dim, F FFN size, V vocabulary, N tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# Logits exist for this many elements at a time in `linear_cross_entropy`: 256 MiB in fp32.
_LOGIT_CHUNK = 1 << 26


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm `x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich, 2019).

    Statistics and scaling are in fp32; the result is cast back to x's dtype *before* the product
    with the weight, as Hugging Face does it.

    Args:
        x: (..., C).
        weight: (C,).
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, computed in fp32 and then cast (Su et al., 2021).

    Args:
        positions: (B, T) or (T,) integer positions.

    Returns:
        cos, sin: positions.shape + (D,), both halves of the last axis equal (rotate-half layout).
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angle = positions.float()[..., None] * (1.0 / theta**exponent)  # (..., T, D / 2)
    angle = torch.cat((angle, angle), dim=-1)  # (..., T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (i, i + D/2) of queries and keys by their position's angle.

    Args:
        q: (B, T, H, D).
        k: (B, T, KV, D).
        cos, sin: (B, T, D) or (T, D), from `rope_table`.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # broadcast over heads

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    return rotate(q), rotate(k)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v with grouped key/value heads (Ainslie et al., 2023).

    The queries are the last T of the S positions: query t sees keys j <= S - T + t.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, KV, D); head h of q reads key/value head h // (H / KV).

    Returns:
        (B, T, H, D).
    """
    T, S = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, length, D)
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=T == S and T > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (Shazeer, 2020). Both (..., F)."""
    return F.silu(gate) * up


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of `softmax(x @ weight.T)`, without holding all logits at once.

    The logits of one chunk of tokens live at a time, in forward and, recomputed, in backward.
    Softmax and sum are in fp32.

    Args:
        x: (N, C).
        weight: (V, C), the output embedding.
        targets: (N,) token ids; `IGNORE_INDEX` (-100) adds neither loss nor count.

    Returns:
        loss_sum: () fp32, in nats.
        count: () int64, the number of targets that are not ignored.
    """

    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x, weight).float()  # (n, V)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    loss_sum = torch.zeros((), dtype=torch.float32, device=x.device)
    size = max(1, _LOGIT_CHUNK // weight.shape[0])
    for part, part_targets in zip(x.split(size), targets.split(size), strict=True):
        if x.shape[0] > size and torch.is_grad_enabled():
            part_sum = checkpoint(chunk_loss, part, part_targets, use_reentrant=False)
        else:
            part_sum = chunk_loss(part, part_targets)
        loss_sum = loss_sum + part_sum
    return loss_sum, (targets != IGNORE_INDEX).sum()
