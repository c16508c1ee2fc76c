"""Chat templates: which is taken, what it may do, and what is refused by name, with the turn."""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llamapro.errors import DataError
from llamapro.text import sandbox
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.messages import check_messages
from llamapro.text.template_files import BUILT_IN, own_template
from llamapro.text.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi 日本語!"},
    {"role": "assistant", "content": "Hello é😀\n\n  done"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    """The byte-level tokenizer of `directory`."""
    return Tokenizer.load(directory)


LATER = "renders earlier turns differently once there are later ones, so where"


@pytest.mark.parametrize(
    ("text", "prompt", "why"),
    [
        ("{{ m.content if loop.last or m.role == 'user' else m.content[:5] }}", "", LATER),
        ("{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}", "", LATER),
        (
            "{{ m.content }}",
            "<think>",
            "writes '.*assistant: <think>' before an answer, and not be",
        ),
    ],
    ids=["shortens", "marks the last", "prompts with more"],
)
def test_templates_that_rewrite_earlier_turns_are_refused(
    tokenizer: Tokenizer, text: str, prompt: str, why: str
) -> None:
    """Templates that drop earlier reasoning do; the message names the turn."""
    source = (
        "{% for m in messages %}{{ m.role }}: " + text + "</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: " + prompt + "{% endif %}"
    )
    template = ChatTemplate(source, tokenizer, "their.jinja")
    with pytest.raises(DataError, match=rf"their\.jinja: turn 2: the template {why}"):
        template.encode(CHAT[1:])


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As of a preset."""
    (tmp_path / "a.jinja").write_text("\ufeff{{ messages[0].content }}", encoding="utf-8")
    template = ChatTemplate.load(tmp_path, tokenizer, str(tmp_path / "a.jinja"))
    assert template.render(CHAT[1:2]) == CHAT[1]["content"]


REASONS = """{% for m in messages %}{{ m.role }}: \
{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.mark.parametrize("special", [False, True])
def test_a_template_finds_the_end_of_reasoning_in_a_message(directory: Path, special: bool) -> None:
    """Qwen3's and DeepSeek's look for "</think>", which it writes nowhere; as in transformers.

    A token that is flagged special cannot stand in a message, so there it is refused by name.
    """
    raw = json.loads((directory / "tokenizer.json").read_text())
    new = {**raw["added_tokens"][0], "content": "</think>", "special": special}
    raw["added_tokens"].append(new | {"id": max(t["id"] for t in raw["added_tokens"]) + 1})
    path = directory / "reasons"
    path.mkdir(exist_ok=True)
    shutil.copy(directory / "tokenizer_config.json", path)
    (path / "tokenizer.json").write_text(json.dumps(raw))
    template = ChatTemplate(REASONS, Tokenizer.load(path), "their.jinja")
    answer = {"role": "assistant", "content": "hm</think>Hello"}
    asked, more = CHAT[1], CHAT[3]
    if special:
        with pytest.raises(
            DataError, match=r"because it holds \['</think>'\], the name of a speci"
        ):
            template.render([asked, answer, more])
        return
    theirs = AutoTokenizer.from_pretrained(path)
    for messages in ([asked, answer], [asked, answer, more]):
        found = theirs.apply_chat_template(messages, chat_template=REASONS, tokenize=False)
        assert template.render(messages) == found
    assert template.encode([asked, answer])[0] == theirs.apply_chat_template(
        [asked, answer], chat_template=REASONS, return_dict=False
    )


def test_template_is_found_in_the_model_s_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """chat_template.jinja, then tokenizer_config.json, one or named ones; a given one first."""
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(DataError, match=r"no chat template .*one of llama2, llama3, mistral"):
        ChatTemplate.load(tmp_path, tokenizer)
    config.write_text(json.dumps({"chat_template": "from config"}))
    assert ChatTemplate.load(tmp_path, tokenizer).source == "from config"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    for several in (named, {"rag": "r", "default": "d"}):
        config.write_text(json.dumps({"chat_template": several}))
        assert ChatTemplate.load(tmp_path, tokenizer).source == "d"
    config.write_text(json.dumps({"chat_template": [*named, named[1] | {"template": "last"}]}))
    assert ChatTemplate.load(tmp_path, tokenizer).source == "last"  # as in transformers
    why = "chat_template has rag, and none is named 'default'"
    for without_default, expected in ((named[:1], why), (["x"], "no chat template")):
        config.write_text(json.dumps({"chat_template": without_default}))
        with pytest.raises(DataError, match=expected):
            ChatTemplate.load(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert ChatTemplate.load(tmp_path, tokenizer).source == "from file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("from folder")
    assert ChatTemplate.load(tmp_path, tokenizer).source == own_template(tmp_path) == "from folder"
    mine = tmp_path / "mine.jinja"
    mine.write_text("mine")
    assert ChatTemplate.load(tmp_path, tokenizer, str(mine)).source == "mine"
    with pytest.raises(DataError, match=r"lama3: .*cannot be read.*built-in: llama2, llama3"):
        ChatTemplate.load(tmp_path, tokenizer, "lama3")


def test_built_in_template_of_another_model_is_refused(tokenizer_file: Path) -> None:
    """The model would be trained on the names of its control tokens as plain text."""
    with pytest.raises(DataError, match=r"has no <\|im_end\|>, <\|im_start\|>, which"):
        ChatTemplate.load("", Tokenizer.load(tokenizer_file), "chatml")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"mine\.jinja: line 1"),
        ("{{ raise_exception('no tools here') }}", r"mine\.jinja: .*no tools here"),
        ("{{ messages[0].content + 1 }}", r"mine\.jinja: TypeError"),
        ("{{ messages[9].content.strip() }}", r"mine\.jinja: UndefinedError"),
        ("{{ messages.append(1) }}", r"mine\.jinja: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", r"mine\.jinja: SecurityError"),
        (
            "nothing",
            "shows nothing of its text, 'Be brief.' of 'system'; .* name another --data.chat-temp",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
            "shows nothing of the assistant",
        ),
    ],
)
def test_failing_templates_are_told_with_the_reason(
    tokenizer: Tokenizer, source: str, message: str
) -> None:
    """The template's own words, or what went wrong; it can neither change nor reach anything."""
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, tokenizer, "mine.jinja").encode(CHAT)


