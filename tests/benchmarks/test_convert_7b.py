"""The benchmark of conversions, with one layer of LLaMA-2-7B's size: about 4 GB on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_each_conversion_has_its_figures(root: Path, tmp_path: Path) -> None:
    """In the order in which they run, each from what the one before wrote; nothing stays."""
    out, work = tmp_path / "figures.json", tmp_path / "work"
    work.mkdir()
    line = [sys.executable, "benchmarks/convert_7b.py", str(work), "--out", str(out)]
    line += ["--layers", "1", "--new-blocks", "1", "--repeats", "1"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["command"] for row in rows] == ["from-meta", "expand", "merge"]
    assert all(0 < row["peak_resident_gb"] < 1.5 for row in rows)
    assert not list(work.rglob("*.safetensors"))
