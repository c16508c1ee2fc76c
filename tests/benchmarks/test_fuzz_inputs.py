"""benchmarks/fuzz_inputs.py: damaged files of every kind end in one message or a right result."""

import random
from pathlib import Path

import fuzz_inputs
import pytest


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs of every kind."""
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    fuzz_inputs.prepare(folder)
    return folder


# Those that take a second or more each are left to the campaign.
FAST = [kind for kind, (_, words) in fuzz_inputs.KINDS.items()
        if words[0] not in ("train", "report", "chat")]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "kinds"),
    [(2 * len(FAST), FAST), pytest.param(3000, list(fuzz_inputs.KINDS), marks=pytest.mark.slow)],
    ids=["a few", "thousands"],
)
def test_damaged_files_end_in_one_message(good: Path, count: int, kinds: list[str]) -> None:
    """Exit status 0 or 2, no traceback, bounded time and memory, a short message."""
    result = fuzz_inputs.campaign(good, count, 1, kinds)
    assert not result["wrong"], "\n".join(result["wrong"])
    ends = result["kinds"].values()
    assert sum(end["taken"] + end["refused"] for end in ends) == count
    assert sum(end["refused"] for end in ends) > count / 3


def test_the_judge_sees_what_is_wrong() -> None:
    """A traceback, another status, no message, a long one; warnings are no message."""
    assert not fuzz_inputs.judge(0, "warning: a\n{}\n")
    assert not fuzz_inputs.judge(2, "DataError: a file: wrong\n")
    assert "traceback" in fuzz_inputs.judge(2, "Traceback (most recent call last):\nKeyError: 1")
    assert "exit status 70" in fuzz_inputs.judge(70, "KeyError: 1")
    assert fuzz_inputs.judge(2, "warning: a\n") == "no message"
    assert "5,007 characters" in fuzz_inputs.judge(2, "Error: " + "a" * 5000)


def test_damage_changes_a_file_and_is_repeatable(tmp_path: Path) -> None:
    """The seed alone decides."""
    seen = []
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"a": [1, {"b": null}], "c": "text"}')
        fuzz_inputs.damage(tmp_path / name, random.Random(3))
        seen.append((tmp_path / name).read_bytes())
    assert seen[0] == seen[1] != b'{"a": [1, {"b": null}], "c": "text"}'