def test_templates_have_what_transformers_gives_them(directory: Path, tokenizer: Tokenizer) -> None:
    """tojson without HTML's escapes, the date, loop controls, both special tokens, no tools."""
    source = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}"
        "{{ m | tojson(indent=2, ensure_ascii=True) }}{% endfor %}{{ strftime_now('%Y') | length }}"
        "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ unknown }}"
    )
    messages = [{"role": "user", "content": "<b> é & <|eot_id|>"}, *CHAT[2:]]
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, chat_template=source, tokenize=False
    )
    assert ChatTemplate(source, tokenizer, "x").render(messages) == expected


@pytest.mark.parametrize(
    ("messages", "problems"),
    [
        (CHAT, []),
        ([{"role": "asistant", "content": "x"}, CHAT[2]], ["turn 1: .*'asistant'.*'assistant'"]),
        ([{"role": ["user"], "content": "x"}, CHAT[2]], [r"turn 1: unknown role \['user'\]"]),
        ([{"role": "user", "content": " \n"}, CHAT[2]], ["turn 1: the content is empty"]),
        ([{"role": "user", "content": None}, CHAT[2]], ["turn 1: the content is nothing, expect"]),
        ([{"role": "user", "content": ["x"]}, CHAT[2]], ["turn 1: the content is list, expected"]),
        (CHAT[:2], ["no turn of the assistant"]),
        ([{"role": "user", "content": "\ufdd1"}, CHAT[2]], [r"turn 1: has U\+FDD0"]),
        ([{"role": "user", "content": "\ud800"}, CHAT[2]], ["turn 1: not valid Unicode"]),
        ([{"role": "x", "content": ""}], ["unknown role", "no turn of the assistant"]),
        ([{"role": "system", "content": ""}, *CHAT[1:], {"role": "tool", "content": ""}], []),
    ],
)
def test_conversations_that_cannot_be_trained_on_are_told(
    tokenizer: Tokenizer, messages: Any, problems: list[str]
) -> None:
    """Every problem, with the turn; `encode` refuses with the same words."""
    found = check_messages(messages)
    assert len(found) == len(problems)
    for text, pattern in zip(found, problems, strict=True):
        assert re.search(pattern, text), text
    if problems:
        with pytest.raises(DataError) as error:
            ChatTemplate.load("", tokenizer, "chatml").encode(messages)
        assert str(error.value) == "; ".join(found)


