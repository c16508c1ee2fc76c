"""The run that benchmarks/faults.py hurts, and the faults: while it runs and between its starts.

    python benchmarks/fault_injection.py KIND COUNT TRAINING-OPTIONS...

The script is train.py on a disk that fails; `start` starts it.
"""

import argparse
import errno
import hashlib
import json
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.tensors import DTYPE_CODES, TensorSpec, tensor_chunks
from llamapro.checkpoints.writing import write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.conversion.expand import expand_checkpoint
from llamapro.expansion import interleave
from llamapro.training.weights import init_random

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
PROCESSES, STEPS, SAVE_EVERY = 2, 12, 2
LIMIT_S = 180.0  # a start takes seconds; one that takes so long hangs
SIGNALS = ("SIGTERM to a worker", "SIGINT to a worker", "SIGTERM to torchrun", "SIGINT to torchrun")
FULL_DISK = {"ENOSPC while writing": errno.ENOSPC, "EIO while writing": errno.EIO}
FILE_LIMIT = "file size limit"  # the kernel's own: EFBIG
KILLS = ("SIGKILL rank 0", "SIGKILL rank 1", "SIGKILL all workers", "SIGKILL torchrun")
RUNNING = (*KILLS, *SIGNALS, *FULL_DISK, FILE_LIMIT)
DAMAGE = ("flip a bit", "cut a file", "delete a file")
BETWEEN = (*DAMAGE, "half a log line", "stale lock", "leftovers")
NOT_COMPARED = {"tokens_per_s", "step_s", "elapsed_s", "memory_bytes"}
EVENTS = {"save", "resume"}  # records of what happened to a run: not in the straight one
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

Log = dict[tuple[str, int], dict[str, Any]]  # (kind, step) -> what of the record is compared


# ---- The run ------------------------------------------------------------------------------------


def prepare(home: Path) -> list[str]:
    """Writes a tiny expanded model and a corpus; returns the command's options without run_dir."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    (home / "train.py").write_text(text, encoding="utf-8")
    (home / "val.py").write_text(text[:8000], encoding="utf-8")
    tokenizer = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=tokenizer, model_type="bpe",
        vocab_size=CONFIG["vocab_size"], byte_fallback=True, num_threads=1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    config = ModelConfig.from_dict(CONFIG)
    tensors = init_random(config, seed=0)
    specs = [TensorSpec(n, DTYPE_CODES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    (home / "base").mkdir()
    write_checkpoint(home / "base", specs, lambda spec: tensor_chunks(tensors[spec.name]))
    write_companions(home / "base", config, [])
    (home / "base" / "tokenizer.model").write_bytes(tokenizer.getvalue())
    expand_checkpoint(Checkpoint.open(home / "base"), home / "pro", interleave(2, 1))
    options: dict[str, object] = {"model.path": home / "pro", "data.train": home / "train.py"}
    options |= {"data.val": f"code={home / 'val.py'}", "data.cache-dir": home / "cache"}
    options |= {"data.seq-len": 32, "train.steps": STEPS, "train.batch-size": 4, "optim.lr": 1e-2}
    options |= {
        "eval.every": 6,
        "eval.sequences": 5,
        "log-every": 1,
        "log-seconds": 0,
        "train.device": "cpu",
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def patch_disk(name: str, count: int) -> None:
    """Makes every write of this process fail, from the count-th call on."""

    def failing(place: str) -> Callable[..., Any]:
        original = getattr(os, place)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count -= 1
            if count <= 0:
                print(f"injected {name} in os.{place}", file=sys.stderr, flush=True)
                raise OSError(FULL_DISK[name], os.strerror(FULL_DISK[name]))
            return original(*args, **kwargs)

        return call

    for place in ("mkdir", "posix_fallocate", "pwrite", "fsync", "rename"):
        setattr(os, place, failing(place))


def inject(name: str, count: int, words: list[str]) -> None:
    """Runs train.py where, from the main rank's count-th call on, nothing can be written."""
    if os.environ["RANK"] == "0":
        patch_disk(name, count)
    sys.argv = [str(TRAIN), *words]
    runpy.run_path(str(TRAIN), run_name="__main__")


@dataclass
class Start:
    """One start of the command, and how it ended.

    Attributes:
        output: its lines, of both processes and torchrun.
        status: torchrun's exit status.
        is_hit: whether the fault came before the end.
        after: the line of output that the fault followed.
        hung: whether it had to be ended.
        statuses: exit status of each rank, where they are known.
        first_step_s: seconds to its first line of progress.
    """

    output: list[str] = field(default_factory=list)
    status: int = 0
    is_hit: bool = False
    after: str = ""
    hung: bool = False
    statuses: list[int] = field(default_factory=list)
    first_step_s: float = 0.0

    @property
    def resumed(self) -> int | None:
        """The step it resumed from, 0 in a new run; None if it did not come so far."""
        return self._last(r"resume from +(?:new run|.*/step-(\d{8}))$")

    @property
    def saved(self) -> int:
        """The last step it said to have saved, or else where it started."""
        return self._last(rf" *\d+/{STEPS}  saved step-(\d{{8}}) ") or self.resumed or 0

    @property
    def computed(self) -> int:
        """The last step that it logged, or else where it started."""
        return self._last(rf" *(\d+)/{STEPS} ") or self.resumed or 0

    def _last(self, pattern: str) -> int | None:
        found = [m for m in (re.match(pattern, line) for line in self.output) if m]
        return int(found[-1][1] or 0) if found else None


