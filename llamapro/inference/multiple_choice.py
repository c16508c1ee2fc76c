"""Multiple choice by likelihood: the choice with the highest log-probability per token wins.

So the paper scores UNFAIR-ToS (Appendix H); the answer is right if it is in the set of right ones.
The same choice can lose in lm-eval: its `acc` takes the plain sum, `acc_norm` the sum per byte.

Shapes: B batch, T length, N tokens of a choice, C hidden size, V vocabulary.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from torch.nn.functional import log_softmax
from tqdm import tqdm

from llamapro.errors import DataError
from llamapro.model import LlamaForCausalLM
from llamapro.text.documents import find_files
from llamapro.text.tables import SUFFIX as TABLE
from llamapro.text.tables import read_rows
from llamapro.text.tokenizer import Tokenizer

_PROMPTS = ("question", "query", "context", "prompt")


@dataclass(frozen=True)
class Question:
    """Ids of the prompt, BOS first, and of each choice; which choices are right."""

    prompt: list[int]
    choices: list[list[int]]
    right: frozenset[int]
    is_cut: bool


def read_choices(pattern: str, tokenizer: Tokenizer, context: int, shots: int) -> list[Question]:
    """Reads .jsonl, .json (a list) or .parquet files of questions.

    A row has `choices`, a list of texts or {"text": [...], "label": [...]}, and an `answer`: label,
    index from 0, text, letter, or a list of these. Its `question` or `query` is put as
    "Question: ...", "Answer:"; a `context` or `prompt` is continued as it stands.

    Args:
        pattern: a file, folder or glob.
        tokenizer: the model's.
        context: longest input in tokens; a longer prompt loses its start, but not BOS.
        shots: so many first rows are not asked, but shown before each question with the answer.

    Raises:
        DataError: a file or its rows cannot be used; the rows that are wrong are named together.
    """
    asked: list[tuple[str, str, list[str], frozenset[int]]] = []
    problems: list[str] = []
    for file in find_files([pattern]):
        for where, row in _rows(file.path):
            try:
                asked.append((where, *_read(json.loads(row) if isinstance(row, bytes) else row)))
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: {error}")
    shown = "".join(p + choices[min(right)] + "\n\n" for _, p, choices, right in asked[:shots])
    questions = []
    for where, prompt, choices, right in asked[shots:]:
        try:
            ids, tokens = _encode(tokenizer, shown + prompt, choices)
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        room = context + 1 - max(map(len, tokens))  # a choice's last token is no input
        if room < 1:
            problems.append(f"{where}: has a choice longer than the context, {context} tokens")
        # As much is cut for every choice: all follow the same prompt.
        start = ids[:1] if ids[0] == tokenizer.bos_id else []
        kept = ids if len(ids) <= room else start + ids[len(ids) - room + len(start) :]
        questions.append(Question(kept, tokens, right, len(kept) < len(ids)))
    if problems:
        more = [f"and {len(problems) - 20:,} more"] if len(problems) > 20 else []
        raise DataError("questions that cannot be used:\n  " + "\n  ".join(problems[:20] + more))
    if not questions:
        raise DataError(f"{pattern}: {len(asked)} questions, none left after --shots {shots}")
    return questions


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields "file:row" and the row, of a .jsonl file its bytes."""
    name = path.name.lower()
    if not name.endswith((".json", ".jsonl", TABLE)):
        raise DataError(f"{path}: not one of .jsonl, .json, {TABLE}")
    try:
        with open(path, "rb") as raw:
            if name.endswith(TABLE):
                yield from read_rows(path, raw, lambda columns: columns)
            elif name.endswith(".jsonl"):
                yield from ((f"{path}:{n}", line) for n, line in enumerate(raw, 1) if line.strip())
            elif isinstance(values := json.load(raw), list):
                yield from ((f"{path}:{n}", value) for n, value in enumerate(values, 1))
            else:
                raise DataError(f"{path}: {type(values).__name__}, expected a list of questions")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read(row: Any) -> tuple[str, list[str], frozenset[int]]:
    """Returns a row's prompt, what may follow it, and which is right; or raises ValueError."""
    values: dict[str, Any] = row if isinstance(row, dict) else {}
    found = [key for key in _PROMPTS if values.get(key) is not None]  # parquet: every column
    if len(found) != 1:
        raise ValueError(f"expected one of the keys {', '.join(_PROMPTS)}; found {found}")
    prompt, given = values[found[0]], values.get("choices")
    choices, labels = given, None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{found[0]!r} is {prompt!r}, expected a text")
    if isinstance(given, dict):
        choices, labels = given.get("text"), given.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"'choices' is {choices!r}, expected a list of two texts or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"'choices' is {choices!r}: one is empty or not a text")
    answer = values.get("answer")
    right: set[int] = set()
    for one in answer if isinstance(answer, list) and answer else [answer]:
        right |= _named(one, choices, labels if isinstance(labels, list) else [])
    if found[0] in ("question", "query"):
        prompt = f"Question: {prompt.strip()}\nAnswer:"
    # White space goes with what follows it: tokens begin with it, few end with it.
    stem = prompt.rstrip()
    gap = prompt[len(stem) :]
    return stem, [(gap or " " * (not c[0].isspace())) + c for c in choices], frozenset(right)


