"""A campaign of random faults over real runs in two processes: nothing lost, nothing changed.

    python benchmarks/faults.py [--faults 200] [--seed 0] [--out RESULT.json]

One run of a tiny expanded model goes straight to its end and saves every step. It is the truth. An
episode is the same command in a new run directory, hit by a fault, started again and hit again,
until it comes to its end. Some faults come at any moment while it runs (kill, signal, a disk that
is full, broken or limited), others between two starts (flipped bit, cut or missing file, stale
lock, leftovers of a killed process, half a line in the log). These promises are checked after every
start:

- It resumes from the newest training checkpoint that no fault has damaged, and names each newer
  one. If none is left, it refuses to start. A checkpoint that was announced as saved is
  there, and so is the last computed step after a signal.
- Every tensor file of every undamaged training checkpoint, and every number in the log except
  times and memory, equals that of the straight run bit for bit.

The seed decides which faults come and where; the machine decides in which microsecond. Linux only.
"""

import hashlib
import random
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measuring
from fault_injection import (
    BETWEEN,
    CONFIG,
    DAMAGE,
    FILE_LIMIT,
    FULL_DISK,
    PROCESSES,
    RUNNING,
    SAVE_EVERY,
    SIGNALS,
    STEPS,
    Log,
    Start,
    checkpoints,
    clutter,
    damage,
    digest,
    newest_undamaged,
    prepare,
    read_log,
    start,
)
from tqdm import tqdm

from llamapro import cli
from llamapro.errors import ConfigError

TENSOR_FILES = ("trainable.safetensors", "optimizer.safetensors")


@dataclass
class Truth:
    """The files of the straight run, step -> file -> SHA-256, and its log."""

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


class Draws:
    """Draws the faults of a campaign, and remembers what came of each.

    Attributes:
        faults: all so far.
        unprovoked: what went wrong in starts that no fault came before or hit.
        episodes: runs that came to their end.
    """

    def __init__(self, count: int, seed: int) -> None:
        """Wants this number of faults."""
        self.faults: list[Fault] = []
        self.unprovoked: list[str] = []
        self.episodes = 0
        self._count, self._rng = count, random.Random(seed)
        self._decks: dict[tuple[str, ...], list[str]] = {}
        self._bar = tqdm(total=count, desc="faults", unit="fault", disable=None)

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


class Campaign(Draws):
    """Faults on two processes that a user's command started.

    Attributes:
        repeated: records that stand in a finished log more than once, all alike.
    """

    def __init__(self, home: Path, count: int, seed: int) -> None:
        """Makes the inputs and the straight run; raises RuntimeError if that fails."""
        super().__init__(count, seed)
        self.repeated, self._home = 0, home
        options = prepare(home)
        keep_all = [*options, "--save.every", "1", "--save.keep", str(STEPS)]
        straight = start(keep_all, home / "straight", "", 0, self._rng)
        if straight.status:
            raise RuntimeError("the straight run failed:\n" + "\n".join(straight.output))
        self._truth = Truth.of(home / "straight")
        self._options = [*options, "--save.every", str(SAVE_EVERY), "--save.keep", "3"]

    def run(self) -> None:
        """Runs episodes until there have been enough faults, and the last one to its end."""
        with self._bar:
            while self._is_wanted:
                self._episode(self._home / f"episode-{self.episodes}")

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
        "machine": measuring.machine(),
        "versions": measuring.versions("torch"),
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
    """Returns the table for people, the broken promises and the totals."""
    totals = result["totals"]
    rows = [[kind, *row.values()] for kind, row in result["tally"].items()]
    columns = list(next(iter(result["tally"].values())))
    heads = [name.replace("_", " ") for name in columns]
    lines = [measuring.table(["", *heads], [*rows, ["all", *(totals[key] for key in columns)]])]
    for fault in result["faults"]:
        if wrong := [*fault["differences"], *fault["broken"]]:
            lines.append(f"{fault['kind']} ({fault['after']}): {'; '.join(wrong[:3])}")
    lines += [f"without a fault: {text}" for text in result["unprovoked"]]
    lines.append(
        f"{totals['faults']} faults over {totals['runs']} runs of {STEPS} steps in {PROCESSES} "
        f"processes: {totals['lost_steps']} lost steps, {totals['differences']} silent "
        f"differences, {totals['broken']} other promises broken"
    )
    return "\n".join(lines)


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--faults", type=int, default=200, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their places")
    args = parser.parse_args()
    if args.faults < 1:
        raise ConfigError(f"--faults {args.faults}: expected 1 or more")
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        campaign = Campaign(Path(home), args.faults, args.seed)
        campaign.run()
    result = summary(campaign, args.seed)
    measuring.write(args.out, result)
    print(render(result))
    if not is_kept(result):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
