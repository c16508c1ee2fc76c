"""The host's time for a call of a kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_every_call_is_timed_both_ways(root: Path, tmp_path: Path) -> None:
    """Without a GPU and without Triton's interpreter, in a process of its own."""
    script, out = root / "benchmarks" / "host_time.py", tmp_path / "host.json"
    words = [sys.executable, str(script), "--calls", "1", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "dispatcher, us" in done.stdout, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len({row["case"] for row in rows}) == 8
    assert all(row["direct"] > 0 and row["dispatcher"] > 0 for row in rows)
