"""Measures how well a checkpoint predicts files: `python -m llamapro.evaluate DIR --data FILE...`

With `--choices FILE...` it measures how well the checkpoint chooses between answers. With
`--against BASE_DIR`, base and tuned model stand side by side, with the paper's token-distribution
shift (Appendix G): the tuned model writes greedily, and the base ranks each token it chose.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm
from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError, DataError, note
from llamapro.formatting import perplexity
from llamapro.inference.distribution_shift import shift, write_greedily
from llamapro.inference.multiple_choice import (
    baselines,
    measure_choices,
    read_choices,
    render_choices,
)
from llamapro.inference.options import ComputeOptions
from llamapro.inference.sampling import end_ids
from llamapro.model import LlamaForCausalLM
from llamapro.ops import IGNORE_INDEX
from llamapro.text.corpus import encode_pieces, read_counted
from llamapro.text.documents import Counts, Piece
from llamapro.text.source_files import find_files
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.objective import NextToken


@dataclass(frozen=True)
class Text:
    """The tokenised documents of one --data argument: prefix and text, with no EOS to predict."""

    name: str
    documents: list[list[int]]
    # UTF-8 length of the text that is predicted. Without a prefix the first token of a document is
    # predicted from nothing, so neither it nor its bytes count.
    bytes: int


def read_text(pattern: str, tokenizer: Tokenizer, text_key: str) -> Text:
    """Reads a file, folder or glob; prints on standard error what was left out."""
    counts = Counts()
    documents: list[list[int]] = []
    pieces: list[Piece] = []
    try:
        for piece in read_counted(find_files([pattern]), tokenizer, text_key, counts, pattern):
            pieces.append(piece)
            if piece.is_last:
                ids = encode_pieces(pieces, tokenizer)
                documents.append(ids[: len(ids) - len(tokenizer.suffix)])
                pieces = []
    except DataError as error:  # the option has another name in training
        raise DataError(str(error).replace("--data.text-key", "--text-key")) from None
    counts.end = ""  # the option that begins documents there is of training alone
    note(f"{pattern}: {counts.describe()}")
    unpredicted = 0
    if not tokenizer.prefix:  # a space that the tokenizer put first is none of the text's bytes
        firsts = [tokenizer.bytes_of(ids[0]) for ids in documents if ids]
        unpredicted = sum(map(len, firsts)) - len(firsts) * tokenizer.adds_space
    return Text(pattern, documents, counts.bytes - unpredicted)


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a document into windows in which every token but the first is predicted exactly once.

    Each window moves by `stride` tokens. All but the first predict that many, each with at least
    context - stride tokens before it.

    Yields:
        (start, end, first): the inputs are tokens[start:end], and tokens[first:end + 1] follow.
    """
    first = 1
    for start in range(0, max(1, length - 1), stride):
        end = min(start + context, length - 1)
        if first <= end:
            yield start, end, first
        first = end + 1
        if end == length - 1:
            return


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM, text: Text, context: int, stride: int, batch_size: int
) -> dict[str, float]:
    """Returns loss (nats per token), perplexity, bits_per_byte and tokens of a text."""
    device = model.lm_head.weight.device
    cut = [
        (ids[start:end], [IGNORE_INDEX] * (first - 1 - start) + ids[first : end + 1])
        for ids in text.documents
        for start, end, first in windows(len(ids), context, stride)
    ]
    cut.sort(key=lambda pair: len(pair[0]))  # little padding
    objective = NextToken(model)
    loss_sum, count = 0.0, 0
    for at in tqdm(range(0, len(cut), batch_size), desc=text.name, unit="batch", disable=None):
        part = cut[at : at + batch_size]
        shape = (len(part), len(part[-1][0]))
        inputs = torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORE_INDEX)
        for row, (ids, following) in enumerate(part):  # padding comes after: causal, so unseen
            inputs[row, : len(ids)] = torch.tensor(ids)
            targets[row, : len(ids)] = torch.tensor(following)
        part_sum, part_count = objective(inputs.to(device), targets.to(device))
        loss_sum += part_sum.item()
        count += int(part_count)
    if not count:
        raise ConfigError(f"{text.name}: has no token to predict")
    loss = loss_sum / count
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss_sum / math.log(2) / text.bytes,
        "tokens": count,
    }


