"""The kernel benchmarks compare functions that compute the same, and nothing stops them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import gpu
import time_kernels

from llamapro.kernels import device as kernel_device

OPS = {"attention", "rms_norm", "add_rms_norm", "rope", "swiglu", "linear_cross_entropy"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes on a GPU")
def test_what_cannot_run_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On a CPU only plain PyTorch runs; every op and direction has a row for each backend."""
    file = tmp_path / "time_kernels.json"
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    monkeypatch.setattr(sys, "argv", ["time_kernels.py", "--out", str(file)])
    time_kernels.main()
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert {row["op"] for row in result["rows"]} == OPS
    for row in result["rows"]:
        if row["by"] == "torch":
            assert row["seconds"] > 0 and row["rate"] > 0
            assert (row["unit"] == "GB/s") == ("share_of_copy" in row)
        else:
            expected = "device is cpu" if "llamapro" in row["by"] else "measured on a GPU only"
            assert row["refused"].startswith(expected) and row["refused"] in printed
    others = {row["by"] for row in result["rows"] if row["op"] == "attention"}
    assert {"llamapro", "cudnn", "flash", "flex", "flash 3", "flash 4"} <= others
    assert len(printed.splitlines()) == 1 + len(result["rows"])
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted")
@pytest.mark.parametrize("op", ["attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_what_is_compared_computes_the_same(op: str) -> None:
    """Ours and plain PyTorch agree on the same inputs, as they are timed."""
    count = 0
    for case in time_kernels.OPS[op](time_kernels.Cases(torch.device("cpu"))):
        results = {}
        for name, get in case.functions.items():
            if name == "torch" or "llamapro" in name:
                torch.manual_seed(0)
                out = time_kernels.timed(case, get())()
                results[name] = out if isinstance(out, tuple) else (out,)
        expected = results.pop("torch")
        for found in results.values():
            for x, y in zip(found, expected, strict=True):
                y = y.transpose(1, 2) if x.shape != y.shape else y  # heads before tokens
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
                count += 1
    assert count


def test_ratio_is_to_the_fastest_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are work per time; ours never count as the other; a refusal is none."""

    def refuse() -> Any:
        raise torch.OutOfMemoryError("too large\nsecond line")

    times = {"llamapro": 2.0, "slow": 8.0, "fast": 4.0}
    functions = {name: lambda name=name: lambda x: name for name in times} | {"none": refuse}
    case = time_kernels.Case(
        "op", "shape", "forward", 8e9, "GB/s", lambda: [torch.ones(1)], functions
    )
    monkeypatch.setattr(time_kernels, "seconds", lambda function, _: (times[function()], "clock"))
    rows = {row["by"]: row for row in time_kernels.measure(case, torch.device("cpu"), 16.0)}
    assert {name: row["rate"] for name, row in rows.items() if "rate" in row} == {
        "llamapro": 4.0,
        "slow": 1.0,
        "fast": 2.0,
    }
    assert rows["llamapro"]["ours_to_best_other"] == 2.0
    assert "ours_to_best_other" not in rows["fast"]
    assert rows["llamapro"]["share_of_copy"] == 0.25
    assert rows["none"]["refused"] == "too large" and "too large" in time_kernels.line(rows["none"])


def test_sweep_prints_sound_tiles_as_lines_of_the_table(root: Path, tmp_path: Path) -> None:
    """What a tile spills is told; without a GPU nothing claims to have been timed."""
    file = tmp_path / "sweep.json"
    command = [
        sys.executable, str(root / "benchmarks" / "sweep_attention.py"), "--kernel", "forward",
        "--block-d", "64", "--architecture", "80", "--candidates", "64x32x4x2", "128x128x4x1",
        "--out", str(file),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    head, *lines = done.stdout.splitlines()
    assert head == "forward sm_80 BLOCK_D 64 bf16: 2 of 2 candidates are sound"
    assert lines[0].strip().startswith('("forward", 80, 64, 2): Tile(64, 32, 4, 2),  # ')
    assert ("not timed" in lines[0]) != torch.cuda.is_available()
    rows = json.loads(file.read_text())["entries"][0]["candidates"]
    spilled = {tuple(row["tile"]): row["spilled_bytes"] for row in rows}
    assert spilled[64, 32, 4, 2] == 0 < spilled[128, 128, 4, 1]
    assert [
        f"spills {size} B" in line for size, line in zip(spilled.values(), lines, strict=True)
    ] == [size > 0 for size in spilled.values()]


def test_the_parts_of_a_gpu_run_follow_each_other_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that takes too long is ended, the next ones run; its own file has what it timed."""

    def run(words: list[str], timeout: float, **_: Any) -> Any:
        if "time_kernels.py" not in words[1]:
            raise subprocess.TimeoutExpired(words, timeout)
        monkeypatch.setattr(sys, "argv", words[1:])
        time_kernels.main()
        return subprocess.CompletedProcess(words, 0)

    words = ["gpu.py", "--out-dir", str(tmp_path), "--lengths", "32"]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "step", "attention", "sweep"])
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1 and sum(gpu.MINUTES.values()) <= 25
    parts = json.loads((tmp_path / "parts.json").read_text())["parts"]
    assert [(part["part"], part["ended"]) for part in parts] == [
        ("sweep", "ended early"),
        ("attention", "exit status 0"),
        ("step", "ended early"),
    ]
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {"attention"} and "S=32 " in rows[0]["shape"]
    assert "attention  exit status 0" in capsys.readouterr().out


def test_what_was_timed_before_a_failure_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of figures is written after every case."""
    measure, calls = time_kernels.measure, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    file = tmp_path / "rows.json"
    monkeypatch.setattr(time_kernels, "measure", failing)
    monkeypatch.setattr(sys, "argv", ["time_kernels.py", "--op", "attention", "--out", str(file)])
    with pytest.raises(KeyboardInterrupt):
        time_kernels.main()
    rows = json.loads(file.read_text())["rows"]
    assert {row["direction"] for row in rows} == {"forward"}
