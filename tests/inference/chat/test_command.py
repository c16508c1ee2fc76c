"""`llamapro chat`: turns from a pipe, a prompt or a terminal."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro.inference.chat import Conversation
from llamapro.text.template_files import BUILT_IN

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., Conversation]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ignore(_piece: str) -> None:
    pass


def test_each_line_of_a_pipe_is_a_turn(run: Run, start: Start) -> None:
    """White space at its sides and commands are text; empty lines are no turns."""
    turns = ["def f(x):", "  /reset ", "/exit"]
    conversation = start()
    for turn in turns:
        conversation.answer(turn, ignore)
    status, shown, notes = run("def f(x):\n\n  /reset \n/exit")
    assert status == 0
    answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    assert shown == "".join(answer + "\n" for answer in answers)
    assert notes.count("tokens/s; context") == 3 and "you: " not in notes


def test_json_is_one_object_with_the_conversation(run: Run, start: Start) -> None:
    """Standard output is the object alone; the answers are shown on standard error."""
    conversation = start(system="Be brief.")
    for turn in ("def", "größe"):
        conversation.answer(turn, ignore)
    status, shown, notes = run("def\ngröße\n", "--json", "--system", "Be brief.")
    assert (status, shown.count("\n")) == (0, 1)
    result = json.loads(shown)
    assert set(result) == {"messages", "tokens", "tokens_per_s"}
    assert result["messages"] == conversation.messages
    assert result["tokens"] == conversation.tokens == 2 * 8
    assert result["tokens_per_s"] > 0
    assert conversation.messages[2]["content"] in notes


def test_prompt_is_the_only_turn_of_a_script(run: Run) -> None:
    """Standard input is not read: it may be another program's."""
    stdin = io.StringIO("another turn\n")
    status, shown, _ = run(stdin, "--prompt", "/reset", "--json")
    assert (status, stdin.tell()) == (0, 0)
    assert [m["role"] for m in json.loads(shown)["messages"]] == ["user", "assistant"]


def test_on_a_terminal_turns_are_asked_for(run: Run) -> None:
    """After --prompt; Ctrl-D, an empty line or /exit ends."""
    for end in ("", "\n", " /exit\nnever\n"):
        status, shown, notes = run(Terminal("def\nreturn\n" + end), "--prompt", "x", "--json")
        assert (status, notes.count("you: ")) == (0, 3)
        turns = [m["content"] for m in json.loads(shown)["messages"] if m["role"] == "user"]
        assert turns == ["x", "def", "return"]
    assert run(Terminal(""))[0] == 0


def test_reset_forgets_all_but_the_system(run: Run) -> None:
    """On a terminal."""
    _, shown, _ = run(Terminal("def\n/reset\nreturn\n"), "--json", "--system", "Be brief.")
    messages = json.loads(shown)["messages"]
    assert [m["content"] for m in messages[:-1]] == ["Be brief.", "return"]


def test_wrong_turns_end_a_script_but_not_a_session(run: Run) -> None:
    """A turn that is too long: exit status 2 and what to do; on a terminal it is left out."""
    stdin = "def\n" + "7" * 200 + "\nreturn\n"
    status, shown, notes = run(stdin, "--json")
    assert (status, shown) == (2, "")
    assert "context full" in notes and "Traceback" not in notes
    status, shown, notes = run(Terminal(stdin), "--json")
    assert status == 0 and "the turn is left out" in notes
    turns = [m["content"] for m in json.loads(shown)["messages"] if m["role"] == "user"]
    assert turns == ["def", "return"]


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        ("", "standard input has no line to answer"),
        ("\n \n", "standard input has no line to answer"),
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"), "standard input is not utf-8"),
    ],
)
def test_unusable_standard_input_exits_2(run: Run, stdin: Any, told: str) -> None:
    """One message that says what to give."""
    status, shown, message = run(stdin)
    assert (status, shown) == (2, "")
    assert told in message and "Traceback" not in message


def test_missing_and_foreign_templates_exit_2(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Option, built-in ones and missing tokens are named, before the model is loaded."""
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    status, shown, message = run("def", path=bare)
    assert (status, shown) == (2, "")
    assert "--chat-template: " in message and "has no chat template" in message
    assert all(name in message for name in BUILT_IN)
    assert run("def", "--chat-template", "llama2", path=bare)[0] == 0
    status, _, message = run("def", "--chat-template", tmp_path / "none.jinja")
    assert status == 2 and "none.jinja" in message
    (bare / "tokenizer_config.json").unlink()
    status, _, message = run("def", "--chat-template", "chatml", path=bare)
    assert status == 2 and "<|im_start|>" in message and "ops:" not in message
    (tmp_path / "empty.jinja").write_text("")
    status, _, message = run("def", "--chat-template", tmp_path / "empty.jinja")
    assert status == 2 and "renders the conversation as nothing" in message


def test_command_runs_on_a_terminal(run: Run, start: Start) -> None:
    """A real one for its input: the answers alone are on standard output."""
    pty = pytest.importorskip("pty")
    conversation = start()
    conversation.answer("def", ignore)
    ours, theirs = pty.openpty()
    os.write(ours, b"def\n/exit\n")
    with open(theirs) as terminal:
        status, shown, notes = run(terminal)
    os.close(ours)
    assert (status, shown) == (0, conversation.messages[-1]["content"] + "\n")
    assert notes.count("you: ") == 2
