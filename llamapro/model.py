"""LLaMA, written out. Parameters have Hugging Face's names: a checkpoint loads without a mapping.

One block (LLaMA Pro, section 3.1):
    x = x + Attention(RMSNorm(x))
    x = x + MLP(RMSNorm(x))

The formulas are in `ops.py`. B batch, T query length, S key length (past + T), C hidden size,
H query heads, KV key/value heads, D head dim, F FFN size, V vocabulary.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llamapro import ops
from llamapro.config import ModelConfig


class Cache(Protocol):
    """Keys and values of earlier positions; `llamapro.inference.cache.KVCache` is one."""

    length: int  # positions so far

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


Past = Cache | None
Bounds = ops.AttentionBounds | None
Rotary = tuple[Tensor, Tensor]  # cosines and sines of the positions: (B, T, D) or (T, D) each


class Linear(nn.Linear):
    """y = x W^T, and + b where the configuration says so. LLaMA's own models have no biases."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """y = x / rms(x) * w, where rms(x) = sqrt(mean(x^2) + eps)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention (MHSA); grouped-query when KV < H. `o_proj` is the paper's W_O."""

    def __init__(self, config: ModelConfig, layer_index: int = 0):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.layer_index = D, layer_index
        self.q_proj = Linear(C, H * D, config.attention_bias)
        self.k_proj = Linear(C, KV * D, config.attention_bias)
        self.v_proj = Linear(C, KV * D, config.attention_bias)
        self.o_proj = Linear(H * D, C, config.o_proj_bias)
        # Qwen3 norms each head's query and key; the heads share the D weights.
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(D, config.rms_norm_eps), norm(D, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, bounds: Bounds = None, cache: Past = None
    ) -> Tensor:
        # With KV < H, each group of H / KV query heads shares one key/value head.
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(heads))  # (B, T, KV, D)
        v = self.v_proj(x).view(heads)  # (B, T, KV, D)
        # Positions enter here and nowhere else: the score of two tokens depends on their distance.
        q, k = ops.rope(q, *rotary), ops.rope(k, *rotary)
        # With a cache, the T new tokens also see the earlier ones: S = past + T.
        if cache is not None:
            k, v = cache.append(self.layer_index, k, v)  # (B, S, KV, D)
        return self.o_proj(ops.attention(q, k, v, bounds).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward (FFN): gate_proj, up_proj, down_proj are the paper's W_1, W_2, W_3."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, F, config.mlp_bias)
        self.up_proj = Linear(C, F, config.mlp_bias)
        self.down_proj = Linear(F, C, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        # The gate scales each of the F features before W_3 mixes them.
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One block. Where o_proj and down_proj are zero, both sums add exactly 0: the identity."""

    def __init__(self, config: ModelConfig, layer_index: int = 0):
        super().__init__()
        self.self_attn = Attention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, bounds: Bounds = None, cache: Past = None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rotary, bounds, cache)
        # x = x + attended, and the norm of that: one pass over memory where a kernel does both.
        norm = self.post_attention_layernorm
        x, normed = ops.add_rms_norm(attended, x, norm.weight, norm.eps)
        return x + self.mlp(normed)


class LlamaModel(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Weights on the meta device are not drawn: for a large model that would take 3 s.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        weight = weight if weight.is_meta else weight.normal_(0.0, config.initializer_range)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        count = config.num_hidden_layers
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(count))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        cache: Past = None,
        documents: Tensor | None = None,
        skip: Collection[int] = (),
    ) -> Tensor:
        """Computes hidden states (B, T, C).

        Args:
            cache: past keys and values; advanced by T positions.
            documents: (B, S) the document of each position, numbered in order. Documents do not see
                one another, and each starts at position 0.
            skip: layers to leave out. Without its new blocks an expanded model *is* its base.
        """
        config, device = self.config, input_ids.device
        T, past = input_ids.shape[1], cache.length if cache is not None else 0
        S, window = past + T, config.sliding_window
        # Bounds hide keys that causality alone would show: of other documents, outside the window.
        positions, bounds = torch.arange(past, S, device=device), None  # (T,)
        if documents is not None:
            bounds = ops.attention_bounds(T, S, None, documents)
            positions = positions - bounds.first  # (B, T)
        if window is not None and window < S:
            bounds = ops.attention_bounds(T, S, window, documents, device)

        # The residual stream: each block reads it and adds to it.
        x = self.embed_tokens(input_ids)  # (B, T, C)
        rotary = ops.rotary_table(config, positions, x.dtype)
        for index, layer in enumerate(self.layers):
            if index not in skip:
                x = layer(x, rotary, bounds, cache)
        # All layers have appended at the old length; only now may it grow.
        if cache is not None:
            cache.length += T
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The language model: token ids (B, T) to logits (B, T, V); arguments as `LlamaModel`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.lm_head(self.model(input_ids, *args, **kwargs))


def build_on_meta(config: ModelConfig) -> LlamaForCausalLM:
    """Builds the model with shapes only: no memory until tensors are assigned to it."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def load_tensors(model: LlamaForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    """Assigns every parameter its tensor by name: no copy. A tied head needs none of its own."""
    is_tied = model.config.tie_word_embeddings
    if is_tied:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, strict=True, assign=True)
    if is_tied:  # assigning made two parameters of one
        model.lm_head.weight = model.model.embed_tokens.weight
