"""The logits of the next token. On a CPU a single new token takes a short way through the model.

A step of a small model reads every weight once and spends as long on some thousand small calls. The
short way computes what `model.py` computes, with the same roundings but for the order in which a
product sums, and makes a third of the calls.

Shapes: B batch, T length, S key length, C hidden size, H query heads, KV key/value heads, D head
dim, F FFN size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamapro import backends, ops
from llamapro.inference.cache import KVCache
from llamapro.model import LlamaForCausalLM

_LOCK = Lock()
_FOUND: list[bool] = []  # whether oneDNN was on when each of the running steps began


def next_logits(model: LlamaForCausalLM, ids: Tensor, cache: KVCache) -> Tensor:
    """Returns the logits (B, V) after these ids (B, T), and appends them to the cache."""
    is_on_cpu = model.lm_head.weight.device.type == "cpu"
    if ids.shape[1] == 1 and is_on_cpu and backends.takes_cpu():
        with _fast_products() if len(ids) == 1 else nullcontext():
            return _step(model, ids[:, 0], cache)
    x = model.model(ids, cache)  # (B, T, C)
    return model.lm_head(x[:, -1])  # of (B, 1, C) with gaps, bmm would copy the weight B times


@contextmanager
def _fast_products() -> Iterator[None]:
    """Lets PyTorch itself multiply a single row of bf16 with a matrix.

    oneDNN packs the matrix anew for each product, which takes longer than reading it. With more
    rows PyTorch would read a large matrix several times. The flag is the whole process's: of steps
    in several threads, the last to end sets it back.
    """
    set_flags = torch.backends.mkldnn.set_flags
    with _LOCK:
        _FOUND.append(set_flags(_enabled=False, _fp32_precision=None)[0])
    try:
        yield
    finally:
        with _LOCK:
            set_flags(_enabled=_FOUND.pop(), _fp32_precision=None)


def _step(llama: LlamaForCausalLM, ids: Tensor, cache: KVCache) -> Tensor:
    """One new token of each sequence, ids (B,), as `LlamaModel.forward` and the head."""
    config, model, past = llama.config, llama.model, cache.length
    layers: Any = model.layers
    H, KV, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    first = max(0, past + 1 - (config.sliding_window or past + 1))  # key that the token sees
    x = model.embed_tokens.weight[ids]  # (B, C)
    cos, sin = ops.rotary_table(config, torch.tensor([past]), x.dtype)  # (1, D)
    # Queries and keys are rotated together. Of the two halves of D, y_1 = x_1 cos - x_2 sin and
    # y_2 = x_2 cos + x_1 sin. So y = x cos + (x_2, x_1) signed_sin, where the table has the signs,
    # and rolling x by D/2 swaps its halves.
    signed_sin = torch.cat((-sin[:, : D // 2], sin[:, D // 2 :]), dim=1)  # (1, D)
    for index, layer in enumerate(layers):
        attn, mlp = layer.self_attn, layer.mlp
        normed = _norm(x, layer.input_layernorm)
        qkv = _product(normed, attn.q_proj, attn.k_proj, attn.v_proj).view(len(ids), -1, D)
        qk, v = qkv[:, : H + KV], qkv[:, H + KV :]  # (B, H + KV, D), (B, KV, D)
        if config.qk_norm:
            qk = torch.cat((_norm(qk[:, :H], attn.q_norm), _norm(qk[:, H:], attn.k_norm)), 1)
        qk = (qk * cos).add_(qk.roll(D // 2, -1).mul_(signed_sin))
        k, v = cache.append(index, qk[:, None, H:], v[:, None])  # (B, S, KV, D)
        attended = ops.attention(qk[:, None, :H], k[:, first:], v[:, first:])  # (B, 1, H, D)
        x = x + _product(attended.flatten(1), attn.o_proj)
        normed = _norm(x, layer.post_attention_layernorm)
        activated = F.silu(_product(normed, mlp.gate_proj)).mul_(_product(normed, mlp.up_proj))
        x = x + _product(activated, mlp.down_proj)
    cache.length += 1
    return _product(_norm(x, model.norm), llama.lm_head)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """`ops.rms_norm` with its roundings: (B, C) -> (B, C)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return norm.weight * F.rms_norm(wide, wide.shape[-1:], None, norm.eps).to(x.dtype)


def _product(x: Tensor, *linears: nn.Linear) -> Tensor:
    """The products with these weights, one beside the other."""
    found = [F.linear(x, linear.weight, linear.bias) for linear in linears]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
