"""Where the assistant's turns lie: templates that change earlier turns, end them late or lose them.

The reference is transformers' rendering of the same turns.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from llamapro.errors import DataError
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.conversations import to_conversation
from llamapro.text.packing import tokenize_conversations
from llamapro.text.tokenizer import Tokenizer

# As Qwen3's: the reasoning of turns before the last question is left out, and the last turn has a
# place for it even if there is none.
FORGETS = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set text, said = m.content, '' -%}
{%- if m.reasoning_content is string -%}{%- set said = m.reasoning_content -%}
{%- elif '</think>' in text -%}
{%- set said = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[-1].lstrip() -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' + said.strip() + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- text + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    """The byte-level tokenizer of `directory`."""
    return Tokenizer.load(directory)


def trained_text(tokenizer: Tokenizer, sample: tuple[Sequence[int], Sequence[bool]]) -> list[str]:
    """The runs of trained tokens as text, control tokens by name."""
    names = {i: name.encode() for name, i in tokenizer.special_tokens.items()}
    runs, before = [b""], False
    for token_id, is_trained in zip(*sample, strict=True):
        if is_trained:
            runs += [] if before else [b""]
            runs[-1] += names.get(token_id, b"") or tokenizer.bytes_of(token_id)
        before = is_trained
    return [run.decode() for run in runs[1:]]


@pytest.mark.parametrize("key", [True, False], ids=["key", "tags"])
def test_a_template_that_forgets_reasoning_gives_a_sample_per_answer(
    directory: Path, tokenizer: Tokenizer, key: bool
) -> None:
    """Each answer is trained with its reasoning, behind what transformers shows before it."""
    chat = [user("Hi"), answer("<think>\nhm\n</think>\n\nHello"), user("More?")]
    chat += [answer("<think>\nno\n</think>\n\nNo.")]
    if key:
        chat[1::2] = [answer("Hello", reasoning_content="hm"), answer("No.", reasoning="no")]
    samples = ChatTemplate(FORGETS, tokenizer, "x").samples(chat)
    theirs = AutoTokenizer.from_pretrained(directory)
    for count, (ids, _) in zip((2, 4), samples, strict=True):
        assert ids == theirs.apply_chat_template(
            chat[:count], chat_template=FORGETS, return_dict=False
        )
    assert [trained_text(tokenizer, sample) for sample in samples] == [
        ["<think>\nhm\n</think>\n\nHello<|im_end|>"],
        ["<think>\nno\n</think>\n\nNo.<|im_end|>"],
    ]


def test_an_answer_behind_one_that_it_changes_is_trained(
    directory: Path, tokenizer: Tokenizer
) -> None:
    """Qwen3's has a place for reasoning in the last turn, and not in the answer before it."""
    shown = "loop.index0 > ns.last"
    source = FORGETS.replace(shown, f"{shown} and (loop.last or said)")
    chat = [user("Hi"), answer("Hello"), answer("More."), user("x"), answer("y")]
    samples = ChatTemplate(source, tokenizer, "x").samples(chat)
    theirs = AutoTokenizer.from_pretrained(directory)
    for count, (ids, _) in zip((2, 3, 5), samples, strict=True):
        assert ids == theirs.apply_chat_template(
            chat[:count], chat_template=source, return_dict=False
        )
    assert [trained_text(tokenizer, sample) for sample in samples] == [
        [f"<think>\n\n</think>\n\n{text}<|im_end|>"] for text in ("Hello", "More.", "y")
    ]


def test_an_answer_without_a_prompt_before_it_is_refused(tokenizer: Tokenizer) -> None:
    """Gemma 4's template puts a second answer behind the first, as nobody would generate it."""
    source = (
        "{% for m in messages %}{% if loop.index0 == 0 or m.role != messages[loop.index0-1].role %}"
        "<|im_start|>{{ m.role }}\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"turn 3: .* before an answer, and not before this one"):
        ChatTemplate(source, tokenizer, "x").samples([user("Hi"), answer("Hello"), answer("More.")])


def test_reasoning_behind_tags_gives_a_sample_per_answer(tokenizer: Tokenizer) -> None:
    """With {% generation %} the turns are found in any case, but not what a template left out."""
    shown = "{{- '<think>\\n' + said.strip() + '\\n</think>\\n\\n' -}}"
    text = "{{- text + '<|im_end|>\\n' -}}"
    assert shown in FORGETS and text in FORGETS
    tagged = FORGETS.replace(shown, "{%- set text = '<think>' + said + '</think>' + text -%}")
    tagged = tagged.replace(
        text,
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- text -}}{%- endgeneration -%}"
        "{%- else -%}{{- text -}}{%- endif -%}{{- '<|im_end|>\\n' -}}",
    )
    chat = [user("Hi"), answer("<think>hm</think>Hello"), user("More?"), answer("No.")]
    samples = ChatTemplate(tagged, tokenizer, "x").samples(chat)
    assert [trained_text(tokenizer, sample) for sample in samples] == [
        ["<think>hm</think>Hello"],
        ["<think></think>No."],
    ]


