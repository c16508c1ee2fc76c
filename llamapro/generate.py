"""Writes text with a checkpoint: `python -m llamapro.generate DIR --prompt "Once upon a time"`.

With `--chat` it answers the turns of a conversation. In Python,
`llamapro.generate(llamapro.load(DIR), "Once upon a time")` returns the text.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.api import generate
from llamapro.checkpoints.base import check_contained
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import open_blocks
from llamapro.conversion.model_card import Training
from llamapro.errors import ConfigError, DataError, note, warn
from llamapro.inference.chat import Conversation, converse
from llamapro.inference.options import ComputeOptions, SamplingOptions
from llamapro.inference.sampling import choose_sampling, end_ids, write_text
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.streaming import StreamingDecoder
from llamapro.text.tokenizer import Tokenizer


@dataclass
class ChatArgs(ComputeOptions, SamplingOptions):
    """Hold a conversation with a checkpoint; answers are printed as they are written.

    In a terminal, an empty line, /exit or Ctrl-D ends, and /reset starts again.

    In a script, --prompt is the only turn; without it, each line of input is one.
    """

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Checkpoint directory with its tokenizer, or hf://owner/name."""
    prompt: str = ""
    """First turn of the conversation."""
    system: str = ""
    """System message of the conversation."""
    chat_template: str = ""
    """Chat template: llama2, llama3, mistral, chatml, a .jinja file or a name of the model's."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass
class Args(ChatArgs):
    """Continue a prompt with a checkpoint; the text is printed as it is written."""

    prompt: str = ""
    """Text to continue; "" starts a new document. With --chat: the first turn."""
    chat: bool = False
    """Hold a conversation, as 'llamapro chat' does."""

    def find_mistakes(self) -> list[str]:
        """Returns a message for every value that is impossible."""
        chat_only = {"--system": self.system, "--chat-template": self.chat_template}
        wrong = [
            f"{name}: is of use with --chat only"
            for name, value in chat_only.items()
            if value and not self.chat
        ]
        return wrong + super().find_mistakes()


def main(argv: list[str] | None = None, prog: str = "python -m llamapro.generate") -> None:
    """Runs the command with these arguments, those of the process by default."""
    _run(cli.arguments(Args, argv, prog))


def main_chat(argv: list[str], prog: str) -> None:
    """Runs the command `llamapro chat` with these arguments."""
    _run(cli.arguments(ChatArgs, argv, prog))


def _run(args: ChatArgs) -> None:
    if wrong := args.find_mistakes():
        raise ConfigError("; ".join(wrong))
    checkpoint = args.open(args.dir)
    tokenizer = Tokenizer.load(checkpoint.path)
    tokenizer.check_fits(checkpoint.config.vocab_size, str(args.dir))
    is_text = isinstance(args, Args) and not args.chat
    with args.backends():
        result = (continue_prompt if is_text else chat)(checkpoint, tokenizer, args)
    if args.json:
        cli.print_result(result, True, "")


def _template(checkpoint: Checkpoint, tokenizer: Tokenizer, args: ChatArgs) -> ChatTemplate:
    """Returns the template of the new blocks, as `merge` writes it, or else that of the files."""
    if not (args.chat_template or args.skip_new_blocks):
        opened = [open_blocks(path) for path in args.blocks]
        found = {Training.of(blocks).template for blocks in opened} - {None}
        if len(found) > 1:
            warn("the new blocks were trained with different chat templates; the base's is taken")
        elif source := next(iter(found), None):
            return ChatTemplate(
                source, tokenizer, f"template of {opened[0].file}", is_trusted=False
            )
    return ChatTemplate.load(checkpoint.path, tokenizer, args.chat_template)


def chat(checkpoint: Checkpoint, tokenizer: Tokenizer, args: ChatArgs) -> dict[str, Any]:
    """Loads the model and answers turns, as `converse`; with --json, on standard error."""
    if args.skip_new_blocks:
        check_contained(checkpoint, special=True)
    try:
        template = _template(checkpoint, tokenizer, args)
    except DataError as error:
        raise DataError(f"--chat-template: {error}") from None
    conversation = Conversation(args.load(checkpoint), tokenizer, template, args, args.system)
    return converse(conversation, args.prompt, sys.stderr if args.json else sys.stdout)


def continue_prompt(checkpoint: Checkpoint, tokenizer: Tokenizer, args: ChatArgs) -> dict[str, Any]:
    """Loads the model and continues --prompt, printing as it goes unless JSON was asked for.

    Returns:
        prompt, text, tokens (their number), tokens_per_s.
    """
    prompt = tokenizer.encode_prompt(args.prompt)
    context = checkpoint.config.max_position_embeddings
    room = context - len(prompt)
    if room < 1:
        raise ConfigError(
            f"--prompt has {len(prompt)} tokens; the context of {args.dir} is {context}: shorten it"
        )
    ends = end_ids(checkpoint.config, tokenizer)
    temperature, top_p = choose_sampling(checkpoint.config, args.temperature, args.top_p)
    model = args.load(checkpoint)

    def show(text: str) -> None:
        if not args.json:
            print(text, end="", flush=True)

    show(args.prompt)
    pieces, count, started = [], 0, time.perf_counter()
    decoder, limit = StreamingDecoder(tokenizer, prompt), min(args.max_new_tokens, room)
    steps = write_text(model, decoder, prompt, limit, temperature, top_p, args.seed, ends)
    for token_id, piece in steps:
        count += token_id is not None
        pieces.append(piece)
        show(piece)
    tokens_per_s = count / (time.perf_counter() - started)
    show("\n")
    stopped = "context full, " if count == room < args.max_new_tokens else ""
    note(f"{stopped}{count} tokens, {tokens_per_s:.1f} tokens/s")
    text = "".join(pieces)
    return {"prompt": args.prompt, "text": text, "tokens": count, "tokens_per_s": tokens_per_s}


class _CallableModule(ModuleType):
    """Once this module is imported it is what `llamapro.generate` names, so it can be called."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    cli.run(main)
