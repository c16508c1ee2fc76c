"""Conversations with a model: `python -m llamapro.generate DIR --chat` runs `converse`."""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, TextIO

import torch

from llamapro.errors import ConfigError, DataError, UserError, note
from llamapro.inference.cache import KVCache
from llamapro.inference.options import SamplingOptions
from llamapro.inference.sampling import choose_sampling, end_ids, write_text
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.messages import check_messages
from llamapro.text.streaming import StreamingDecoder
from llamapro.text.tokenizer import Tokenizer

# Control tokens that end a turn in common formats. The model's files may not list them, and its
# template names only one: a call of Llama 3.1 ends with <|eom_id|>.
ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def stop_ids(model: LlamaForCausalLM, tokenizer: Tokenizer) -> set[int]:
    """Returns the ids that end an answer: the ends of a document and of a turn."""
    turns = {tokenizer.added[n].id for n in ENDS_OF_TURN if n in tokenizer.added}
    return turns | end_ids(model.config, tokenizer)


class Conversation:
    """The turns so far, and the model that answers the next one.

    The chat template renders all turns into each prompt. The ids at its start that the model saw
    last time stay in the KV cache, so the model reads only the rest.

    Attributes:
        messages: `role` and `content` of each turn, the system's first if there is one.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: SamplingOptions,
        system: str = "",
    ) -> None:
        self.tokens, self.elapsed_s = 0, 0.0
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._sampling, self._system = sampling, system
        chosen = choose_sampling(model.config, sampling.temperature, sampling.top_p)
        self._temperature, self._top_p = chosen
        self._stops = stop_ids(model, tokenizer) | template.end_ids()
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._cache = KVCache(model, 1, 0)
        self._ids: list[int] = []  # the first _cache.length of them are those in the cache
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system's, which may stay in the cache."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Adds a turn of the user and the assistant's answer; `show` gets the answer's pieces.

        Raises ConfigError if the turn leaves no room in the context for an answer, and DataError if
        the chat template refuses it; the conversation stays as it was.

        Returns:
            A line about the answer: the reason if it is incomplete, tokens, speed, context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.encode_prompt(messages)
        if not prompt:
            raise DataError(f"{self._template.origin}: renders the conversation as nothing")
        context = self._model.config.max_position_embeddings
        room = context - len(prompt)
        if room < 1:
            raise ConfigError(
                f"context full: the conversation has {len(prompt)} tokens with this turn; the "
                f"context of the model is {context}: shorten the turn, or begin a new conversation"
            )
        limit = min(self._sampling.max_new_tokens, room)
        started = time.perf_counter()
        content = self._write(prompt, limit, show)
        elapsed_s = time.perf_counter() - started
        count = len(self._ids) - len(prompt)
        self.tokens += count
        self.elapsed_s += elapsed_s
        notes = []
        if self._ids[-1] not in self._stops:
            reason = "context full" if limit == room else f"--max-new-tokens {limit} reached"
            notes.append(f"{reason}, the answer is incomplete")
        answer = {"role": "assistant", "content": content}
        if problems := check_messages([answer]):  # the template would refuse it in the next prompt
            reason = problems[0].removeprefix("turn 1: ")
            notes.append(f"this turn is forgotten, its answer cannot be kept ({reason})")
        else:
            self.messages = [*messages, answer]
        notes.append(f"{count} tokens, {count / elapsed_s:.1f} tokens/s")
        notes.append(f"context {len(self._ids):,} of {context:,}")
        return "; ".join(notes)

    def _write(self, prompt: list[int], limit: int, show: Callable[[str], None]) -> str:
        """Returns the text that the model writes after a prompt; appends its ids to `_ids`."""
        read = self._keep_shared(prompt, len(prompt) + limit)
        pieces = []
        for token_id, piece in write_text(
            self._model,
            # Without the prompt: it strips the space that sentencepiece puts before a text.
            StreamingDecoder(self._tokenizer),
            prompt[read:],
            limit,
            self._temperature,
            self._top_p,
            self._generator,
            self._stops,
            self._cache,
        ):
            if token_id is not None:
                self._ids.append(token_id)
            pieces.append(piece)
            show(piece)
        return "".join(pieces)

    def _keep_shared(self, prompt: list[int], capacity: int) -> int:
        """Cuts the cache to the ids it shares with a prompt, and returns how many; may grow it."""
        cached = self._ids[: self._cache.length]
        # The last id of a prompt is always read: its logits are needed.
        pairs = zip(cached, prompt[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._cache.length = shared
        if self._cache.capacity < capacity:
            self._cache = self._cache.take(torch.tensor([0]), capacity - shared)
        self._ids = list(prompt)
        return shared


def converse(conversation: Conversation, prompt: str, out: TextIO) -> dict[str, Any]:
    """Answers `prompt`, if there is one, and the lines of standard input, on `out`.

    Returns:
        messages, tokens (of all answers), tokens_per_s.

    Raises:
        ConfigError: there is no turn, or the context is full.
        DataError: the chat template refuses a turn. On a terminal the message is printed instead,
            and the conversation goes on without this turn.
    """
    is_terminal = sys.stdin.isatty()

    def show(piece: str) -> None:
        print(piece, end="", file=out, flush=True)

    for text in _turns(prompt, is_terminal, conversation.reset):
        try:
            about = conversation.answer(text, show)
        except UserError as error:
            if not is_terminal:
                raise
            about = f"{error}; the turn is left out (/reset forgets all turns)"
        else:
            print(file=out, flush=True)
        note(about)
    if not conversation.tokens and not is_terminal:
        raise ConfigError("standard input has no line to answer; give it turns, or --prompt")
    return {
        "messages": conversation.messages,
        "tokens": conversation.tokens,
        "tokens_per_s": conversation.tokens / max(conversation.elapsed_s, 1e-9),
    }


def _turns(prompt: str, is_terminal: bool, reset: Callable[[], None]) -> Iterator[str]:
    """Yields the user's turns: the prompt, then on a terminal, or without a prompt, input lines."""
    if prompt:
        yield prompt
        if not is_terminal:
            return
    while line := _read_line("you: " if is_terminal else ""):
        text = line.removesuffix("\n")
        if is_terminal and text.strip() in ("", "/exit"):
            return
        if is_terminal and text.strip() == "/reset":
            reset()
        elif text.strip():  # an empty line is no turn
            yield text
    if is_terminal:
        note("")  # Ctrl-D leaves the cursor behind the question


def _read_line(question: str) -> str:
    """Returns the next line of standard input, "" at its end."""
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not {sys.stdin.encoding} text: {error}") from None
