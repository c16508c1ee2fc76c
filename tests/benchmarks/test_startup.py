"""benchmarks/startup.py: later starts read neither tokens nor weights."""

import json
from pathlib import Path

import pytest
import startup


@pytest.mark.slow
def test_starts_and_rates_are_measured(tmp_path: Path) -> None:
    """The first start reads the base; the next ones read little, though the tokens are more."""
    out = tmp_path / "out.json"
    words = ["--shards", "1", "3", "--megabytes", "1", "--rounds", "1", "--seconds", "0.1"]
    startup.main([*words, "--out", str(out)])
    found = json.loads(out.read_text())
    assert [(row["axis"], row["corpus_shards"]) for row in found["starts"]] == [
        ("corpus", 1), ("corpus", 3), ("base", 1), ("size", 1),
    ]  # fmt: skip
    for row in found["starts"]:
        assert row["first_read_mb"] > row["base_mb"] * 0.9
        assert row["again_read_mb"] < 1 and row["resume_read_mb"] < 0.1 * row["base_mb"]
    assert found["starts"][2]["base_shards"] == 4
    for rate in found["tokenising"]:
        assert rate["same_number"] and rate["ours_tokens_per_s"] > 0 < rate["ratio"]


def test_tokenising_alone_is_measured_also_as_json(tmp_path: Path) -> None:
    """`--shards` without a number; a tokenizer.model is read by both of its libraries."""
    out = tmp_path / "out.json"
    startup.main(["--shards", "--rounds", "1", "--seconds", "0.1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert not found["starts"] and all(rate["same_number"] for rate in found["tokenising"])
    assert [(rate["tokenizer"], rate["library"]) for rate in found["tokenising"]] == [
        ("sentencepiece", "sentencepiece"), ("sentencepiece", "tokenizers"),
        ("byte-level", "tokenizers"),
    ]  # fmt: skip
