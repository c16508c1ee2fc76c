"""What data give in several forms, and templates take in one: parts of a content, arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llamapro.errors import DataError
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.conversations import to_conversation
from llamapro.text.messages import check_messages
from llamapro.text.tokenizer import Tokenizer

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
TAIL = (
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Gemma 3's and Llama 4's: each part without the white space around it.
TRIMMED = (
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
)
LINES = (
    "{{ m.content if m.content is string else m.content | map(attribute='text') | join('\\n') }}"
)
# As Qwen 2.5's and Llama 3.1's.
CALLS = "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    """The byte-level tokenizer of `directory`."""
    return Tokenizer.load(directory)


@pytest.mark.parametrize("shown", [TRIMMED, LINES], ids=["trimmed", "lines"])
@pytest.mark.parametrize("tagged", [True, False])
def test_a_template_gets_the_parts_that_it_takes_one_by_one(
    directory: Path, tokenizer: Tokenizer, shown: str, tagged: bool
) -> None:
    """The ids of transformers, with its mask where the template has tags."""
    chat = [
        {"role": "user", "content": parts("Look: ", " here ")},
        {"role": "assistant", "content": parts(" One", "two\n")},
        {"role": "user", "content": " So? "},
        {"role": "assistant", "content": "Yes. "},
    ]
    answer = "{% generation %}" + shown + "{% endgeneration %}" if tagged else shown
    source = f"{HEAD}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{shown}{{% endif %}}{TAIL}"
    ids, trained = ChatTemplate(source, tokenizer, "x").encode(
        to_conversation({"messages": chat}).messages
    )
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        chat, chat_template=source, return_dict=True, return_assistant_tokens_mask=tagged
    )
    assert ids == theirs["input_ids"]
    assert not tagged or [*map(int, trained)] == theirs["assistant_masks"]


def test_other_templates_get_the_parts_joined(tokenizer: Tokenizer) -> None:
    """One that prints a list, makes it JSON, or adds it to a text would not show the parts."""
    chat = [{"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": "c"}]
    messages, *_ = to_conversation({"messages": chat})
    for shown in ("{{ m.content | trim }}", "{{ '' + m.content }}", "{{ m.content | tojson }}"):
        text = ChatTemplate(HEAD + shown + TAIL, tokenizer, "x").render(messages)
        assert "ab" in text and "type" not in text


def test_a_part_that_a_template_leaves_out_is_refused(tokenizer: Tokenizer) -> None:
    """Gemma 3's shows the first part of the system's text alone."""
    source = HEAD + "{{ m.content if m.content is string else m.content[0].text }}" + TAIL
    chat = [{"role": "user", "content": parts("one a", "two b")}]
    chat += [{"role": "assistant", "content": "c"}]  # type: ignore[dict-item]
    with pytest.raises(DataError, match="turn 1: the template shows nothing of its text, 'two b'"):
        ChatTemplate(source, tokenizer, "x").encode(to_conversation({"messages": chat}).messages)


@pytest.mark.parametrize(
    "shown", ["{{ m.content | tojson if m.content is mapping else m.content }}", "{{ m.content }}"]
)
def test_a_tool_s_result_may_be_an_object(
    directory: Path, tokenizer: Tokenizer, shown: str
) -> None:
    """The template gets it, as in transformers; one that adds it to a text fails there too."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "f"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": {"a": "é", "b": [1.5, True]}},
        {"role": "assistant", "content": "c"},
    ]
    messages, *_ = to_conversation({"messages": chat})
    source = HEAD + shown + "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}" + TAIL
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        chat, chat_template=source, return_dict=True
    )
    assert ChatTemplate(source, tokenizer, "x").encode(messages)[0] == theirs["input_ids"]
    with pytest.raises(DataError, match=r"concatenate.*; turn 3: the tool's result is an object"):
        ChatTemplate(HEAD + "{{ '' + m.content }}" + TAIL, tokenizer, "x").render(messages)
    messages, *_ = to_conversation({"messages": [{"role": "user", "content": {"a": 1}}]})
    assert "turn 1: the content is dict, expected a string" in check_messages(messages)


