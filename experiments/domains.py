"""Text for the study that is made here or comes with every Python installation.

English is the general domain, as in the demo. Code and arithmetic are the new ones, as code and
mathematics are in the paper. Each new domain has questions with four choices. No base here was
trained on two further general sets, so they show whether a model keeps more than what it replays:
the docstrings of an installed package, and `stories.txt`, written for this study in the manner of
TinyStories (Eldan & Li, 2023).
"""

import ast
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

STORIES = Path(__file__).with_name("stories.txt")
QUESTIONS = 64
LINES_BEFORE = 4
PACKAGE, PACKAGE_BYTES = "numpy", 200_000  # a dependency, so it is always installed
MATH_DOCUMENTS = {"train": 6000, "val": 300}
PROBLEMS_PER_DOCUMENT = 6
Question = dict[str, object]


def write_corpus(out: Path) -> None:
    """Adds `math/`, `packages/` and `choices/*.jsonl` to the demo's `english/` and `code/`."""
    _write(out / "packages" / "docstrings.txt", "\n\n".join(package_docstrings()))
    for split, count in MATH_DOCUMENTS.items():
        texts = list(arithmetic(split, count))
        for start in range(0, count, 100):
            file = out / "math" / split / f"{start // 100:03d}.txt"
            _write(file, "".join(texts[start : start + 100]))
    held_out = sorted((out / "code" / "val").glob("*.py"))
    code = code_questions([file.read_text(encoding="utf-8") for file in held_out])
    for name, questions in (("code", code), ("math", math_questions())):
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        _write(out / "choices" / f"{name}.jsonl", lines)
    _write(out / "complete", "")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def package_docstrings() -> Iterator[str]:
    """Yields the long docstrings of an installed package, in a fixed order, up to a limit."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    written = 0
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) > 200:
                    yield text
                    written += len(text)
        if written > PACKAGE_BYTES:
            return


# ---- Arithmetic ---------------------------------------------------------------------------------


def _problem(draw: random.Random) -> tuple[str, int]:
    """Returns a sum, difference or product, and its value."""
    kind = draw.randrange(3)
    low, high = (2, 9) if kind == 2 else (1, 20)
    a, b = draw.randint(low, high), draw.randint(low, high)
    if kind == 0:
        return f"{a} + {b}", a + b
    return (f"{max(a, b)} - {min(a, b)}", abs(a - b)) if kind == 1 else (f"{a} * {b}", a * b)


def arithmetic(split: str, documents: int) -> Iterator[str]:
    """Yields worksheets of problems with their answers.

    Both splits draw from the same 700 problems or so, because this domain is learned by heart.
    """
    draw = random.Random(f"arithmetic {split}")
    for _ in range(documents):
        problems = [_problem(draw) for _ in range(PROBLEMS_PER_DOCUMENT)]
        lines = [f"Question: What is {p}?\nAnswer: {p} = {value}\n" for p, value in problems]
        yield "".join(lines) + "\n"


def math_questions() -> Iterator[Question]:
    """Yields problems of the same kind. The wrong choices are close to the right one."""
    draw = random.Random("questions")
    for _ in range(QUESTIONS):
        problem, value = _problem(draw)
        near = [n for n in range(max(0, value - 10), value + 11) if n != value]
        wrong = [f" {n}" for n in draw.sample(near, 3)]
        context = f"Question: What is {problem}?\nAnswer: {problem} ="
        yield _question(context, f" {value}", wrong, draw)


def _question(context: str, right: str, wrong: Iterable[str], draw: random.Random) -> Question:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


# ---- Code ---------------------------------------------------------------------------------------


def code_questions(files: list[str]) -> Iterator[Question]:
    """Yields lines of source and, as choices, the line that follows and three from elsewhere."""
    draw = random.Random("questions")
    places = [
        (lines, at)
        for lines in (text.splitlines() for text in files)
        for at in range(LINES_BEFORE, len(lines))
        if len(lines[at].strip()) > 12
    ]
    for _ in range(QUESTIONS):
        lines, at = draw.choice(places)
        right, indent = lines[at], lines[at][: -len(lines[at].lstrip())]
        others: list[str] = []
        while len(others) < 3:
            text, place = draw.choice(places)
            other = indent + text[place].strip()
            if other not in (right, *others):
                others.append(other)
        yield _question("\n".join(lines[at - LINES_BEFORE : at]) + "\n", right, others, draw)