def _named(answer: Any, choices: list[str], labels: list[Any]) -> set[int]:
    """Returns the choices that an answer means by label, index, text or letter, in this order."""
    count = len(choices)
    for names in (labels, range(count), choices, [] if labels else ascii_uppercase[:count]):
        named = {i for i, name in enumerate(names) if name == answer and i < count}
        if named and not isinstance(answer, bool):  # True == 1
            return named
    letters = labels or list(ascii_uppercase[:count])
    raise ValueError(f"'answer' is {answer!r}, expected 0 to {count - 1}, {letters} or the text")


def _encode(
    tokenizer: Tokenizer, prompt: str, choices: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Returns the prompt's ids and each choice's: those after the prompt's in the joined text.

    Where a token spans the border, the choice is encoded by itself, as what continues a text.
    """
    ids, tokens = tokenizer.encode(prompt, bos=True), []
    for choice in choices:
        joined = tokenizer.encode(prompt + choice, bos=True)
        agrees = joined[: len(ids)] == ids
        tokens.append(joined[len(ids) :] if agrees else tokenizer.encode(choice, continues=True))
    return ids, tokens


@torch.inference_mode()
def log_likelihoods(
    model: LlamaForCausalLM, questions: Sequence[Question], batch_size: int, name: str = ""
) -> list[list[float]]:
    """Returns each choice's summed log-probability (nats): fp32 each, fp64 sums.

    Args:
        model: any dtype.
        questions: tokenised for it.
        batch_size: inputs per forward pass.
        name: shown beside the progress.
    """
    # Choices that differ in their last token alone, as A, B, C and D, have one input.
    asked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for at, question in enumerate(questions):
        for which, tokens in enumerate(question.choices):
            asked.setdefault((*question.prompt, *tokens[:-1]), []).append((at, which))
    sums = [[0.0] * len(question.choices) for question in questions]
    inputs = sorted(asked, key=len, reverse=True)  # memory is short at once, or never
    for first in tqdm(range(0, len(inputs), batch_size), desc=name, unit="batch", disable=None):
        batch = inputs[first : first + batch_size]
        padded = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)  # (B, T)
        for row, ids in enumerate(batch):  # padding comes after: causal, so unseen
            padded[row, : len(ids)] = torch.tensor(ids)
        hidden = model.model(padded.to(model.lm_head.weight.device))  # (B, T, C)
        for row, ids in enumerate(batch):
            for at, which in asked[ids]:
                targets = torch.tensor(questions[at].choices[which], device=hidden.device)  # (N,)
                logits = model.lm_head(hidden[row, len(ids) - len(targets) : len(ids)])  # (N, V)
                chosen = log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None])
                sums[at][which] = chosen.sum(dtype=torch.float64).item()
    return sums


def measure_choices(
    model: LlamaForCausalLM, questions: Sequence[Question], batch_size: int, name: str
) -> tuple[dict[str, float], list[bool]]:
    """Lets a model choose; of equally likely choices the first. Arguments: `log_likelihoods`.

    Returns:
        accuracy, its standard error `stderr`, and `accuracy_sum`, by the plain sum; and which
        questions were answered right, by the likelihood per token.
    """
    correct, by_sum = [], []
    sums = log_likelihoods(model, questions, batch_size, name)
    for question, scores in zip(questions, sums, strict=True):
        means = [s / len(tokens) for s, tokens in zip(scores, question.choices, strict=True)]
        correct.append(means.index(max(means)) in question.right)
        by_sum.append(scores.index(max(scores)) in question.right)
    count, accuracy = len(questions), sum(correct) / len(questions)
    stderr = math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1))
    found = {"accuracy": accuracy, "accuracy_sum": sum(by_sum) / count, "stderr": stderr}
    return found, correct


def baselines(questions: Sequence[Question]) -> dict[str, float]:
    """Returns what needs no model: questions, cut prompts, and two accuracies.

    They are chance, of choosing at random, and majority, of always choosing the position that is
    right most often: the largest class, where all questions have the same choices.
    """
    count = len(questions)
    most = Counter(i for q in questions for i in q.right).most_common(1)[0][1]
    chance = sum(len(q.right) / len(q.choices) for q in questions) / count
    cut = sum(q.is_cut for q in questions)
    return {"questions": count, "cut": cut, "chance": chance, "majority": most / count}


def render_choices(found: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of a table of evaluate's `choices`: accuracy, baselines, the change."""
    width = max(len("file"), *map(len, found))
    columns = f"{'questions':>10} {'per token':>17} {'by sum':>8} {'chance':>8} {'majority':>9}"
    lines = [f"{'file':<{width}} {'model':<6} {columns}"]
    for name, this in found.items():
        for which in ("base", "this") if "base" in this else ("this",):
            marks = this["base"] if which == "base" else this
            lines.append(
                f"{name:<{width}} {which:<6} {this['questions']:>10,} {marks['accuracy']:>8.2%} "
                f"± {marks['stderr']:>6.2%} {marks['accuracy_sum']:>8.2%} {this['chance']:>8.2%} "
                f"{this['majority']:>9.2%}"
            )
        if "base" in this:
            change = 100 * (this["accuracy"] - this["base"]["accuracy"])
            turned = f"{this['gained']:,} wrong -> right, {this['lost']:,} right -> wrong"
            lines.append(f"{'':<{width}} {change:+.2f} points: {turned}")
        if this["cut"]:
            lines.append(f"{'':<{width}} {this['cut']:,} prompts were too long: cut from the left")
    return lines
