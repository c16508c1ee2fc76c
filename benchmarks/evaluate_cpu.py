"""Evaluation on the CPU beside lm-evaluation-harness: how fast both score questions and texts.

    python benchmarks/evaluate_cpu.py DIR --choices FILE --data PATH [--dtypes float32 bfloat16]
                                      [--questions 64] [--documents 32] [--context 256]
                                      [--rounds 3] [--threads 1] [--out RESULT.json]

What `llamapro evaluate` runs and lm_eval's model `hf` (pip install -e '.[lm-eval]') score the same
questions and texts in one process, in turn, with a batch size of eight. Texts are cut to the
context, so that both read each in one piece. Times are the CPU time of the process, summed over its
threads, once all is loaded and tokenised: with one thread, what the clock shows on a quiet machine.
`speed` is the median of the ratios of neighbouring rounds, `difference` the largest one between
their log-likelihoods, in nats: of a choice, or of all texts per token.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from lm_eval.models.huggingface import HFLM

from llamapro.checkpoints.directory import Checkpoint
from llamapro.evaluate import Text, measure, read_text
from llamapro.inference.multiple_choice import log_likelihoods, read_choices
from llamapro.text.tokenizer import Tokenizer

BATCH = 8
Run = Callable[[], list[float]]  # returns log-likelihoods


def sides(args: Any, dtype: str) -> dict[str, dict[str, Run]]:
    """Returns the runs of both sides by what they score."""
    model = Checkpoint.open(args.dir).load(getattr(torch, dtype))
    harness = HFLM(str(args.dir), dtype=dtype, device="cpu", batch_size=BATCH)
    tokenizer = Tokenizer.load(args.dir)
    questions = read_choices(args.choices, tokenizer, args.context, shots=0)[: args.questions]
    texts = read_text(args.data, tokenizer, "text").documents[: args.documents]
    texts = [ids[: args.context] for ids in texts if len(ids) > 1]

    def our_choices() -> list[float]:
        return [x for row in log_likelihoods(model, questions, BATCH) for x in row]

    def our_texts() -> list[float]:
        return [-measure(model, Text("", texts, 1), args.context, args.context, BATCH)["loss"]]

    def theirs(pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        requests = [(("", ""), before, after) for before, after in pairs]
        return [value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]

    def their_choices() -> list[float]:
        return theirs([(asked.prompt, choice) for asked in questions for choice in asked.choices])

    def their_texts() -> list[float]:
        # The first token is predicted from nothing by neither side.
        return [sum(theirs([(ids[:1], ids[1:]) for ids in texts])) / sum(len(t) - 1 for t in texts)]

    return {
        "choices": {"ours": our_choices, "lm_eval": their_choices},
        "texts": {"ours": our_texts, "lm_eval": their_texts},
    }


def compare(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Runs both sides in turn; returns the figures of one kind of input."""
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    values: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first one warms up
        for side in list(runs)[:: -1 if number % 2 else 1]:
            start = time.process_time()
            values[side] = runs[side]()
            if number:
                seconds[side].append(time.process_time() - start)
    pairs = list(zip(values["ours"], values["lm_eval"], strict=True))
    ratios = zip(seconds["lm_eval"], seconds["ours"], strict=True)
    return {
        "seconds": {side: statistics.median(times) for side, times in seconds.items()},
        "speed": statistics.median(theirs / ours for theirs, ours in ratios),
        "difference": max(abs(ours - theirs) for ours, theirs in pairs),
    }


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("dir", type=Path, help="checkpoint")
    parser.add_argument("--choices", required=True, help="questions, as `llamapro evaluate` reads")
    parser.add_argument("--data", required=True, help="texts, as `llamapro evaluate` reads them")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--questions", type=int, default=64, help="the first of the file")
    parser.add_argument("--documents", type=int, default=32, help="the first of the texts")
    parser.add_argument("--context", type=int, default=256, help="tokens that a text is cut to")
    parser.add_argument("--rounds", type=int, default=3, help="of each side")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shown = ("questions", "documents", "context", "rounds", "threads")
    settings = {"model": args.dir.name} | {key: getattr(args, key) for key in shown}
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for what, runs in sides(args, dtype).items():
            print(f"{dtype}, {what} ...", file=sys.stderr, flush=True)
            rows.append({"dtype": dtype, "what": what} | compare(runs, args.rounds))
            result: dict[str, Any] = {"machine": measuring.machine(), "settings": settings}
            packages = ("torch", "transformers", "lm_eval")
            result |= {"versions": measuring.versions(*packages), "rows": rows}
            measuring.write(args.out, result)  # after every case, in case the next is cut off
    lines = [
        [
            row["dtype"],
            row["what"],
            f"{row['seconds']['ours']:.2f}",
            f"{row['seconds']['lm_eval']:.2f}",
            f"{row['speed']:.2f}x",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    print(measuring.table("dtype,what,ours s,lm_eval s,speed,difference".split(","), lines))


if __name__ == "__main__":
    main()
