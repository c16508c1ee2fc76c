"""Multiple choice: the scores are those of a computation one by one, the best per token wins."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import DataError
from llamapro.inference import multiple_choice
from llamapro.inference.multiple_choice import (
    Question,
    baselines,
    log_likelihoods,
    measure_choices,
    read_choices,
)
from llamapro.model import LlamaForCausalLM
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.objective import NextToken

CONTEXT = 128
ROWS: list[dict[str, Any]] = [
    {"question": "What parses arguments?", "choices": ["the parser", "a list"], "answer": 0},
    {"question": "What is x?", "choices": ["one of the values in parser", "no", "y"], "answer": 2},
    {"prompt": "return [x for x in", "choices": ["parser]", "self]"], "answer": "B"},
]


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., Any],
) -> Path:
    """A random model of two layers with a context of 128 tokens."""
    config = tiny_config(max_position_embeddings=CONTEXT, num_hidden_layers=2)
    return write_random_checkpoint(tmp_path_factory.mktemp("choices") / "ckpt", config)


@pytest.fixture
def model(checkpoint: Path) -> LlamaForCausalLM:
    return Checkpoint.open(checkpoint).load()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture
def read(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., list[Question]]:
    """`read(rows, context=128, shots=0)`: the questions of a .jsonl file of these rows."""

    def read(rows: list[Any], context: int = CONTEXT, shots: int = 0) -> list[Question]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_choices(str(file), tokenizer, context, shots)

    return read


def texts(tokenizer: Tokenizer, question: Question) -> list[str]:
    """Every choice with the prompt before it, as text."""
    return [tokenizer.decode(question.prompt + tokens) for tokens in question.choices]


# ---- Scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_those_of_transformers_one_by_one(
    checkpoint: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    read: Callable[..., list[Question]],
    batch_size: int,
) -> None:
    """The reference has no batch, no padding and no sharing: the joined text, every position."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    found = log_likelihoods(model, read(ROWS, shots=1), batch_size)
    row, choices = ROWS[0], ROWS[1]["choices"]
    shown = f"Question: {row['question']}\nAnswer: {row['choices'][0]}\n\n"
    asked = [(f"{shown}Question: What is x?\nAnswer:", choices)]
    asked += [(shown + ROWS[2]["prompt"], ROWS[2]["choices"])]
    expected: list[list[float]] = []
    for prompt, choices in asked:
        before = len(tokenizer.encode(prompt, bos=True))
        expected.append([])
        for choice in choices:
            ids = torch.tensor([tokenizer.encode(f"{prompt} {choice}", bos=True)])
            with torch.no_grad():
                logprobs = F.log_softmax(theirs(ids[:, :-1]).logits[0], -1)
            each = logprobs.gather(-1, ids[0, 1:, None])[before - 1 :]
            expected[-1].append(each.double().sum().item())
    assert [len(scores) for scores in found] == [3, 2]
    for ours, by_hand in zip(found, expected, strict=True):
        assert ours == pytest.approx(by_hand, rel=1e-5)


