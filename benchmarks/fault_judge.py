"""What a fault may cost: nothing that was saved, and not a bit in silence.

`Truth` is the straight run, `Start` what one start printed, `Fault` what came of a fault.
"""

import hashlib
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 12
TENSOR_FILES = ("trainable.safetensors", "optimizer.safetensors")
NOT_COMPARED = {"tokens_per_s", "step_s", "elapsed_s", "memory_bytes"}
EVENTS = {"save", "resume"}  # records of what happened to a run: not in the straight one
# Signals after which the last step must be there.
SAVING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
REMOVED = "run directory removed"

Log = dict[tuple[str, int], dict[str, Any]]  # (kind, step) -> what of the record is compared


# ---- On the disk --------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Returns a hash of all that a training checkpoint's directory holds."""
    whole = hashlib.sha256()
    for file in sorted(path.iterdir()):
        whole.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Returns step -> directory of every complete training checkpoint, oldest first."""
    return {int(p.name[5:]): p for p in sorted((run_dir / "checkpoints").glob("step-????????"))}


def newest_undamaged(run_dir: Path, damaged: set[str]) -> int | None:
    """Returns the newest step whose digest is not in `damaged`; None if all are, 0 if none is."""
    found = checkpoints(run_dir)
    good = [step for step, path in found.items() if digest(path) not in damaged]
    return max(good) if good else None if found else 0


def read_log(run_dir: Path) -> tuple[Log, list[str]]:
    """Returns the log, and the records that contradict an earlier one."""
    log: Log = {}
    wrong = []
    file = run_dir / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):  # half a line, left by a kill
            record = {k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED}
            if record["kind"] in EVENTS:
                continue
            key = (record["kind"], record["step"])
            if not is_same(log.setdefault(key, record), record):
                wrong.append(f"log: {key[0]} {key[1]} was {log[key]}, then {record}")
    return log, wrong


def is_same(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether two records of a log agree up to rounding: two processes sum in another order."""
    return (
        other is not None
        and one.keys() == other.keys()
        and all(
            math.isclose(value, other[key], rel_tol=1e-5)
            if isinstance(value, float)
            else value == other[key]
            for key, value in one.items()
        )
    )


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
        """Compares a run with this one: files to the bit, the log up to rounding.

        Args:
            run_dir: of the run.
            damaged: digests of the training checkpoints that a fault has damaged: left out.
            is_complete: whether it has come to its end, and the log must hold every record.
        """
        log, wrong = read_log(run_dir)
        for step, path in checkpoints(run_dir).items():
            if digest(path) not in damaged:
                found, expected = _tensor_hashes(path), self.files.get(step, {})
                wrong += [f"{path.name}/{n}" for n in found if found[n] != expected.get(n)]
        for key, record in log.items():
            if not is_same(record, self.log.get(key)):
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


# ---- What was printed, and what it is worth -----------------------------------------------------


@dataclass
class Start:
    """One start of the command, and how it ended.

    Attributes:
        output: its lines, of all processes.
        status: the first exit status that is not 0.
        is_hit: whether the fault came before the end.
        after: the line of output that the fault followed.
        hung: whether it had to be ended.
        statuses: exit status of each rank.
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

    def says(self, text: str) -> bool:
        """Whether a line holds this text."""
        return any(text in line for line in self.output)

    def _last(self, pattern: str) -> int | None:
        found = [m for m in (re.match(pattern, line) for line in self.output) if m]
        return int(found[-1][1] or 0) if found else None


@dataclass
class Fault:
    """One fault and what came of it.

    Attributes:
        kind: of the fault.
        after: what it came after, or what it damaged.
        lost_steps: steps that were saved, or due, and were not resumed from.
        differences: what is not as in the straight run, or was passed over in silence.
        broken: other promises.
    """

    kind: str
    after: str
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
        if newest is None:
            if not found.status or not found.says("no training checkpoint is intact"):
                self.broken.append("all are damaged, but it did not refuse to start")
        elif found.resumed is None:
            self.broken.append(f"did not start: {found.output[-8:]}")
        else:
            self.lost_steps += max(0, newest - found.resumed)
            if found.resumed > newest:
                self.differences.append(f"resumed from the damaged step {found.resumed}")
            told = [line for line in found.output if line.startswith("warning")]
            for name in passed_over:
                if not any(f"{name}/" in line for line in told):
                    self.differences.append(f"{name} was passed over without a word")

    def judge_end(self, ended: Start, newest: int) -> None:
        """Judges the start that it hit; `newest` is the newest undamaged step afterwards.

        A kill may cost what was not saved. A signal costs nothing. A directory that is removed must
        hold what was computed, where the run noticed. A failed write is no success.
        """
        is_signal, is_kill = self.kind.startswith(SAVING), self.kind.startswith("SIGKILL")
        is_removal, is_write = self.kind == REMOVED, self.kind.endswith(("writing", "limit"))
        if is_removal:
            due = ended.computed if ended.says("was removed while") else 0
        else:
            due = ended.computed if is_signal else ended.saved
        self.lost_steps += max(0, due - newest)
        right = {0} if is_signal and ended.saved < STEPS else {2} if is_write else {0, 2}
        if not is_kill and ended.status not in right:
            self.broken.append(f"status {ended.status}: {ended.output[-8:]}")
        survivors = {0, 2, -9}  # a rank that was killed, and those that noticed
        if is_kill and not set(ended.statuses) <= survivors:
            self.broken.append(f"statuses {ended.statuses}: {ended.output[-8:]}")