def processes(mark: str) -> dict[int, str]:
    """Returns pid -> rank ("" if none) of the processes whose environment has the mark."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            entries = file.read_bytes().decode(errors="replace").split("\0")
            if mark in entries:
                ranks = [e.removeprefix("RANK=") for e in entries if e.startswith("RANK=")]
                found[int(file.parent.name)] = "".join(ranks)
    return found


def strike(kind: str, torchrun: int, mark: str, rng: random.Random) -> bool:
    """Does what the kind says to the running processes; False if they had ended."""
    ranks = {rank: pid for pid, rank in processes(mark).items() if rank}
    if len(ranks) < PROCESSES:
        return False
    name = kind.split()[0]
    if kind.endswith("torchrun"):
        chosen = [torchrun]
    elif kind == "SIGKILL all workers":
        chosen = list(ranks.values())
    elif kind in SIGNALS:
        chosen = [ranks[rng.choice(sorted(ranks))]]
    else:
        chosen = [ranks[kind[-1] if kind.startswith("SIGKILL") else "0"]]
    try:
        for pid in chosen:
            if kind == FILE_LIMIT:
                size = rng.randrange(2_000, 60_000)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
            else:
                os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return False
    return True


def wait_for_saving(run_dir: Path) -> bool:
    """Looks until a training checkpoint is being written; False if none is for half a second."""
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        if any(run_dir.glob("checkpoints/.step-*.partial-*")):
            return True
    return False


def start(options: list[str], run_dir: Path, kind: str, target: int, rng: random.Random) -> Start:
    """Starts the command and lets a fault of this kind ("": none) come after step `target`."""
    result, mark = Start(), f"LLAMAPRO_FAULTS={run_dir}-{rng.getrandbits(64):x}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES)]
    if kind in FULL_DISK:
        command += [__file__, kind, str(rng.randrange(1, 200))]
    else:
        command += [str(TRAIN)]
    command += [*options, "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", mark.split("=")[0]: mark.split("=")[1]}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    trigger = re.compile(rf" *{target}/" if target else r"steps +\d")
    is_for_saving = target % SAVE_EVERY == 0 and rng.random() < 0.7
    delay_s = rng.uniform(0, 0.01 if is_for_saving else 0.08)

    def end_all() -> None:
        for pid in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def give_up() -> None:
        result.hung = True
        end_all()

    with subprocess.Popen(command, text=True, errors="replace", env=environment, **pipes) as run:
        watchdog = threading.Timer(LIMIT_S, give_up)
        watchdog.start()
        assert run.stdout is not None
        try:
            for line in run.stdout:
                result.output.append(line.rstrip("\n"))
                is_due = not result.is_hit and kind and kind not in FULL_DISK
                if is_due and trigger.match(line):
                    result.after = f"step {target or line.strip()} + {1000 * delay_s:.1f} ms"
                    if is_for_saving and target and wait_for_saving(run_dir):
                        result.after += " of saving"
                    time.sleep(delay_s)
                    result.is_hit = strike(kind, run.pid, mark, rng)
                    if kind == "SIGKILL torchrun":  # its workers would go on alone
                        time.sleep(delay_s)
                        end_all()
        finally:
            watchdog.cancel()
            end_all()
    result.status = run.returncode
    if kind in FULL_DISK or kind == FILE_LIMIT:
        failed = [line for line in result.output if re.search("injected|File too large", line)]
        result.is_hit, result.after = bool(failed), "".join(failed[:1])[-120:]
    return result


# ---- What is on the disk ------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Returns a hash of all that a training checkpoint's directory holds."""
    whole = hashlib.sha256()
    for file in sorted(path.iterdir()):
        whole.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Returns step -> directory of every complete training checkpoint, oldest first."""
    return {int(p.name[5:]): p for p in sorted((run_dir / "checkpoints").glob("step-????????"))}


def read_log(run_dir: Path) -> tuple[Log, int, list[str]]:
    """Returns the log, how often it repeats a record, and the records that contradict another."""
    log: Log = {}
    repeated, wrong = 0, []
    file = run_dir / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):  # half a line, left by a kill
            record = {k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED}
            if record["kind"] in EVENTS:
                continue
            key = (record["kind"], record["step"])
            repeated += key in log
            if log.setdefault(key, record) != record:
                wrong.append(f"log: {key[0]} {key[1]} was {log[key]}, then {record}")
    return log, repeated, wrong


def newest_undamaged(run_dir: Path, damaged: set[str]) -> int | None:
    """Returns the newest step whose digest is not in `damaged`; None if all are, 0 if none is."""
    found = checkpoints(run_dir)
    good = [step for step, path in found.items() if digest(path) not in damaged]
    return max(good) if good else None if found else 0


def damage(kind: str, path: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Damages a file of a training checkpoint; returns it, and what it held."""
    file = rng.choice(sorted(path.iterdir()))
    data = file.read_bytes()
    if kind == "delete a file":
        file.unlink()
    elif kind == "cut a file":
        file.write_bytes(data[: rng.randrange(len(data) - 1)])  # more than a last line's end
    else:
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    return file, data


def clutter(kind: str, run_dir: Path, step: int, rng: random.Random) -> None:
    """Leaves behind what a killed process may: half a log line, a lock file, hidden directories."""
    if kind == "half a log line":
        line = json.dumps({"kind": "train", "step": step + 1, "loss": 1.0})
        with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line[: rng.randrange(1, len(line))])
    elif kind == "stale lock":
        (run_dir / "lock").write_text(f"pid {os.getpid()} on {platform.node()}\n")
    else:
        whole = checkpoints(run_dir)[step]
        for name in (f".step-{step + 1:08d}.partial-{platform.node()}-1", f".{whole.name}.removed"):
            left = whole.with_name(name)
            shutil.copytree(whole, left, dirs_exist_ok=True)
            damage(rng.choice(DAMAGE), left, rng)


if __name__ == "__main__":
    inject(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
