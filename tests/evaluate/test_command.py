"""`llamapro evaluate`: what it prints, the questions it takes, and the options it refuses."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamapro import evaluate as command
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.evaluate import Args, evaluate

Run = Callable[..., tuple[int, str, str]]


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the single file."""
    (found,) = result["files"].values()
    assert isinstance(found, dict)
    return found


def test_questions_alone_need_no_data(args: Args, questions: str, run: Run) -> None:
    """Only --choices: no text is measured, and --against asks for no room for the shift."""
    options = ("--choices", questions, "--shots", 1, "--against", args.dir, "--json")
    status, shown, _ = run(args.dir, *options)
    assert status == 0
    result = json.loads(shown)
    assert result["files"] == {}
    found = result["choices"][questions]
    marks = {"accuracy", "accuracy_sum", "stderr"}
    assert set(found["base"]) == marks
    shared = {"questions", "cut", "chance", "majority", "base", "gained", "lost"}
    assert set(found) == marks | shared
    assert (found["questions"], found["chance"], found["majority"]) == (5, 0.5, 1.0)
    assert (found["gained"], found["lost"]) == (0, 0)
    assert found["base"] == {key: found[key] for key in marks}
    lines = command.render(result).splitlines()
    assert len(lines) == 5 and "perplexity" not in lines[1] and "per token" in lines[1]


def test_context_and_batch_size_hold_for_questions_too(args: Args, questions: str) -> None:
    """Prompts are cut to --context; how many are computed at once changes nothing."""
    asked = replace(args, data=(), choices=(questions,), context=16, shots=2)
    found = [evaluate(replace(asked, batch_size=n))["choices"][questions] for n in (1, 8)]
    assert found[0] == found[1]
    assert found[0]["cut"] == 4
    assert evaluate(replace(asked, shots=0))["choices"][questions]["cut"] == 0


def test_command_prints_one_json_object(
    checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    """`python -m llamapro.evaluate --json`: files and their four numbers, progress elsewhere."""
    line = ["evaluate", checkpoint, "--data", text_file, "--json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    monkeypatch.delitem(sys.modules, "llamapro.evaluate")  # runpy warns of a module run twice
    status, shown, notes = run_command(
        lambda _: runpy.run_module("llamapro.evaluate", run_name="__main__", alter_sys=True)
    )
    assert status == 0
    result = json.loads(shown)
    assert shown.count("\n") == 1
    assert set(result) == {"model", "against", "context", "stride", "files", "choices"}
    assert result["choices"] == {}
    assert (result["model"], result["against"]) == (str(checkpoint), None)
    assert set(result["files"]) == {str(text_file)}
    assert set(only(result)) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert f"{text_file}: 1 documents" in notes


def test_command_prints_a_table(run: Run, args: Args, text_file: Path) -> None:
    """One row a file, with the numbers of the result."""
    found = only(evaluate(args))
    status, shown, _ = run(args.dir, "--data", text_file)
    assert status == 0
    row = next(line for line in shown.splitlines() if line.startswith(str(text_file)))
    expected = ["this", str(found["tokens"]), f"{found['loss']:.4f}", f"{found['perplexity']:.3f}"]
    assert row.split()[1:] == [*expected, f"{found['bits_per_byte']:.4f}"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "33"], "--context 33"),
        (["--context", "-1"], "--context -1"),
        (["--context", "8", "--stride", "9"], "--stride 9"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--shift-new-tokens", "0"], "--shift"),
        (["--choices", "x", "--shots", "-1"], "--shots -1"),
        (["--shots", "1"], "--shots 1: expected 0 or more, with --choices"),
        (["--against", "{dir}"], "--shift-prompt-tokens 32 and --shift-new-tokens 64"),
        (["--against", "nowhere"], "nowhere"),
        (["--text-key"], "--text-key"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_options_exit_2(
    run: Run, checkpoint: Path, text_file: Path, options: list[str], told: str
) -> None:
    """One message on standard error names the option and the value; no traceback, no result."""
    options = [option.format(dir=checkpoint) for option in options]
    status, shown, message = run(checkpoint, "--data", text_file, *options)
    assert (status, shown) == (2, "")
    assert told in message
    assert "Traceback" not in message


def test_no_data_exits_2(run: Run, checkpoint: Path) -> None:
    """Neither an absent --data nor one with nothing after it measures anything."""
    for options in ([], ["--data"], ["--choices"]):
        status, shown, message = run(checkpoint, *options)
        assert (status, shown) == (2, "")
        assert "--data: name at least one file, folder or glob" in message


def test_all_wrong_options_come_in_one_message(args: Args) -> None:
    """Three impossible options, three complaints."""
    with pytest.raises(ConfigError) as caught:
        evaluate(replace(args, context=99, stride=100, batch_size=0))
    for option in ("--context 99", "--stride 100", "--batch-size 0"):
        assert option in str(caught.value)


def test_files_that_cannot_be_used_are_named(args: Args, tmp_path: Path) -> None:
    """Missing file, missing key, empty text, missing checkpoint."""
    lines, empty = tmp_path / "x.jsonl", tmp_path / "empty.txt"
    lines.write_text('{"content": "x"}\n')
    empty.touch()
    with pytest.raises(DataError, match="none"):
        evaluate(replace(args, data=(str(tmp_path / "none.txt"),)))
    with pytest.raises(DataError, match=r"x\.jsonl:1: no 'text' key"):
        evaluate(replace(args, data=(str(lines),)))
    with pytest.raises(ConfigError, match=r"empty\.txt: has no token to predict"):
        evaluate(replace(args, data=(str(empty),)))
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(replace(args, dir=tmp_path / "nowhere"))