def test_a_prompt_is_read_once_for_all_its_choices(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their last token is never read, so letters need the prompt alone. Short ones go together."""
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_hook(lambda _m, args, _out: shapes.append(args[0].shape))
    letters = Question([1, 50, 60], [[70], [71], [72], [73]], frozenset({2}), False)
    (scores,) = log_likelihoods(model, [letters], 8)
    assert shapes == [(1, 3)]
    assert len(set(scores)) == 4
    shapes.clear()
    words = Question([1, 50], [[70, 71, 72], [73], [74, 75]], frozenset({0}), False)
    together = log_likelihoods(model, [letters, words], 2)
    assert shapes == [(2, 3), (7, 2)]
    shapes.clear()
    monkeypatch.setattr(multiple_choice, "POSITIONS", 0)
    apart = log_likelihoods(model, [letters, words], 2)
    assert shapes == [(2, 3), (2, 2)]  # the other five have one token
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_padding_is_not_seen_through_a_window(tiny_config: Callable[..., Any]) -> None:
    """Prompts shorter and longer than a window of 4: beside others as alone."""
    config = tiny_config(num_hidden_layers=2, model_type="mistral", sliding_window=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    questions = [
        Question(list(range(1, length)), [[70, 71, 72], [73], [74, 75]], frozenset({0}), False)
        for length in (2, 4, 9)
    ]
    alone = [log_likelihoods(model, [question], 1)[0] for question in questions]
    for together, one in zip(log_likelihoods(model, questions, 8), alone, strict=True):
        assert together == pytest.approx(one, rel=1e-5)


def test_model_trained_on_the_answers_gives_them(
    model: LlamaForCausalLM, read: Callable[..., list[Question]]
) -> None:
    """The third choice is always right: untrained it is missed, after a few steps it is chosen."""
    choices = ["the parser", "a list", "no value", "self"]
    rows = [{"question": f"{word}?", "choices": choices, "answer": 2} for word in "abcdefgh"]
    questions = read(rows)
    before, _ = measure_choices(model, questions, 4, "")
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        question = questions[0]
        ids = torch.tensor([question.prompt + question.choices[2]])
        targets = ids[:, 1:].clone()
        targets[:, : len(question.prompt) - 1] = -100
        loss, _count = NextToken(model)(ids[:, :-1], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after, correct = measure_choices(model, questions, 4, "")
    assert before["accuracy"] < 1
    assert (after["accuracy"], after["stderr"], correct) == (1.0, 0.0, [True] * 8)


# ---- Rows -------------------------------------------------------------------------------------

LABELLED = {"text": ["2", "3", "1"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y", "z"], 0, {0}),
        (["x", "y", "z"], 2.0, {2}),  # a parquet column with an absent value
        (["x", "y", "z"], "y", {1}),
        (["x", "y", "z"], "C", {2}),
        (["B", "A"], "A", {1}),  # the text before the letter
        (["x", "y", "x"], "x", {0, 2}),
        (LABELLED, "2", {1}),  # the label before the text
        (LABELLED, 2, {1}),  # and before the index, as a table changes it
        (LABELLED, 0, {0}),
        ({"text": ["x", "y"], "label": ["no", "yes"]}, "yes", {1}),
        ({"text": ["x", "y"]}, "B", {1}),
        ({"text": ["x", "y"], "label": ["a", "b"]}, "B", {1}),
        (["x", "y", "z"], "(B)", {1}),
        (["x", "y", "z"], "c.", {2}),
        (["x", "y", "z"], "2", {2}),
        ({"a": "x", "b": "y"}, "b", {1}),
        ({"text": ["x", "y"], "label": ["(A)", "(B)"]}, "B", {1}),
        (["Rome.", "Oslo."], "oslo", {1}),
        (LABELLED, 2.0, {1}),
    ],
)
def test_answer_is_a_label_index_text_or_letter(
    read: Callable[..., list[Question]], choices: Any, answer: Any, right: set[int]
) -> None:
    """Labels come first, so a label that is also a text means the label."""
    (question,) = read([{"question": "x", "choices": choices, "answer": answer}])
    assert question.right == right


def test_an_answer_may_name_several_choices(read: Callable[..., list[Question]]) -> None:
    """By text and by index."""
    (question,) = read([{"query": "x", "choices": ["a", "b", "c"], "answer": ["c", 0]}])
    assert question.right == {0, 2}


@pytest.mark.parametrize("key", ["answerKey", "gold", "label"])
def test_other_names_for_answer_and_choices_are_read(
    read: Callable[..., list[Question]], key: str
) -> None:
    """ARC's, lm-eval's and HellaSwag's names; an "answer" beside them counts."""
    row = {"question": "x", "options": ["a", "b"], key: "B"}
    assert [q.right for q in read([row, row | {"answer": "a"}])] == [{1}, {0}]


def test_a_column_for_each_choice_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """MMLU's tables, also with fewer choices in a row."""
    (tmp_path / "q.csv").write_text("question,A,B,C,answer\nx,self,parser,args,C\ny,a,b,,B\n")
    one, other = read_choices(str(tmp_path / "q.csv"), tokenizer, CONTEXT, 0)
    assert (len(one.choices), one.right) == (3, {2})
    assert (len(other.choices), other.right) == (2, {1})


def test_keys_and_files_that_are_not_read_are_named(
    tmp_path: Path,
    tokenizer: Tokenizer,
    read: Callable[..., list[Question]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A passage changes what is asked; a null, as parquet has it, is no key."""
    (question,) = read([ROWS[0] | {"passage": "Long ago.", "id": 7, "support": None}])
    assert question == read(ROWS[:1])[0]
    name = f"{tmp_path / 'rows.jsonl'}: "
    assert capsys.readouterr().err.count(f"{name}keys that are not read: 'passage', 'id'\n") == 1
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    assert len(read_choices(str(tmp_path), tokenizer, CONTEXT, 0)) == 1
    assert "gone.jsonl: left out (a link to nothing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "joined"),
    [
        ({"question": " x? "}, "Question: x?\nAnswer: self"),
        ({"query": "x?"}, "Question: x?\nAnswer: self"),
        ({"prompt": "def f("}, "def f( self"),
        ({"context": "def f( "}, "def f( self"),
        ({"context": "def f(\n"}, "def f(\nself"),
        ({"prompt": "def", "choices": ["\n  self", "x"]}, "def\n  self"),
        ({"question": None, "prompt": "def"}, "def self"),
    ],
)
def test_prompt_and_choice_are_joined_by_white_space_once(
    tokenizer: Tokenizer, read: Callable[..., list[Question]], row: dict[str, Any], joined: str
) -> None:
    """A question gets its frame, a prompt stays as it is; the ids are those of the joined text."""
    (question,) = read([{"choices": ["self", "x"], "answer": 0} | row])
    assert question.prompt + question.choices[0] == tokenizer.encode(joined, bos=True)
    assert question.prompt == tokenizer.encode(joined[: -len("self")].rstrip(), bos=True)


def test_choice_that_merges_with_the_prompt_is_encoded_by_itself(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """If a token of the joined text spans the border, the prompt's ids stay as they are."""
    names = {"q": 5, " ab": 6, "q ab": 7, " c": 8}

    def encode(text: str, bos: bool = False, continues: bool = False) -> list[int]:
        assert continues == (text in (" ab", " c"))
        ids = [names[text]] if text in names else [5, 8]
        return [1] * bos + ids

    merging: Any = SimpleNamespace(encode=encode, prefix=[1])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "q", "choices": ["ab", "c"], "answer": 0}))
    (question,) = read_choices(str(file), merging, 9, 0)
    assert (question.prompt, question.choices) == ([1, 5], [[6], [8]])


