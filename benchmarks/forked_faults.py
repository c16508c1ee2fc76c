"""A campaign of random faults over training runs: nothing is lost, nothing changes in silence.

    python benchmarks/forked_faults.py [--faults 1000] [--seed 0] [--out RESULT.json]

One run of a tiny expanded model goes straight to its end for each of text, replay and chat. An
episode is the same command in a new run directory, hit by a fault, started again with one process
or two and hit again, until it comes to its end. Faults come

- while it runs: kills, signals, a process that stops and goes on, a run directory that is removed,
  a full, broken or limited disk, calls of the file system that fail once or for ever;
- between two starts: a flipped bit, a cut or missing file, a stale lock, leftovers of a kill;
- from the file system, a quarter of all runs: all that is optional is missing;
- from a second machine that holds something else: every such start must end with one message.

After every start these promises are checked:

- It resumes from the newest training checkpoint that no fault has damaged, and names each newer
  one. If none is left, it refuses to start. A checkpoint that was announced as saved is there, and
  so is the last computed step after a signal.
- Every tensor file of every undamaged training checkpoint has the bits of the straight run, and the
  log its numbers up to rounding, whatever the number of processes.
- No output holds a traceback, no start hangs.

What came of each episode is appended to RESULT.jsonl, from which a campaign that was stopped goes
on. The seed decides which faults come and where; the machine decides in which microsecond. Linux
only.
"""

import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
from fault_judge import REMOVED, STEPS, Fault, Start, Truth, checkpoints, digest, newest_undamaged
from fault_ranks import BROKEN, PAUSE, RUNNING, Ranks
from fault_run import BETWEEN, DAMAGE, OTHER_FILES, OTHER_WORDS, clutter, damage, differ, prepare
from tqdm import tqdm

from llamapro import cli
from llamapro.errors import ConfigError
from llamapro.training.agreement import code_hash

COLUMNS = ("faults", "lost_steps", "differences", "broken")
BARE = "file system lacks what is optional"
OTHERS = (*OTHER_WORDS, *OTHER_FILES)


class Campaign:
    """Episodes, and what came of each: JSON-able `episodes`."""

    def __init__(self, home: Path, count: int, seed: int, file: Path) -> None:
        """Wants `count` faults; reads from `file` what an earlier start has done, and appends."""
        self._home, self._count, self._seed, self._file = home, count, seed, file
        lines = file.read_text().splitlines() if file.exists() else []
        self.episodes: list[dict[str, Any]] = [json.loads(line) for line in lines]
        earlier = [fault for episode in self.episodes for fault in episode["faults"]]
        self._drawn = Counter(fault["kind"] for fault in earlier)
        self._bar = tqdm(total=count, initial=len(earlier), desc="faults", disable=None)
        self._rng, self._faults = random.Random(), list[Fault]()
        self._ranks = Ranks(home)
        self._variants = prepare(home)
        self._truths = {name: self._straight(name) for name in self._variants}

    def _straight(self, name: str) -> Truth:
        run_dir = self._home / f"straight-{name}"
        words = [*self._variants[name], "--run-dir", str(run_dir)]
        words += ["--save.every", "1", "--save.keep", str(STEPS)]
        found = self._ranks.start([words] * 2, run_dir, "", 0, self._rng)
        if found.status:
            raise RuntimeError("the straight run failed:\n" + "\n".join(found.output))
        return Truth.of(run_dir)

    def run(self) -> None:
        """Runs episodes until there have been enough faults, and the last one to its end."""
        with self._bar:
            while self._is_wanted:
                self._rng = random.Random(f"{self._seed}-{len(self.episodes)}")
                self._faults, started_at = [], time.time()
                found = self._episode(self._home / f"episode-{len(self.episodes)}")
                found |= {"faults": [asdict(fault) for fault in self._faults]}
                found |= {"code": code_hash(), "started_at": started_at}
                self.episodes.append(found)
                self._faults = []
                with open(self._file, "a", encoding="utf-8") as log:
                    log.write(json.dumps(found) + "\n")
        self._ranks.close()

    @property
    def _is_wanted(self) -> bool:
        earlier = sum(len(episode["faults"]) for episode in self.episodes)
        return earlier + len(self._faults) < self._count

    def _draw(self, kinds: tuple[str, ...]) -> str:
        """Draws a kind, rather one that came seldom."""
        weights = [(1 + self._drawn[kind]) ** -2.0 for kind in kinds]
        kind = self._rng.choices(kinds, weights)[0]
        self._drawn[kind] += 1
        return kind

    def _note(self, kind: str, after: str) -> Fault:
        self._faults.append(Fault(kind, after))
        self._bar.update()
        return self._faults[-1]

    def _episode(self, run_dir: Path) -> dict[str, Any]:
        """Starts one run again and again, until it is complete or a promise is broken."""
        rng, damaged, seconds, unprovoked = self._rng, set[str](), list[float](), list[str]()
        variant, is_bare = rng.choice(sorted(self._variants)), rng.random() < 0.25
        words = [*self._variants[variant], "--run-dir", str(run_dir)]
        running: Fault | None = None
        while True:
            if self._is_wanted and rng.random() < 0.4:
                self._differ(variant, words, run_dir)
            between, undo = None, None
            newest = newest_undamaged(run_dir, damaged)
            if newest and self._is_wanted and rng.random() < 0.7:
                kind, path = self._draw(BETWEEN), checkpoints(run_dir)[newest]
                between = self._note(kind, f"{variant}, {path.name}")
                if kind in DAMAGE:
                    undo = damage(kind, path, rng)
                    damaged.add(digest(path))
                    newest = newest_undamaged(run_dir, damaged)
                else:
                    clutter(kind, run_dir, newest, rng)
            newer = [p.name for s, p in checkpoints(run_dir).items() if s > (newest or 0)]
            kind = self._draw(RUNNING) if self._is_wanted else ""
            found = self._start(words, run_dir, "" if is_bare and kind in BROKEN else kind, is_bare)
            if found.first_step_s and kind not in (PAUSE, *BROKEN):
                seconds.append(round(found.first_step_s, 2))
            if is_bare and self._is_wanted:
                self._note(BARE, variant).judge_resume(found, newest, newer)
            before = between or running or Fault("", "")
            if found.resumed is not None or not found.is_hit:  # it came so far
                before.judge_resume(found, newest, newer)
            running = self._note(kind, f"{variant}, {found.after}") if found.is_hit else None
            latest = running or before
            if running:
                running.judge_end(found, newest_undamaged(run_dir, damaged) or 0)
            if found.says("Traceback"):
                latest.broken.append("a traceback: " + "\n".join(found.output[-30:]))
            is_failed = found.status and (not running or kind == PAUSE)
            if found.hung or (is_failed and newest is not None):
                latest.broken.append(f"status {found.status}: {found.output[-8:]}")
            is_stopped = found.says("stopped by a signal")
            is_complete = not found.status and not is_stopped and STEPS in checkpoints(run_dir)
            truth = self._truths[variant]
            latest.differences += truth.differences(run_dir, damaged, is_complete)
            if latest.differences or latest.lost_steps:
                latest.broken.append("\n".join(found.output[-25:]))
            if not before.kind:
                unprovoked += before.broken + before.differences
            if is_complete or any(f.broken or f.differences for f in (before, latest)):
                break
            if undo and newest is None:
                undo[0].write_bytes(undo[1])  # as the message asks: one is put back
        shutil.rmtree(run_dir, ignore_errors=True)
        return {"variant": variant, "seconds": seconds, "unprovoked": unprovoked}

    def _start(self, words: list[str], run_dir: Path, kind: str, is_bare: bool) -> Start:
        rng = self._rng
        processes = 2 if kind.endswith("rank 1") else rng.choice([1, 2])
        is_apart = processes == 2 and rng.random() < 0.5
        first = max(checkpoints(run_dir), default=0) + 1
        target = rng.choice([0, *range(first, STEPS + 1)])
        if kind == REMOVED:
            target = max(target, 1)  # before, there is nothing
        everywhere = [words] * processes
        return self._ranks.start(everywhere, run_dir, kind, target, rng, is_bare, is_apart)

    def _differ(self, variant: str, words: list[str], run_dir: Path) -> None:
        """Starts with a second machine that holds something else; both must refuse."""
        kind, nodes = self._draw(OTHERS), self._home / "nodes"
        fault = self._note(f"second machine, other {kind}", variant)
        before = {path.name: digest(path) for path in checkpoints(run_dir).values()}
        machines = list(differ(kind, words, nodes))
        found = self._ranks.start(machines, run_dir, "", 0, self._rng, is_apart=True)
        shutil.rmtree(nodes, ignore_errors=True)
        if found.statuses != [2, 2] or found.hung or found.says("Traceback"):
            fault.broken.append(f"statuses {found.statuses}: {found.output[-12:]}")
        if before != {path.name: digest(path) for path in checkpoints(run_dir).values()}:
            fault.differences.append("training checkpoints were changed")


