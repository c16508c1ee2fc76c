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

import tyro
from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.api import generate
from llamapro.checkpoints.base import check_contained
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError, DataError
from llamapro.inference.chat import Conversation, converse
from llamapro.inference.options import ComputeOptions, SamplingOptions
from llamapro.inference.sampling import write_text
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import StreamingDecoder, Tokenizer


@dataclass
class Args(ComputeOptions, SamplingOptions):
    """Continue a prompt, or a conversation, with a checkpoint; text is printed as it is written."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Checkpoint directory with its tokenizer, or hf://owner/name."""
    prompt: str = ""
    """Text to continue; an empty one starts a new document. With --chat: the first turn."""
    chat: bool = False
    """Answer turns of a conversation. A terminal asks for each turn: an empty line, /exit or Ctrl-D
    ends, /reset starts again. In a script, --prompt is the only turn; without it, each line of
    standard input is a turn."""
    system: str = ""
    """With --chat: the system's turn, before all others."""
    chat_template: str = ""
    """With --chat: llama2, llama3, mistral, chatml or a .jinja file; the model's own if empty."""
    json: bool = False
    """Print the result as one JSON object."""

    def check(self) -> None:
        """Raises ConfigError with every option that is impossible."""
        wrong = [
            f"{name}: is of use with --chat only"
            for name, value in [("--system", self.system), ("--chat-template", self.chat_template)]
            if value and not self.chat
        ]
        if wrong := wrong + self.find_mistakes():
            raise ConfigError("; ".join(wrong))


def main(argv: list[str] | None = None, prog: str = "python -m llamapro.generate") -> None:
    """Runs the command with these arguments, those of the process by default."""
    args = tyro.cli(Args, prog=prog, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    args.check()
    checkpoint = Checkpoint.open(args.dir)
    tokenizer = Tokenizer.load(checkpoint.path)
    tokenizer.check_fits(checkpoint.config.vocab_size, str(args.dir))
    command = chat if args.chat else continue_prompt
    with args.backends():
        result = command(checkpoint, tokenizer, args)
    if args.json:
        cli.print_result(result, True, "")


def chat(checkpoint: Checkpoint, tokenizer: Tokenizer, args: Args) -> dict[str, Any]:
    """Loads the model and answers turns; with --json the answers go to standard error.

    Raises:
        ConfigError: --skip-new-blocks cannot be used; or as `converse`.
        DataError: the chat template is missing or does not fit; or as `converse`.
    """
    if args.skip_new_blocks:
        check_contained(checkpoint, special=True)
    try:
        template = ChatTemplate.load(checkpoint.path, tokenizer, args.chat_template)
    except DataError as error:
        raise DataError(f"--chat-template: {error}") from None
    conversation = Conversation(args.load(checkpoint), tokenizer, template, args, args.system)
    return converse(conversation, args.prompt, sys.stderr if args.json else sys.stdout)


def continue_prompt(checkpoint: Checkpoint, tokenizer: Tokenizer, args: Args) -> dict[str, Any]:
    """Loads the model and continues --prompt.

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
    """Continues a prompt, printing as it goes unless JSON was asked for.

    Returns:
        prompt, text, tokens (their number), tokens_per_s.
    """
    if not args.json:
        print(args.prompt, end="", flush=True)
    pieces, count, started = [], 0, time.perf_counter()
    for token_id, piece in write_text(
        model,
        StreamingDecoder(tokenizer, prompt),
        prompt,
        limit,
        args.temperature,
        args.top_p,
        args.seed,
        model.config.eos_token_ids,
    ):
        count += token_id is not None
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    elapsed_s = time.perf_counter() - started
    if not args.json:
        print()
    return {
        "prompt": args.prompt,
        "text": "".join(pieces),
        "tokens": count,
        "tokens_per_s": count / elapsed_s,
    }


class _CallableModule(ModuleType):
    """Once this module is imported it is what `llamapro.generate` names, so it can be called."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    cli.run(main)
