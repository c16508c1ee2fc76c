"""A campaign of random faults over real runs in two processes: nothing lost, nothing changed.

    python benchmarks/faults.py [--faults 200] [--seed 0] [--out RESULT.json]

One run of a tiny expanded model goes straight to its end and saves every step: that is the truth.
Then episodes: the same command in a new run directory, hit by a fault, started again, hit again,
until it has come to its end. Some faults come while it runs, in any moment (kill, signal, a disk
that is full, broken or limited), some between two starts (flipped bit, cut or missing file, stale
lock, leftovers of a killed process, half a line in the log). What is promised, and looked at after
every start:

- It resumes from the newest training checkpoint that no fault has damaged, and names each newer
  one; if there is none any more, it refuses to start. A checkpoint that was announced as saved is
  there; after a signal the step that was last computed is, too.
- Every tensor file of every undamaged training checkpoint, and every number in the log except
  times and memory, is to the bit that of the straight run.

The seed decides which faults come and where; in which microsecond they land, the machine. Linux.
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
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from llamapro import cli
from llamapro.checkpoint import DTYPE_CODES, Checkpoint, TensorSpec, tensor_chunks
from llamapro.config import ConfigError, ModelConfig
from llamapro.expansion import interleave
from llamapro.model import init_random
from llamapro.output import write_checkpoint, write_companions
from llamapro.streaming import expand_checkpoint

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
PROCESSES, STEPS, SAVE_EVERY = 2, 24, 2
LIMIT_S = 180.0  # a start takes seconds; one that takes so long hangs
SIGNALS = ("SIGTERM to a worker", "SIGINT to a worker", "SIGTERM to torchrun", "SIGINT to torchrun")
FULL_DISK = {"ENOSPC while writing": errno.ENOSPC, "EIO while writing": errno.EIO}
FILE_LIMIT = "file size limit"  # the kernel's own: EFBIG
KILLS = ("SIGKILL rank 0", "SIGKILL rank 1", "SIGKILL all workers", "SIGKILL torchrun")
RUNNING = (*KILLS, *SIGNALS, *FULL_DISK, FILE_LIMIT)
DAMAGE = ("flip a bit", "cut a file", "delete a file")
BETWEEN = (*DAMAGE, "half a log line", "stale lock", "leftovers")
TENSOR_FILES = ("trainable.safetensors", "optimizer.safetensors")
NOT_COMPARED = {"tokens_per_s", "step_s", "elapsed_s", "memory_bytes"}
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
    options |= {"eval.every": 6, "eval.sequences": 5, "log-every": 1, "train.device": "cpu"}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def inject(name: str, count: int, words: list[str]) -> None:
    """Runs train.py where, from the main rank's count-th call on, nothing can be written."""

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

    if os.environ["RANK"] == "0":
        for place in ("mkdir", "posix_fallocate", "pwrite", "fsync", "rename"):
            setattr(os, place, failing(place))
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
    """

    output: list[str] = field(default_factory=list)
    status: int = 0
    is_hit: bool = False
    after: str = ""
    hung: bool = False

    @property
    def resumed(self) -> int | None:
        """The step it resumed from, 0 in a new run; None if it did not come so far."""
        return self._last(r"resume from +(?:new run|.*/step-(\d{8}))$")

    @property
    def saved(self) -> int:
        """The last step it said to have saved, or else where it started."""
        return self._last(r"saved .*/step-(\d{8})$") or self.resumed or 0

    @property
    def computed(self) -> int:
        """The last step that it logged, or else where it started."""
        return self._last(rf"step (\d+)/{STEPS} ") or self.resumed or 0

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
        command += [__file__, "inject", kind, str(rng.randrange(1, 200))]
    else:
        command += [str(TRAIN)]
    command += [*options, "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", mark.split("=")[0]: mark.split("=")[1]}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    trigger = re.compile(rf"step {target}/" if target else r"steps +\d")
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
                    result.after = f"{line.split(' · ')[0].strip()} + {1000 * delay_s:.1f} ms"
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
            key = (record["kind"], record["step"])
            repeated += key in log
            if log.setdefault(key, record) != record:
                wrong.append(f"log: {key[0]} {key[1]} was {log[key]}, then {record}")
    return log, repeated, wrong


@dataclass
class Truth:
    """What the straight run made: step -> file -> SHA-256, and its log."""

    files: dict[int, dict[str, str]]
    log: Log

    @classmethod
    def of(cls, run_dir: Path) -> "Truth":
        """Reads a run that has saved every step."""
        files = {step: _tensor_hashes(path) for step, path in checkpoints(run_dir).items()}
        return cls(files, read_log(run_dir)[0])

    def differences(self, run_dir: Path, damaged: set[str], is_complete: bool) -> list[str]:
        """Compares a run with this one, to the bit.

        Args:
            run_dir: of the run.
            damaged: digests of the training checkpoints that a fault has damaged: left out.
            is_complete: whether it has come to its end, and the log must hold every record.
        """
        log, _, wrong = read_log(run_dir)
        for step, path in checkpoints(run_dir).items():
            if digest(path) not in damaged:
                found, expected = _tensor_hashes(path), self.files.get(step, {})
                wrong += [f"{path.name}/{n}" for n in found if found[n] != expected.get(n)]
        for key, record in log.items():
            if record != self.log.get(key):
                wrong.append(f"log: {key[0]} {key[1]} is {record}, not {self.log.get(key)}")
        if is_complete:
            wrong += [f"log: {k[0]} {k[1]} is missing" for k in self.log if k not in log]
            if STEPS not in checkpoints(run_dir):
                wrong.append(f"no training checkpoint of step {STEPS}")
        return wrong


def _tensor_hashes(path: Path) -> dict[str, str]:
    found = {name: path / name for name in TENSOR_FILES}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "missing"
        for name, file in found.items()
    }


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


# ---- The campaign -------------------------------------------------------------------------------


@dataclass
class Fault:
    """One fault and what came of it.

    Attributes:
        kind: one of `RUNNING` or `BETWEEN`.
        episode: which run, from 0.
        after: what it came after, or which file it damaged.
        status: torchrun's exit status when it hit a running one.
        newest: the newest undamaged step that the next start found.
        resumed: where that start went on.
        refused: whether that start refused, because no training checkpoint was intact.
        was_saving: whether it left a half-written training checkpoint.
        lost_steps: steps that were saved, or due, and were not resumed from.
        differences: what is not to the bit as in the straight run, or was passed over in silence.
        broken: other promises.
    """

    kind: str
    episode: int
    after: str
    status: int | None = None
    newest: int | None = None
    resumed: int | None = None
    refused: bool = False
    was_saving: bool = False
    lost_steps: int = 0
    differences: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def judge_resume(self, found: Start, newest: int | None, passed_over: list[str]) -> None:
        """Judges the start that came after.

        Args:
            found: that start.
            newest: the newest undamaged step, 0 in a new run; None if all are damaged.
            passed_over: names of the damaged training checkpoints newer than that.
        """
        text = "\n".join(found.output)
        self.newest, self.resumed = newest, found.resumed
        self.refused = found.status != 0 and "no training checkpoint is intact" in text
        if newest is None:
            if not self.refused:
                self.broken.append("all are damaged, but it did not refuse to start")
        elif found.resumed is None:
            self.broken.append(f"did not start: {text[-600:]}")
        else:
            self.lost_steps += max(0, newest - found.resumed)
            if found.resumed > newest:
                self.differences.append(f"resumed from the damaged step {found.resumed}")
            told = [line for line in found.output if line.startswith("warning")]
            for name in passed_over:
                if not any(f"{name}/" in line for line in told):
                    self.differences.append(f"{name} was passed over without a word")

    def judge_end(self, ended: Start, newest: int) -> None:
        """Judges the start that it hit; `newest` is the newest undamaged step afterwards."""
        self.status = ended.status
        due = ended.computed if self.kind in SIGNALS else ended.saved
        self.lost_steps += max(0, due - newest)
        if self.kind.endswith("to a worker") and ended.status and ended.saved < STEPS:
            self.broken.append(f"status {ended.status} instead of 0: {ended.output[-8:]}")
        if (self.kind in FULL_DISK or self.kind == FILE_LIMIT) and not ended.status:
            self.broken.append("could not write, but ended with status 0")


class Campaign:
    """Draws the faults, and remembers what came of each.

    Attributes:
        faults: all so far.
        unprovoked: what went wrong in starts that no fault came before or hit.
        repeated: records that stand in a finished log more than once, all alike.
        episodes: runs that came to their end.
    """

    def __init__(self, home: Path, count: int, seed: int) -> None:
        """Makes the inputs and the straight run; raises RuntimeError if that fails."""
        self.faults: list[Fault] = []
        self.unprovoked: list[str] = []
        self.repeated = self.episodes = 0
        self._home, self._count, self._rng = home, count, random.Random(seed)
        self._decks: dict[tuple[str, ...], list[str]] = {}
        options = prepare(home)
        keep_all = [*options, "--save.every", "1", "--save.keep", str(STEPS)]
        straight = start(keep_all, home / "straight", "", 0, self._rng)
        if straight.status:
            raise RuntimeError("the straight run failed:\n" + "\n".join(straight.output))
        self._truth = Truth.of(home / "straight")
        self._options = [*options, "--save.every", str(SAVE_EVERY), "--save.keep", "3"]
        self._bar = tqdm(total=count, desc="faults", unit="fault", disable=None)

    def run(self) -> None:
        """Runs episodes until there have been enough faults, and the last one to its end."""
        with self._bar:
            while self._is_wanted:
                self._episode(self._home / f"episode-{self.episodes}")

    @property
    def _is_wanted(self) -> bool:
        return len(self.faults) < self._count

    def _draw(self, kinds: tuple[str, ...]) -> str:
        """Draws a kind, each as often as the others."""
        if not self._decks.get(kinds):
            self._decks[kinds] = self._rng.sample(kinds, len(kinds))
        return self._decks[kinds].pop()

    def _note(self, kind: str, after: str) -> Fault:
        self.faults.append(Fault(kind, self.episodes, after))
        self._bar.update()
        return self.faults[-1]

    def _episode(self, run_dir: Path) -> None:
        """Starts one run again and again, until it is complete or a promise is broken."""
        rng, damaged = self._rng, set[str]()
        while_running: Fault | None = None
        while True:
            newest, between, undo = newest_undamaged(run_dir, damaged), None, None
            if newest and self._is_wanted and rng.random() < 0.7:
                kind, path = self._draw(BETWEEN), checkpoints(run_dir)[newest]
                between = self._note(kind, f"between starts, {path.name}")
                if kind in DAMAGE:
                    undo = damage(kind, path, rng)
                    between.after += f"/{undo[0].name}"
                    damaged.add(digest(path))
                    newest = newest_undamaged(run_dir, damaged)
                else:
                    clutter(kind, run_dir, newest, rng)
            kind = self._draw(RUNNING) if self._is_wanted else ""
            target = rng.choice([0, *range((newest or 0) + 1, STEPS + 1)])
            newer = [p.name for s, p in checkpoints(run_dir).items() if s > (newest or 0)]
            found = start(self._options, run_dir, kind, target, rng)

            if while_running:  # this start came after it, too
                while_running.newest, while_running.resumed = newest, found.resumed
            before = between or while_running or Fault("", self.episodes, "")
            before.judge_resume(found, newest, newer)
            while_running = self._note(kind, found.after) if found.is_hit else None
            latest = while_running or before
            if while_running:
                while_running.was_saving = any(run_dir.glob("checkpoints/.step-*"))
                while_running.judge_end(found, newest_undamaged(run_dir, damaged) or 0)
            elif kind:
                self._decks[RUNNING].append(kind)  # it came too late: drawn again
            if found.hung or (found.status and not while_running and newest is not None):
                latest.broken.append(f"status {found.status}: {found.output[-8:]}")
            is_complete = not while_running and not found.status
            latest.differences += self._truth.differences(run_dir, damaged, is_complete)
            if not before.kind:
                self.unprovoked += before.broken + before.differences
            if is_complete or any(f.broken or f.differences for f in (before, latest)):
                break
            if undo and newest is None:
                undo[0].write_bytes(undo[1])  # as the message asks: one is put back
        self.repeated += read_log(run_dir)[1]
        self.episodes += 1
        shutil.rmtree(run_dir)


def summary(campaign: Campaign, seed: int) -> dict[str, Any]:
    """Returns machine, versions, tally of each kind, totals and every fault, JSON-able."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    machine = {"system": platform.platform(), "cores": os.cpu_count()}
    machine |= {"processor": model[1] if model else platform.machine()}
    tally = {}
    for kind in (*RUNNING, *BETWEEN):
        faults = [fault for fault in campaign.faults if fault.kind == kind]
        tally[kind] = {
            "faults": len(faults),
            "while_saving": sum(fault.was_saving for fault in faults),
            "resumed": sum(bool(fault.resumed) for fault in faults),
            "refused": sum(fault.refused for fault in faults),
            "lost_steps": sum(fault.lost_steps for fault in faults),
            "differences": sum(len(fault.differences) for fault in faults),
            "broken": sum(len(fault.broken) for fault in faults),
        }
    totals = {key: sum(row[key] for row in tally.values()) for key in next(iter(tally.values()))}
    totals |= {"runs": campaign.episodes, "repeated_log_records": campaign.repeated}
    return {
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "settings": {"seed": seed, "steps": STEPS, "save_every": SAVE_EVERY, "model": CONFIG},
        "tally": tally,
        "totals": totals,
        "unprovoked": campaign.unprovoked,
        "faults": [asdict(fault) for fault in campaign.faults],
    }