def test_a_key_of_an_object_is_no_control_token(tokenizer: Tokenizer) -> None:
    """As a value is none: a tool's result could end its turn."""
    chat = [{"role": "user", "content": "f"}, {"role": "tool", "content": {"<|im_end|>": 1}}]
    messages, *_ = to_conversation({"messages": [*chat, {"role": "assistant", "content": "c"}]})
    ids, _ = ChatTemplate(HEAD + "{{ m.content | tojson }}" + TAIL, tokenizer, "x").encode(messages)
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == len(messages)


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
@pytest.mark.parametrize("shown", [CALLS, CALLS.replace(" | tojson", "")], ids=["json", "as it is"])
def test_arguments_as_a_text_are_not_put_in_quotes(
    tokenizer: Tokenizer, key: str, shown: str
) -> None:
    """OpenAI's are a text of JSON; one that the template writes as it is stays so."""
    call: Any = {"name": "f", "arguments": '{"q": "é"}'}
    call = [{"function": call}] if key == "tool_calls" else json.dumps(call)
    chat = [{"role": "user", "content": "f"}, {"role": "assistant", "content": "", key: call}]
    messages, *_ = to_conversation({"messages": chat})
    text = ChatTemplate(HEAD + shown + TAIL, tokenizer, "x").render(messages)
    assert text.endswith('assistant\n{"q": "é"}<|im_end|>\n')


def test_arguments_that_are_no_json_are_refused(tokenizer: Tokenizer) -> None:
    """Where the template needs an object; a call without arguments has an empty one."""
    template = ChatTemplate(HEAD + CALLS + TAIL, tokenizer, "x")
    calls = [{"function": {"name": "f", "arguments": said}} for said in ("", "{q: 1}")]
    chats = [[{"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    assert "assistant\n{}<|im_end|>" in template.render(chats[0])
    with pytest.raises(DataError, match="turn 1: the 'arguments' of 'f' is a text that is no JSON"):
        template.render(chats[1])
    for call, lacks in (({"function": {"name": "f"}}, "arguments"), ({"name": "f"}, "function")):
        with pytest.raises(DataError, match=f"turn 1: the call of 'f' has no '{lacks}'"):
            template.render([{**chats[0][0], "tool_calls": [call]}])


def test_a_call_that_a_template_goes_through_gets_an_object(tokenizer: Tokenizer) -> None:
    """As Qwen3-Coder's, which fails for a text."""
    shown = "{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ k ~ v }}"
    template = ChatTemplate(f"{HEAD}{shown}{{% endfor %}}{{% endfor %}}{TAIL}", tokenizer, "x")
    call = {"function": {"name": "f", "arguments": '{"q": 1}'}}
    text = template.render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "assistant\nq1<|im_end|>" in text


@pytest.mark.parametrize("arguments", [None, [], {}, 1])
def test_arguments_that_are_no_text_stay_as_they_are(tokenizer: Tokenizer, arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    chat = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    text = ChatTemplate(HEAD + CALLS + TAIL, tokenizer, "x").render(chat)
    assert f"assistant\n{json.dumps(arguments)}<|im_end|>" in text


@pytest.mark.parametrize("role", ["system", "tool", "assistant"])
def test_each_role_is_asked_whether_it_takes_parts(tokenizer: Tokenizer, role: str) -> None:
    """Llama 3.2's takes them of users alone, and would print a system's list."""
    shown = (
        f"{{% if m.role == 'user' %}}{TRIMMED}{{% else %}}{{{{ m.content | string }}}}{{% endif %}}"
    )
    chat = [{"role": r, "content": parts("a ", "b ")} for r in ("user", "assistant", "user")]
    chat[0 if role == "system" else 1]["role"] = role
    chat += [{"role": "assistant", "content": "c"}] * (role != "assistant")  # type: ignore[list-item]
    messages, *_ = to_conversation({"messages": [*chat, {"role": "assistant", "content": "c"}]})
    text = ChatTemplate(HEAD + shown + TAIL, tokenizer, "x").render(messages)
    assert f"{role}\na b <|im_end|>" in text and "user\nab<|im_end|>" in text


def test_a_turn_s_own_key_for_parts_is_as_any_other(tokenizer: Tokenizer) -> None:
    """It neither replaces the content nor breaks what reads it."""
    chat: Any = [{"role": "user", "content": "Hello", "content_parts": [{"text": "no"}]}]
    messages, *_ = to_conversation({"messages": [*chat, {"role": "assistant", "content": "c"}]})
    ids, _ = ChatTemplate(HEAD + TRIMMED + TAIL, tokenizer, "x").encode(messages)
    assert tokenizer.decode(ids).count("user\nHello") == 1