def test_first_rows_are_shown_and_not_asked(
    tokenizer: Tokenizer, read: Callable[..., list[Question]]
) -> None:
    """Two shots, each with its right answer, in order; one question is left."""
    (question,) = read(ROWS, shots=2)
    shown = (
        "Question: What parses arguments?\nAnswer: the parser\n\n"
        "Question: What is x?\nAnswer: y\n\n"
    )
    asked = f"{shown}return [x for x in"
    assert texts(tokenizer, question) == [f"{asked} parser]", f"{asked} self]"]
    with pytest.raises(DataError, match="3 questions, none left after --shots 3"):
        read(ROWS, shots=3)


def test_long_prompt_is_cut_from_the_left_after_bos(
    model: LlamaForCausalLM, tokenizer: Tokenizer, read: Callable[..., list[Question]]
) -> None:
    """All choices follow the same prompt, the longest fills the context, and it is counted."""
    rows = [{"prompt": "self " * 200, "choices": ["x", "parser of x and y"], "answer": 0}, ROWS[0]]
    cut, whole = read(rows)
    assert (cut.is_cut, whole.is_cut) == (True, False)
    assert len(cut.prompt) + max(map(len, cut.choices)) - 1 == CONTEXT
    full = tokenizer.encode(("self " * 200).rstrip(), bos=True)
    assert cut.prompt == full[:1] + full[len(full) - len(cut.prompt) + 1 :]
    assert baselines([cut, whole])["cut"] == 1
    assert len(log_likelihoods(model, [cut], 2)[0]) == 2
    longest = max(map(len, whole.choices))
    assert [q.prompt for q in read(rows[1:], context=longest)] == [[tokenizer.bos_id]]
    told = rf"rows\.jsonl:1: .*longer than the context, {longest - 1} tokens"
    with pytest.raises(DataError, match=told):
        read(rows[1:], context=longest - 1)


