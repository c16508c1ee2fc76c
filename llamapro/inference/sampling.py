"""Writing text: the next token from the logits, and one token after another.

Shapes: B batch, T length, C hidden size, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, note, warn
from llamapro.files import read_json
from llamapro.inference.cache import KVCache
from llamapro.inference.decoding import next_logits
from llamapro.model import LlamaForCausalLM
from llamapro.text.streaming import StreamingDecoder
from llamapro.text.tokenizer import Tokenizer

GENERATION_FILE = "generation_config.json"
# Other settings of that file that would change which token is chosen: name -> value that does not.
_OF_DRAWING: dict[str, Any] = {"top_k": 0, "min_p": 0, "typical_p": 1, "top_h": None}
_OF_DRAWING |= {"epsilon_cutoff": 0, "eta_cutoff": 0}
_OF_LOGITS = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "num_beams": 1}
_OF_LOGITS |= {"min_length": 0, "min_new_tokens": 0, "guidance_scale": 1, "token_healing": False}
_OF_LOGITS |= {"encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0}
_LISTS = "bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias stop_strings "
_LISTS += "force_words_ids constraints watermarking_config dola_layers penalty_alpha max_time"
_FORCED = "forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty max_new_tokens"


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """Returns the ids that end a text: every EOS that a model's files name.

    They are those of `config.json`, of the `generation_config.json` beside it, which often lists
    more (Llama 3's end of turn), and the tokenizer's, which a chat model may have changed alone.
    Says if the two files name another BOS than the tokenizer, whose own is put first.
    """
    ends = set(config.eos_token_ids)
    if tokenizer.eos_id is not None:
        ends.add(tokenizer.eos_id)
    file, raw = _generation_config(config)
    eos = raw.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token_id) is not int for token_id in listed):
        raise CheckpointError(
            f"{file}: eos_token_id is {eos!r:.80}, expected a token id or a list of them"
        )
    ends.update(listed)
    for name, fields in {"config.json": config.raw, file.name: raw}.items():
        bos = fields.get("bos_token_id")
        if None not in (bos, tokenizer.bos_id) and bos != tokenizer.bos_id:
            warn(
                f"{config.directory}: bos_token_id is {bos!r:.80} in {name}, but the tokenizer's "
                f"BOS is token {tokenizer.bos_id}, which counts"
            )
    return ends


def _generation_config(config: ModelConfig) -> tuple[Path, dict[str, Any]]:
    """Reads `generation_config.json`, or where there is none `config.json`, as transformers."""
    directory = config.directory or Path()
    if config.directory and (file := directory / GENERATION_FILE).exists():
        return file, read_json(file)
    return directory / "config.json", config.raw


def choose_sampling(
    config: ModelConfig, temperature: float | None = None, top_p: float | None = None
) -> tuple[float, float]:
    """Returns temperature and top_p: those given, or where they are None the model's own.

    As in transformers, the temperature of `generation_config.json` counts if `do_sample` is true
    there (1.0 if it names none), and its top_p wherever tokens are drawn. Without them the most
    likely token is taken. Standard error says what comes from the file, and what is not applied.
    """
    file, raw = _generation_config(config)
    taken: list[str] = []

    def own(name: str, is_possible: Callable[[Any], bool], expected: str) -> float:
        value, option = 1.0 if raw.get(name) is None else raw[name], f"--{name.replace('_', '-')}"
        if type(value) not in (int, float) or not is_possible(value):
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}, expected {expected}; correct it or give {option}"
            )
        taken.append(f"{name} {value}")
        return float(value)

    draws = raw.get("do_sample") or False
    if type(draws) is not bool:
        raise CheckpointError(f"{file}: do_sample is {draws!r:.80}, expected true or false")
    if temperature is None:
        temperature = own("temperature", lambda v: 0 <= v < 1e9, "0 or more") if draws else 0.0
    if top_p is None and temperature and raw.get("top_p") is not None:
        top_p = own("top_p", lambda v: 0 < v <= 1, "more than 0, at most 1")
    ignored: dict[str, Any] = _OF_LOGITS | (_OF_DRAWING if temperature else {})
    ignored |= {name: [] for name in f"{_LISTS} {_FORCED}".split()}
    left = [f"{n} {raw[n]!r:.40}" for n, none in ignored.items() if raw.get(n) not in (None, none)]
    said = [f"{', '.join(taken)} from {file.name}"] if taken else []
    said += [f"{', '.join(left)} of {file.name} not applied"] if left else []
    if said:
        note("; ".join(said))
    return temperature, 1.0 if top_p is None else top_p


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Chooses the next token of each sequence.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep only the most likely tokens, the fewest whose probabilities reach this value
            (nucleus sampling; Holtzman et al., 2020).
        generator: on the CPU, so that every device writes the same text.

    Returns:
        (B, 1) token ids.
    """
    if temperature == 0:
        # As argmax, the first of equal ones, but on a CPU in a quarter of the time in bf16.
        return logits.max(-1, keepdim=True).indices
    scaled = logits.cpu().double()
    # The largest becomes 0, so that no temperature, however small, makes it overflow.
    probabilities = ((scaled - scaled.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p == 1:  # without the sort, which takes longer than a small model
        return _draw(probabilities, generator).to(logits.device)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays if those before it do not reach top_p yet; the first one always stays.
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return ids.gather(-1, _draw(ordered, generator)).to(logits.device)


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draws an index of each row, with probabilities that are proportional to the weights."""
    # One random number per row: `torch.multinomial` takes one per token, which is a sixth of the
    # time of a small model with a large vocabulary.
    sums = weights.cumsum(-1)  # (B, V), fp64
    total = sums[:, -1:]
    if not total.isfinite().all():
        raise CheckpointError("the logits are NaN or infinite, so no token can be drawn")
    at = torch.rand(total.shape, dtype=sums.dtype, generator=generator) * total
    return torch.searchsorted(sums, at, right=True).clamp(max=weights.shape[-1] - 1)


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | torch.Generator = 0,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Continues prompts of equal length, one token at a time.

    Args:
        prompt: (B, T) token ids, T >= 1; with a cache, the ids that follow those in it.
        temperature, top_p: as for `sample`.
        seed: an integer, or a generator that continues earlier draws.
        cache: holds the tokens before the prompt, with room for T + max_new_tokens - 1 more. At the
            end it holds all tokens except the last one yielded.

    Yields:
        (B, 1): the token ids of each step.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    if cache is None:
        cache = KVCache(model, prompt.shape[0], prompt.shape[1] + max_new_tokens)
    ids = prompt.to(model.lm_head.weight.device)
    for _ in range(max_new_tokens):
        ids = sample(next_logits(model, ids, cache), temperature, top_p, generator)
        yield ids


def write_text(
    model: LlamaForCausalLM,
    decoder: StreamingDecoder,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | torch.Generator = 0,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
) -> Iterator[tuple[int | None, str]]:
    """Continues one prompt and decodes the new tokens, up to the first one in `stop_ids`.

    Args:
        decoder: a new one; it decides how the text begins.
        model, prompt, max_new_tokens, temperature, top_p, seed, cache: as for `generate`.

    Yields:
        Each token id with its text, which is "" for the token that stops. At the end, None with the
        text of an incomplete character.
    """
    steps = generate(model, torch.tensor([prompt]), max_new_tokens, temperature, top_p, seed, cache)
    for step in steps:
        token_id = int(step)
        yield token_id, "" if token_id in stop_ids else decoder.feed(token_id)
        if token_id in stop_ids:
            break
    yield None, decoder.flush()
