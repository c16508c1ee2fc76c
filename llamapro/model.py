"""LLaMA, written out: every module and parameter carries the name it has in Hugging Face.

So a Hugging Face checkpoint loads with no mapping, and what is trained here loads there. The block
is the paper's (section 3.1): `x' = x + MHSA(RMSNorm(x))`, `y = x' + FFN(RMSNorm(x'))`.

Shapes: B batch, T query length, S key length (past + T), C hidden size, H query heads, KV key/value
heads, D head dim, F FFN size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamapro import ops
from llamapro.config import ModelConfig
from llamapro.kernels import cpu as functional

# Embedding and head, and what the rows of added tokens are called where they are apart.
NEW_ROWS = {
    "model.embed_tokens.weight": "model.embed_tokens.new_rows",
    "lm_head.weight": "lm_head.new_rows",
}


class Linear(nn.Linear):
    """`nn.Linear` without a bias, and with `functional.linear` for its product."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return functional.linear(x, self.weight)


class Embedding(nn.Embedding):
    """`nn.Embedding`; the rows of added tokens may be a parameter of their own, `new_rows`."""

    new_rows: nn.Parameter | None

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)
        self.register_parameter("new_rows", None)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        if self.new_rows is None:
            return super().forward(ids)
        # Two look-ups and a choice: the base's rows, V x C, are not copied to be joined.
        new = ids - self.weight.shape[0]
        is_new = new >= 0
        base_rows = F.embedding(ids.masked_fill(is_new, 0), self.weight)
        return torch.where(
            is_new[..., None], F.embedding(new.clamp(min=0), self.new_rows), base_rows
        )


class Head(nn.Linear):
    """`nn.Linear` without a bias: hidden states to logits; `new_rows` as in `Embedding`."""

    new_rows: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_parameter("new_rows", None)

    def rows(self) -> Tensor:  # (V, C)
        """Returns the base's rows and those of added tokens, joined where they are apart."""
        return self.weight if self.new_rows is None else torch.cat((self.weight, self.new_rows))

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return F.linear(x, self.rows())


class RMSNorm(nn.Module):
    """`ops.rms_norm` and `ops.add_rms_norm` with their weight (C,)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # both (..., C)
        """Returns `residual + x` and its norm: one pass over memory where a kernel does it."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of buffers per layer.

    Attributes:
        keys, values: per layer (B, capacity, KV, D).
        length: how many positions are filled; `LlamaModel.forward` advances it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.length = 0
        self.capacity = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new k, v (B, T, KV, D); returns all its positions (B, S, KV, D)."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"KV cache holds {self.capacity} positions, asked for {end}")
        self.keys[layer][:, self.length : end] = k
        self.values[layer][:, self.length : end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class Attention(nn.Module):
    """MHSA of the paper; grouped-query when KV < H. `o_proj` is the paper's W_O."""

    def __init__(self, config: ModelConfig, layer_index: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.layer_index = D, layer_index
        self.q_proj = Linear(C, H * D)
        self.k_proj = Linear(C, KV * D)
        self.v_proj = Linear(C, KV * D)
        self.o_proj = Linear(H * D, C)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: ops.AttentionBounds | None,
        cache: KVCache | None,
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads)  # (B, T, H, D)
        k = self.k_proj(x).view(heads)  # (B, T, KV, D)
        v = self.v_proj(x).view(heads)  # (B, T, KV, D)
        q, k = ops.rope(q, k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer_index, k, v)  # (B, S, KV, D)
        return self.o_proj(ops.attention(q, k, v, bounds).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """FFN of the paper: `(SiLU(x W_1) * x W_2) W_3` = gate_proj, up_proj, down_proj."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, F)
        self.up_proj = Linear(C, F)
        self.down_proj = Linear(F, C)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One block. With `o_proj` and `down_proj` zero, both sums add exactly 0: the identity.

    Attributes:
        recompute: do not keep this block's activations for backward but compute them again
            (activation checkpointing, Chen et al. 2016). Set by the trainer.
    """

    def __init__(self, config: ModelConfig, layer_index: int):
        super().__init__()
        self.self_attn = Attention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: ops.AttentionBounds | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        # Below the first new block nothing needs a gradient, so there is nothing to save.
        needs_graph = x.requires_grad or self.mlp.down_proj.weight.requires_grad
        if self.recompute and needs_graph and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cos, sin, bounds, cache, use_reentrant=False)
        return self._forward(x, cos, sin, bounds, cache)

    def _forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: ops.AttentionBounds | None,
        cache: KVCache | None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, bounds, cache)
        x, normed = self.post_attention_layernorm.add(attended, x)
        return x + self.mlp(normed)


