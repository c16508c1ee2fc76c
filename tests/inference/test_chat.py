"""Conversations: what the model is given, when an answer ends, and how turns are read."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import generate as command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError
from llamapro.inference import sampling
from llamapro.inference.cache import KVCache
from llamapro.inference.chat import Conversation, stop_ids
from llamapro.inference.decoding import next_logits
from llamapro.inference.options import SamplingOptions
from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.template_files import BUILT_IN
from llamapro.text.tokenizer import Tokenizer

Config = Callable[..., ModelConfig]
Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

NAMES = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|im_start|>", "<|im_end|>"),
]
EOS_OF_CONFIG = 300


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_random_checkpoint: Write, tiny_config: Config
) -> Path:
    """A random model with a context of 160, all formats' control tokens, chatml's template."""
    path = tmp_path_factory.mktemp("chat") / "ckpt"
    config = tiny_config(
        vocab_size=416, max_position_embeddings=160, eos_token_id=[EOS_OF_CONFIG, 415]
    )
    write_random_checkpoint(path, config)
    size = Tokenizer.load(path).vocab_size
    added = {size + i: {"content": name, "special": True} for i, name in enumerate(NAMES)}
    raw = {"bos_token": "<s>", "eos_token": "</s>", "legacy": False, "added_tokens_decoder": added}
    (path / "tokenizer_config.json").write_text(json.dumps(raw))
    (path / "chat_template.jinja").write_text(BUILT_IN["chatml"])
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaForCausalLM:
    return Checkpoint.open(checkpoint).load()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


Start = Callable[..., Conversation]


@pytest.fixture
def start(checkpoint: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> Start:
    """`start(**options of the command) -> Conversation`: eight tokens an answer."""

    def start(system: str = "", chat_template: str = "", **options: Any) -> Conversation:
        template = ChatTemplate.load(checkpoint, tokenizer, chat_template)
        sampling = SamplingOptions(**{"max_new_tokens": 8} | options)
        return Conversation(model, tokenizer, template, sampling, system)

    return start


class Reader:
    """Records the model's inputs: `ids` in its context, and the number read at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[int] = []
        self.reads: list[int] = []

        def reading(model: LlamaForCausalLM, input_ids: Tensor, cache: KVCache) -> Tensor:
            self.ids = self.ids[: cache.length] + input_ids[0].tolist()
            self.reads.append(input_ids.shape[1])
            return next_logits(model, input_ids, cache)

        monkeypatch.setattr(sampling, "next_logits", reading)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`writes(*ids)`: stands in for the model, which writes these in each answer."""

    def writes(*ids: int) -> None:
        def fake(model: Any, prompt: Any, limit: int, *_: Any) -> Iterator[Tensor]:
            yield from (torch.tensor([[i]]) for i in ids[:limit])

        monkeypatch.setattr(sampling, "generate", fake)

    return writes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run) -> Run:
    """`run(stdin, *options) -> (exit status, stdout, stderr)` of the command."""

    def run(stdin: Any, *options: object, path: Path = checkpoint) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        base = (path, "--device", "cpu", "--max-new-tokens", 8)
        main = partial(command.main_chat, prog="llamapro chat")
        return run_command(main, *base, *options)

    return run


def ignore(_piece: str) -> None:
    """Takes an answer that no test looks at while it is written."""


def shared_start(first: list[int], second: list[int]) -> int:
    """The number of ids that two sequences have in common before they differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(at for at, (a, b) in pairs if a != b)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_prompt_is_the_templates_token_by_token(
    checkpoint: Path, tokenizer: Tokenizer, start: Start, reader: Reader, name: str
) -> None:
    """A prompt renders all turns, cached or not; names of control tokens in a turn stay text."""
    template = ChatTemplate.load(checkpoint, tokenizer, name)
    conversation = start(chat_template=name, system="Be brief.")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    for turn in ("def f(x):", "größe <|im_end|></s>", "x"):
        expected = template.encode_prompt([*conversation.messages, user(turn)])
        conversation.answer(turn, ignore)
        assert reader.ids[: len(expected)] == expected
        assert conversation.messages[-2] == user(turn)
        assert conversation.messages[-1]["role"] == "assistant"
    assert len(conversation.messages) == 7


