"""Conversations: what the model is given, when an answer ends, and how turns are read."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro.errors import ConfigError, DataError
from llamapro.inference import sampling
from llamapro.inference.chat import Conversation, stop_ids
from llamapro.inference.options import SamplingOptions
from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.template_files import BUILT_IN
from llamapro.text.tokenizer import Tokenizer

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., Conversation]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`writes(*ids)`: stands in for the model, which writes these in each answer."""

    def writes(*ids: int) -> None:
        def fake(model: Any, prompt: Any, limit: int, *_: Any) -> Iterator[Tensor]:
            yield from (torch.tensor([[i]]) for i in ids[:limit])

        monkeypatch.setattr(sampling, "generate", fake)

    return writes


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
    checkpoint: Path, tokenizer: Tokenizer, start: Start, reader: Any, name: str
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


def test_only_what_is_new_is_read(start: Start, reader: Any, tokenizer: Tokenizer) -> None:
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


def test_the_same_turn_again_reads_its_last_token(start: Start, reader: Any) -> None:
    """A prompt that is all in the cache still needs the logits of its end."""
    conversation = start()
    conversation.answer("def", ignore)
    first = conversation.messages
    conversation.reset()
    reader.reads.clear()
    conversation.answer("def", ignore)
    assert reader.reads[0] == 1
    assert conversation.messages == first


def test_pieces_are_shown_while_the_model_writes(start: Start, reader: Any) -> None:
    """One piece per token, before the next is computed; joined they are the answer."""
    conversation = start()
    shown: list[tuple[int, str]] = []
    conversation.answer("def", lambda piece: shown.append((len(reader.reads), piece)))
    assert [steps for steps, _ in shown] == [*range(1, 9), 8]
    assert "".join(piece for _, piece in shown) == conversation.messages[-1]["content"]


@pytest.mark.parametrize("stop", [300, 415, "</s>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"])
def test_ends_of_turn_and_of_document_end_an_answer(
    start: Start, tokenizer: Tokenizer, writes: Callable[..., None], stop: int | str
) -> None:
    """Those of config.json, of the tokenizer and of the formats; counted, not shown."""
    stop_id = stop if isinstance(stop, int) else tokenizer.special_tokens[stop]
    words = tokenizer.encode("def f(x)")
    writes(*words, stop_id, *words)
    conversation = start(max_new_tokens=50)
    note = conversation.answer("x", ignore)
    assert conversation.messages == [user("x"), assistant("def f(x)")]
    assert conversation.tokens == len(words) + 1
    assert note.startswith(f"{len(words) + 1} tokens")


def test_what_the_template_puts_behind_an_answer_ends_it(
    checkpoint: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, writes: Callable[..., None]
) -> None:
    """Such as Gemma's <end_of_turn>, or Phi's <|end|>: a model is trained to end with it."""
    end = "<|end_header_id|>"
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ChatTemplate(source, tokenizer, "x")
    assert template.end_ids() == {tokenizer.special_tokens[end]}
    words = tokenizer.encode("def f(x)")
    writes(*words, tokenizer.special_tokens[end], *words)
    conversation = Conversation(model, tokenizer, template, SamplingOptions(max_new_tokens=50))
    conversation.answer("x", ignore)
    assert conversation.messages == [user("x"), assistant("def f(x)")]


def test_other_control_tokens_do_not_end_an_answer(
    start: Start, tokenizer: Tokenizer, writes: Callable[..., None]
) -> None:
    """They give no text."""
    words = tokenizer.encode("def f(x)")
    writes(*words, tokenizer.special_tokens["<|start_header_id|>"], *words)
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


def test_the_context_is_used_to_its_last_token(start: Start, reader: Any) -> None:
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
