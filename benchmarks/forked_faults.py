"""A long campaign of faults in runs that start fast: text, replay and chat, one and two processes.

    python benchmarks/forked_faults.py [--faults 1000] [--seed 0] [--out RESULT.json]

The promises are those of faults.py, and so are the tallies. What is added:

- faults of the file system below Python, by a preloaded shim: rename, fsync, unlink, rmdir, flock,
  opendir, write and pwrite fail, once or for ever; and file systems that lack all that is optional;
- SIGHUP, SIGSTOP and SIGCONT, and a run directory that is removed while the run writes there;
- a second machine that holds something else: every start must end with one message;
- starts of one run with one process and with two, with replay and with packed conversations.

No output may hold a traceback. The seconds from a start to its first progress line are noted.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
from fault_injection import (
    BETWEEN,
    DAMAGE,
    STEPS,
    Start,
    checkpoints,
    clutter,
    damage,
    digest,
    newest_undamaged,
    prepare,
)
from fault_ranks import BROKEN, DIFFERENT, FORKED, PAUSE, REMOVED, Ranks
from faults import Draws, Fault, Truth

from llamapro import cli
from llamapro.errors import ConfigError

COLUMNS = ("faults", "lost_steps", "differences", "broken")
VARIANTS = ["text", "replay", "chat"]
BARE = "file system lacks what is optional"
SAME_BITS = ["--train.batch-size", "2", "--train.micro-batch-size", "1", "--optim.clip", "1e9"]
SAME_BITS += ["--save.background", "no", "--save.every", "2", "--save.keep", "3"]


class LogTruth(Truth):
    """The straight run, whose log may differ in rounding: other processes sum in another order."""

    def differences(self, run_dir: Path, damaged: set[str], is_complete: bool) -> list[str]:
        found = super().differences(run_dir, damaged, is_complete)
        return [text for text in found if not (text.startswith("log: ") and self._is_near(text))]

    def _is_near(self, text: str) -> bool:
        """Whether a difference in the log is one of rounding alone."""
        import ast

        for word in (", not ", ", then "):
            if word in text:
                before, after = text.split(word)
                values = before[before.index("{") :], after
                one, other = (ast.literal_eval(value) for value in values)
                return one.keys() == other.keys() and all(
                    abs(v - other[k]) <= 1e-5 * abs(v) if isinstance(v, float) else v == other[k]
                    for k, v in one.items()
                )
        return False


def write_chats(home: Path) -> list[str]:
    """Writes conversations from the lines of the corpus; returns the options that train on them."""
    lines = [line.strip() for line in (home / "train.py").read_text().splitlines()]
    lines = [line for line in lines if 10 < len(line) < 40]
    for name, part in (("chats", lines[:300]), ("held-out", lines[300:360])):
        rows = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(part[::2], part[1::2], strict=True)
        ]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data.format", "chat", "--data.chat-template", "llama2", "--data.too-long"]
    words += ["truncate", "--data.train", str(home / "chats.jsonl")]
    return [*words, "--data.val", f"code={home / 'held-out.jsonl'}"]


class Campaign(Draws):
    """Faults on processes that a server forks, within a time."""

    def __init__(
        self, home: Path, count: int, seed: int, seconds: float, variants: list[str]
    ) -> None:
        super().__init__(count, seed)
        self.first_steps: list[float] = []
        self.starts, self._home = 0, home
        self._until = time.monotonic() + seconds
        self._ranks = Ranks(home)
        options = [*prepare(home), *SAME_BITS]
        replay = ["--replay.share", "0.25", "--replay.distill", "--replay.tokens", "600"]
        self._variants = {"text": options, "replay": [*options, *replay]}
        self._variants["chat"] = [*options, *write_chats(home)]
        self._variants = {name: self._variants[name] for name in variants}
        self._truths = {name: self._straight(name) for name in self._variants}

    def _straight(self, name: str) -> Truth:
        run_dir = self._home / f"straight-{name}"
        words = [*self._variants[name], "--run-dir", str(run_dir)]
        words += ["--save.every", "1", "--save.keep", str(STEPS)]
        found = self._ranks.start([words] * 2, run_dir, "", 0, self._rng)
        if found.status:
            raise RuntimeError("the straight run failed:\n" + "\n".join(found.output))
        return LogTruth.of(run_dir)

    def run(self) -> None:
        with self._bar:
            while self._is_wanted:
                self._episode(self._home / f"episode-{self.episodes}")
        self._ranks.close()

    @property
    def _is_wanted(self) -> bool:
        return super()._is_wanted and time.monotonic() < self._until

    def _start(
        self, variant: str, run_dir: Path, kind: str, target: int, is_bare: bool
    ) -> tuple[Start, int]:
        self.starts += 1
        world = 2 if kind.endswith("rank 1") else self._rng.choice([1, 2])
        words = [*self._variants[variant], "--run-dir", str(run_dir)]
        found = self._ranks.start([words] * world, run_dir, kind, target, self._rng, is_bare)
        if found.first_step_s and kind not in (PAUSE, *BROKEN):
            self.first_steps.append(found.first_step_s)
        return found, world

    def _episode(self, run_dir: Path) -> None:
        """Starts one run again and again, until it is complete or a promise is broken."""
        rng, damaged = self._rng, set[str]()
        variant, is_bare = rng.choice(sorted(self._variants)), rng.random() < 0.25
        running: Fault | None = None
        while True:
            newest, between, undo = newest_undamaged(run_dir, damaged), None, None
            if self._is_wanted and rng.random() < 0.5:
                self._differ(variant, run_dir)
            if newest and self._is_wanted and rng.random() < 0.8:
                kind, path = self._draw(BETWEEN), checkpoints(run_dir)[newest]
                between = self._note(kind, f"between starts, {path.name}")
                if kind in DAMAGE:
                    undo = damage(kind, path, rng)
                    damaged.add(digest(path))
                    newest = newest_undamaged(run_dir, damaged)
                else:
                    clutter(kind, run_dir, newest, rng)
            kind = self._draw(FORKED) if self._is_wanted else ""
            if is_bare and kind in BROKEN:
                self._decks[FORKED].append(kind)
                kind = ""
            target = rng.choice([0, *range((newest or 0) + 1, STEPS + 1)])
            newer = [p.name for s, p in checkpoints(run_dir).items() if s > (newest or 0)]
            found, world = self._start(variant, run_dir, kind, target, is_bare)
            if is_bare and self._is_wanted:
                self._note(BARE, f"{variant}, {world} process(es)").judge_resume(
                    found, newest, newer
                )

            if running:
                running.newest, running.resumed = newest, found.resumed
            before = between or running or Fault("", self.episodes, "")
            if found.resumed is not None or not found.is_hit:  # it came so far
                before.judge_resume(found, newest, newer)
            running = self._note(kind, f"{variant}, {found.after}") if found.is_hit else None
            latest = running or before
            if running:
                judge(running, found, newest_undamaged(run_dir, damaged) or 0)
            if any("Traceback" in line for line in found.output):
                latest.broken.append("a traceback: " + "\n".join(found.output[-30:]))
            is_failed = found.status and (not running or kind == PAUSE)
            if found.hung or (is_failed and newest is not None):
                latest.broken.append(f"status {found.status}: {found.output[-8:]}")
            is_stopped = any("stopped by a signal" in line for line in found.output)
            is_complete = not found.status and not is_stopped and STEPS in checkpoints(run_dir)
            truth = self._truths[variant]
            latest.differences += truth.differences(run_dir, damaged, is_complete)
            if latest.differences:
                latest.differences.append("\n".join(found.output[-25:]))
            if not before.kind:
                self.unprovoked += before.broken + before.differences
            if is_complete or any(f.broken or f.differences for f in (before, latest)):
                break
            if undo and newest is None:
                undo[0].write_bytes(undo[1])
        self.episodes += 1
        shutil.rmtree(run_dir, ignore_errors=True)

    def _differ(self, variant: str, run_dir: Path) -> None:
        """Starts with a second machine that holds something else; both must refuse."""
        kind = self._draw(tuple(DIFFERENT))
        fault, nodes = self._note(f"second machine: {kind}", variant), self._home / "nodes"
        shutil.rmtree(nodes, ignore_errors=True)
        option, other = DIFFERENT[kind]
        here = [*self._variants[variant], "--run-dir", str(run_dir)]
        there = list(here)
        if other:
            there += [option, other]
        else:  # another directory under the same name
            at = here.index(option) + 1
            for node in (0, 1):
                (nodes / f"node-{node}").mkdir(parents=True)
            mine = nodes / "node-0" / "thing"
            Path(here[at]).mkdir(exist_ok=True)
            mine.symlink_to(here[at])
            if kind == "other base":
                shutil.copytree(here[at], nodes / "node-1" / "thing")
                _change_weight(nodes / "node-1" / "thing" / "model.safetensors")
            else:
                (nodes / "node-1" / "thing").mkdir()
            here[at] = there[at] = "thing"
        before = {path.name: digest(path) for path in checkpoints(run_dir).values()}
        words = [here, there]
        found = self._ranks.start(words, run_dir, "", 0, self._rng, is_apart=True)
        if found.statuses != [2, 2] or found.hung or "Traceback" in "\n".join(found.output):
            fault.broken.append(f"statuses {found.statuses}: {found.output[-12:]}")
        if before != {path.name: digest(path) for path in checkpoints(run_dir).values()}:
            fault.differences.append("training checkpoints were changed")


def judge(fault: Fault, ended: Start, newest: int) -> None:
    """Judges the start that a fault hit; `newest` is the newest undamaged step afterwards."""
    if fault.kind == REMOVED:
        fault.status = ended.status
        if "was removed while" in "\n".join(ended.output):
            fault.lost_steps += max(0, ended.computed - newest)
        elif ended.status not in (0, 2):
            fault.broken.append(f"status {ended.status}: {ended.output[-8:]}")
        return
    fault.judge_end(ended, newest)
    if fault.kind in BROKEN and ended.status not in (0, 2):
        fault.broken.append(f"status {ended.status}: {ended.output[-8:]}")


def _change_weight(file: Path) -> None:
    with open(file, "r+b") as out:
        out.seek(-8, os.SEEK_END)
        out.write(b"\1\2\3\4")


def summary(campaign: Campaign, seed: int) -> dict[str, Any]:
    """Returns machine, versions, tally of each kind, totals and the broken promises, JSON-able."""
    tally: dict[str, dict[str, int]] = {}
    for fault in campaign.faults:
        row = tally.setdefault(
            fault.kind, dict.fromkeys(("faults", "lost_steps", "differences"), 0)
        )
        row["faults"] += 1
        row["lost_steps"] += fault.lost_steps
        row["differences"] += len(fault.differences)
        row["broken"] = row.get("broken", 0) + len(fault.broken)
    totals = {key: sum(row[key] for row in tally.values()) for key in COLUMNS}
    totals |= {"runs": campaign.episodes, "starts": campaign.starts}
    times = sorted(campaign.first_steps)
    seconds = {"median": statistics.median(times), "longest": times[-1]} if times else {}
    return {
        "machine": measuring.machine(),
        "versions": measuring.versions("torch"),
        "settings": {"seed": seed, "steps": STEPS},
        "tally": dict(sorted(tally.items())),
        "totals": totals,
        "seconds_to_recover": {key: round(value, 2) for key, value in seconds.items()},
        "unprovoked": campaign.unprovoked,
        "wrong": [asdict(f) for f in campaign.faults if f.broken or f.differences or f.lost_steps],
    }


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their places")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="time after which it ends")
    args = parser.parse_args()
    if args.faults < 1:
        raise ConfigError(f"--faults {args.faults}: expected 1 or more")
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        campaign = Campaign(Path(home), args.faults, args.seed, args.seconds, args.variants)
        campaign.run()
    result = summary(campaign, args.seed)
    measuring.write(args.out, result)
    rows = [[kind, *row.values()] for kind, row in result["tally"].items()]
    print(measuring.table(["", "faults", "lost steps", "differences", "broken"], rows))
    for fault in result["wrong"]:
        print(
            f"{fault['kind']} ({fault['after']}): {[*fault['differences'], *fault['broken']][:3]}"
        )
    print(json.dumps(result["totals"] | result["seconds_to_recover"]), *result["unprovoked"][:5])
    if result["wrong"] or result["unprovoked"]:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
