"""Time and peak memory of from-meta, expand and merge on a 7B-sized checkpoint, beside `cp`.

    python benchmarks/convert_7b.py WORK_DIR [--layers 32] [--repeats 2] [--out RESULT.json]

A release with the shapes of LLaMA-2-7B (13.5 GB in bf16, random weights) is made in WORK_DIR, which
must have 65 GB free, and removed again. Each command and a `cp` of the bytes that it writes run in
turn. The figures are the medians, and the largest resident size of the command. A file of that size
is written and removed before each run, because a virtual machine must first get back from its host
the memory that has been free for a while, which can take longer than the copy.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import measuring
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo, write_blocks
from llamapro.checkpoints.tensors import tensor_chunks
from llamapro.checkpoints.writing import Target
from llamapro.expansion import is_in_layers

ROOT = Path(__file__).resolve().parents[1]
DIM, FFN, HEADS, VOCAB = 4096, 11008, 32, 32000


def make_release(path: Path, layers: int) -> None:
    """Writes `params.json` and one `consolidated.00.pth` with LLaMA-2-7B's shapes."""
    path.mkdir(parents=True)
    params = {"dim": DIM, "n_heads": HEADS, "n_layers": layers, "multiple_of": 256}
    (path / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5, "vocab_size": -1}))
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (VOCAB, DIM) for name in ("tok_embeddings", "output")
    }
    shapes["norm.weight"] = (DIM,)
    for i in range(layers):
        part = f"layers.{i}."
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{part}attention.{name}.weight"] = (DIM, DIM)
        shapes[f"{part}feed_forward.w1.weight"] = (FFN, DIM)
        shapes[f"{part}feed_forward.w2.weight"] = (DIM, FFN)
        shapes[f"{part}feed_forward.w3.weight"] = (FFN, DIM)
        shapes |= {f"{part}attention_norm.weight": (DIM,), f"{part}ffn_norm.weight": (DIM,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.empty(shape).normal_(0, 0.02, generator=generator)
        tensors[name] = (values if len(shape) == 2 else values + 1).to(torch.bfloat16)
    torch.save(tensors, path / "consolidated.00.pth")


def make_blocks(path: Path, expanded_path: Path) -> None:
    """Writes a file of new blocks that are random, in fp32."""
    expanded = Checkpoint.open(expanded_path)
    record = expanded.config.expansion
    assert record is not None

    def chunks(shape: tuple[int, ...]) -> Iterator[memoryview]:
        return tensor_chunks(torch.empty(shape).normal_(0, 0.02))

    targets = [
        Target(name, "F32", tensor.shape, [partial(chunks, tensor.shape)])
        for name, tensor in expanded.tensors.items()
        if is_in_layers(name, record.new_layers)
    ]
    info = BlocksInfo.of(expanded.config, "new_blocks", 1)
    write_blocks(path, targets, info)


def in_own_process(function: Callable[..., None], *arguments: object) -> None:
    """Runs a function elsewhere: a command started from here inherits our largest resident size."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed")


def timed(command: list[str]) -> tuple[float, int]:
    """Runs a command; returns its seconds and its largest resident size in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: {errors[-500:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def touch_memory(path: Path, size: int) -> None:
    """Writes a file of `size` bytes and removes it, with everything on disk afterwards."""
    chunk = bytes(1 << 20)
    with open(path, "wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(chunk)
    os.sync()
    path.unlink()


def directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def measure(name: str, words: list[str], out: Path, repeats: int) -> dict[str, float | str]:
    """Runs a convert.py command and `cp -r` of its output in turn; keeps the output."""
    copy = out.with_name("copy")
    ours: list[float] = []
    copies: list[float] = []
    peaks: list[int] = []

    def convert() -> None:
        shutil.rmtree(out, ignore_errors=True)
        touch_memory(out.with_name("touched"), size)
        seconds, peak = timed([sys.executable, str(ROOT / "convert.py"), *words])
        ours.append(seconds)
        peaks.append(peak)

    def copy_all() -> None:
        touch_memory(out.with_name("touched"), size)
        copies.append(timed(["cp", "-r", str(out), str(copy)])[0])
        shutil.rmtree(copy)

    size = 10**9
    convert()  # not counted; makes what is copied
    size = directory_bytes(out)
    ours.clear()
    for repeat in range(repeats):
        for turn in (convert, copy_all) if repeat % 2 else (copy_all, convert):
            turn()
    row: dict[str, float | str] = {
        "command": name,
        "written_gb": directory_bytes(out) / 1e9,
        "seconds": statistics.median(ours),
        "cp_seconds": statistics.median(copies),
        "ratio_to_cp": statistics.median(ours) / statistics.median(copies),
        "peak_resident_gb": max(peaks) / 1e9,
    }
    print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:<10}" for k, v in row.items()))
    return row


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("work_dir", type=Path, help="directory with 65 GB free")
    parser.add_argument(
        "--layers", type=int, default=32, help="layers of the base (LLaMA-2-7B: 32)"
    )
    parser.add_argument("--new-blocks", type=int, default=8, help="blocks that expand adds")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each command")
    args = parser.parse_args()
    work = args.work_dir / "convert-benchmark"
    release, base, pro, merged = (work / n for n in ("release", "base", "pro", "merged"))
    blocks = work / "blocks.safetensors"
    result = {"machine": measuring.machine(), "versions": measuring.versions("torch")}
    rows: list[dict[str, float | str]] = []

    def add(out: Path, name: str, *words: object) -> None:
        rows.append(measure(name, [name, *map(str, words)], out, args.repeats))
        measuring.write(args.out, result | {"layers": args.layers, "rows": rows})

    try:
        in_own_process(make_release, release, args.layers)
        add(base, "from-meta", release, base)
        shutil.rmtree(release)
        add(pro, "expand", base, pro, "--num-new-blocks", args.new_blocks)
        shutil.rmtree(base)
        in_own_process(make_blocks, blocks, pro)
        add(merged, "merge", pro, blocks, merged)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
