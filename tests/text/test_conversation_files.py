"""Conversations in files of every kind; all mistakes are found in one pass, with file and row."""

import gzip
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import Problems
from llamapro.text.conversations import ConversationCounts, read_conversations, to_conversation
from llamapro.text.source_files import find_files

_chats = runpy.run_path(str(Path(__file__).with_name("chats.py")))
ASKED, ROW, read, lines_of, write = map(_chats.get, ("ASKED", "ROW", "read", "lines_of", "write"))


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
    assert f", skipped: {tmp_path / 'readme.md'}" in counts.describe()


def test_columns_of_a_text_table_are_looked_at_once(tmp_path: Path) -> None:
    """As those of parquet; a row that was cut is named, and what is not read may be missing."""
    (tmp_path / "a.csv").write_text("id,prompt,completion,note\n1,x,y\n2,x\n3,x,y,z\n")
    (tmp_path / "b.csv").write_text("id,text\n1,x\n2,y\n")
    found, problems = read(tmp_path / "a.csv", tmp_path / "b.csv")
    assert [where.removeprefix(f"{tmp_path}/") for where, _ in found] == ["a.csv:1", "a.csv:3"]
    assert [line.strip().removeprefix(f"{tmp_path}/")[:45] for line in lines_of(problems)] == [
        "a.csv:2: no field for 'completion'; put a tex",
        "b.csv:1: no column of a conversation (found: ",
    ]


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer, not the file: run"),
        ("<!DOCTYPE html><p>Entry not found", "a web page, not the file: the download failed"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json.gz"])
def test_what_stands_in_a_table_s_place_is_named(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    """One problem with the next step, whatever the file should hold."""
    (tmp_path / name).write_text(content)
    (line,) = lines_of(read(tmp_path / name)[1])
    assert f"{name}: {expected}" in line


def test_keys_that_are_not_read_are_said(tmp_path: Path, write_parquet: Any) -> None:
    """In the summary, so that a column with the reasoning is not lost in silence."""
    rows = [
        {"question": "a", "answer": "b", "reasoning": "c", "id": None, "train_on_prompt": False}
    ]
    for file in (write(tmp_path / "a.jsonl", *rows), write_parquet(tmp_path / "a.parquet", rows)):
        counts = ConversationCounts()
        assert len(list(read_conversations(find_files([str(file)]), Problems(), counts))) == 1
        assert "reasoning" in counts.unread and "question" not in counts.unread
        assert "keys not read: " in counts.describe() and "'reasoning'" in counts.describe()


def test_files_without_a_row_are_counted(tmp_path: Path) -> None:
    """Their names were given, and nothing of them is read."""
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    (tmp_path / "b.json").write_text("[]")
    write(tmp_path / "c.jsonl", ROW)
    counts = ConversationCounts()
    assert len(list(read_conversations(find_files([str(tmp_path)]), Problems(), counts))) == 1
    assert "2 files without a row" in counts.describe()


def test_weights_in_a_column_are_refused(tmp_path: Path, write_parquet: Any) -> None:
    """A table is read by its columns, and these are among them."""
    file = write_parquet(tmp_path / "a.parquet", [{"messages": ASKED, "turn_weights": [0, 1]}])
    conversations, problems = read(file)
    assert not conversations and "'turn_weights' is [0, 1]: only turns" in problems.listed[0]


def test_all_problems_of_all_files_are_found_in_one_pass(tmp_path: Path) -> None:
    """Each bad row is named with file and number, good ones between them are still read."""
    bad_turns = [ASKED[0], {"name": "x"}, ASKED[1]]
    rows = write(tmp_path / "rows.jsonl", ROW, {"messages": bad_turns}, ROW, {"text": "x"})
    with rows.open("a") as file:
        file.write("{not json\n" + json.dumps(ROW) + "\n[1]\n")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(ROW).encode() + b'\n{"messages": "caf\xe9"}\n')
    wide = tmp_path / "wide.json"
    wide.write_bytes(json.dumps([ROW]).encode("utf-16"))
    single = tmp_path / "single.json"
    single.write_text(json.dumps(ROW))
    stacked = write(tmp_path / "stacked.json", ROW, ROW)
    cut = tmp_path / "cut.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps([i]).encode() + b"\n" for i in range(3)), mtime=0)
    cut.write_bytes(whole[:-9])
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(ROW))
    other = tmp_path / "data.xls"
    other.write_text("a,b")
    found, problems = read(rows, latin, wide, single, stacked, plain, other)
    good = [f"{rows}:1", f"{rows}:3", f"{rows}:6", f"{latin}:1"]
    good += [f"{single}:1", f"{stacked}:1", f"{stacked}:2"]  # rows, whatever the name says
    assert [where for where, _ in found] == good
    expected = [
        f"{rows}:2: turn 2: no role",
        f"{rows}:4: no conversation (found keys: 'text')",
        f"{rows}:5: not a line of JSON",
        f"{rows}:7: expected a JSON object, found list",
        f"{latin}:2: not UTF-8",
        f"{wide}:1: UTF-16; convert it",
        f"{plain}:1: truncated or not gz",
        f"{other}:1: not one of .jsonl",
    ]
    lines = lines_of(problems)
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.strip().startswith(start)
    assert "truncated or not gz" in lines_of(read(cut)[1])[-1]


def test_a_key_twice_is_a_problem_of_its_row_and_the_others_are_read(tmp_path: Path) -> None:
    """In lines and in a list, in a row and in a turn; a text of JSON is one, too."""
    row, turn = json.dumps(ROW), '{"role": "user", "content": "a", "content": "b"}'
    twice = [f'{{"messages": [{turn}]}}', row[:-1] + ', "id": 1, "id": 2}']
    tools = json.dumps({**ROW, "tools": '[{"type": "function", "type": "x"}]'})
    (lines := tmp_path / "a.jsonl").write_text("\n".join([row, *twice, row, tools]))
    (listed := tmp_path / "b.json").write_text(f"[{row}, {twice[0]} ,\n\n{twice[1]},{row}\n]")
    (broken := tmp_path / "c.json").write_text(f"[{twice[0]}, {row}, nothing]")
    found, problems = read(lines, listed, broken)
    assert [where for where, _ in found] == [
        *(f"{lines}:1", f"{lines}:4", f"{listed}:1", f"{listed}:4", f"{broken}:2")
    ]
    end = "comes twice in an object: leave one of them"
    column = broken.read_text().index("nothing") + 1
    assert [line.strip().partition(": '[")[0] for line in lines_of(problems)] == [
        f"{lines}:2: the key 'content' {end}",
        f"{lines}:3: the key 'id' {end}",
        f"{lines}:5: 'tools' is a text that is no JSON ('type' comes twice)",
        f"{listed}:2: the key 'content' {end}",
        f"{listed}:3: the key 'id' {end}",
        f"{broken}:1: the key 'content' {end}",
        f"{broken}:1: not one list in JSON (Expecting value: line 1 column {column} "
        f"(char {column - 1}))",
    ]


def test_encoding_error_ends_its_file_with_its_line(tmp_path: Path) -> None:
    """A file of another encoding is one problem, not one for each of its lines."""
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps([ROW, ROW], indent=1).encode() + b"\n\xe9\n\xe9")
    line_number = path.read_bytes().count(b"\n")
    assert f"{path}:{line_number}: not UTF-8" in lines_of(read(path)[1])[0]
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b'"\xe9"\n' * 50)
    assert len(read(lines)[1]) == 1
