"""benchmarks/forked_faults.py: its judge sees what is lost or changed, and real faults pass."""

import json
import random
import shutil
from pathlib import Path

import fault_judge
import forked_faults
import pytest
from fault_judge import REMOVED, STEPS, Fault, Start, Truth
from fault_run import DAMAGE, damage


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run as the judge sees it: two training checkpoints, the last one final, and a log."""
    run_dir = tmp_path / "run"
    for step in (2, STEPS):
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        for name in (*fault_judge.TENSOR_FILES, "state.json", "manifest.json"):
            (path / name).write_text(f"{name} of step {step}\n")
    records = [
        {"kind": "train", "step": step, "loss": 1 / step, "elapsed_s": 0.1 * step}
        for step in (1, 2, STEPS)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run_dir


def test_a_run_like_the_straight_one_has_no_differences(run_dir: Path) -> None:
    """Times, state.json and roundings may differ, and a last line may be cut off."""
    truth = Truth.of(run_dir)
    log = run_dir / "metrics.jsonl"
    text = log.read_text().replace('"elapsed_s": 0.1', '"elapsed_s": 7.5')
    log.write_text(text.replace("0.5,", "0.5000001,") + '{"kind": "t')
    (run_dir / "checkpoints" / "step-00000002" / "state.json").write_text("other times\n")
    assert truth.differences(run_dir, set(), True) == []


def test_one_other_bit_of_a_tensor_file_is_seen(run_dir: Path) -> None:
    """Every training checkpoint is compared, unless a fault is known to have damaged it."""
    truth = Truth.of(run_dir)
    path = run_dir / "checkpoints" / "step-00000002"
    file = path / "optimizer.safetensors"
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert truth.differences(run_dir, set(), True) == ["step-00000002/optimizer.safetensors"]
    assert truth.differences(run_dir, {fault_judge.digest(path)}, True) == []
    file.unlink()
    assert truth.differences(run_dir, set(), True) == ["step-00000002/optimizer.safetensors"]


def test_another_loss_is_seen_wherever_it_stands(run_dir: Path) -> None:
    """In a record or in a repeated one; a record may be new or missing; so may the last step."""
    truth = Truth.of(run_dir)
    log = run_dir / "metrics.jsonl"
    right = log.read_text()
    log.write_text(right.replace("0.5,", "0.501,"))
    (found,) = truth.differences(run_dir, set(), True)
    assert found.startswith("log: train 2 is") and "0.501" in found
    log.write_text(right + json.dumps({"kind": "train", "step": 2, "loss": 0.25}) + "\n")
    (found,) = truth.differences(run_dir, set(), True)
    assert found.startswith("log: train 2 was") and "0.25" in found
    log.write_text(right + json.dumps({"kind": "bad_step", "step": 2}) + "\n")
    assert len(truth.differences(run_dir, set(), True)) == 1
    log.write_text(right.split("\n", 1)[1])
    assert truth.differences(run_dir, set(), True) == ["log: train 1 is missing"]
    assert truth.differences(run_dir, set(), False) == []  # it has not come so far
    log.write_text(right)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    assert truth.differences(run_dir, set(), True) == [f"no training checkpoint of step {STEPS}"]


RESUMED = "resume from      runs/a/checkpoints/step-00000004"
TOLD = "warning          runs/a/checkpoints/step-00000006/state.json: missing; resuming from"
INTACT = "CheckpointError: no training checkpoint is intact: ..."


@pytest.mark.parametrize(
    ("lines", "status", "newest", "passed_over", "expected"),
    [
        ([RESUMED], 0, 4, [], (0, 0, 0)),
        ([RESUMED, TOLD], 0, 4, ["step-00000006"], (0, 0, 0)),
        ([RESUMED], 0, 4, ["step-00000006"], (0, 1, 0)),  # without a word
        ([RESUMED], 0, 6, [], (2, 0, 0)),
        (["resume from      new run"], 0, 6, [], (6, 0, 0)),
        ([RESUMED], 0, 2, [], (0, 1, 0)),  # from a damaged one
        ([INTACT], 2, None, ["step-00000006"], (0, 0, 0)),
        ([INTACT], 0, None, ["step-00000006"], (0, 0, 1)),
        (["resume from      new run"], 0, None, ["step-00000006"], (0, 0, 1)),
        (["ConfigError: ..."], 2, 4, [], (0, 0, 1)),  # did not start
    ],
)
def test_where_a_run_resumes_is_judged(
    lines: list[str],
    status: int,
    newest: int | None,
    passed_over: list[str],
    expected: tuple[int, int, int],
) -> None:
    """From the newest undamaged training checkpoint, with a word on each newer one."""
    fault = Fault("flip a bit", "")
    fault.judge_resume(Start(lines, status), newest, passed_over)
    assert (fault.lost_steps, len(fault.differences), len(fault.broken)) == expected


@pytest.mark.parametrize(
    ("kind", "statuses", "newest", "lost", "broken"),
    [
        ("SIGKILL rank 0", [-9, 2], 4, 0, 0),  # step 5 was never saved
        ("SIGKILL rank 0", [-9, 2], 2, 2, 0),  # step 4 was said to be
        ("SIGKILL rank 0", [-9, -6], 4, 0, 1),
        ("SIGTERM to a worker", [0], 5, 0, 0),
        ("SIGTERM to a worker", [0], 4, 1, 0),
        ("SIGUSR1 to a worker", [0], 4, 1, 0),
        ("SIGINT to a worker", [1], 5, 0, 1),
        ("ENOSPC while writing", [2], 4, 0, 0),
        ("EIO while writing", [0], 4, 0, 1),
        ("rename fails", [70], 4, 0, 1),
        (REMOVED, [2], 5, 0, 0),
        (REMOVED, [2], 4, 1, 0),
        (REMOVED, [1], 5, 0, 1),
    ],
)
def test_what_was_announced_and_what_a_signal_leaves_must_be_there(
    kind: str, statuses: list[int], newest: int, lost: int, broken: int
) -> None:
    """A kill may cost what was not saved; a signal or a removed directory costs nothing."""
    lines = ["resume from      new run", f"         4/{STEPS}   1.0000"]
    lines += [f"         4/{STEPS}  saved step-00000004 in 0.1s", f"         5/{STEPS}   1.0000"]
    lines += ["x: was removed while the run ..."] * (kind == REMOVED)
    fault = Fault(kind, "")
    status = next((s for s in statuses if s), 0)
    fault.judge_end(Start(lines, status, statuses=statuses), newest)
    assert (fault.lost_steps, len(fault.broken)) == (lost, broken)


def test_every_damage_changes_the_digest_and_can_be_undone(run_dir: Path) -> None:
    """This holds for whichever file and place is drawn."""
    path = run_dir / "checkpoints" / "step-00000002"
    before, rng = fault_judge.digest(path), random.Random(0)
    for kind in DAMAGE * 20:
        file, data = damage(kind, path, rng)
        damaged = {fault_judge.digest(path)}
        assert before not in damaged
        assert fault_judge.newest_undamaged(run_dir, damaged) == STEPS
        file.write_bytes(data)
        assert fault_judge.digest(path) == before


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_short_campaign_keeps_every_promise_and_goes_on(tmp_path: Path) -> None:
    """A few faults of all sorts on one process and two; the second start adds to the first."""
    for count, name in ((2, "one"), (6, "two")):
        (tmp_path / name).mkdir()
        campaign = forked_faults.Campaign(tmp_path / name, count, 5, tmp_path / "episodes.jsonl")
        campaign.run()
    result = forked_faults.summary(campaign.episodes, 5)
    assert result["totals"]["faults"] >= 6 and result["wrong"] == result["unprovoked"] == []
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == len(campaign.episodes)
