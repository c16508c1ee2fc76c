"""Writes text with a checkpoint: `python -m llamapro.generate DIR --prompt "Once upon a time"`.

With `--chat`, answers turns of a conversation; see `llamapro.inference.chat`.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError
from llamapro.inference.cache import KVCache
from llamapro.inference.options import ComputeOptions
from llamapro.model import LlamaForCausalLM
from llamapro.text.tokenizer import StreamingDecoder, Tokenizer


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draws the next token of each sequence.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws from the fewest tokens whose probabilities reach this (Holtzman et al., 2020).
        generator: of random numbers, on the CPU: the same text on every device.

    Returns:
        (B, 1) token ids.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    scaled = logits.cpu().double()
    # The largest becomes 0, so that no temperature, however small, makes it overflow.
    probabilities = ((scaled - scaled.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p == 1:  # without the sort, which takes longer than a small model
        return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays if those before it do not reach top_p yet; the first one always stays.
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    chosen = torch.multinomial(ordered, 1, generator=generator)  # renormalises
    return ids.gather(-1, chosen).to(logits.device)


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
    """Continues prompts of one length, one token at a time.

    Args:
        model: in evaluation mode.
        prompt: (B, T) token ids, T >= 1; with a cache, those that follow the ones in it.
        max_new_tokens: how many steps are made; the caller may stop sooner.
        temperature, top_p: as for `sample`.
        seed: of the draws; or a generator, for draws that follow earlier ones.
        cache: of the tokens before the prompt, with room for T + max_new_tokens - 1 more. It is
            filled with all tokens but the last one yielded.

    Yields:
        (B, 1): each step's token ids.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    weight = model.lm_head.weight
    if cache is None:
        capacity = prompt.shape[1] + max_new_tokens
        cache = KVCache(model.config, prompt.shape[0], capacity, weight.dtype, weight.device)
    ids = prompt.to(weight.device)
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.model(ids, cache)[:, -1:])[:, 0]  # (B, V)
        ids = sample(logits, temperature, top_p, generator)
        yield ids


@dataclass
class Args(ComputeOptions):
    """Continue a prompt, or a conversation, with a checkpoint: text is printed as it is written."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Checkpoint directory, with its tokenizer (tokenizer.model or tokenizer.json)."""
    prompt: str = ""
    """Text to continue; empty: start a new document. With --chat: the first turn."""
    chat: bool = False
    """Answer turns of a conversation. On a terminal, they are asked for: an empty line, /exit or
    Ctrl-D ends, /reset forgets. Elsewhere --prompt is the only turn, or else each line of standard
    input is one."""
    system: str = ""
    """With --chat: the system's turn, before all others."""
    chat_template: str = ""
    """With --chat: a .jinja file, or llama2, llama3, mistral or chatml; empty: the model's own."""
    max_new_tokens: int = 256
    """Stop after this many tokens, at the end of the document (with --chat: of the answer), or when
    the context is full."""
    temperature: float = 0.0
    """0: always the most likely token; higher: more varied."""
    top_p: float = 1.0
    """Draw from the most likely tokens that make up this much probability."""
    seed: int = 0
    """Of the draws: the same seed writes the same text."""
    json: bool = False
    """Print the result as one JSON object."""

    def check(self) -> None:
        """Raises ConfigError with every option that is impossible."""
        wrong = [
            f"{name}: is of use with --chat only"
            for name, value in [("--system", self.system), ("--chat-template", self.chat_template)]
            if value and not self.chat
        ]
        if self.max_new_tokens < 1:
            wrong.append(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            wrong.append(f"--temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            wrong.append(f"--top-p {self.top_p}: expected more than 0, at most 1")
        if not 0 <= self.seed < 1 << 64:
            wrong.append(f"--seed {self.seed}: expected 0 or more, below 2^64")
        if wrong:
            raise ConfigError("; ".join(wrong))


def main() -> None:
    flags = (tyro.conf.FlagCreatePairsOff,)
    args = tyro.cli(Args, prog="python -m llamapro.generate", config=flags)
    args.check()
    checkpoint = Checkpoint.open(args.dir)
    tokenizer = Tokenizer.load(checkpoint.path)
    tokenizer.check_fits(checkpoint.config.vocab_size, str(args.dir))
    if args.chat:
        from llamapro.inference import chat as talk  # which imports this module

        result = talk.chat(checkpoint, tokenizer, args)
    else:
        result = continue_prompt(checkpoint, tokenizer, args)
    if args.json:
        cli.print_result(result, True, "")


def continue_prompt(checkpoint: Checkpoint, tokenizer: Tokenizer, args: Args) -> dict[str, Any]:
    """Loads the model and continues --prompt; returns as `write`.

    Raises:
        ConfigError: the prompt is empty or too long.
    """
    prompt = tokenizer.encode(args.prompt, bos=True)
    if not prompt:
        raise ConfigError(f"{args.dir}: its tokenizer has no BOS token; give a --prompt")
    context = checkpoint.config.max_position_embeddings
    room = context - len(prompt)
    if room < 1:
        raise ConfigError(
            f"--prompt has {len(prompt)} tokens; the context of {args.dir} is {context}: shorten it"
        )
    with args.backends():
        model = args.load(checkpoint)
        result = write(model, tokenizer, prompt, min(args.max_new_tokens, room), args)
    stopped = "context full, " if result["tokens"] == room < args.max_new_tokens else ""
    print(
        f"{stopped}{result['tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s",
        file=sys.stderr,
    )
    return result


def write(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: list[int], limit: int, args: Args
) -> dict[str, Any]:
    """Generates, printing as it goes unless JSON was asked for; returns prompt, text and speed."""
    decoder = StreamingDecoder(tokenizer, prompt)
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)

    if not args.json:
        print(args.prompt, end="", flush=True)
    count, started = 0, time.perf_counter()
    ids = torch.tensor([prompt])
    for token in generate(model, ids, limit, args.temperature, args.top_p, args.seed):
        count += 1
        if (token_id := int(token)) in model.config.eos_token_ids:
            break
        show(decoder.feed(token_id))
    show(decoder.flush())
    elapsed = time.perf_counter() - started
    if not args.json:
        print()
    text = "".join(pieces)
    return {
        "prompt": args.prompt,
        "text": text,
        "tokens": count,
        "tokens_per_s": count / elapsed,
    }


if __name__ == "__main__":
    cli.run(main)