def rope_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns `ops.rope_table` with the frequencies of this configuration."""
    theta, scaling = config.rope_theta, config.rope_scaling
    frequencies = ops.rope_frequencies(config.head_dim, theta, scaling, positions.device)
    return ops.rope_table(positions, frequencies, dtype)


class LlamaModel(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        base_rows: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns hidden states (B, T, C) and, if `base_rows`, those of the base inside as well.

        The base is the model without the latest generation's new blocks; it needs no gradient. It
        sees so many last sequences, which are no packed documents: (base_rows, T, C).
        """
        assert not base_rows or documents is None
        x = self.embed_tokens(input_ids)  # (B, T, C)
        T, past = input_ids.shape[1], cache.length if cache is not None else 0
        S, window = past + T, self.config.sliding_window
        bounds, positions = None, torch.arange(past, S, device=x.device)  # (T,)
        if documents is not None:
            bounds = ops.attention_bounds(T, S, None, documents)
            positions = positions - bounds.first  # (B, T): each document starts at 0
        if window is not None and window < S:
            bounds = ops.attention_bounds(T, S, window, documents, x.device)
        cos, sin = rope_table(self.config, positions, x.dtype)
        record = self.config.expansion
        new = record.new_layers if record and base_rows else ()
        for index, layer in enumerate(self.layers):
            if index in new[:1]:
                # Below the first new block the two are one. The base goes first: in backward FSDP
                # gathers ahead of time what ran before, and that is to be the model's own block.
                base_x = x[-base_rows:]  # (base_rows, T, C)
                with torch.no_grad():
                    for above in range(index, len(self.layers)):
                        if above not in new:
                            base_x = self.layers[above](base_x, cos, sin, bounds)
                    base_x = self.norm(base_x)
            x = layer(x, cos, sin, bounds, cache)
        if cache is not None:
            cache.length += T
        return (self.norm(x), base_x) if new else self.norm(x)


class Replayed(NamedTuple):
    """The last sequences of a batch, whose loss is apart from the others'.

    Attributes:
        rows: how many they are. 0 is not the same as none: the base runs, as on other processes.
        weight: of their loss, beside the others' 1.
        distill: it is KL(base || model), the base being the one inside, not their cross-entropy.
    """

    rows: int
    weight: float
    distill: bool


class LlamaForCausalLM(nn.Module):
    """The language model: token ids to logits, or, given targets, to the summed loss."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes lm_head share the embedding's weight where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.lm_head.new_rows = self.model.embed_tokens.new_rows

    def split_vocabulary(self, base_vocab_size: int) -> None:
        """Makes the rows of added tokens parameters of their own, so that they alone can train.

        The parameters are replaced: this comes before weights are loaded.

        Args:
            base_vocab_size: how many rows of embedding and head come before them.
        """
        for part in (self.model.embed_tokens, self.lm_head):
            base_rows, new_rows = part.weight.detach().tensor_split((base_vocab_size,))
            part.weight, part.new_rows = nn.Parameter(base_rows), nn.Parameter(new_rows)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        documents: Tensor | None = None,
        replayed: Replayed | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes logits or loss.

        Args:
            input_ids: (B, T) token ids.
            targets: (B, T) the ids that should follow, `ops.IGNORE_INDEX` where none counts.
            cache: past keys and values; advanced by T positions.
            last_only: compute the logits of the last position alone (generation).
            documents: (B, S) the number of each position's document, non-decreasing, past ones
                included: documents do not see one another, and each starts at position 0.
            replayed: which sequences have a loss of their own; with targets.

        Returns:
            Without targets: logits (B, T, V), or (B, 1, V), in the weights' dtype.
            With targets: (loss_sum, count), as `ops.linear_cross_entropy`; what is replayed is in
            both, in the first times its weight.
        """
        # Where other processes have replayed sequences and this one has none, the base sees one.
        base_rows = max(1, replayed.rows) if replayed is not None and replayed.distill else 0
        x = self.model(input_ids, cache, documents, base_rows)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:] if last_only else x)
        if replayed is None:
            return self._loss(x, targets)
        x, base_x = x if base_rows else (x, None)
        rows = (targets.shape[0] - replayed.rows, replayed.rows)
        (x, last_x), (targets, last_targets) = x.split(rows), targets.split(rows)
        loss, count = self._loss(x, targets)
        last_base_x = None if base_x is None else base_x[: replayed.rows]
        last_loss, last_count = self._loss(last_x, last_targets, last_base_x)
        return loss + replayed.weight * last_loss, count + last_count

    def _loss(
        self, x: Tensor, targets: Tensor, base_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of hidden states x or, given the base's, KL(base || model)."""
        head, record = self.lm_head, self.config.expansion
        frozen_rows = 0 if head.new_rows is None else head.weight.shape[0]
        x, targets = x.flatten(0, 1), targets.flatten()
        if base_x is None:
            return ops.linear_cross_entropy(x, head.rows(), targets, frozen_rows)
        of_base = record.base_vocab_size if record else None  # None: the vocabulary did not grow
        return ops.linear_kl(x, base_x.flatten(0, 1), head.rows(), targets, frozen_rows, of_base)


def build_on_meta(config: ModelConfig) -> LlamaForCausalLM:
    """Returns the model with shapes only: no memory until tensors are assigned to it."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def load_tensors(model: LlamaForCausalLM, tensors: dict[str, Tensor]) -> None:
    """Assigns the named tensors to a model on the meta device: their storage, no copy.

    Args:
        tensors: every parameter under its Hugging Face name; `lm_head.weight` only if not tied.
            Of a split vocabulary whole; what is named `new_rows` takes the place of its last rows.
    """
    if model.config.tie_word_embeddings:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    if model.model.embed_tokens.new_rows is not None:
        for name, new_rows in NEW_ROWS.items():
            base_rows, rest = tensors[name].tensor_split((model.get_parameter(name).shape[0],))
            tensors = {new_rows: rest} | tensors | {name: base_rows}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()


def init_random(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Fresh fp32 weights: N(0, initializer_range) for matrices, 1 for norms, as Hugging Face.

    Returns:
        Name -> tensor for every parameter; a function of (config, seed) alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, meta in build_on_meta(config).named_parameters():  # a tied weight appears once
        tensors[name] = torch.ones(meta.shape)
        if meta.ndim == 2:
            tensors[name].normal_(0.0, config.initializer_range, generator=generator)
    return tensors
