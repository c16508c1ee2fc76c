"""Metrics: what is logged comes back, survives kills and resumes, and reads well."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.run import read_metrics
from llamapro.errors import DataError
from llamapro.files import write_file
from llamapro.training.metrics import MetricsLog, read_run, summarize


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 4.0 - step / 100, **more}


def write_steps(run_dir: Path, steps: range) -> None:
    with closing(MetricsLog(run_dir, 0)) as log:
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
    with closing(MetricsLog(tmp_path / "a" / "run", 0)) as log:
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
    with closing(MetricsLog(tmp_path, 0)) as log:
        log.log({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    assert record == {"kind": "train", "step": 1, "loss": None, "grad_norm": None}


def test_resuming_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    """After a resume at step 4, steps 5 and 6 of the killed process are gone."""
    write_steps(tmp_path, range(1, 7))
    with closing(MetricsLog(tmp_path, 4)) as log:
        assert steps_of(tmp_path) == [1, 2, 3, 4]
        log.log(train(5, loss=1.0))
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path)[-1]["loss"] == 1.0


def test_starting_again_at_step_0_starts_a_new_log(tmp_path: Path) -> None:
    """A run killed before its first checkpoint does not keep a second evaluation of the base."""
    write_steps(tmp_path, range(3))
    with closing(MetricsLog(tmp_path, 0)) as log:
        log.log(train(0))
    assert steps_of(tmp_path) == [0]


def test_resuming_without_a_log_starts_one(tmp_path: Path) -> None:
    """A checkpoint copied without its metrics can be resumed."""
    with closing(MetricsLog(tmp_path, 4)) as log:
        log.log(train(5))
    assert steps_of(tmp_path) == [5]


def test_a_half_written_last_line_is_left_out_and_removed_on_resume(tmp_path: Path) -> None:
    """A kill in the middle of a line costs that line only, and the next one does not join it."""
    write_steps(tmp_path, range(1, 3))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write('{"kind": "train", "step": 3, "note": "ü'.encode()[:-1])
    assert steps_of(tmp_path) == [1, 2]
    with closing(MetricsLog(tmp_path, 3)) as log:
        log.log(train(4))
    assert steps_of(tmp_path) == [1, 2, 4]


def test_a_log_that_is_removed_while_it_is_put_back_stays_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other file takes the place of the old one, whose bytes are the only ones left."""
    home = tmp_path / "run"

    def removed_again(path: Path, content: bytes) -> None:
        write_file(path, content)
        shutil.rmtree(home)

    with closing(MetricsLog(home, 0)) as log:
        log.log(train(1))
        shutil.rmtree(home)
        with monkeypatch.context() as patch:
            patch.setattr("llamapro.training.metrics.write_file", removed_again)
            with pytest.raises(FileNotFoundError):
                log.log(train(2))
        with open(tmp_path / "other", "wb", buffering=0) as other:  # takes a free descriptor
            other.write(b"another file\n" * 100)
            with pytest.raises(OSError, match="was removed"):
                log.log(train(3))
    assert steps_of(home) == [1, 2, 3]


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
from llamapro.training.metrics import MetricsLog, read_run, summarize
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
    with closing(MetricsLog(tmp_path, 3)) as log:
        log.log({"kind": "eval", "step": 3, "set": "code", "loss": 2.0})
    for is_evaluated, kinds in ((True, ["train"] * 3 + ["eval"]), (False, ["train"] * 3)):
        MetricsLog(tmp_path, 3, is_evaluated).close()
        assert [record["kind"] for record in read_metrics(tmp_path)] == kinds


# ---- Run directories, read for the report --------------------------------------------------------


def write_run(run_dir: Path, records: list[dict[str, Any]], info: Any = None) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({} if info is None else info))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run_dir


def test_summary_holds_the_runs_numbers(tmp_path: Path) -> None:
    """Losses at step 0 and at the end, the mean of the last ten, the median speed, the tokens."""
    records = [
        {"kind": "eval", "step": step, "set": "general", "loss": loss, "tokens_seen": step * 100}
        for step, loss in ((0, 2.0), (6, 1.0), (12, 1.5))
    ]
    records += [
        train(s, loss=float(s), tokens=s * 100, tokens_per_s=float(s * s), elapsed_s=s / 2)
        for s in range(1, 13)
    ]
    info = {"settings": {"train": {"trainable": "all"}}, "parameters": {"total": 8, "trainable": 2}}
    run = read_run(write_run(tmp_path, records, info), "pro")
    assert summarize(run, ["general", "absent"]) == {
        "run": "pro",
        "path": str(tmp_path),
        "trains": "all",
        "trainable_parameters": 2,
        "total_parameters": 8,
        "steps": 12,
        "tokens": 1200,
        "sets": {
            "general": {"initial_loss": 2.0, "final_loss": 1.5, "change": -0.5},
            "absent": {"initial_loss": None, "final_loss": None, "change": None},
        },
        "final_train_loss": 7.5,
        "tokens_per_s": 42.5,
        "elapsed_s": 6.0,
        "memory_bytes": None,
    }


def test_only_step_0_is_no_final_loss(tmp_path: Path) -> None:
    """A run that has not trained yet neither learned nor kept anything."""
    base = {"kind": "eval", "step": 0, "set": "general", "loss": 2.0, "tokens_seen": 0}
    run = read_run(write_run(tmp_path, [base]), "pro")
    assert run.losses("general") == (2.0, None)


def test_a_set_that_the_last_evaluation_did_not_reach_has_its_value_before(tmp_path: Path) -> None:
    """A run may end between two sets."""
    sets = (("code", 0), ("general", 0), ("code", 3), ("general", 3), ("code", 6))
    records = [{"kind": "eval", "step": n, "set": name, "loss": 9.0 - n} for name, n in sets]
    run = read_run(write_run(tmp_path, records), "pro")
    assert (run.losses("code"), run.losses("general")) == ((9.0, 3.0), (9.0, 6.0))


def test_without_step_0_there_is_no_base(tmp_path: Path) -> None:
    """The first evaluation there is does not stand in for the base."""
    later = {"kind": "eval", "step": 5, "set": "general", "loss": 2.0, "tokens_seen": 5}
    run = read_run(write_run(tmp_path, [later]), "pro")
    assert run.losses("general") == (None, 2.0)


def test_run_json_must_be_a_readable_object(tmp_path: Path) -> None:
    """A missing, damaged or odd run.json is named."""
    write_run(tmp_path, [], ["not", "an", "object"])
    with pytest.raises(DataError, match=r"run\.json: damaged: .* no JSON object"):
        read_run(tmp_path, "pro")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: damaged: JSONDecodeError"):
        read_run(tmp_path, "pro")
    (tmp_path / "run.json").unlink()
    with pytest.raises(DataError, match=r"no run\.json; is this a run directory\?"):
        read_run(tmp_path, "pro")


def test_a_record_that_could_not_be_written_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a moment leaves no gap and no half line."""
    write, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) == 2:
            return write(fd, data[:7])
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with closing(MetricsLog(tmp_path, 0)) as log:
        monkeypatch.setattr(os, "write", full)
        log.log({"kind": "train", "step": 1})
        with pytest.raises(OSError, match="No space left"):
            log.log({"kind": "train", "step": 2})
        log.log({"kind": "train", "step": 3})
        calls[:] = [1, 1]
        with pytest.raises(OSError, match="No space left"):
            log.log({"kind": "train", "step": 4})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
