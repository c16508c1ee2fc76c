"""Greedy generation on the CPU beside transformers: the time of a step after the prompt.

    python benchmarks/generate_cpu.py DIR [--dtypes float32 bfloat16] [--batch-sizes 1 8]
                                      [--prompt 32] [--tokens 48] [--rounds 3] [--threads 1]
                                      [--out RESULT.json]

Both load the same checkpoint and continue the same random prompts in one process, in turn. Times
are the CPU time of the process, summed over its threads: with one thread, what the clock shows on a
quiet machine. `step_ms` is the median over rounds of the median of the steps in the second half of
a call; `speed` is the median of the ratios of neighbouring calls. `call` compares whole calls, with
the prompt. transformers runs its own `generate` with its default attention and cache.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llamapro.checkpoints.directory import Checkpoint
from llamapro.inference.sampling import generate

Run = Callable[[Tensor, int], tuple[list[float], Tensor]]  # step seconds, with the prompt's; ids


def ours(path: Path, dtype: torch.dtype) -> Run:
    """Returns this implementation's run."""
    model = Checkpoint.open(path).load(dtype)

    def run(prompt: Tensor, tokens: int) -> tuple[list[float], Tensor]:
        times, ids = [time.process_time()], []
        for step in generate(model, prompt, tokens):
            times.append(time.process_time())
            ids.append(step)
        return [end - start for start, end in itertools.pairwise(times)], torch.cat(ids, 1)

    return run


def theirs(path: Path, dtype: torch.dtype) -> Run:
    """Returns the run of transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def run(prompt: Tensor, tokens: int) -> tuple[list[float], Tensor]:
        times = [time.process_time()]

        def after_step(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            times.append(time.process_time())
            return torch.zeros(len(ids), dtype=torch.bool)

        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[after_step],
        )
        steps = [end - start for start, end in itertools.pairwise(times)]
        return steps, found[:, prompt.shape[1] :]

    return run


def measure(runs: dict[str, Run], prompt: Tensor, args: Any) -> dict[str, Any]:
    """Runs both in turn; returns the figures of one batch size."""
    steps: dict[str, list[float]] = {side: [] for side in runs}
    calls: dict[str, list[float]] = {side: [] for side in runs}
    ids: dict[str, Tensor] = {}
    for number in range(args.rounds + 1):  # the first one warms up
        for side in list(runs)[:: -1 if number % 2 else 1]:
            seconds, ids[side] = runs[side](prompt, args.tokens)
            if number:
                steps[side].append(statistics.median(seconds[args.tokens // 2 :]))
                calls[side].append(sum(seconds))
    row: dict[str, Any] = {"batch_size": len(prompt)}
    for side in runs:
        step = statistics.median(steps[side])
        row[side] = {"step_ms": 1000 * step, "tokens_per_s": len(prompt) / step}
    for name, times in (("speed", steps), ("call", calls)):
        pairs = zip(times["transformers"], times["ours"], strict=True)
        row[name] = statistics.median(their / our for their, our in pairs)
    same = (ids["ours"] == ids["transformers"]).long().cumprod(1).sum()
    return row | {"same_tokens": int(same), "tokens": ids["ours"].numel()}


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("dir", type=Path, help="checkpoint")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each side")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vocab_size = Checkpoint.open(args.dir).config.vocab_size
    settings = {key: getattr(args, key) for key in ("prompt", "tokens", "rounds", "threads")}
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        kind = getattr(torch, dtype)
        runs = {"ours": ours(args.dir, kind), "transformers": theirs(args.dir, kind)}
        for size in args.batch_sizes:
            print(f"{dtype}, batch size {size} ...", file=sys.stderr, flush=True)
            shape, generator = (size, args.prompt), torch.Generator().manual_seed(0)
            prompt = torch.randint(vocab_size, shape, generator=generator)
            rows.append({"dtype": dtype} | measure(runs, prompt, args))
            result: dict[str, Any] = {"machine": measuring.machine()}
            result |= {"settings": {"model": args.dir.name} | settings}
            result |= {"versions": measuring.versions("torch", "transformers"), "rows": rows}
            measuring.write(args.out, result)  # after every case, in case the next is cut off
    heads = "dtype,batch,ours ms,theirs ms,speed,whole call,same tokens".split(",")
    lines = [
        [
            row["dtype"],
            row["batch_size"],
            f"{row['ours']['step_ms']:.1f}",
            f"{row['transformers']['step_ms']:.1f}",
            f"{row['speed']:.2f}x",
            f"{row['call']:.2f}x",
            f"{row['same_tokens']} of {row['tokens']}",
        ]
        for row in rows
    ]
    print(measuring.table(heads, lines))


if __name__ == "__main__":
    main()
