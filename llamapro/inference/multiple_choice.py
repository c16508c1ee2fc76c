"""Multiple choice by likelihood: the choice with the highest log-probability per token wins.

The paper scores UNFAIR-ToS this way (Appendix H). Any of several right choices counts. lm-eval may
rank the choices differently: its `acc` takes the plain sum of the log-probabilities, its `acc_norm`
the sum per byte.

Shapes: B batch, T length, N tokens of a choice, C hidden size, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import log_softmax
from tqdm import tqdm

from llamapro import ops
from llamapro.errors import DataError, Problems, note
from llamapro.inference.cache import KVCache
from llamapro.model import LlamaForCausalLM
from llamapro.text.rows import quote_names, read_rows
from llamapro.text.source_files import find_files
from llamapro.text.tokenizer import Tokenizer

# More than batch_size inputs go together while their cache has at most this many positions, and
# choices while they have at most this many tokens: on a CPU larger batches save no more time.
POSITIONS, TOKENS = 2048, 128
LOGITS = 256  # rows of logits at a time
_PROMPTS = ("question", "query", "context", "prompt")
# The names that files of questions have for one thing; the first that a row has counts.
_CHOICES, _ANSWERS = ("choices", "options"), ("answer", "answerKey", "gold", "label")


@dataclass(frozen=True)
class Question:
    """A tokenised question."""

    prompt: list[int]  # the tokenizer's prefix (BOS or nothing) first
    choices: list[list[int]]
    right: frozenset[int]
    is_cut: bool  # the prompt was too long and lost its beginning


def read_choices(pattern: str, tokenizer: Tokenizer, context: int, shots: int) -> list[Question]:
    """Reads files of questions, in the formats of `read_rows`.

    A row has `choices`, a list of texts, {label: text} or {"text": [...], "label": [...]}, or
    columns A, B and so on. Its `answer` is a label, an index from 0, a text, a letter, or a list of
    these. A `question` or `query` is put between "Question:" and "Answer:"; a `context` or `prompt`
    is continued as it stands. Other keys are not read, and named. Raises DataError if a file or its
    rows cannot be used. One message names all wrong rows.

    Args:
        context: longest input in tokens; a longer prompt loses its beginning, but not the prefix.
        shots: this many first rows stand, answered, before each question, and are not asked.
    """
    rows: list[tuple[str, str, list[str], frozenset[int]]] = []
    problems, unread = Problems(limit=20), dict[str, None]()
    for file in find_files([pattern]):
        if file.left_out:
            note(f"{file.path}: left out ({file.left_out})")
            continue
        for place, row in read_rows(file.path, problems.add, noun="question"):
            try:
                rows.append((place, *_read(row, unread)))
            except ValueError as error:
                problems.add(f"{place}: {error}")
    examples = "".join(p + choices[min(right)] + "\n\n" for _, p, choices, right in rows[:shots])
    questions = []
    for place, prompt, choices, right in rows[shots:]:
        try:
            questions.append(_tokenize(tokenizer, examples + prompt, choices, right, context))
        except (DataError, ValueError) as error:
            problems.add(f"{place}: {error}")
    problems.check(DataError, "questions that cannot be used", one_per_line=True)
    if not questions:
        raise DataError(f"{pattern}: {len(rows)} questions, none left after --shots {shots}")
    if unread:
        note(f"{pattern}: keys that are not read: {quote_names(unread)}")
    return questions


def _read(row: dict[str, Any], unread: dict[str, None]) -> tuple[str, list[str], frozenset[int]]:
    """Returns a row's prompt, its choices and the right ones; raises ValueError.

    `unread` gets the keys that are not read.
    """
    row = {key: value for key, value in row.items() if value is not None}  # parquet: every column
    if {"A", "B"} <= row.keys() and not row.keys() & {*_CHOICES}:  # a table with a column for each
        row["choices"] = {name: row.pop(name) for name in ascii_uppercase if row.get(name)}
    found = [key for key in _PROMPTS if key in row]
    if len(found) != 1:
        raise ValueError(f"expected one of the keys {', '.join(_PROMPTS)}; found {found}")
    for names in (_CHOICES, _ANSWERS):
        if not (known := [key for key in names if key in row]):
            raise ValueError(f"none of the keys {', '.join(names)}; found {quote_names(row)}")
        found.append(known[0])
    prompt, choices, answer = map(row.get, found)
    labels = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{found[0]!r} is {prompt!r}, expected a text")
    if isinstance(choices, dict):
        labels = choices.get("label") if "text" in choices else [*choices]
        choices = choices.get("text", [*choices.values()])
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{found[1]!r} is {choices!r}, expected a list of two texts or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{found[1]!r} is {choices!r}: one is empty or not a text")
    unread |= dict.fromkeys(key for key in row if key not in found)
    right: set[int] = set()
    for one in answer if isinstance(answer, list) and answer else [answer]:
        right |= _named(one, choices, labels if isinstance(labels, list) else [])
    if found[0] in ("question", "query"):
        prompt = f"Question: {prompt.strip()}\nAnswer:"
    # White space between the two belongs to the choice: tokens begin with it, few end with it.
    stem = prompt.rstrip()
    gap = prompt[len(stem) :]
    return stem, [(gap or " " * (not c[0].isspace())) + c for c in choices], frozenset(right)


def _named(answer: Any, choices: list[str], labels: list[Any]) -> set[int]:
    """Returns the choices that an answer names by label, or else by index, text or letter.

    A label may be a number on one side and its digits on the other, as tables change them. Another
    case, brackets, a full stop, and an index in digits are taken if they can mean one choice only.
    """
    if isinstance(answer, float) and answer.is_integer():  # a table's numbers beside nulls
        answer = int(answer)
    count = len(choices)
    names = [*map(str, labels)] or list(ascii_uppercase[:count])
    forms = [(range(count), answer), (choices, answer)]
    forms.insert(0 if labels else 2, (names, str(answer)))
    exact = [{i for i, name in enumerate(form) if name == one} for form, one in forms]
    bare = [(i, _bare(name)) for form, _ in forms for i, name in enumerate(form)]
    alike = {i for i, name in bare if name == _bare(answer) != ""}
    named = next(filter(None, exact), alike if len(alike) == 1 else set[int]())
    if isinstance(answer, bool) or not 0 <= max(named, default=-1) < count:  # True == 1
        raise ValueError(
            f"the answer is {answer!r}, expected 0 (the first) to {count - 1}, {names} or the text"
        )
    return named


def _bare(name: object) -> str:
    return str(name).strip(" ()[].:").casefold()


def _tokenize(
    tokenizer: Tokenizer, prompt: str, choices: list[str], right: frozenset[int], context: int
) -> Question:
    """Returns a question whose choices have the ids that follow the prompt in the joined text."""
    ids, tokens = tokenizer.encode(prompt, bos=True), []
    for choice in choices:
        joined = tokenizer.encode(prompt + choice, bos=True)
        agrees = joined[: len(ids)] == ids  # else a token spans the border between the two
        tokens.append(joined[len(ids) :] if agrees else tokenizer.encode(choice, continues=True))
    # The longest choice decides for all, so that all choices follow the same prompt.
    room = context + 1 - max(map(len, tokens))  # the last token of a choice is no input
    prefix = tokenizer.prefix
    if room < max(1, len(prefix)):
        raise ValueError(f"has a choice longer than the context, {context} tokens")
    kept = ids if len(ids) <= room else prefix + ids[len(ids) - room + len(prefix) :]
    return Question(kept, tokens, right, len(kept) < len(ids))


@torch.inference_mode()
def log_likelihoods(
    model: LlamaForCausalLM, questions: Sequence[Question], batch_size: int, name: str = ""
) -> list[list[float]]:
    """Returns the summed log-probability (nats) of each choice: fp32 terms, fp64 sums.

    A prompt is read once; its choices continue from the KV cache. A forward pass takes `batch_size`
    prompts or choices, or more if they are short.
    """
    longest = max((len(q.prompt) + max(map(len, q.choices)) for q in questions), default=1)
    most = max(batch_size, POSITIONS // longest)
    sums = [[0.0] * len(question.choices) for question in questions]
    # The longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    for at in tqdm(range(0, len(order), most), desc=name, unit="batch", disable=None):
        batch = order[at : at + most]
        cache, documents, before = _read_prompts(model, [questions[i].prompt for i in batch])
        asked = [
            (tokens, row, i, which)
            for row, i in enumerate(batch)
            for which, tokens in enumerate(questions[i].choices)
        ]
        asked.sort(key=lambda one: -len(one[0]))  # little padding
        while asked:
            more = len(asked[0][0]) - 1  # the last token of a choice is no input
            size = min(most, max(batch_size, TOKENS // max(1, more)))
            part, asked = asked[:size], asked[size:]
            rows = torch.tensor([row for _, row, _, _ in part], device=before.device)
            choices = [tokens for tokens, _, _, _ in part]
            taken = cache.take(rows, more) if more else cache
            found = _continue(model, choices, taken, documents[rows], before[rows])
            for (_, _, i, which), value in zip(part, found, strict=True):
                sums[i][which] = value
    return sums


def _read_prompts(
    model: LlamaForCausalLM, prompts: list[list[int]]
) -> tuple[KVCache, Tensor, Tensor]:
    """Returns the cache, the document (B, T) of each position, and the last hidden states (B, C).

    Padding stands before a prompt and is a document of its own, which no other token sees.
    """
    device, length = model.lm_head.weight.device, max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)  # (B, T)
    documents = torch.zeros(len(prompts), length, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        documents[row, length - len(prompt) :] = 1
    ids, documents = ids.to(device), documents.to(device)
    cache = KVCache(model, len(prompts), length)
    return cache, documents, model.model(ids, cache, documents)[:, -1]


def _continue(
    model: LlamaForCausalLM,
    choices: list[list[int]],
    cache: KVCache,
    documents: Tensor,
    before: Tensor,
) -> list[float]:
    """Returns the log-probability of choices (R), the longest first, after the cached prompts."""
    weight, sizes = model.lm_head.weight, [len(ids) for ids in choices]
    following, room = before[:, None], sizes[0] - 1  # (R, 1, C)
    if room:
        ids = torch.zeros(len(choices), room, dtype=torch.int64)  # (R, T)
        for row, choice in enumerate(choices):
            ids[row, : len(choice) - 1] = torch.tensor(choice[:-1])
        documents = F.pad(documents, (0, room), value=1)  # (R, S)
        hidden = model.model(ids.to(weight.device), cache, documents)  # (R, T, C)
        following = torch.cat((following, hidden), dim=1)
    read = torch.cat([following[row, :size] for row, size in enumerate(sizes)])  # (N, C)
    targets = torch.tensor([i for ids in choices for i in ids], device=weight.device)  # (N,)
    chosen = []
    for x, i in zip(read.split(LOGITS), targets.split(LOGITS), strict=True):
        logits = ops.linear(x, weight)  # (N, V)
        chosen.append(log_softmax(logits, -1, dtype=torch.float32).gather(-1, i[:, None]))
    return [one.sum(dtype=torch.float64).item() for one in torch.cat(chosen).split(sizes)]


def measure_choices(
    model: LlamaForCausalLM, questions: Sequence[Question], batch_size: int, name: str
) -> tuple[dict[str, float], list[bool]]:
    """Lets a model choose; a tie goes to the first choice. Arguments as `log_likelihoods`.

    Returns:
        accuracy, its standard error `stderr`, and `accuracy_sum`, where the plain sum decides.
        Then, for each question, whether the likelihood per token answers it right.
    """
    correct, by_sum = [], []
    likelihoods = log_likelihoods(model, questions, batch_size, name)
    for question, sums in zip(questions, likelihoods, strict=True):
        means = [s / len(tokens) for s, tokens in zip(sums, question.choices, strict=True)]
        correct.append(means.index(max(means)) in question.right)
        by_sum.append(sums.index(max(sums)) in question.right)
    count, accuracy = len(questions), sum(correct) / len(questions)
    stderr = math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1))
    scores = {"accuracy": accuracy, "accuracy_sum": sum(by_sum) / count, "stderr": stderr}
    return scores, correct


def baselines(questions: Sequence[Question]) -> dict[str, float]:
    """Returns the numbers that need no model: of questions, and of prompts that were cut.

    `chance` is the accuracy of choosing at random, `majority` that of always choosing the position
    that is right most often.
    """
    count = len(questions)
    most = Counter(i for q in questions for i in q.right).most_common(1)[0][1]
    chance = sum(len(q.right) / len(q.choices) for q in questions) / count
    cut = sum(q.is_cut for q in questions)
    return {"questions": count, "cut": cut, "chance": chance, "majority": most / count}


def render_choices(results: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of a table: accuracies, baselines, and the change from the base."""
    width = max(len("file"), *map(len, results))
    columns = f"{'questions':>10} {'per token':>17} {'by sum':>8} {'chance':>8} {'majority':>9}"
    lines = [f"{'file':<{width}} {'model':<6} {columns}"]
    for name, this in results.items():
        base = this.get("base")
        for model, scores in (("base", base), ("this", this)):
            if scores is not None:
                lines.append(
                    f"{name:<{width}} {model:<6} {this['questions']:>10,} "
                    f"{scores['accuracy']:>8.2%} ± {scores['stderr']:>6.2%} "
                    f"{scores['accuracy_sum']:>8.2%} {this['chance']:>8.2%} "
                    f"{this['majority']:>9.2%}"
                )
        if base is not None:
            change = 100 * (this["accuracy"] - base["accuracy"])
            turned = f"{this['gained']:,} wrong -> right, {this['lost']:,} right -> wrong"
            lines.append(f"{'':<{width}} {change:+.2f} points: {turned}")
        if this["cut"]:
            lines.append(f"{'':<{width}} {this['cut']:,} prompts were too long: cut from the left")
    return lines