@dataclass
class Args(ComputeOptions):
    """Measure loss, perplexity and bits per byte on files, and accuracy on questions."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Checkpoint directory with its tokenizer, or hf://owner/name."""
    data: tuple[str, ...] = ()
    """Text to predict: files, folders or globs, as in training. Each argument is measured alone."""
    choices: tuple[str, ...] = ()
    """Questions: .jsonl, .json, .csv or .parquet, with question (or prompt), choices and answer."""
    shots: int = 0
    """Examples before each question: the first of its --choices, which are then not asked."""
    against: Annotated[Path | None, arg(metavar="BASE_DIR")] = None
    """Second checkpoint, usually the base, to compare with, also by token-distribution shift."""
    context: int = 0
    """Longest input in tokens; 0: the model's max_position_embeddings."""
    stride: int = 0
    """Tokens by which the window over a text moves; 0: half the context."""
    batch_size: int = 8
    """Windows, questions or choices per forward pass; of short questions more."""
    text_key: str = "text"
    """Key of a JSON row, or column of a table, that holds the text."""
    shift_prompts: int = 16
    """Prompts cut from each text to measure the shift from --against; 0 measures none."""
    shift_prompt_tokens: int = 32
    """Tokens of each of these prompts."""
    shift_new_tokens: int = 64
    """Tokens written after each of these prompts."""
    json: bool = False
    """Print the result as one JSON object."""

    def window(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Returns context and stride; raises ConfigError that names every impossible option."""
        limit = checkpoint.config.max_position_embeddings
        context = self.context or limit
        stride = self.stride or max(1, context // 2)
        wrong = []
        if not 1 <= context <= limit:
            wrong.append(f"--context {context}: {checkpoint.path} takes 1 to {limit}")
        if not 1 <= stride <= context:
            wrong.append(f"--stride {stride}: expected 1 to the context, {context}")
        if self.batch_size < 1:
            wrong.append(f"--batch-size {self.batch_size}: expected 1 or more")
        if self.shots < 0 or (self.shots and not self.choices):
            wrong.append(f"--shots {self.shots}: expected 0 or more, with --choices")
        if self.shift_prompts < 0 or self.shift_prompt_tokens < 1 or self.shift_new_tokens < 1:
            wrong.append(
                "--shift-prompt-tokens and --shift-new-tokens: expected 1 or more, "
                "--shift-prompts: 0 or more"
            )
        wanted = self.shift_prompt_tokens + self.shift_new_tokens
        if self.data and self.against and self.shift_prompts and wanted > limit:
            wrong.append(
                f"--shift-prompt-tokens {self.shift_prompt_tokens} and --shift-new-tokens "
                f"{self.shift_new_tokens} do not fit the context of {limit}"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))
        return context, stride


def evaluate(args: Args) -> dict[str, Any]:
    """Measures every text and set of questions, with one model in memory at a time.

    Returns:
        model, against, context, stride, and by name of a --data or --choices argument:
        files: as `measure`; with a base also `base`, the same of the base, and `shift`.
        choices: as `measure_choices` and `baselines`; with a base also `base`, `gained`, `lost`.
    """
    if not args.data and not args.choices:
        raise ConfigError("--data: name at least one file, folder or glob; or questions: --choices")
    checkpoint = args.open(args.dir)
    base = Checkpoint.open(args.against) if args.against else None
    context, stride = args.window(checkpoint)
    tokenizer = Tokenizer.load(checkpoint.path)
    tokenizer.check_fits(checkpoint.config.vocab_size, str(args.dir))
    if base is not None:
        if Tokenizer.load(base.path).fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"--against {base.path}: its tokenizer is not that of {args.dir}; token losses "
                "and ranks cannot be compared"
            )
        replace(args, context=context, stride=stride).window(base)
    texts = [read_text(pattern, tokenizer, args.text_key) for pattern in args.data]
    questions = {p: read_choices(p, tokenizer, context, args.shots) for p in args.choices}

    def measure_all(model: LlamaForCausalLM) -> tuple[dict[str, Any], dict[str, Any]]:
        size = args.batch_size
        files = {text.name: measure(model, text, context, stride, size) for text in texts}
        answers = {n: measure_choices(model, asked, size, n) for n, asked in questions.items()}
        return files, answers

    model = args.load(checkpoint)
    files, answers = measure_all(model)
    choices = {n: scores | baselines(questions[n]) for n, (scores, _) in answers.items()}
    if base is not None:
        samples = {
            text.name: write_greedily(
                model,
                text.documents,
                prompts=args.shift_prompts,
                prompt_tokens=args.shift_prompt_tokens,
                new_tokens=args.shift_new_tokens,
            )
            for text in texts
        }
        del model
        model = replace(args, skip_new_blocks=False).load(base)
        base_files, base_answers = measure_all(model)
        ends = end_ids(base.config, tokenizer)
        for name, numbers in base_files.items():
            sample = samples[name]
            files[name] |= {"base": numbers, "shift": sample and shift(model, sample, ends)}
        for name, (scores, before) in base_answers.items():
            _, correct = answers[name]
            turned = Counter(zip(before, correct, strict=True))
            gained, lost = turned[False, True], turned[True, False]
            choices[name] |= {"base": scores, "gained": gained, "lost": lost}
    return {
        "model": str(args.dir),
        "against": str(args.against) if args.against else None,
        "context": context,
        "stride": stride,
        "files": files,
        "choices": choices,
    }


def render(result: dict[str, Any]) -> str:
    """Returns the measurements as a table of texts and a table of questions."""
    width = max(map(len, ("file", *result["files"])))
    columns = f"{'tokens':>10} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}"
    lines = [f"{result['model']}, context {result['context']}, stride {result['stride']}"]
    if result["files"]:
        lines.append(f"{'file':<{width}} {'model':<6} {columns}")

    for name, found in result["files"].items():
        base = found.get("base")
        for model, numbers in (("base", base), ("this", found)):
            if numbers is not None:
                lines.append(
                    f"{name:<{width}} {model:<6} {numbers['tokens']:>10,} {numbers['loss']:>8.4f} "
                    f"{numbers['perplexity']:>11.3f} {numbers['bits_per_byte']:>10.4f}"
                )
        if base is not None:
            change = found["loss"] - base["loss"]
            verdict = "learned" if change < 0 else "forgot" if change > 0 else "changed"
            lines.append(f"{'':<{width}} {verdict} {abs(change):.4f} nats per token")
        if shift := found.get("shift"):
            lines.append(
                f"{'':<{width}} {shift['positions']:,} tokens written greedily, by their rank in "
                f"the base: unshifted {shift['unshifted']:.1%}, marginal "
                f"{shift['marginal']:.1%}, shifted {shift['shifted']:.1%}"
            )
    if result["choices"]:
        lines += render_choices(result["choices"])
    return "\n".join(lines)


def main(argv: list[str] | None = None, prog: str = "python -m llamapro.evaluate") -> None:
    """Runs the command with these arguments, those of the process by default."""
    args = cli.arguments(Args, argv, prog)
    with args.backends():
        result = evaluate(args)
    text = render(result)
    if args.against and args.dir.is_dir() and not (args.blocks or args.skip_new_blocks):
        text += f"\nnext: llamapro push {shlex.quote(str(args.dir))} OWNER/NAME --dry-run"
    cli.print_result(result, args.json, text)


if __name__ == "__main__":
    cli.run(main)