def summary(episodes: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Returns machine, versions, tally of each kind, totals and the broken promises, JSON-able."""
    tally: dict[str, dict[str, int]] = {}
    faults = [fault for episode in episodes for fault in episode["faults"]]
    for fault in faults:
        row = tally.setdefault(fault["kind"], dict.fromkeys(COLUMNS, 0))
        row["faults"] += 1
        row["lost_steps"] += fault["lost_steps"]
        row["differences"] += len(fault["differences"])
        row["broken"] += len(fault["broken"])
    totals = {key: sum(row[key] for row in tally.values()) for key in COLUMNS}
    times = sorted(second for episode in episodes for second in episode["seconds"])
    keys = {"median": statistics.median(times), "longest": times[-1]} if times else {}
    return {
        "machine": measuring.machine(),
        "versions": measuring.versions("torch"),
        "settings": {"seed": seed, "steps": STEPS},
        "code": dict(Counter(episode["code"] for episode in episodes)),
        "tally": dict(sorted(tally.items())),
        "totals": totals | {"runs": len(episodes), "starts_that_trained": len(times)},
        "seconds_to_recover": {key: round(value, 2) for key, value in keys.items()},
        "unprovoked": [text for episode in episodes for text in episode["unprovoked"]],
        "wrong": [f for f in faults if f["broken"] or f["differences"] or f["lost_steps"]],
    }


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their places")
    args = parser.parse_args()
    if args.faults < 1:
        raise ConfigError(f"--faults {args.faults}: expected 1 or more")
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        file = args.out.with_suffix(".jsonl") if args.out else Path(home) / "episodes.jsonl"
        campaign = Campaign(Path(home), args.faults, args.seed, file)
        campaign.run()
    result = summary(campaign.episodes, args.seed)
    measuring.write(args.out, result)
    rows = [[kind, *row.values()] for kind, row in result["tally"].items()]
    print(measuring.table(["", "faults", "lost steps", "differences", "broken"], rows))
    for fault in result["wrong"]:
        print(f"{fault['kind']} ({fault['after']}): {[*fault['differences'], *fault['broken']]}")
    print(json.dumps(result["totals"] | result["seconds_to_recover"]), *result["unprovoked"][:5])
    if result["wrong"] or result["unprovoked"]:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
