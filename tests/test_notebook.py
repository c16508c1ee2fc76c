"""The notebook of docs/ runs from top to bottom, and shows what it prints."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Losses and sizes depend on the machine and on Python's own texts; words, shapes and truths do not.
DECIMALS = re.compile(r"[+-]?\d+\.\d+")
BETWEEN = "\f"


@pytest.fixture(scope="module")
def cells(root: Path) -> list[dict[str, Any]]:
    """The cells with code."""
    book = json.loads((root / "docs" / "paper.ipynb").read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """Returns the text below a cell; there is nothing but text."""
    assert {output["name"] for output in cell["outputs"]} <= {"stdout"}
    return "".join(line for output in cell["outputs"] for line in output["text"])


def run(root: Path, cells: list[dict[str, Any]], steps: str = "") -> list[str]:
    """Runs the cells in their order, in a new process, and returns what each prints.

    Args:
        steps: numbers of training steps, base and others, in place of the notebook's.
    """
    sources = ["".join(cell["source"]) for cell in cells]
    if steps:
        named = r"(BASE_STEPS, NEW_STEPS =) \d+, \d+"
        sources[0], count = re.subn(named, rf"\1 {steps}", sources[0])
        assert count == 1
    script = f"\nprint({BETWEEN!r}, end='')\n".join(sources)
    ran = subprocess.run(
        [sys.executable, "-"],
        input=script,
        cwd=root / "docs",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(BETWEEN)


def test_the_notebook_prints_what_it_shows(root: Path, cells: list[dict[str, Any]]) -> None:
    """Cell by cell, with two steps of training: every word and whole number, but no loss."""
    pytest.importorskip("transformers")
    for cell, text in zip(cells, run(root, cells, "2, 2"), strict=True):
        assert DECIMALS.sub("#", text) == DECIMALS.sub("#", shown(cell)), "".join(cell["source"])


@pytest.mark.slow
def test_the_notebook_says_what_its_losses_say(root: Path, cells: list[dict[str, Any]]) -> None:
    """All learn code; new blocks forget and learn less than all weights at the same rate."""
    for text in ("\n".join(run(root, cells)), "\n".join(map(shown, cells))):
        rows = re.findall(r"^(\w+ .*?) +English .* \((\S+)\)   code .* \((\S+)\)$", text, re.M)
        changes = {name: (float(english), float(code)) for name, english, code in rows}
        new = changes["new blocks, 2e-3"]
        fast, slow = changes["all weights, 2e-3"], changes["all weights, 5e-4"]
        assert max(new[1], fast[1], slow[1]) < 0
        assert new[0] < fast[0] and new[1] > fast[1]
        # At a lower rate all weights are close to the new blocks on both.
        assert all(abs(s - n) < abs(f - n) for n, f, s in zip(new, fast, slow, strict=True))
