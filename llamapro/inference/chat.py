"""Conversations with a checkpoint: what `python -m llamapro.generate DIR --chat` does."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llamapro.checkpoints.base import check_contained
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError, DataError, UserError
from llamapro.generate import Args, generate
from llamapro.inference.cache import KVCache
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate, check_messages
from llamapro.text.tokenizer import StreamingDecoder, Tokenizer

# Control tokens that end a turn in the formats in use, whatever config.json says ends a document.
ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def stop_ids(model: LlamaForCausalLM, tokenizer: Tokenizer) -> set[int]:
    """Returns the ids that end an answer: ends of document and of turn."""
    stops = {tokenizer.special_tokens[n] for n in ENDS_OF_TURN if n in tokenizer.special_tokens}
    if tokenizer.eos_id is not None:
        stops.add(tokenizer.eos_id)
    return stops.union(model.config.eos_token_ids)


class Conversation:
    """The turns so far, and the model that answers the next one.

    Each prompt is the chat template's rendering of all turns. What it shares with the ids that the
    model saw last, from the first on, stays in the KV cache; the model reads the rest only.

    Attributes:
        messages: `role` and `content` of each turn, the system's first if there is one.
        tokens: how many the model wrote, of all answers.
        elapsed_s: how long all answers took.
    """

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: Tokenizer, template: ChatTemplate, args: Args
    ) -> None:
        """Begins with the system's turn of `args`, or with none."""
        self.tokens, self.elapsed_s = 0, 0.0
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._args = args
        self._stops = stop_ids(model, tokenizer)
        self._generator = torch.Generator().manual_seed(args.seed)
        self._cache = self._new_cache(0)
        self._ids: list[int] = []  # the first _cache.length of them are those in the cache
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system's; it may stay in the cache."""
        system = self._args.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Adds a turn of the user and the assistant's answer to the conversation.

        Args:
            text: the user's turn.
            show: is given the answer in pieces, as they are written.

        Returns:
            A line about the answer: why it is incomplete, if it is; tokens, speed, context.

        Raises:
            ConfigError: the turn leaves no room in the context for an answer.
            DataError: the chat template refuses the turn. The conversation stays as it was.
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
                f"context of {self._args.dir} is {context}: shorten the turn, or begin a new "
                f"conversation"
            )
        limit = min(self._args.max_new_tokens, room)
        started = time.perf_counter()
        content, has_ended = self._write(prompt, limit, show)
        elapsed_s = time.perf_counter() - started
        count = len(self._ids) - len(prompt)
        self.tokens += count
        self.elapsed_s += elapsed_s
        notes = []
        if not has_ended:
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

    def _write(
        self, prompt: list[int], limit: int, show: Callable[[str], None]
    ) -> tuple[str, bool]:
        """Returns the text that follows a prompt, and whether the model ended it."""
        read = self._keep_shared(prompt, len(prompt) + limit)
        rest = torch.tensor([prompt[read:]])
        sampling = (self._args.temperature, self._args.top_p, self._generator)
        # Without the prompt: it strips the space that sentencepiece puts before a text.
        decoder, pieces = StreamingDecoder(self._tokenizer), []
        has_ended = False
        for token in generate(self._model, rest, limit, *sampling, self._cache):
            self._ids.append(int(token))
            if has_ended := self._ids[-1] in self._stops:
                break
            pieces.append(decoder.feed(self._ids[-1]))
            show(pieces[-1])
        pieces.append(decoder.flush())
        show(pieces[-1])
        return "".join(pieces), has_ended

    def _keep_shared(self, prompt: list[int], capacity: int) -> int:
        """Returns how many ids of a prompt are in the cache, which is cut to them and has room."""
        cached = self._ids[: self._cache.length]
        shared = 0
        for cached_id, token_id in zip(cached, prompt[:-1], strict=False):  # logits need one read
            if cached_id != token_id:
                break
            shared += 1
        if self._cache.capacity < capacity:
            old, new = self._cache, self._new_cache(capacity)
            for kept, copy in zip(old.keys + old.values, new.keys + new.values, strict=True):
                copy[:, :shared] = kept[:, :shared]
            self._cache = new
        self._cache.length = shared
        self._ids = list(prompt)
        return shared

    def _new_cache(self, capacity: int) -> KVCache:
        weight = self._model.lm_head.weight
        return KVCache(self._model.config, 1, capacity, weight.dtype, weight.device)


def chat(checkpoint: Checkpoint, tokenizer: Tokenizer, args: Args) -> dict[str, Any]:
    """Loads the model and answers all turns, printing as it goes.

    Answers go to standard output, or with --json to standard error; all else to standard error.

    Returns:
        messages, tokens (of all answers), tokens_per_s.

    Raises:
        ConfigError: there is no turn, the context is full, or --skip-new-blocks cannot be used.
        DataError: there is no chat template, or it refuses a turn. On a terminal, what is wrong
            with a turn is said, and the conversation goes on without it.
    """
    if args.skip_new_blocks:
        check_contained(checkpoint, special=True)
    try:
        template = ChatTemplate.load(checkpoint.path, tokenizer, args.chat_template)
    except DataError as error:
        raise DataError(f"--chat-template: {error}") from None
    is_terminal = sys.stdin.isatty()
    out = sys.stderr if args.json else sys.stdout

    def show(piece: str) -> None:
        print(piece, end="", file=out, flush=True)

    with args.backends():
        model = args.load(checkpoint)
        conversation = Conversation(model, tokenizer, template, args)
        for text in _turns(args.prompt, is_terminal, conversation.reset):
            try:
                note = conversation.answer(text, show)
            except UserError as error:
                if not is_terminal:
                    raise
                note = f"{error}; the turn is left out (/reset forgets all turns)"
            else:
                print(file=out, flush=True)
            print(note, file=sys.stderr, flush=True)
    if not conversation.tokens and not is_terminal:
        raise ConfigError("standard input has no line to answer; give it turns, or --prompt")
    return {
        "messages": conversation.messages,
        "tokens": conversation.tokens,
        "tokens_per_s": conversation.tokens / max(conversation.elapsed_s, 1e-9),
    }


def _turns(prompt: str, is_terminal: bool, reset: Callable[[], None]) -> Iterator[str]:
    """Yields the user's turns: --prompt, and unless it is all there is, lines of standard input."""
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
        print(file=sys.stderr)  # Ctrl-D leaves the cursor behind the question


def _read_line(question: str) -> str:
    """Returns the next line of standard input, "" at its end."""
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not {sys.stdin.encoding} text: {error}") from None
