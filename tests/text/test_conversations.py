"""Rows and turns of chats: every form is read, and every mistake is named."""

import hashlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from llamapro.text import packing
from llamapro.text.conversations import to_conversation
from llamapro.text.messages import PARTS

_chats = runpy.run_path(str(Path(__file__).with_name("chats.py")))
ASKED, ROW, read, lines_of, write = map(_chats.get, ("ASKED", "ROW", "read", "lines_of", "write"))
IN_PARTS = [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}]


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
    texts = [{key: m[key] for key in m if key != PARTS} for m in messages]
    assert (texts, variables) == (ASKED, {})


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


def test_names_that_only_begin_like_weights_are_not_read() -> None:
    """Nor lists of texts, nor what tokenising left in a row."""
    beside = {"training_tags": ["a"], "attention_mask": [1, 1], "learning_rates": [0.1]}
    assert to_conversation({**ROW, **beside}).unread == {*beside}
    turns = [ASKED[0], ASKED[1] | {"learner_id": "x", "trainer": "y", "attention_mask": [1]}]
    assert to_conversation({"messages": turns}).messages[1]["trainer"] == "y"


def test_a_turn_that_is_a_call_becomes_the_assistant_s() -> None:
    """LLaMA-Factory and ms-swift keep a call of a tool as a turn of its own, as a text of JSON."""
    call = {"name": "f", "arguments": {"x": 1}}
    said = [{"type": "function", "function": call}]
    for role, answer in (("function_call", "observation"), ("tool_call", "tool_response")):
        for value in (json.dumps(call), json.dumps([call]), call):
            turns = [
                {"from": "human", "value": "Hi"},
                {"from": role, "value": value},
                {"from": answer, "value": "2"},
                {"from": "gpt", "value": "Hello"},
            ]
            assert to_conversation({"conversations": turns}).messages == [
                ASKED[0],
                {"role": "assistant", "content": "", "tool_calls": said},
                {"role": "tool", "content": "2"},
                ASKED[1],
            ]
    seen = to_conversation({"prompt": turns[:3], "completion": "Hello"}).messages
    assert [message.get("weight", 1) for message in seen] == [1, 0, 1, 1]


def test_tools_may_be_texts_of_json_in_a_list() -> None:
    """As tables keep them whose tools have different parameters; the template gets objects."""
    tools = [{"name": "f", "parameters": {"x": 1}}, {"name": "g"}]
    for said in (tools, json.dumps(tools), [json.dumps(tool) for tool in tools]):
        assert to_conversation(ROW | {"tools": said}).variables == {"tools": tools}


def test_turns_as_lists_of_roles_and_contents_are_read() -> None:
    """`datasets` makes of a sequence of objects an object of lists, in JSON and parquet."""
    turns = {"role": ["user", "assistant"], "content": ["Hi", "Hello"], "name": [None, None]}
    assert to_conversation({"messages": turns}).messages == ASKED
    turns = {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}
    assert to_conversation({"conversations": turns, "prompt": "x", "response": "y"})[0] == ASKED
    assert to_conversation({"conversations": json.dumps(turns)}).messages == ASKED


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
    empty = {"tool_calls": [], "reasoning_content": "", "thinking": ""}
    (_, message), *_ = to_conversation({"messages": [ASKED[0], ASKED[1] | empty]})
    assert not message.keys() & empty.keys()  # a template may ask whether they are there
    assert messages[3] == {"role": "tool", "content": "sunny", "tool_call_id": "7"}
    assert variables == {"deep": True, "tools": tools}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "no conversation (found keys: 'text')"),
        ({"instruction": "x"}, "no conversation"),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": "b", "tool_calls": True}]},
            "turn 2: 'tool_calls' is True, expected a list of calls",
        ),
        ({"messages": {"role": "user"}}, "'messages' is dict, expected a list of turns"),
        ({"messages": "x"}, "'messages' is a text that is no JSON"),
        (
            {"messages": [ASKED[0], {"role": "function_call", "content": "f(x)"}]},
            "turn 2: the call is a text that is no JSON (Expecting value: line 1 column 1 (char 0)"
            "): 'f(x)'",
        ),
        (
            {"messages": [ASKED[0], {"role": "assistant", "tool_calls": "f(x)"}]},
            "turn 2: 'tool_calls' is a text that is no JSON",
        ),
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
            for said in (
                {"mask": True},
                {"learn": False},
                {"weights": [1]},
                {"no_train": 1},
                {"train_on_turn": False},
            )
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
        ({"prompt": "x", "completion": "y", "label": "False"}, "'label' is False: a completion to"),
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
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "; save 'chosen', with the prompt befor"),
        ({"messages": {"role": ["user"], "content": []}}, "'messages' has lists of several len"),
        ({"messages": {"turns": ASKED}}, "'messages' is dict, expected a list of turns"),
        (ROW | {"tools": ["f"]}, "'tools' is a text that is no JSON"),
        (ROW | {"tools": "[[1]]"}, "'tools' has [1], expected objects"),
        ({"messages": {"role": "user"}}, "'messages' is dict, expected a list of turns"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "turn 1: a part of type str"),
        ({"messages": [ASKED[0], {"role": "tool_call", "content": "f()"}]}, "turn 2: the call"),
        (
            {"messages": [ASKED[0], {"role": "function_call", "content": "[1]"}]},
            "turn 2: expected a call's name and arguments, not '[1]'",
        ),
        (
            {"messages": [{"role": "tool_call", "content": '{"name": "f"}'}] * 2},
            "turn 2: a second call in a row: put both into one list",
        ),
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
    rows += [{"messages": [ASKED[0], {"role": "tool_call", "content": '{"name": "f"}'}]}]
    rows += [{"prompt": ASKED, "completion": "z"}, ROW | {"functions": [1]}, ROW | {"prompt": "z"}]
    rows += [{"messages": [ASKED[0], ASKED[1] | {"function_call": '{"name": "f"}'}]}]
    rows += [{"messages": [ASKED[0], ASKED[1] | {"content": [{"type": "text", "text": "x"}]}]}]
    rows += [
        {"messages": [ASKED[0], ASKED[1] | {"train_on_turn": False}]},
        pair | {"label": "False"},
    ]
    found: list[Any] = []
    for row in rows:
        try:
            found.append(to_conversation(row)[:2])
        except ValueError:
            found.append("refused")
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8]
    assert (packing.FORMAT_VERSION, digest) == (10, "673fb16c"), found
