"""The functions of `import llamapro`: block expansion by hand, in memory.

For models that do not fit into memory, and for several GPUs, use the commands: `expand` and `merge`
stream, and `train` shards.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import COMPANION_FILES
from llamapro.checkpoints.tensors import combine_hashes, sha256_of
from llamapro.checkpoints.writing import in_memory, write_checkpoint
from llamapro.conversion.companions import write_companions
from llamapro.errors import ConfigError
from llamapro.expansion import expand_config, expand_state_dict, interleave, select_trainable
from llamapro.files import output_directory
from llamapro.inference.sampling import end_ids, write_text
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.text.streaming import StreamingDecoder
from llamapro.text.tokenizer import Tokenizer


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """Loads a checkpoint in Hugging Face layout, frozen and in evaluation mode.

    Raises ConfigError for a model that is no LLaMA, CheckpointError for a missing or damaged file.

    Args:
        path: a directory, or `hf://owner/name[@revision]`.
        dtype: dtype of the weights and the computation; None takes the checkpoint's.
    """
    return Checkpoint.open(path).load(dtype, device)


def expand(
    model: LlamaForCausalLM, num_new_blocks: int, blocks_per_group: int = 1
) -> LlamaForCausalLM:
    """Inserts evenly spaced identity blocks (section 3.2); the logits stay the same, to the bit.

    The result shares the base's tensors; the new blocks have tensors of their own. The
    configuration records which blocks are new. Raises ConfigError if the layers do not split like
    this; the message lists the numbers that work.

    Args:
        num_new_blocks: number of new blocks in all; the layers must split into equal groups.
        blocks_per_group: number of new blocks on top of each group.
    """
    layout = interleave(model.config.num_hidden_layers, num_new_blocks, blocks_per_group)
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    base_sha256 = combine_hashes((t, sha256_of(t.chunks())) for t in in_memory(base))
    expanded = build_on_meta(expand_config(model.config, layout, base_sha256))
    load_tensors(expanded, expand_state_dict(base, layout))
    return expanded.requires_grad_(False).eval()


def train_only_new(model: LlamaForCausalLM) -> list[nn.Parameter]:
    """Freezes everything except the new blocks and returns their parameters for an optimizer.

    Raises ConfigError if the model was not expanded.
    """
    return [model.get_parameter(name) for name in select_trainable(model, "new_blocks")]


def save(model: LlamaForCausalLM, path: str | Path, force: bool = False) -> None:
    """Writes a checkpoint directory that `load` and transformers read.

    Tokenizer files are copied from the directory that the model, or its base, was loaded from.
    Raises ConfigError if the directory exists or cannot be written, or the model's configuration
    was made field by field.

    Args:
        model: in any dtype, on any device.
        path: the directory to create; it appears once it is complete.
        force: replace a checkpoint of this name.
    """
    if not model.config.raw:
        raise ConfigError(
            "this model's configuration was made field by field: make it with "
            "ModelConfig.from_dict, which keeps what config.json needs"
        )
    config = model.config
    if record := config.expansion:  # its new blocks may have been trained since
        record = replace(record, new_sha256=None)
        config = config.resized(config.num_hidden_layers, config.vocab_size, record)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    source = config.directory
    companions = [f for pattern in COMPANION_FILES for f in source.glob(pattern)] if source else []
    with output_directory(path, force) as aside:
        write_checkpoint(aside, in_memory(tensors))
        write_companions(aside, config, sorted(companions))


def generate(
    model: LlamaForCausalLM,
    text: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Returns the text that the model writes after another, up to the end of the document.

    Args:
        model: on any device.
        text: the text to continue; an empty one starts a new document.
        max_new_tokens: largest number of tokens; a full context ends the text, too.
        temperature: 0 takes the most likely token, 1.0 samples from the model's own distribution.
            Of `generation_config.json` only the ends of text are read here.
        top_p: sample only from the most likely tokens that together have this probability.
        seed: the same seed writes the same text.
        tokenizer: None takes the one in the directory that the model, or its base, was loaded from.

    Raises:
        ConfigError: there is no tokenizer, or the text fills the context.
        CheckpointError: `generation_config.json` is damaged.
        DataError: the text is empty, and the tokenizer names no token to start from.
    """
    if tokenizer is None:
        if model.config.directory is None:
            raise ConfigError("this model was not loaded from a directory: give a tokenizer")
        tokenizer = _tokenizer_of(model.config.directory)
    prompt = tokenizer.encode_prompt(text)
    context = model.config.max_position_embeddings
    if len(prompt) >= context:
        raise ConfigError(f"the text has {len(prompt)} tokens: expected 1 to {context - 1}")
    decoder, ends = StreamingDecoder(tokenizer, prompt), end_ids(model.config, tokenizer)
    limit = min(max_new_tokens, context - len(prompt))
    steps = write_text(model, decoder, prompt, limit, temperature, top_p, seed, ends)
    return "".join(piece for _, piece in steps)


_tokenizer_of = lru_cache(maxsize=4)(Tokenizer.load)
