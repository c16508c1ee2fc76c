"""Damages every kind of file that a user can be handed, and runs the command that reads it.

    python benchmarks/fuzz_inputs.py --count 10000 --out benchmarks/results/fuzz_inputs.json

Each input is a good one with one file changed from a fixed seed: values of its JSON, its text or
its bytes. A command runs in a forked process of limited time and memory. It has to succeed, or end
with one short message and exit status 2. Anything else is listed with its seed.
"""

import functools
import importlib
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from fuzz_kinds import KINDS, MAKE, write_good

from llamapro import cli
from llamapro.__main__ import run_command

# Imported once, before the forks.
PARENT_IMPORTS = (
    *("llamapro.scripts.train", "llamapro.scripts.convert", "llamapro.generate", "tyro", "jinja2"),
    *("llamapro.evaluate", "llamapro.report", "matplotlib.pyplot", "torch._dynamo", "tokenizers"),
    *("pyarrow.parquet", "gguf", "sentencepiece"),
)
CPU_S, MEMORY = 30, 3 << 30  # of an input; of a process
BATCH, LONGEST = 40, 4000  # inputs of a process; characters of a message
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2.5, 1e-300, 1e300, 10**12, 10**30, 1 << 63),
    *(float("nan"), float("inf"), "", "x", "1", "silu", [], [1], [[]], {}, {"a": 1}, [None] * 3),
    *("\ud800", "\0", "<s>", "a" * 100_000, -(1 << 31), [0] * 10_000, {"content": 7}),
]


# ---- Good inputs -------------------------------------------------------------------------------


def prepare(root: Path) -> None:
    """Writes good inputs of every kind into a folder."""
    write_good(root)

    def make_more() -> None:
        for words in MAKE:
            status, text = run(words, root)
            if status:
                raise RuntimeError(f"{' '.join(words)}: exit status {status}: {text}")

    if status := forked(make_more):
        raise RuntimeError(f"{status}: {(root.parent / 'said').read_text()}")


# ---- Damage ------------------------------------------------------------------------------------


