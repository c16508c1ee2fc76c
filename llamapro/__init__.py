"""LLaMA Pro from scratch: expand a LLaMA with identity blocks, train only those, keep the rest.

    import llamapro

    base = llamapro.load("checkpoints/llama2-7b")
    model = llamapro.expand(base, 8)  # 8 identity blocks: the logits are the base's, to the bit
    optimizer = torch.optim.AdamW(llamapro.train_only_new(model))
    ...
    llamapro.save(model, "checkpoints/llama2-7b-pro")

To learn the method, read `llamapro/model.py` (the network), `llamapro/expansion.py` (the method)
and `train.py` (the training loop). Each name below is imported when it is first used, so that
`import llamapro` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamapro.api import expand, generate, load, save, train_only_new
    from llamapro.config import ModelConfig
    from llamapro.model import LlamaForCausalLM
    from llamapro.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "LlamaForCausalLM",
    "ModelConfig",
    "Tokenizer",
    "expand",
    "generate",
    "load",
    "save",
    "train_only_new",
]

_MODULES = {
    "LlamaForCausalLM": "llamapro.model",
    "ModelConfig": "llamapro.config",
    "Tokenizer": "llamapro.text.tokenizer",
    "generate": "llamapro.generate",
}


def __getattr__(name: str) -> Any:
    """Imports a public name."""
    if name not in __all__:
        raise AttributeError(f"module 'llamapro' has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "llamapro.api")), name)


def __dir__() -> list[str]:
    """Lists the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