def is_kept(result: dict[str, Any]) -> bool:
    """Returns whether every promise was kept."""
    totals = result["totals"]
    wrong = totals["lost_steps"] + totals["differences"] + totals["broken"]
    return not wrong and not result["unprovoked"]


def render(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    columns = list(next(iter(result["tally"].values())))
    lines = [f"{'':22}" + "".join(f"{name.replace('_', ' '):>14}" for name in columns)]
    for kind, row in [*result["tally"].items(), ("all", result["totals"])]:
        lines.append(f"{kind:22}" + "".join(f"{row[name]:>14}" for name in columns))
    for fault in result["faults"]:
        if wrong := [*fault["differences"], *fault["broken"]]:
            lines.append(f"{fault['kind']} ({fault['after']}): {'; '.join(wrong[:3])}")
    lines += [f"without a fault: {text}" for text in result["unprovoked"]]
    totals = result["totals"]
    lines.append(
        f"{totals['faults']} faults over {totals['runs']} runs of {STEPS} steps in {PROCESSES} "
        f"processes: {totals['lost_steps']} lost steps, {totals['differences']} silent "
        f"differences, {totals['broken']} other promises broken"
    )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["inject"]:
        return inject(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of which faults come, and where")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args()
    if args.faults < 1:
        raise ConfigError(f"--faults {args.faults}: expected 1 or more")
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        campaign = Campaign(Path(home), args.faults, args.seed)
        campaign.run()
    result = summary(campaign, args.seed)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(render(result))
    if not is_kept(result):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
