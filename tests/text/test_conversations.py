"""Chat files: every form is read, and every mistake is named with its file and row in one pass."""

import gzip
import hashlib
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamapro.errors import Problems
from llamapro.text import packing
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
IN_PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": ASKED, "messages": None},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"prompt": ASKED[:1], "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello", "history": []},
        {"messages": [ASKED[0], ASKED[1] | {"weight": 1, "name": None}]},
        {"query": "Hi", "response": "Hello", "type": "MATH"},
        {"question": "Hi", "answer": "Hello"},
        {"instruction": "Hi", "context": "", "response": "Hello"},
        {"conversation": [{"role": "human", "value": "Hi"}, {"role": "GPT", "text": "Hello"}]},
        {"messages": [{"role": "user", "content": IN_PARTS}, ASKED[1]]},
        {"messages": json.dumps(ASKED), "question": "notes", "answer": "beside it", "context": "c"},
        {"messages": [], "conversations": ASKED, "weight": 1, "mask": False, "train": True},
        {"messages": ASKED, "conversations": ASKED, "prompt": "x", "label": True},
        {"instruction": "Hi", "output": "Hello", "response": "Hello", "label": 0},
        {"instruction": "", "input": "Hi", "output": "Hello", "history": "[]", "kto_tag": True},
        {
            "messages": [
                {**ASKED[0], "from": "a survey", "value": "Hi"},
                {**ASKED[1], "from": "gpt"},
            ]
        },
    ],
)
def test_every_form_of_a_row_gives_the_same_messages(row: dict[str, Any]) -> None:
    """messages, ShareGPT, Alpaca, prompt and answer, and contents in parts mean the same."""
    messages, variables, _ = to_conversation(row)
    assert (messages, variables) == (ASKED, {})


