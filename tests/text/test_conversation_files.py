"""Conversations in files of every kind: JSON, tables, compressed ones."""

import gzip
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamapro.errors import Problems
from llamapro.text.conversations import (
    ConversationCounts,
    read_conversations,
    to_conversation,
)
from llamapro.text.source_files import find_files

CHATS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("chats.py"))))
ASKED = CHATS.ASKED
ROW = CHATS.ROW
read = CHATS.read
lines_of = CHATS.lines_of
write = CHATS.write


def test_files_of_all_kinds_are_read_in_order(tmp_path: Path) -> None:
    """Lines, compressed lines and lists give the rows with their numbers; blank lines count."""
    lines = tmp_path / "a.jsonl"
    lines.write_text("\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROW) + "\n")
    (tmp_path / "c.json").write_text(json.dumps([ROW, ROW], indent=1))
    (tmp_path / "readme.md").write_text("about the data")
    counts, problems = ConversationCounts(), Problems()
    found = list(read_conversations(find_files([str(tmp_path)]), problems, counts))
    assert not problems
    assert [where.removeprefix(f"{tmp_path}/") for where, _ in found] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "b.jsonl.gz:1",
        "c.json:1",
        "c.json:2",
    ]
    assert all(conversation == (ASKED, {}, set()) for _, conversation in found)
    assert counts.other_files == 1
    assert "1 files that are not" in counts.describe()


def test_functions_are_tools(tmp_path: Path) -> None:
    """OpenAI's older keys say the same without the object around each, in rows and turns."""
    call = {"name": "f", "arguments": "{}"}
    turn = {"role": "assistant", "content": None, "function_call": call}
    row = {"functions": [{"name": "f"}], "messages": [ASKED[0], turn]}
    messages, variables, _ = to_conversation(row)
    assert variables == {"tools": [{"type": "function", "function": {"name": "f"}}]}
    calls = [{"type": "function", "function": call}]
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    with pytest.raises(ValueError, match="turn 2: has 'function_call' and 'tool_calls'"):
        to_conversation({"messages": [ASKED[0], turn | {"tool_calls": calls}]})


def test_parquet_is_read_and_its_mistakes_are_named(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    """Rows have numbers; messages about a missing column or damage name the file."""
    rows = [{**ROW, "id": 1}, {"messages": None, "id": 2}, ROW]
    good = write_parquet(tmp_path / "good.parquet", rows)
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write_parquet(tmp_path / "share.parquet", [{"conversations": share}])
    columns = write_parquet(tmp_path / "text.parquet", [{"text": "x", "n": 1}])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(good.read_bytes()[:-20])
    found, problems = read(good, tmp_path / "share.parquet", columns, broken)
    assert [(where.removeprefix(f"{tmp_path}/"), row.messages) for where, row in found] == [
        ("good.parquet:1", ASKED),
        ("good.parquet:3", ASKED),
        ("share.parquet:1", ASKED),
    ]
    lines = lines_of(problems)
    assert f"{good}:2: no conversation" in lines[0]
    assert f"{columns}:1: no column of a conversation (found: 'text', 'n')" in lines[1]
    assert f"{broken}:1: not a parquet file, or a damaged one" in lines[2]
    assert len(lines) == 3


def test_a_key_that_other_rows_of_a_table_have_is_not_there(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    """A column of calls has the arguments of all of them; a null is no argument."""
    calls = [{"function": {"arguments": {name: 1}}} for name in ("x", "y")]
    rows = [{"messages": [ASKED[0], ASKED[1] | {"tool_calls": [call]}]} for call in calls]
    found, _ = read(write_parquet(tmp_path / "calls.parquet", rows))
    assert [c.messages[1]["tool_calls"] for _, c in found] == [[call] for call in calls]