def test_reasoning_in_other_white_space_is_shown(tokenizer: Tokenizer) -> None:
    """A template may join lines."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('\\n', ' ') }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = [user("Hi"), answer("<think>a\nb</think>Yes")]
    (sample,) = ChatTemplate(source, tokenizer, "x").samples(chat)
    assert trained_text(tokenizer, sample) == ["<think>a b</think>Yes</s>"]


def test_only_trained_turns_have_to_be_found(tokenizer: Tokenizer) -> None:
    """A turn of weight 0 may be changed later; then the conversation is one sample."""
    template = ChatTemplate(FORGETS, tokenizer, "x")
    seen = answer("Hello", weight=0)
    (sample,) = template.samples([user("Hi"), seen, user("More?"), answer("No.")])
    assert trained_text(tokenizer, sample) == ["<think>\n\n</think>\n\nNo.<|im_end|>"]
    (sample,) = template.samples([user("Hi"), answer("Yes"), user("More?"), {**seen}])
    assert trained_text(tokenizer, sample) == ["<think>\n\n</think>\n\nYes<|im_end|>"]


def test_samples_of_one_conversation_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary says conversations, and how many samples more there are."""
    rows = [[user("Hi"), answer("Hello")], [user("Hi"), answer("Hello"), user("x"), answer("y")]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    template = ChatTemplate(FORGETS, tokenizer, "x")
    store = tokenize_conversations({"a": [str(file)]}, template, "0", tmp_path / "cache")["a"]
    assert store.documents == 3
    said = capsys.readouterr().err
    assert "a: 2 conversations, 6 turns" in said
    assert "1 samples more, because the template changes earlier turns" in said


@pytest.mark.parametrize("key", [True, False], ids=["key", "tags"])
def test_reasoning_that_a_template_never_shows_is_refused(tokenizer: Tokenizer, key: bool) -> None:
    """DeepSeek R1's template cuts it off every answer, so it would not be trained."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}{# reasoning_content #}"
    )
    turn = answer("Yes", reasoning_content="hm") if key else answer("<think>hm</think>Yes")
    template = ChatTemplate(source, tokenizer, "r1.jinja")
    with pytest.raises(DataError, match=r"r1\.jinja: turn 2: .* leaves out its reasoning, 'hm'"):
        template.samples([user("Hi"), turn])
    (sample,) = template.samples([user("Hi"), {**turn, "weight": 0}, user("x"), answer("y")])
    assert trained_text(tokenizer, sample) == ["y</s>"]


@pytest.mark.parametrize("earlier", ["<|eot_id|>", "", "\n"])
def test_each_answer_learns_the_end_that_it_has_as_the_last(
    tokenizer: Tokenizer, earlier: str
) -> None:
    """As gpt-oss's: EOS behind the last answer, and another token or none behind earlier ones."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last and not "
        "add_generation_prompt %}{{ eos_token }}{% else %}" + earlier + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = [user("Hi"), answer("Hello"), user("More?"), answer("No.")]
    samples = ChatTemplate(source, tokenizer, "x").samples(chat)
    assert [trained_text(tokenizer, sample) for sample in samples] == [["Hello</s>"], ["No.</s>"]]


def test_eos_behind_all_turns_but_the_last_ends_them(tokenizer: Tokenizer) -> None:
    """Templates leave the last turn open to continue it; the others end, and that is trained."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = [user("Hi"), answer("Hello"), user("More?"), answer("No.")]
    (sample,) = ChatTemplate(source, tokenizer, "x").samples(chat)
    assert trained_text(tokenizer, sample) == ["Hello</s>", "No."]


@pytest.mark.parametrize("end", ["", "{{ eos_token }}"])
def test_a_template_that_ends_no_answer_is_said(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    """As GLM 4.5's, in which the next header ends a turn: nothing is trained to stop."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + end
    source += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ends = ChatTemplate(source, tokenizer, "glm.jinja").end_ids()
    assert ends == ({tokenizer.eos_id} if end else set())
    said = "glm.jinja: no token ends the last answer of a conversation, so a model does not learn"
    assert (said in capsys.readouterr().err) == (not end)


def test_a_header_behind_a_first_turn_of_the_assistant_is_not_trained(tokenizer: Tokenizer) -> None:
    """Llama 3's first template puts it behind every answer; the first turn may be one."""
    source = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
        "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>"
    )
    with pytest.raises(DataError, match=r"turn 1: .* ignores add_generation_prompt"):
        ChatTemplate(source, tokenizer, "x").samples([answer("Welcome")])