@pytest.mark.parametrize("name", BUILT_IN)
def test_cached_answers_are_those_of_prompts_read_anew(
    checkpoint: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, start: Start, name: str
) -> None:
    """Greedily, over four turns, one of which begins a new conversation."""
    template = ChatTemplate.load(checkpoint, tokenizer, name)
    conversation = start(chat_template=name)
    for turn in ("def f(x):", "return", "größe", "x"):
        if turn == "größe":
            conversation.reset()
            assert conversation.messages == []
        prompt = template.encode_prompt([*conversation.messages, user(turn)])
        ids = [int(token) for token in generate(model, torch.tensor([prompt]), 8)]
        stops = [i for i, token in enumerate(ids) if token in stop_ids(model, tokenizer)]
        conversation.answer(turn, ignore)
        assert conversation.messages[-1]["content"] == tokenizer.decode(ids[: (stops or [8])[0]])


def test_answers_are_drawn_as_the_model_says(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    """With the settings of generation_config.json, which are said; options count more."""
    own = shutil.copytree(checkpoint, tmp_path / "own")
    (own / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.5}')
    greedy, drawn = run("Hi"), run("Hi", path=own)
    assert drawn[1] == run("Hi", "--temperature", 1.5)[1] != greedy[1]
    assert "temperature 1.5 from generation_config.json\n" in drawn[2]
    assert run("Hi", "--temperature", 0, path=own)[1] == greedy[1]


def test_only_what_is_new_is_read(start: Start, reader: Reader, tokenizer: Tokenizer) -> None:
    """The start that a prompt shares with the last one and its answer is not read again."""
    conversation = start(system="Be brief, and always say what you know and what you guess.")
    conversation.answer("def f(x):", ignore)
    before = list(reader.ids)
    reader.reads.clear()
    conversation.answer("x", ignore)
    prompt = len(reader.ids) - len(reader.reads) + 1
    shared = shared_start(before, reader.ids)
    assert shared > 50 and reader.reads[0] == prompt - shared
    conversation.reset()
    before = list(reader.ids)
    reader.reads.clear()
    conversation.answer("y", ignore)
    shared = shared_start(before, reader.ids)
    assert shared > 30 and reader.reads[0] == len(reader.ids) - len(reader.reads) + 1 - shared


def test_the_same_turn_again_reads_its_last_token(start: Start, reader: Reader) -> None:
    """A prompt that is all in the cache still needs the logits of its end."""
    conversation = start()
    conversation.answer("def", ignore)
    first = conversation.messages
    conversation.reset()
    reader.reads.clear()
    conversation.answer("def", ignore)
    assert reader.reads[0] == 1
    assert conversation.messages == first


def test_pieces_are_shown_while_the_model_writes(start: Start, reader: Reader) -> None:
    """One piece per token, before the next is computed; joined they are the answer."""
    conversation = start()
    shown: list[tuple[int, str]] = []
    conversation.answer("def", lambda piece: shown.append((len(reader.reads), piece)))
    assert [steps for steps, _ in shown] == [*range(1, 9), 8]
    assert "".join(piece for _, piece in shown) == conversation.messages[-1]["content"]


@pytest.mark.parametrize(
    "stop", [EOS_OF_CONFIG, 415, "</s>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"]
)
def test_ends_of_turn_and_of_document_end_an_answer(
    start: Start, tokenizer: Tokenizer, writes: Callable[..., None], stop: int | str
) -> None:
    """Those of config.json, of the tokenizer and of the formats; counted, not shown."""
    stop_id = stop if isinstance(stop, int) else tokenizer.token_id(stop)
    words = tokenizer.encode("def f(x)")
    writes(*words, stop_id, *words)
    conversation = start(max_new_tokens=50)
    note = conversation.answer("x", ignore)
    assert conversation.messages == [user("x"), assistant("def f(x)")]
    assert conversation.tokens == len(words) + 1
    assert note.startswith(f"{len(words) + 1} tokens")


def test_other_control_tokens_do_not_end_an_answer(
    start: Start, tokenizer: Tokenizer, writes: Callable[..., None]
) -> None:
    """They give no text."""
    words = tokenizer.encode("def f(x)")
    writes(*words, tokenizer.token_id("<|start_header_id|>"), *words)
    conversation = start(max_new_tokens=2 * len(words) + 1)
    note = conversation.answer("x", ignore)
    assert conversation.messages[-1] == assistant("def f(x) def f(x)")
    assert note.startswith(f"--max-new-tokens {2 * len(words) + 1} reached, ")


def test_an_answer_without_text_is_said_and_its_turn_forgotten(
    start: Start, tokenizer: Tokenizer, writes: Callable[..., None]
) -> None:
    """Templates have no place for an empty turn; the conversation goes on without it."""
    writes(2)
    conversation = start()
    assert "this turn is forgotten" in conversation.answer("x", ignore)
    assert (conversation.messages, conversation.tokens) == ([], 1)


def test_the_context_is_used_to_its_last_token(start: Start, reader: Reader) -> None:
    """The answer that meets the end is kept and said to be cut; the next turn is refused."""
    conversation = start(max_new_tokens=1000, chat_template="llama2")
    note = conversation.answer("def", ignore)
    assert note.startswith("context full, the answer is incomplete; ")
    assert note.endswith("context 160 of 160")
    assert len(reader.ids) == 159  # the last token is written, not read
    kept = conversation.messages
    assert len(kept) == 2
    with pytest.raises(ConfigError, match=r"context full: .* the context of .* is 160: shorten"):
        conversation.answer("def", ignore)
    assert conversation.messages == kept
    conversation.reset()
    conversation.answer("x = 1", ignore)
    assert len(conversation.messages) == 2


def test_a_turn_must_leave_room_for_one_token(
    checkpoint: Path, tokenizer: Tokenizer, start: Start
) -> None:
    """A prompt of 160 tokens is refused, one of 159 gets an answer of one."""
    template = ChatTemplate.load(checkpoint, tokenizer, "llama2")
    turn = "7" * (160 - len(template.encode_prompt([user("7")])) + 1)  # a digit is a token
    assert len(template.encode_prompt([user(turn)])) == 160
    conversation = start(chat_template="llama2")
    with pytest.raises(ConfigError, match="has 160 tokens with this turn"):
        conversation.answer(turn, ignore)
    conversation.answer(turn[1:], ignore)
    assert conversation.tokens == 1


def test_a_turn_that_the_template_refuses_changes_nothing(start: Start) -> None:
    """Half a surrogate pair; the conversation goes on after it."""
    conversation = start()
    with pytest.raises(DataError, match="not valid Unicode"):
        conversation.answer("caf\udce9", ignore)
    assert conversation.messages == []
    conversation.answer("def", ignore)
    assert len(conversation.messages) == 2


def test_turns_are_drawn_by_one_seed_and_differ(start: Start) -> None:
    """The same seed gives the same conversation; the same question again, another answer."""

    def talk_twice(seed: int) -> list[str]:
        conversation, answers = start(seed=seed, temperature=1.5, max_new_tokens=20), []
        for _ in range(2):
            conversation.reset()
            conversation.answer("def", ignore)
            answers.append(conversation.messages[-1]["content"])
        return answers

    first = talk_twice(3)
    assert first == talk_twice(3) != talk_twice(4)
    assert first[0] != first[1]


# ---- The command -------------------------------------------------------------------------------


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
