"""benchmarks/train_cpu.py: its sides compute the same, in processes of their own, and end."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train_cpu

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def script(root: Path) -> Path:
    """The script's file."""
    return root / "benchmarks" / "train_cpu.py"


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def done(script: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result and the output of one short run of all sides in both dtypes."""
    out = tmp_path_factory.mktemp("train-cpu") / "result.json"
    words = ["--size", "tiny", "--rounds", "1", "--steps", "3", "--warmup", "1", "--threads", "1"]
    process = run(script, *words, "--out", str(out))
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text()), process.stdout


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # fp32: sums in another order. bf16: autocast rounds at other places than FSDP's casts do, so a
    # token's loss moves by up to a unit in bf16's last place (2^-8); their mean by less than that.
    [("float32", 1e-5), ("bfloat16", 2**-9)],
)
@pytest.mark.slow
def test_all_sides_train_alike(
    done: tuple[dict[str, Any], str], dtype: str, tolerance: float
) -> None:
    """The losses of the first and the last step agree, and training lowers them."""
    rows = [row for row in done[0]["rows"] if row["dtype"] == dtype]
    assert [row["side"] for row in rows] == ["ours", "ddp", "fsdp2"]
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=tolerance)
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=tolerance)
        assert row["last_loss"] < row["first_loss"] - 0.01


@pytest.mark.slow
def test_every_side_has_its_figures_and_ours_over_it(done: tuple[dict[str, Any], str]) -> None:
    """Rate, memory and start-up fit together; the table and the JSON tell ratios and targets."""
    result, printed = done
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 24 / row["step_s"])
        assert row["step_s"] < row["start_s"]
        assert 50 < row["libraries_mb"] < row["peak_mb"]
        ours = next(r for r in result["rows"] if r["dtype"] == row["dtype"])
        if row is ours:
            assert "ours" not in row
        else:
            ratios = row["ours"]
            assert ratios["memory"] == pytest.approx(ours["peak_mb"] / row["peak_mb"])
            assert ratios["start"] == pytest.approx(ours["start_s"] / row["start_s"])
            assert f"{ratios['speed']:.2f}x" in printed
        assert re.search(rf"^{row['side']} +{row['dtype']}", printed, re.MULTILINE)
    assert result["targets"] == {"speed": 1.2, "memory": 0.7} and "target: speed" in printed
    assert result["settings"]["processes"] == 2 and result["settings"]["rounds"] == 1
    assert all(result["versions"].values())
    assert (
        result["machine"]["cores"] == os.cpu_count() and "load_average_after" in result["machine"]
    )


def test_speed_compares_steps_that_were_taken_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A load that slows every other pair of steps fivefold leaves the ratio as it is."""
    taken: list[str] = []

    class Scripted(train_cpu.Group):  # type: ignore[misc, name-defined]
        def __init__(self, side: str, dtype: str, args: argparse.Namespace):
            self.started, self.processes, self.side, self.steps = 0.0, [], side, 0

        def step(self) -> dict[str, float]:
            taken.append(self.side)
            self.steps += 1
            seconds = {"ours": 1.0, "ddp": 1.5}[self.side] * (5 if self.steps % 2 else 1)
            if self.steps <= 5:  # more of them than count, and at another ratio
                seconds = 1000.0
            return {"step_s": seconds, "loss": 1.0, "peak_mb": 700.0, "libraries_mb": 300.0}

    monkeypatch.setattr(train_cpu, "Group", Scripted)
    args = argparse.Namespace(sides=["ours", "ddp"], rounds=2, warmup=5, steps=3, batch_size=2)
    ours, ddp = train_cpu.measure("float32", argparse.Namespace(**vars(args), size="tiny"))
    assert ddp["ours"]["speed"] == pytest.approx(1.5) and ddp["ours"]["memory"] == 1
    assert ours["step_s"] < 10 and ddp["tokens_per_s"] == pytest.approx(96 / ddp["step_s"])
    assert taken == ["ours", "ddp"] * 8 + ["ddp", "ours"] * 8


WORKER = """
import json, sys
if {starts}:
    for _ in sys.stdin:
        print(json.dumps(dict(step_s=1.0, loss=2.0, peak_mb=3.0, libraries_mb=4.0)), flush=True)
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bool], None]:
    """`stand_in(starts)`: the processes answer without a model, or end at once."""

    def make(starts: bool) -> None:
        file = tmp_path / "worker.py"
        file.write_text(WORKER.format(starts=starts))
        monkeypatch.setattr(train_cpu, "__file__", str(file))

    return make


ARGS = argparse.Namespace(size="tiny", batch_size=1, threads=1)


def test_a_process_that_ends_stops_its_group(stand_in: Callable[[bool], None]) -> None:
    """The other process does not wait for it: the step fails and says whose it is."""
    stand_in(True)
    with train_cpu.Group("ours", "float32", ARGS) as running:
        assert running.step()["loss"] == 2
        running.processes[0].kill()
        running.processes[0].wait()
        with pytest.raises(RuntimeError, match="ours in float32: a process ended"):
            running.step()
    assert all(process.poll() is not None for process in running.processes)


def test_a_process_that_cannot_start_stops_its_group(stand_in: Callable[[bool], None]) -> None:
    """A process that ends without an answer to a step is an error, not a wait."""
    stand_in(False)
    with (
        train_cpu.Group("ours", "float32", ARGS) as running,
        pytest.raises(RuntimeError, match="ours in float32: a process ended"),
    ):
        running.step()


@pytest.mark.parametrize("option", ["--steps", "--batch-size", "--rounds", "--threads"])
def test_a_number_below_one_is_refused(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """The option and its value are named before anything starts."""
    monkeypatch.setattr(sys, "argv", ["train_cpu.py", option, "0"])
    with pytest.raises(train_cpu.ConfigError, match=f"{option} 0: expected 1 or more"):
        train_cpu.main()


def test_a_process_takes_a_step_for_each_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process of a side trains, and answers with time, loss and memory."""
    words = ["--worker", "ours", "--dtypes", "float32", "--size", "tiny", "--batch-size", "1"]
    monkeypatch.setattr(sys, "argv", ["train_cpu.py", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\nstep\n"))
    train_cpu.main()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert second["loss"] < first["loss"] - 0.01 and second["step_s"] > 0
    assert 50 < first["libraries_mb"] <= first["peak_mb"]


def test_without_transformers_its_sides_are_refused_and_ours_runs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stand_in: Callable[[bool], None],
) -> None:
    """The message names the extra; `--sides ours` does not need it."""
    monkeypatch.setattr(train_cpu, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train_cpu.py", "--sides", "ddp"])
    with pytest.raises(train_cpu.ConfigError, match=r"pip install -e '\.\[hf\]'"):
        train_cpu.main()
    stand_in(True)
    words = ["--size", "tiny", "--sides", "ours", "--dtypes", "float32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["train_cpu.py", *words, "--steps", "1", "--warmup", "1"])
    train_cpu.main()
    assert re.search(r"^ours +float32", capsys.readouterr().out, re.MULTILINE)