def test_forms_of_file_hold_the_same_questions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """.jsonl with a blank line, .json, .parquet with a column for every key; a folder of two."""
    rows = [row | {"answer": "A"} for row in ROWS]  # parquet: one type a column
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    expected = read_choices(str(lines), tokenizer, CONTEXT, 0)
    assert len(expected) == 3
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    assert read_choices(str(tmp_path / "b.json"), tokenizer, CONTEXT, 0) == expected
    assert read_choices(str(tmp_path), tokenizer, CONTEXT, 0) == expected * 2
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({k: [r.get(k) for r in rows] for k in (*rows[0], "prompt")})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "c.parquet")
    assert read_choices(str(tmp_path / "c.parquet"), tokenizer, CONTEXT, 0) == expected


def test_every_row_that_is_wrong_is_named(read: Callable[..., list[Question]]) -> None:
    """One message: file, row and what was found there."""
    good = ROWS[0]
    wrong: list[tuple[Any, str]] = [
        ([], "expected a JSON object, found list"),
        ({}, "expected one of the keys question, query, context, prompt; found []"),
        (good | {"prompt": "x"}, "found ['question', 'prompt']"),
        (good | {"question": " "}, "'question' is ' '"),
        (good | {"choices": None}, "none of the keys choices, options; found 'question', 'answer'"),
        (good | {"choices": ["one"]}, "expected a list of two texts or more"),
        (good | {"choices": ["x", " "]}, "one is empty or not a text"),
        (good | {"choices": ["x", 1]}, "one is empty or not a text"),
        (good | {"answer": 2}, "is 2, expected 0 (the first) to 1, ['A', 'B'] or the text"),
        (good | {"answer": -1}, "answer is -1"),
        (good | {"answer": "C"}, "answer is 'C'"),
        (good | {"answer": True}, "answer is True"),
        (
            good | {"choices": {"text": ["x", "y"], "label": ["a", "b", "c"]}, "answer": "c"},
            "is 'c'",
        ),
        (good | {"choices": ["...", "x"], "answer": ""}, "answer is ''"),
        (good | {"choices": ["b", "A"], "answer": "(B)"}, "is '(B)'"),  # the letter, or the text
        (good | {"choices": {"text": ["x", "y"], "label": ["a", "A"]}, "answer": "(A)"}, "'(A)'"),
        (good | {"answer": [0, 5]}, "answer is 5"),
        (good | {"answer": []}, "answer is []"),
        ({"question": "x", "choices": ["x", "y"]}, "answerKey, gold, label; found 'question', "),
        (good | {"choices": ["x", "\ud800"]}, "not valid Unicode"),
    ]
    with pytest.raises(DataError) as caught:
        read([good, *(row for row, _ in wrong)])
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == len(wrong)
    for number, (_, told) in enumerate(wrong, 2):
        (line,) = (line for line in lines if f"rows.jsonl:{number}: " in line)
        assert told in line
    with pytest.raises(DataError, match="and 5 more"):
        read([{}] * 25)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A line that is no JSON, a .json that is none or no list, another kind of file, none."""
    contents = {
        "line.jsonl": (b'{"question"\n', r"line\.jsonl:1: "),
        "latin.jsonl": ('{"question": "ß"}\n'.encode("latin-1"), r"latin\.jsonl:1: not UTF-8"),
        "broken.json": (b"[", r"broken\.json:1: not one list in JSON"),
        "one.json": (b"{\n}", r"one\.json:1: expected a list of questions, or one per line"),
        "text.txt": (b"x", r"text\.txt:1: not one of \.jsonl"),
        "damaged.parquet": (b"PAR1", r"damaged\.parquet"),
        "empty.jsonl": (b"\n", r"empty\.jsonl: 0 questions"),
    }
    for name, (content, told) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=told):
            read_choices(str(tmp_path / name), tokenizer, CONTEXT, 0)
    with pytest.raises(DataError, match="nowhere"):
        read_choices(str(tmp_path / "nowhere"), tokenizer, CONTEXT, 0)
