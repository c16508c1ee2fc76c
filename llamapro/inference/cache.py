"""The KV cache keeps keys and values of earlier tokens, so that a new token costs one step."""

from copy import copy

from torch import Tensor

from llamapro.model import LlamaForCausalLM


class KVCache:
    """One pair of preallocated buffers per layer: `keys` and `values`, (B, capacity, KV, D)."""

    def __init__(self, model: LlamaForCausalLM, batch_size: int, capacity: int):
        config, weight = model.config, model.lm_head.weight  # whose dtype and device they get
        shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [weight.new_empty(shape) for _ in layers]
        self.values = [weight.new_empty(shape) for _ in layers]
        self.length = 0  # the number of filled positions; `LlamaModel.forward` advances it
        self.capacity = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new k, v (B, T, KV, D) and returns all positions (B, S, KV, D)."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"KV cache holds {self.capacity} positions, asked for {end}")
        self.keys[layer][:, self.length : end] = k
        self.values[layer][:, self.length : end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def take(self, rows: Tensor, more: int) -> "KVCache":
        """Returns copies of these sequences (R,), with room for `more` positions."""
        taken = copy(self)
        taken.capacity = self.length + more
        for name in ("keys", "values"):
            setattr(taken, name, [])
            for x in getattr(self, name):
                buffer = x.new_empty(len(rows), taken.capacity, *x.shape[2:])
                buffer[:, : self.length] = x[rows, : self.length]
                getattr(taken, name).append(buffer)
        return taken
