"""Metrics: what is logged comes back, survives kills and resumes, and reads well."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.run import read_metrics
from llamapro.errors import DataError
from llamapro.training.metrics import MetricsLog


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 4.0 - step / 100, **more}


def write_steps(run_dir: Path, steps: range) -> None:
    with MetricsLog(run_dir, 0) as log:
        for step in steps:
            log.log(train(step))


def steps_of(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


def test_records_come_back_as_logged(tmp_path: Path) -> None:
    """Both kinds of records are read back equal and in order, from a directory made on the way."""
    records = [
        {"kind": "eval", "step": 0, "set": "größe", "loss": 1.2, "tokens_seen": 0},
        train(10, learning_rate=2e-4, tokens=40960),
    ]
    with MetricsLog(tmp_path / "a" / "run", 0) as log:
        for record in records:
            log.log(record)
    assert read_metrics(tmp_path / "a" / "run") == records


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """A record can be read while the log is still open."""
    log = MetricsLog(tmp_path, 0)
    log.log(train(1))
    assert steps_of(tmp_path) == [1]
    log.close()


def test_what_is_not_finite_is_strict_json(tmp_path: Path) -> None:
    """NaN and infinity become null, which every JSON reader takes."""
    with MetricsLog(tmp_path, 0) as log:
        log.log({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    assert record == {"kind": "train", "step": 1, "loss": None, "grad_norm": None}


def test_resuming_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    """After a resume at step 4, steps 5 and 6 of the killed process are gone."""
    write_steps(tmp_path, range(1, 7))
    with MetricsLog(tmp_path, 4) as log:
        assert steps_of(tmp_path) == [1, 2, 3, 4]
        log.log(train(5, loss=1.0))
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path)[-1]["loss"] == 1.0


def test_starting_again_at_step_0_starts_a_new_log(tmp_path: Path) -> None:
    """A run killed before its first checkpoint does not keep a second evaluation of the base."""
    write_steps(tmp_path, range(3))
    with MetricsLog(tmp_path, 0) as log:
        log.log(train(0))
    assert steps_of(tmp_path) == [0]


def test_resuming_without_a_log_starts_one(tmp_path: Path) -> None:
    """A checkpoint copied without its metrics can be resumed."""
    with MetricsLog(tmp_path, 4) as log:
        log.log(train(5))
    assert steps_of(tmp_path) == [5]


def test_a_half_written_last_line_is_left_out_and_removed_on_resume(tmp_path: Path) -> None:
    """A kill in the middle of a line costs that line only, and the next one does not join it."""
    write_steps(tmp_path, range(1, 3))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write('{"kind": "train", "step": 3, "note": "ü'.encode()[:-1])
    assert steps_of(tmp_path) == [1, 2]
    with MetricsLog(tmp_path, 3) as log:
        log.log(train(4))
    assert steps_of(tmp_path) == [1, 2, 4]


def test_an_interrupted_rewrite_leaves_the_old_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the rename, the records that a resume is about to drop are all there."""
    write_steps(tmp_path, range(1, 7))

    def killed(_fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, 4)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "damage", ['{"kind": "tr', "[1, 2]", '{"kind": "train"}', '{"step": 1}', "\xff"]
)
def test_damage_before_the_end_names_file_and_line(tmp_path: Path, damage: str) -> None:
    """A line that is no record is refused with its place, also when resuming."""
    good = json.dumps(train(1))
    text = f"{good}\n{damage}\n{good}\n"
    (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected a JSON object"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        MetricsLog(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="latin-1") == text


def test_a_directory_that_is_no_run_says_so(tmp_path: Path) -> None:
    """A missing log asks whether this is a run directory."""
    with pytest.raises(DataError, match=r"no metrics\.jsonl; is this a run directory\?"):
        read_metrics(tmp_path)


def test_a_record_that_does_not_fit_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    """A limit on the file's size stands for a full disk: no half line, also not on closing."""
    program = """
import resource, signal, sys
from pathlib import Path
from llamapro.training.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(Path(sys.argv[1]), 0)
log.log({"kind": "train", "step": 1, "loss": 4.0})
size = (Path(sys.argv[1]) / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
try:
    log.log({"kind": "train", "step": 2, "loss": 4.0})
except OSError as error:
    print(error.filename)
log.close()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert steps_of(tmp_path) == [1]


def test_an_evaluation_that_is_done_again_stands_once(tmp_path: Path) -> None:
    """A run stopped inside an evaluation, after it was resumed and killed there once more."""
    write_steps(tmp_path, range(1, 4))
    with MetricsLog(tmp_path, 3) as log:
        log.log({"kind": "eval", "step": 3, "set": "code", "loss": 2.0})
    for is_evaluated, kinds in ((True, ["train"] * 3 + ["eval"]), (False, ["train"] * 3)):
        MetricsLog(tmp_path, 3, is_evaluated).close()
        assert [record["kind"] for record in read_metrics(tmp_path)] == kinds
