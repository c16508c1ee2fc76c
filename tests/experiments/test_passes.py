"""experiments/passes.py: the same run with stores of several sizes, and what each forgot."""

import json
import sys
from pathlib import Path

import passes
import pytest


@pytest.mark.slow
def test_each_store_has_its_row(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence of eight is replayed, so 16 steps of 8 x 16 tokens pass twice over 128."""
    for name in ("train", "val"):
        (tmp_path / name).write_text("what is learned stands here once more. " * 40)
    options = {"--new-blocks": 1, "--seq-len": 16, "--steps": 16, "--tokens": 128}
    options |= {name: tmp_path / name[2:] for name in ("--train", "--val", "--out", "--json")}
    words = ["passes.py", str(base), *(str(word) for pair in options.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(passes, "HELD_OUT_TOKENS", 200)
    passes.main()
    plain, held = json.loads((tmp_path / "json").read_text())["rows"]
    assert (plain["stored"], held["stored"], held["passes"]) == (0, 128, 2)
    assert plain["kl"] > 0 and plain["replayed_kl"] is None
    assert held["kl"] > 0 and held["replayed_kl"] > 0
