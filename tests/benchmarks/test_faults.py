"""benchmarks/faults.py: its judge sees what is lost or changed, and real faults come out clean."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import pytest


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run as the judge sees it: two training checkpoints, the last one final, and a log."""
    run_dir = tmp_path / "run"
    for step in (2, faults.STEPS):
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        for name in (*faults.TENSOR_FILES, "state.json", "manifest.json"):
            (path / name).write_text(f"{name} of step {step}\n")
    records = [
        {"kind": "train", "step": step, "loss": 1 / step, "elapsed_s": 0.1 * step}
        for step in (1, 2, faults.STEPS)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run_dir


def output(*lines: str, status: int = 0) -> object:
    return faults.Start(list(lines), status)


def test_a_run_like_the_straight_one_has_no_differences(run_dir: Path) -> None:
    """Times and state.json may differ, and a last line may be cut off."""
    truth = faults.Truth.of(run_dir)
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text().replace('"elapsed_s": 0.1', '"elapsed_s": 7.5') + '{"kind": "t')
    (run_dir / "checkpoints" / "step-00000002" / "state.json").write_text("other times\n")
    assert truth.differences(run_dir, set(), True) == []


def test_one_other_bit_of_a_tensor_file_is_seen(run_dir: Path) -> None:
    """Every training checkpoint is compared, unless a fault is known to have damaged it."""
    truth = faults.Truth.of(run_dir)
    path = run_dir / "checkpoints" / "step-00000002"
    file = path / "optimizer.safetensors"
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert truth.differences(run_dir, set(), True) == ["step-00000002/optimizer.safetensors"]
    assert truth.differences(run_dir, {faults.digest(path)}, True) == []
    file.unlink()
    assert truth.differences(run_dir, set(), True) == ["step-00000002/optimizer.safetensors"]


def test_another_loss_is_seen_wherever_it_stands(run_dir: Path) -> None:
    """One bit may differ in a record or in a repeated one; a record may be new or missing."""
    truth = faults.Truth.of(run_dir)
    log = run_dir / "metrics.jsonl"
    right = log.read_text()
    log.write_text(right.replace("0.5,", "0.5000000000000001,"))
    (found,) = truth.differences(run_dir, set(), True)
    assert found.startswith("log: train 2 is") and "0.5000000000000001" in found
    log.write_text(right + json.dumps({"kind": "train", "step": 2, "loss": 0.25}) + "\n")
    (found,) = truth.differences(run_dir, set(), True)
    assert found.startswith("log: train 2 was") and "0.25" in found
    log.write_text(right + json.dumps({"kind": "bad_step", "step": 2}) + "\n")
    assert len(truth.differences(run_dir, set(), True)) == 1
    log.write_text(right.split("\n", 1)[1])
    assert truth.differences(run_dir, set(), True) == ["log: train 1 is missing"]
    assert truth.differences(run_dir, set(), False) == []  # it has not come so far