def test_input_and_system_become_part_of_the_conversation() -> None:
    """Alpaca's input follows the instruction; a system text is the first message."""
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief."}
    assert [(m["role"], m["content"]) for m in to_conversation(row).messages] == [
        ("system", "Be brief."),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_one_text_of_the_system_counts() -> None:
    """That of the turns, else that of the row, for each form; what does not count is listed."""
    row = {"messages": ASKED, "system_prompt": "s", "id": 7, "tags": [], "note": ""}
    messages, _, unread = to_conversation(row)
    assert messages == [{"role": "system", "content": "s"}, *ASKED] and unread == {"id"}
    messages, _, unread = to_conversation({"messages": messages, "system": "t"})
    assert [m["content"] for m in messages] == ["s", "Hi", "Hello"] and unread == {"system"}


def test_input_and_context_belong_to_an_instruction_whatever_its_answer_is_called() -> None:
    """Nothing of the question is lost."""
    for answer in ("output", "response"):
        row = {"instruction": "a", "input": "b", "context": "c", answer: "d"}
        assert to_conversation(row).messages[0]["content"] == "a\n\nb\n\nc"


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


def test_names_that_only_begin_like_weights_are_not_read() -> None:
    """Nor lists of texts, nor what tokenising left in a row."""
    beside = {"training_tags": ["a"], "attention_mask": [1, 1], "learning_rates": [0.1]}
    assert to_conversation({**ROW, **beside}).unread == {*beside}
    turns = [ASKED[0], ASKED[1] | {"learner_id": "x", "trainer": "y", "attention_mask": [1]}]
    assert to_conversation({"messages": turns}).messages[1]["trainer"] == "y"


def test_history_comes_before_the_question() -> None:
    """Pairs, as LLaMA-Factory keeps them, after the system's text."""
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    found = [(m["role"], m["content"]) for m in to_conversation(row).messages]
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert found == list(zip(roles, "sabcd", strict=True))


def test_answers_within_a_prompt_are_not_trained() -> None:
    """The loss is on the completion, whatever the turns of the prompt say."""
    row = {"prompt": [ASKED[0], ASKED[1] | {"train": True}, ASKED[0]], "completion": ASKED[1:]}
    assert [m.get("weight", 1) for m in to_conversation(row).messages] == [1, 0, 1, 1]


def test_what_stands_beside_other_forms_is_kept() -> None:
    """Dolly's context follows the instruction; OpenOrca's system prompt comes first."""
    dolly = to_conversation({"instruction": "a", "context": "b", "response": "c"})
    assert dolly.messages[0]["content"] == "a\n\nb"
    orca = to_conversation({"system_prompt": "s", "question": "a", "response": "b"})
    assert [m["role"] for m in orca.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "said",
    [
        *({"weight": 0}, {"loss_weight": 0.0}, {"loss_mask": 0}, {"train": False}, {"loss": False}),
        *({"training": False}, {"trainable": False}, {"masked": True}, {"is_masked": True}),
        {"train_mask": 0},
    ],
)
def test_a_turn_without_weight_keeps_it_and_other_keys_stay(said: dict[str, Any]) -> None:
    """Whatever tool wrote it; what else a turn has is for the template."""
    turns = [
        ASKED[0] | {"name": "Ann"},
        ASKED[1] | said | {"reasoning_content": "r"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"from": "observation", "value": "sunny", "tool_call_id": "7"},
        ASKED[1],
    ]
    tools = [{"type": "function"}]
    row = {"messages": turns, "tools": json.dumps(tools), "chat_template_kwargs": {"deep": True}}
    messages, variables, _ = to_conversation(row)
    assert [m.get("weight", 1) for m in messages] == [1, 0, 1, 1, 1]
    assert messages[0]["name"] == "Ann" and messages[1]["reasoning_content"] == "r"
    assert messages[2]["content"] == "" and messages[2]["tool_calls"] == turns[2]["tool_calls"]
    assert messages[3] == {"role": "tool", "content": "sunny", "tool_call_id": "7"}
    assert variables == {"deep": True, "tools": tools}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "no conversation (found keys: 'text')"),
        ({"instruction": "x"}, "no conversation"),
        ({"messages": {"role": "user"}}, "'messages' is dict, expected a list of turns"),
        ({"messages": "x"}, "'messages' is a text that is no JSON"),
        ({"messages": ["x"]}, "turn 1: expected role and content, found str"),
        ({"messages": [{"content": "x"}]}, "turn 1: no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without a text"),
        ({**ROW, "tools": "not JSON"}, "'tools' is a text that is no JSON"),
        ({**ROW, "tools": "[" * 9999}, "'tools' is a text that is no JSON"),
        ({**ROW, "tools": {"name": "f"}}, "'tools' is dict, expected a list"),
        ({**ROW, "chat_template_kwargs": 5}, "'chat_template_kwargs' is int, expected a dict"),
        ({"instruction": "x", "output": "y", "history": 5}, "'history' is not a list of pairs"),
        ({"messages": [{**ASKED[0], "masked": False}, ASKED[1]]}, "turn 1: only turns of the assi"),
        ({**ROW, "functions": [1], "tools": [1]}, "has 'functions' and 'tools': keep one"),
        ({**ROW, "images": ["a.png"]}, "has 'images': only text"),
        (
            {"messages": [{**ASKED[0], "image": "a.png"}, ASKED[1]]},
            "turn 1: has 'image': only text",
        ),
        ({**ROW, "weight": 0.5}, "'weight' is 0.5: only turns have a weight, 0 or 1"),
        ({**ROW, "train": False}, "'train' is False: only turns"),
        ({**ROW, "mask": [0, 1]}, "'mask' is [0, 1]: only turns"),
        *(
            ({**ROW, key: [0, 1]}, f"'{key}' is [0, 1]: only turns have a weight")
            for key in ("weights", "loss_weights", "train_mask", "turn_masks")
        ),
        ({**ROW, "train_on_prompt": True}, "'train_on_prompt' is True: only turns"),
        ({**ROW, "train_on_inputs": 1}, "'train_on_inputs' is 1: only turns"),
        ({**ROW, "is_trainable": False}, "'is_trainable' is False: only turns"),
        *(
            ({"messages": [ASKED[0], ASKED[1] | said]}, f"turn 2: '{next(iter(said))}' is not read")
            for said in ({"mask": True}, {"learn": False}, {"weights": [1]}, {"no_train": 1})
        ),
        (
            {
                "messages": [
                    {**ASKED[1], "content": [{"type": "text", "text": "x", "train": False}]}
                ]
            },
            "turn 1: a part of the content has 'train': cut the turn",
        ),
        ({"prompt": "x", "completion": "y", "label": False}, "'label' is False: a completion to"),
        ({"instruction": "x", "output": "y", "kto_tag": False}, "'kto_tag' is False: a completion"),
        (
            {"messages": [{**ASKED[0], "value": "x"}, ASKED[1]]},
            "turn 1: 'value' says something else than 'content': keep one",
        ),
        (
            {"messages": [ASKED[0], {**ASKED[1], "from": "human"}]},
            "turn 2: 'from' says something else than 'role': keep one",
        ),
        (
            {"question": "x", "answer": "y", "context": "z"},
            "'context' is not read beside 'question'",
        ),
        ({"prompt": "x", "response": "y", "input": "z"}, "'input' is not read beside 'prompt' and"),
        ({**ROW, "conversations": ASKED[:1]}, "'messages' say something else than 'conversations'"),
        (
            {"question": "x", "response": "y", "answer": "z"},
            "'response' say something else than 'qu",
        ),
        (
            {**ROW, "system": "s", "system_prompt": "t"},
            "'system' says something else than 'system_p",
        ),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, "turn 2: 'weight' is 0.5; only 0"),
        ({"messages": [{**ASKED[0], "train": True}, ASKED[1]]}, "turn 1: only turns of the assi"),
        ({"messages": [{**ASKED[1], "train_detail": [{}]}]}, "turn 1: 'train_detail' is not read"),
        (
            {"messages": [{**ASKED[1], "weight": 1, "train": False}]},
            "turn 1: 'weight' and 'train' contradict each other",
        ),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "'history' is not a list of pairs"),
        ({"instruction": "x", "input": 3, "output": "y"}, "'instruction' and 'input'"),
    ],
)
def test_row_of_another_form_is_refused_not_guessed(row: Any, problem: str) -> None:
    """A row that cannot be trained on as it stands is refused with what was found."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        to_conversation(row)


def test_a_store_of_another_way_to_read_is_not_used() -> None:
    """Whoever changes what is read of a row raises the version, or old tokens would be used."""
    pair = {"instruction": "x", "output": "y"}
    answers = [ASKED[1] | said for said in ({"train_mask": 0}, {"name": "n"}, {"learn": 0})]
    rows = [{"messages": [ASKED[0], answer]} for answer in answers]
    rows += [ROW | {key: value} for key in ("weights", "mask") for value in (None, [0, 1])]
    rows += [pair | more for more in ({"input": "z"}, {"history": [["a", "b"]]}, {"system": "s"})]
    rows += [{"prompt": ASKED, "completion": "z"}, ROW | {"functions": [1]}, ROW | {"prompt": "z"}]
    found: list[Any] = []
    for row in rows:
        try:
            found.append(to_conversation(row)[:2])
        except ValueError:
            found.append("refused")
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8]
    assert (packing.FORMAT_VERSION, digest) == (4, "35f6f574"), found


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
        f"{wide}:1: not UTF-8",
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
    assert [line.strip() for line in lines_of(problems)] == [
        f"{lines}:2: the key 'content' {end}",
        f"{lines}:3: the key 'id' {end}",
        f"{lines}:5: 'tools' is a text that is no JSON ('type' comes twice)",
        f"{listed}:2: the key 'content' {end}",
        f"{listed}:3: the key 'id' {end}",
        f"{broken}:1: the key 'content' {end}",
        f"{broken}:1: not JSON (Expecting value: line 1 column {column} (char {column - 1}))",
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
