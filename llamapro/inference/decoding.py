"""The logits of the next token. On a CPU a single new token takes a short way through the model.

A step of a small model reads every weight once and spends as long on some thousand small calls. The
short way computes what `model.py` computes, with the same roundings but for the order in which a
product sums, and makes a third of the calls. For several sequences in fp32 it reads a copy of the
weights, with q, k, v and gate, up put together, in oneDNN's own layout. For one sequence a copy in
another layout was measured to bring nothing.

Shapes: B batch, T length, S key length, C hidden size, H query heads, KV key/value heads, D head
dim, F FFN size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamapro import backends, ops
from llamapro.inference.cache import KVCache
from llamapro.kernels import cpu
from llamapro.model import LlamaForCausalLM

COPY_AFTER = 16  # steps; a copy takes as long as about five, and saves a quarter of each
COPY_BYTES = 4 << 30  # a larger model is not copied, for it may not fit into memory twice

Product = Callable[[Tensor], Tensor]  # (B, in) -> (B, out)


class Decoder:
    """Computes the logits of the next token, step after step.

    Keep it as long as the model's weights do not change: it may hold a copy of them.
    """

    def __init__(self, model: LlamaForCausalLM):
        self.model = model
        self._steps = 0
        self._products = _products(model, _own)

    def logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Returns the logits (B, V) after these ids (B, T), and appends them to the cache."""
        weight = self.model.lm_head.weight
        if ids.shape[1] > 1 or weight.device.type != "cpu" or not backends.takes_cpu():
            x = self.model.model(ids, cache)  # (B, T, C)
            return self.model.lm_head(x[:, -1:])[:, 0]
        self._steps += 1
        if self._steps == COPY_AFTER and len(ids) > 1 and weight.dtype == torch.float32:
            nbytes = sum(p.nbytes for p in self.model.parameters())
            if cpu.HAS_ONEDNN and nbytes <= COPY_BYTES:
                self._products = _products(self.model, partial(_packed, len(ids)))
        return self._step(ids[:, 0], cache)

    def _step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """One new token of each sequence, ids (B,), as `LlamaModel.forward` and the head."""
        config, model, past = self.model.config, self.model.model, cache.length
        layers: Any = model.layers
        H, KV, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        first = max(0, past + 1 - (config.sliding_window or past + 1))  # key that the token sees
        x = model.embed_tokens.weight[ids]  # (B, C)
        cos, sin = ops.rotary_table(config, torch.tensor([past]), x.dtype)  # (1, D)
        sin = torch.cat((-sin[:, : D // 2], sin[:, D // 2 :]), dim=1)  # of both halves swapped
        *blocks, (head,) = self._products
        for index, (layer, products) in enumerate(zip(layers, blocks, strict=True)):
            qkv_proj, o_proj, gate_up_proj, down_proj = products
            qkv = qkv_proj(_norm(x, layer.input_layernorm)).view(len(ids), -1, D)
            qk, v = qkv[:, : H + KV], qkv[:, H + KV :]  # (B, H + KV, D), (B, KV, D)
            if config.qk_norm:
                attn = layer.self_attn
                qk = torch.cat((_norm(qk[:, :H], attn.q_norm), _norm(qk[:, H:], attn.k_norm)), 1)
            qk = (qk * cos).add_(qk.roll(D // 2, -1).mul_(sin))
            k, v = cache.append(index, qk[:, None, H:], v[:, None])  # (B, S, KV, D)
            k, v = k[:, first:].transpose(1, 2), v[:, first:].transpose(1, 2)  # (B, KV, S, D)
            attended = F.scaled_dot_product_attention(
                qk[:, :H, None], k, v, enable_gqa=H != KV
            )  # (B, H, 1, D)
            x = x + o_proj(attended.flatten(1))
            gate, up = gate_up_proj(_norm(x, layer.post_attention_layernorm)).chunk(2, dim=-1)
            x = x + down_proj(F.silu(gate).mul_(up))
        cache.length += 1
        return head(_norm(x, model.norm))


def _norm(x: Tensor, norm: Any) -> Tensor:
    """`ops.rms_norm` with its roundings: (B, C) -> (B, C)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return norm.weight * F.rms_norm(wide, wide.shape[-1:], None, norm.eps).to(x.dtype)


def _products(model: LlamaForCausalLM, product: Callable[..., Product]) -> list[list[Product]]:
    """Returns the matrix products of each block, as `_step` takes them, and of the head."""
    layers: Any = model.model.layers
    blocks = [(layer.self_attn, layer.mlp) for layer in layers]
    return [
        [
            product(a.q_proj, a.k_proj, a.v_proj),
            product(a.o_proj),
            product(f.gate_proj, f.up_proj),
            product(f.down_proj),
        ]
        for a, f in blocks
    ] + [[product(model.lm_head)]]


def _own(*linears: nn.Linear) -> Product:
    """The products with the model's own weights, one beside the other."""
    if len(linears) == 1:
        return lambda x: F.linear(x, linears[0].weight, linears[0].bias)
    return lambda x: torch.cat([F.linear(x, part.weight, part.bias) for part in linears], dim=-1)


def _packed(rows: int, *linears: nn.Linear) -> Product:
    """The same with a copy, in fp32, in the layout that oneDNN likes for this number of rows."""
    weight = torch.cat([part.weight for part in linears])
    # All of them have a bias, or none has.
    biases: list[Tensor] = [part.bias for part in linears if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: cpu.onednn(x, packed, bias)