def damage(file: Path, draw: random.Random) -> None:
    """Changes a file at one place or a few: JSON in its values, others in their text or bytes."""
    data = bytearray(file.read_bytes())
    rows = data.splitlines() if file.suffix in (".jsonl", ".json") else []
    if rows and draw.random() < 0.6:
        whole = file.suffix == ".json"
        at = draw.randrange(len(rows))
        raw = json.loads(data if whole else rows[at])
        text = json.dumps(_odd_value(raw, draw)).encode()
        file.write_bytes(text if whole else b"\n".join([*rows[:at], text, *rows[at + 1 :]]))
        return
    kind = draw.choice(["flip", "flip", "set", "set", "cut", "splice", "insert", "deep", "code"])
    reach = min(len(data), draw.choice([64, 2000, len(data)]))  # headers come first
    at, end = draw.randrange(reach), draw.randrange(len(data))
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 4, 30])):
            data[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    elif kind == "set":
        for _ in range(draw.choice([1, 1, 4, 30])):
            data[draw.randrange(reach)] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    elif kind == "cut":
        del data[at:]
    elif kind == "splice":
        data[at:at] = data[end : end + draw.choice([1, 8, 200])]
    elif kind == "insert":
        odd = [b"9" * 400, b"\0", b"\xff\xfe", b'"', b"{", b"[", b"{{ 9 ** 9 ** 9 }}", b"NaN", b"-"]
        data[at:at] = draw.choice(odd)
    elif kind == "deep":
        data[at:at] = draw.choice([b"[", b'{"a":', b"((", b"{% if 1 %}"]) * 50_000
    else:
        code = draw.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"])
        data = bytearray(bytes(data).decode("latin-1").encode(code))
    file.write_bytes(data)


def _odd_value(raw: Any, draw: random.Random) -> Any:
    """Returns JSON with a value replaced by an odd one, left out, or put at another key too."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(raw)
    inside, key = draw.choice(places)
    if draw.random() < 0.1:
        del inside[key]
    elif draw.random() < 0.2:
        other, name = draw.choice(places)
        inside[key] = json.loads(json.dumps(other[name]))
    else:
        inside[key] = draw.choice(ODD)
    return raw


# ---- Running -----------------------------------------------------------------------------------


def run(words: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """Runs a command in this folder and process; returns its exit status and what it said."""
    said = folder.parent / "said"
    with open(said, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    sys.argv, status = ["llamapro", *words], 70
    try:
        cli.run(lambda: run_command(words[0], list(words[1:])))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 70
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status, said.read_text(encoding="utf-8", errors="replace")


def forked(task: Callable[[], None]) -> int:
    """Does a task in a process of limited memory; returns its exit status, or minus a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not (pid := os.fork()):
        limit = MEMORY + _now()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Whatever the parent has put in their place, these write where a command writes.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        status = 71
        try:
            task()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:  # no exception may leave the fork, not even one of print_exc without memory
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _now() -> int:
    """Returns the address space of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def judge(status: int, text: str) -> str:
    """Returns what is wrong with the end of a command, or ""."""
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    if status == 0:
        return "a traceback" if "Traceback" in text else ""
    if status != 2:
        return f"exit status {status}: " + " | ".join(lines[-3:])[-400:]
    if "Traceback" in text or not lines:
        return "no message" if not lines else "a traceback: " + lines[-1][:300]
    message = text[text.rfind("Error: ") :] if "Error: " in text else lines[-1]
    return f"a message of {len(message):,} characters" if len(message) > LONGEST else ""


def campaign(
    good: Path, count: int, seed: int, kinds: list[str], limit_s: float = math.inf
) -> dict[str, Any]:
    """Runs `count` damaged inputs, kind after kind; returns the tally of each kind.

    No further ones begin after `limit_s` seconds.
    """
    begun = time.monotonic()
    tally: dict[str, Any] = {kind: Counter(inputs=0, taken=0, refused=0) for kind in kinds}
    wrong: list[str] = []
    work, log = good.parent / "work", good.parent / "log"

    def work_through(first: int) -> None:
        """Runs inputs and writes the number of each that begins, and how it ended."""
        with open(log, "w", encoding="utf-8") as out:
            for number in range(first, min(count, first + BATCH)):
                print(number, end=" ", file=out, flush=True)
                name, words = KINDS[kinds[number % len(kinds)]]
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(good, work)
                damage(work / name, random.Random(seed + number))
                started = time.perf_counter()
                status, text = run(words, work)
                problem, elapsed_s = judge(status, text), time.perf_counter() - started
                print(json.dumps([status, problem, round(elapsed_s, 1)]), file=out, flush=True)

    number = 0
    while number < count and time.monotonic() - begun < limit_s:
        status = forked(functools.partial(work_through, number))
        for line in log.read_text(encoding="utf-8").splitlines():
            word, _, end = line.partition(" ")
            number = int(word) + 1
            kind = kinds[int(word) % len(kinds)]
            ended, problem, elapsed_s = json.loads(end or f'[70, "ends the process: {status}", 0]')
            tally[kind].update(inputs=1, taken=ended == 0, refused=ended == 2)
            tally[kind]["slowest_s"] = max(tally[kind]["slowest_s"], elapsed_s)
            if problem:
                wrong.append(f"{kind}, seed {seed + int(word)}: {problem}")
                print(wrong[-1], file=sys.stderr, flush=True)
    return {"inputs": number, "kinds": {k: dict(v) for k, v in tally.items()}, "wrong": wrong}


def main() -> None:
    """Runs the campaign and writes its tally."""
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--count", type=int, default=10_000, help="number of damaged inputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first input")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin none after this time")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in PARENT_IMPORTS:
        importlib.import_module(name)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "good")
        good, limit_s = Path(folder) / "good", 3600 * args.hours
        result = campaign(good, args.count, args.seed, args.kinds, limit_s)
        measuring.write(args.out, {"machine": measuring.machine()} | result)


if __name__ == "__main__":
    main()