def test_a_prompt_needs_no_answer(tokenizer: Tokenizer) -> None:
    """Generation starts from the user's turn; an empty one is still refused."""
    template = ChatTemplate.load("", tokenizer, "chatml")
    text = "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
    assert template.encode_prompt([CHAT[3]]) == tokenizer.encode(text, special=True)
    with pytest.raises(DataError, match="turn 1: the content is empty"):
        template.encode_prompt([{"role": "user", "content": ""}])


@pytest.mark.parametrize("role", ["system", "tool", "assistant"])
def test_a_turn_that_a_template_passes_over_is_refused(tokenizer: Tokenizer, role: str) -> None:
    """Such as one of a role that it does not know, or a text where it wants a list of parts."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == '" + role + "' %}{% for p in "
        "m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = ChatTemplate(source, tokenizer, "their.jinja")
    turns = [CHAT[0], CHAT[1], {"role": "tool", "content": "42"}, CHAT[4]]
    with pytest.raises(DataError, match=f"shows nothing of its text, .* of '{role}'"):
        template.encode(turns)
    if role != "assistant":
        template.encode([turn for turn in turns if turn["role"] != role])


@pytest.mark.parametrize("key", ["extra_special_tokens", "model_specific_special_tokens"])
def test_templates_have_the_named_tokens(spaced: Path, tmp_path: Path, key: str) -> None:
    """unk, pad and a model's own names reach the template as in transformers."""
    path = Path(shutil.copytree(spaced, tmp_path / "model"))
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"pad_token": "<unk>"}
    config[key] = {"image_token": "<|im_start|>"}
    file.write_text(json.dumps(config))
    source = "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ image_token }}{{ sep_token }}"
    assert ChatTemplate(source, Tokenizer.load(path), "x").render(CHAT) == (
        "<s><unk><unk><|im_start|>"
    )


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ '%0999999999d' % 1 }}",
        "{% set x = 10 ** (10 ** 8) %}",
        "{% if messages | length > 2 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}",
        "{% if messages | length > 2 %}{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endif %}",
    ],
    ids=["format", "power", "loops in a later turn", "doubling in a later turn"],
)
def test_a_template_without_end_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    """In one message, and within a second here; this process renders nothing of it.

    It is not started again for the conversations that follow.
    """
    monkeypatch.setattr(sandbox, "PROGRAM", "import llamapro.text.sandbox as s; s.CPU_S = 1; "
                        "s.MEMORY = 1 << 28; s.serve()")  # fmt: skip
    (tmp_path / "bomb.jinja").write_text(bomb)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
    with pytest.raises(DataError, match=r"bomb\.jinja: the chat template takes over 5 s or 1024"):
        template = ChatTemplate.load("", tokenizer, str(tmp_path / "bomb.jinja"))
        if "> 2" in bomb:
            assert template.render(turns[:2]) == ""
        template.render(turns)
    for _ in range(2 if "> 2" in bomb else 0):
        with pytest.raises(DataError, match="takes over 5 s"):
            template.render(turns[:2])


