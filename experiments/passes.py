"""How often may replayed text repeat? The same run with stores of several sizes.

    python experiments/passes.py BASE --train FOLDER --val FOLDER --out DIR --json FILE

Each run trains new blocks under `replay.hold` on text that the base wrote once, and replays equally
many tokens, so a smaller store repeats more often. Where the model learns a small store by heart,
its KL on held-out text of the base rises above that on the replayed text. The same command
continues where it was stopped.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from abilities import Document, divergence
from bases import command
from options import ROOT
from trial import HELD_OUT_SEED, write_json
from variants import HELD_SHARE

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import read_metrics
from llamapro.inference.sampling import end_ids
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.replay import Opening, write_documents
from llamapro.training.settings import ReplaySettings

HELD_OUT_TOKENS = 20_000


def main() -> None:
    """Trains plain expansion and one model for each size; prints a row of figures for each."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("base", type=Path, help="checkpoint directory of the base")
    parser.add_argument("--train", required=True, help="text of the new domain")
    parser.add_argument("--val", required=True, help="held-out text of it")
    parser.add_argument("--out", type=Path, required=True, help="directory for runs and models")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    sizes = [1 << n for n in (10, 13, 14, 15, 16)]
    parser.add_argument("--tokens", type=int, nargs="+", default=sizes, help="sizes of the stores")
    parser.add_argument("--new-blocks", type=int, default=5, help="number of new blocks")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of a run")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    s = parser.parse_args()
    expanded = s.out / "expanded"
    if not expanded.exists():
        blocks = ("--num-new-blocks", s.new_blocks)
        command(ROOT / "convert.py", "expand", s.base, expanded, *blocks)
    base, documents = held_out(s.base, s.seq_len)
    rows = []
    for tokens in [0, *s.tokens]:
        name = f"tokens-{tokens}" if tokens else "plain"
        hold = ["--replay.hold", "3%", "--replay.tokens", tokens] if tokens else []
        run_dir, model_dir = s.out / name / "run", s.out / name / "model"
        if not model_dir.exists():
            command(
                *(ROOT / "train.py", "--model.path", expanded, "--run-dir", run_dir),
                *("--data.train", s.train, "--data.val", f"domain={s.val}"),
                *("--data.seq-len", s.seq_len, "--train.steps", s.steps),
                *("--train.batch-size", s.batch_size, "--train.micro-batch-size", s.batch_size),
                *("--optim.lr", s.lr, "--optim.warmup-ratio", 0.06, "--eval.sequences", 256),
                *hold,
            )
            command(ROOT / "convert.py", "merge", expanded, run_dir, model_dir)
        model = Checkpoint.open(model_dir).load(torch.float32)
        passes = s.steps * s.batch_size * s.seq_len * HELD_SHARE / tokens if tokens else 0
        figures = last_figures(run_dir) | divergence(base, model, documents)
        rows.append({"stored": tokens, "passes": passes} | figures)
        print(json.dumps(rows[-1]), flush=True)
    if s.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        settings = {key: str(value) for key, value in vars(s).items() if key != "json"}
        write_json(s.json, {"settings": settings, "versions": versions, "rows": rows})


def held_out(path: Path, length: int) -> tuple[Any, Sequence[Document]]:
    """Returns the base, and documents that it writes with a seed that no replay uses."""
    checkpoint = Checkpoint.open(path)
    base, tokenizer = checkpoint.load(torch.float32), Tokenizer.load(path)
    settings = ReplaySettings(seed=HELD_OUT_SEED, batch_size=64)
    ends, openings = end_ids(checkpoint.config, tokenizer), [Opening(tokenizer.document_start())]
    written = write_documents(base, openings, ends, length, settings, HELD_OUT_TOKENS)
    return base, [(ids, 1) for ids in written if len(ids) > 1]


def last_figures(run_dir: Path) -> dict[str, float | None]:
    """Returns the domain's held-out loss, the replayed text's KL (geometric mean of the last ten
    records), both in nats per token, and the weight of the KL.
    """
    events = read_metrics(run_dir)
    tail = [event for event in events if event["kind"] == "train"][-10:]
    kls = [event["replay_kl"] for event in tail if "replay_kl" in event]
    replayed = math.exp(sum(map(math.log, kls)) / len(kls)) if kls else None
    return {
        "domain": [event["loss"] for event in events if event["kind"] == "eval"][-1],
        "replayed_kl": replayed,
        "weight": tail[-1].get("replay_weight"),
    }


if __name__ == "__main__":
    main()
