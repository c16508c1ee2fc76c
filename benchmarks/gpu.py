"""All that the first half hour on a GPU should tell, in the order of what must be right first.

    make gpu [ARGS="--only correctness step --lengths 4096 --out-dir DIR"]

1. correctness: the tests that are marked gpu;
2. sweep: the tiles of attention, at head dim 128 in bf16;
3. attention: beside cuDNN, FlashAttention and FlexAttention;
4. rows: the kernels that memory bounds, and the loss, beside PyTorch, torch.compile and Liger;
5. step: a training step of LLaMA-2-7B with 8 new blocks.

Each part has minutes of its own, 25 in all. A part that needs longer is ended and the next begins:
its figures are in DIR as far as it came, because they are written after every case. Status 1 says
that tests failed or a part ended early. docs/kernels.md says how to read the figures.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import measuring

ROOT = Path(__file__).resolve().parents[1]
MINUTES = {"correctness": 7.0, "sweep": 5.0, "attention": 5.0, "rows": 4.0, "step": 4.0}
ROWS = ("rms_norm", "rope", "swiglu", "linear_cross_entropy")


def command(part: str, out_dir: Path, lengths: list[int]) -> list[str]:
    """Returns the words of a part's command."""
    out = ["--out", str(out_dir / f"{part}.json")]
    words = {
        "correctness": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"],
        "sweep": ["sweep_attention.py", "--jobs", str(os.cpu_count() or 1)],
        "attention": ["time_kernels.py", "--op", "attention", "--lengths", *map(str, lengths)],
        "rows": ["time_kernels.py", "--op", *ROWS],
        "step": ["train_step.py", "--steps", "5"],
    }[part]
    if part == "correctness":
        return [sys.executable, *words]
    return [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:], *out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=MINUTES, default=list(MINUTES), help="parts to run")
    add("--lengths", type=int, nargs="+", default=[4096, 8192], help="lengths of attention")
    add("--out-dir", type=Path, default=Path("gpu-out"), help="directory of the figures")
    args = parser.parse_args()
    out_dir = args.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in (name for name in MINUTES if name in args.only):
        print(f"---- {part}, at most {MINUTES[part]:g} minutes", flush=True)
        started = time.monotonic()
        words = command(part, out_dir, args.lengths)
        try:
            status = subprocess.run(words, cwd=ROOT, timeout=60 * MINUTES[part]).returncode
        except subprocess.TimeoutExpired:
            status = None
        ended = "ended early" if status is None else f"exit status {status}"
        rows.append({"part": part, "ended": ended, "seconds": round(time.monotonic() - started)})
        measuring.write(out_dir / "parts.json", {"parts": rows})
    print(measuring.table(list(rows[0]), [list(row.values()) for row in rows]))
    sys.exit(any(row["ended"] != "exit status 0" for row in rows))


if __name__ == "__main__":
    main()