def test_a_run_that_ended_without_its_last_checkpoint_is_seen(run_dir: Path) -> None:
    """Exit status 0 alone does not make it complete."""
    truth = faults.Truth.of(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{faults.STEPS:08d}")
    assert len(truth.differences(run_dir, set(), True)) == 1


RESUMED = "resume from      runs/a/checkpoints/step-00000004"
TOLD = "warning          runs/a/checkpoints/step-00000006/state.json: missing; resuming from"


@pytest.mark.parametrize(
    ("lines", "newest", "lost", "differences"),
    [
        ([RESUMED], 4, 0, 0),
        ([RESUMED, TOLD], 4, 0, 0),
        ([RESUMED], 6, 2, 0),
        (["resume from      new run"], 6, 6, 0),
        ([RESUMED], 2, 0, 1),
    ],
    ids=["at_the_newest", "passed_over", "too_early", "started_anew", "from_a_damaged_one"],
)
def test_steps_lost_on_resume_are_counted(
    lines: list[str], newest: int, lost: int, differences: int
) -> None:
    """They go from the newest undamaged training checkpoint to where the run went on."""
    fault = faults.Fault("flip a bit", 0, "")
    fault.judge_resume(output(*lines), newest, [])
    assert (fault.lost_steps, len(fault.differences), fault.broken) == (lost, differences, [])


def test_a_damaged_checkpoint_must_be_named() -> None:
    """A run that resumes from the one before it without a word is a silent difference."""
    for lines, count in (([RESUMED, TOLD], 0), ([RESUMED], 1)):
        fault = faults.Fault("flip a bit", 0, "")
        fault.judge_resume(output(*lines), 4, ["step-00000006"])
        assert len(fault.differences) == count


@pytest.mark.parametrize(
    ("line", "status", "is_right"),
    [
        ("CheckpointError: no training checkpoint is intact: ...", 1, True),
        ("CheckpointError: no training checkpoint is intact: ...", 0, False),
        ("Traceback (most recent call last):", 1, False),
        ("resume from      new run", 0, False),
    ],
)
def test_a_run_with_nothing_intact_must_refuse(line: str, status: int, is_right: bool) -> None:
    """It must give its message and an exit status."""
    fault = faults.Fault("flip a bit", 0, "")
    fault.judge_resume(output(line, status=status), None, ["step-00000006"])
    assert fault.refused is is_right and len(fault.broken) == (not is_right)


@pytest.mark.parametrize(
    ("kind", "status", "newest", "lost", "broken"),
    [
        ("SIGKILL rank 0", 1, 4, 0, 0),  # step 5 was never saved
        ("SIGKILL rank 0", 1, 2, 2, 0),  # step 4 was said to be
        ("SIGTERM to a worker", 0, 5, 0, 0),
        ("SIGTERM to torchrun", 1, 5, 0, 0),
        ("SIGTERM to torchrun", 1, 4, 1, 0),
        ("SIGINT to a worker", 1, 5, 0, 1),
        ("ENOSPC while writing", 1, 4, 0, 0),
        ("EIO while writing", 0, 4, 0, 1),
    ],
)
def test_what_was_announced_and_what_a_signal_leaves_must_be_there(
    kind: str, status: int, newest: int, lost: int, broken: int
) -> None:
    """A kill may cost what was not saved; a signal costs nothing; a failed write is no success."""
    lines = [
        "resume from      new run",
        f"         4/{faults.STEPS}   1.0000",
        f"         4/{faults.STEPS}  saved step-00000004 in 0.1s",
    ]
    lines += [f"         5/{faults.STEPS}   1.0000"]
    fault = faults.Fault(kind, 0, "")
    fault.judge_end(output(*lines, status=status), newest)
    assert (fault.lost_steps, len(fault.broken)) == (lost, broken)


@pytest.mark.parametrize("name", ["lost_steps", "differences", "broken", "unprovoked"])
def test_one_broken_promise_fails_the_campaign(name: str) -> None:
    """A campaign without one passes."""
    totals = {"lost_steps": 0, "differences": 0, "broken": 0}
    assert faults.is_kept({"totals": totals, "unprovoked": []})
    unprovoked = ["a difference"] if name == "unprovoked" else []
    assert not faults.is_kept({"totals": totals | {name: 1}, "unprovoked": unprovoked})


def test_every_damage_changes_the_digest_and_can_be_undone(run_dir: Path) -> None:
    """This holds for whichever file and place is drawn."""
    path = run_dir / "checkpoints" / "step-00000002"
    before, rng = faults.digest(path), random.Random(0)
    for kind in faults.DAMAGE * 20:
        file, data = faults.damage(kind, path, rng)
        assert faults.newest_undamaged(run_dir, {faults.digest(path)}) == faults.STEPS
        assert faults.digest(path) != before
        file.write_bytes(data)
        assert faults.digest(path) == before


@pytest.mark.slow
def test_real_faults_lose_and_change_nothing(root: Path, tmp_path: Path) -> None:
    """A short campaign over a real run has all its faults, ends, and keeps the promises."""
    out, script = tmp_path / "result.json", str(root / "benchmarks" / "faults.py")
    command = [sys.executable, script, "--faults", "2", "--seed", "3", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["totals"]["faults"] == len(result["faults"]) == 2
    assert result["totals"]["runs"] == 1 and result["totals"]["lost_steps"] == 0
    for fault in result["faults"]:  # the next start went on, or refused
        assert fault["resumed"] is not None or fault["refused"]
    assert "2 faults over 1 runs" in done.stdout and "0 lost steps" in done.stdout