@pytest.mark.parametrize("tagged", [True, False])
def test_a_word_that_shares_its_token_with_a_space_outside_is_trained(
    tmp_path: Path, train_byte_level: Callable[..., tokenizers.Tokenizer], tagged: bool
) -> None:
    """The space behind a header, or the line end behind an answer; as transformers marks it."""
    source = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "text").write_text("it is,\n" * 9)
    raw = json.loads(train_byte_level(tmp_path / "text", 300, []).to_str())
    raw["model"]["vocab"][",Ċ"] = len(raw["model"]["vocab"])
    raw["model"]["merges"].append([",", "Ċ"])
    raw["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode(" is,\n")) == 2  # or nothing is tested
    chat = [answer("is it is,"), user("Hi"), answer("is")]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chat, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    if not tagged:
        for tag in ("{% generation %}", "{% endgeneration %}"):
            source = source.replace(tag, "")
    ((ids, trained),) = ChatTemplate(source, tokenizer, "x").samples(chat)
    assert ids == expected["input_ids"]
    marks = [*map(bool, expected["assistant_masks"])]
    if not tagged:  # without tags, the line end is of the turn
        marks[-1] = True
    assert trained == marks


def test_a_call_that_a_template_loses_is_refused(tokenizer: Tokenizer) -> None:
    """DeepSeek's templates show it only if the content is null; transformers 5 leaves that out."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m['content'] is none %}"
        "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    template = ChatTemplate(source, tokenizer, "r1.jinja")
    with pytest.raises(DataError, match=r"turn 2: the template does not show its call of 'weather"):
        template.samples([user("Hi"), answer("", tool_calls=[call])])


def test_a_tool_that_a_template_does_not_show_is_refused(tokenizer: Tokenizer) -> None:
    """Nor is a call shown because its tool is: this template has other names for what a call is."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.name }}()</s>{% endfor %}{% if m.role == 'user' and not loop.first %}"
        "{{ tools | tojson }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template, tools = ChatTemplate(source, tokenizer, "x"), [{"name": "Weather"}]
    chat = [user("Hi"), answer("Yes"), user("?"), answer("", tool_calls=[{"name": "Weather"}])]
    with pytest.raises(DataError, match="the template does not show the tool 'Weather'"):
        template.encode(chat[:2], {"tools": tools})
    template.encode(chat, {"tools": tools})
    chat[3]["tool_calls"] = [{"function": tools[0]}]
    with pytest.raises(DataError, match="turn 4: the template does not show its call of 'Weather'"):
        template.encode(chat, {"tools": tools})


@pytest.mark.parametrize("role", ["developer", "system"])
def test_a_turn_is_not_shown_by_words_that_another_turn_has(
    tokenizer: Tokenizer, role: str
) -> None:
    """Templates pass over a developer's message, or a second one of the system."""
    source = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') or loop.first %}"
        "[{{ m.role }}]{{ m.content | replace('\n', ' ') }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = ChatTemplate(source, tokenizer, "x")
    first = {"role": "system", "content": "You help\nall of the people."}
    chat = [user("Are you\nthe help?"), answer("<think>all the people</think>Yes")]
    template.samples([first, *chat])
    with pytest.raises(DataError, match="turn 2: the template shows nothing of its text"):
        template.samples([first, {"role": role, "content": "Help all the people."}, *chat])


def test_words_are_shown_as_words_and_in_any_case(tokenizer: Tokenizer) -> None:
    """ "me" within "name" does not show "Let me see"; a template may write in small letters."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{{ m.tool_calls }}{% else %}"
        "{{ m.content | lower }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = ChatTemplate(source, tokenizer, "x")
    (sample,) = template.samples([user("Hi"), answer("HELLO")])
    assert trained_text(tokenizer, sample) == ["hello</s>"]
    call = answer("Let me see", tool_calls=[{"name": "f"}])
    with pytest.raises(DataError, match="turn 2: the template shows nothing of its text, 'Let me"):
        template.samples([user("Hi"), call])


def test_tojson_takes_its_options_in_order(directory: Path, tokenizer: Tokenizer) -> None:
    """By name or not, as transformers' filter."""
    source = (
        "{{ messages[0] | tojson(true, 2) }}{{ messages[0] | tojson(false, none, (',', ':')) }}"
    )
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [user("é")], chat_template=source, tokenize=False
    )
    assert ChatTemplate(source, tokenizer, "x").render([user("é")]) == expected


def test_a_tokenizer_without_control_tokens_has_chats(
    tmp_path: Path, train_byte_level: Callable[..., tokenizers.Tokenizer]
) -> None:
    """There is no name to break in a message then."""
    train_byte_level(Path(__file__), 300, []).save(str(tmp_path / "tokenizer.json"))
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    template = ChatTemplate(source, Tokenizer.load(tmp_path), "x")
    assert template.render([user("Hi </s>")]) == "user:Hi </s>;"


def test_turns_without_content_that_say_something_are_read(tokenizer: Tokenizer) -> None:
    """A turn of reasoning alone, and a tool that returns nothing."""
    tool = {"role": "tool", "content": None}
    chat = [user("Hi"), answer(None, reasoning_content="hm"), tool, answer("No.")]
    messages, *_ = to_conversation({"messages": chat})
    assert [message["content"] for message in messages] == ["Hi", "", "", "No."]
    samples = ChatTemplate(FORGETS, tokenizer, "x").samples(messages)
    assert [trained_text(tokenizer, sample) for sample in samples] == [
        ["<think>\nhm\n</think>\n\n<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"]
    ]
    for nothing in (answer(None), user("")):
        with pytest.raises(DataError, match="turn 1: the content is "):
            given = to_conversation({"messages": [nothing, chat[3]]}).messages
            ChatTemplate(FORGETS, tokenizer, "x").samples(given)
