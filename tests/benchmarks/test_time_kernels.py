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
    assert {"llamapro", "cudnn", "flash", "flex"} <= others
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
    monkeypatch.setattr(time_kernels, "seconds", lambda function, _: times[function()])
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
    """A tile that spills is left out; without a GPU nothing claims to have been timed."""
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
    assert head == "forward sm_80 BLOCK_D 64 bf16: 1 of 2 candidates are sound"
    assert len(lines) == 1
    assert lines[0].strip().startswith('("forward", 80, 64, 2): Tile(64, 32, 4, 2),  # ')
    assert ("not timed" in lines[0]) != torch.cuda.is_available()
    best, worst = json.loads(file.read_text())["entries"][0]["candidates"]
    assert best["tile"] == [64, 32, 4, 2] and not best["problems"]
    assert any(problem.startswith("spills") for problem in worst["problems"])