def test_of_two_templates_the_file_is_taken(
    directory: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers; that tokenizer_config.json has another is said."""
    path = Path(shutil.copytree(directory, tmp_path / "model"))
    (path / "chat_template.jinja").write_text("file")
    config = json.loads((path / "tokenizer_config.json").read_text())
    for stored, told in (("file", ""), ("config", "tokenizer_config.json has another one")):
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": stored}))
        assert ChatTemplate.load(path, tokenizer).source == "file"
        err = capsys.readouterr().err
        assert told in err and bool(err) == bool(told)


def test_another_template_for_tools_is_not_passed_over(
    directory: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """transformers takes it for rows with tools, wherever it is stored."""
    path = Path(shutil.copytree(directory, tmp_path / "model"))
    plain = BUILT_IN["mistral"] + "{% for t in tools or [] %}{{ t.name }}{% endfor %}"
    named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": "x"}]
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    listed = ChatTemplate.load(path, tokenizer)
    (path / "chat_template.jinja").write_text(plain)
    alone = ChatTemplate.load(path, tokenizer)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    beside = ChatTemplate.load(path, tokenizer)
    (path / "chat_template.jinja").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": plain}))
    for template in (listed, beside, ChatTemplate.load(path, tokenizer), alone):
        template.encode(CHAT[1:])
        if template is not alone:
            with pytest.raises(DataError, match=r"name it with --data\.chat-template tool_use"):
                template.encode(CHAT[1:], {"tools": [{"name": "f"}]})
    alone.encode(CHAT[1:], {"tools": [{"name": "f"}]})


@pytest.mark.parametrize("is_file", [True, False])
def test_one_of_several_templates_of_a_model_is_named(
    directory: Path, tmp_path: Path, tokenizer: Tokenizer, is_file: bool
) -> None:
    """As transformers takes it; wherever it is stored. It serves for all rows."""
    path = Path(shutil.copytree(directory, tmp_path / "model"))
    sources = {"default": BUILT_IN["mistral"], "tool_use": BUILT_IN["llama3"]}
    named = [{"name": name, "template": source} for name, source in sources.items()]
    if is_file:
        (path / "additional_chat_templates").mkdir()
        (path / "chat_template.jinja").write_text(sources["default"])
        (path / "additional_chat_templates" / "tool_use.jinja").write_text(sources["tool_use"])
    else:
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    theirs = AutoTokenizer.from_pretrained(path)
    found = ChatTemplate.load(path, tokenizer, "tool_use")
    assert found.render(CHAT) == theirs.apply_chat_template(
        CHAT, chat_template="tool_use", tokenize=False
    )
    assert found.source == sources["tool_use"] and not found.has_other


def test_missing_jinja_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    """The message names the package to install."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError, match=r"need jinja2: pip install -e '\.\[tokenizers\]'"):
        ChatTemplate.load("", tokenizer, "llama3")


LLAMA_3_FIRST = """\
{% for m in messages %}{{ bos_token if loop.first else '' }}<|start_header_id|>{{ m.role }}\
<|end_header_id|>

{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>

"""


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        (LLAMA_3_FIRST, "Hello"),
        ("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}</s>{% endfor %}", "Hello"),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}", "a"),
    ],
    ids=["prompts after every answer", "other header", "answer inside the header"],
)
def test_a_header_is_never_trained(tokenizer: Tokenizer, source: str, answer: str) -> None:
    """It may have any name and stand before the answer or behind it."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    template = ChatTemplate(source, tokenizer, "their.jinja")
    with pytest.raises(DataError, match=r"turn 2: .*ignores add_generation_prompt.*assistant"):
        template.encode(messages)


def test_a_filter_on_what_a_tag_encloses_is_refused(tokenizer: Tokenizer) -> None:
    """It would meet the marks around it, and leave other text than in transformers."""
    source = (
        "{% for m in messages %}{% set text %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}{{ text FILTER }}{{ eos_token }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Yes "}]
    ChatTemplate(source.replace("FILTER", ""), tokenizer, "x").encode(chat)
    trimmed = ChatTemplate(source.replace("FILTER", "| trim"), tokenizer, "x")
    with pytest.raises(DataError, match=r"x: changes what \{% generation %\} encloses"):
        trimmed.encode(chat)
    assert trimmed.render(chat) == "Hi</s>Yes</s>"
    assert tokenizer.decode(trimmed.encode_prompt(chat)) == "HiYes"  # which trains nothing


def test_threads_and_forks_get_their_own_renderings() -> None:
    """One process renders for all threads of a process, and another one for its fork."""
    source = "{{ x }} {{ x * 2 }}"
    render = sandbox.compiled_apart(source)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: render({"x": x}, None), range(200)))
    assert found == [f"{x} {x * 2}" for x in range(200)]
    if not (child := os.fork()):
        own = sandbox.compiled_apart(source)
        os._exit(own is render or own({"x": 3}, None) != "3 6")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sandbox.compiled_apart(source) is render and render({"x": 4}, None) == "4 8"
