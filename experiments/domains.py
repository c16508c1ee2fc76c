"""Text for the study that every Python installation has, or that is made here: nothing is fetched.

English is the general domain, as in the demo; code and arithmetic are the new ones (the paper's are
code and mathematics, too). Beside each new domain stand questions with four choices. General text
from sources that no base here was trained on shows whether what is kept is more than what was
replayed: the docstrings of an installed package, and `stories.txt`, written for this study in the
manner of TinyStories (Eldan & Li, 2023).
"""

import ast
import importlib.util
import inspect
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llamapro.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
STORIES = Path(__file__).with_name("stories.txt")
QUESTIONS = 64
LINES_BEFORE = 4
PACKAGE, PACKAGE_BYTES = "numpy", 200_000  # a dependency, so it is always there
MATH_DOCUMENTS = {"train": 6000, "val": 300}
PROBLEMS_PER_DOCUMENT = 6


def write_corpus(out: Path) -> None:
    """Writes `english/`, `code/`, `math/`, each with `train/` and `val/`, `packages/` and
    `choices/*.jsonl`; what is there already stays.

    Raises:
        DataError: this installation has not the text, or the disk does not take it.
    """
    done = out / "complete"
    if done.exists():
        return
    command = [sys.executable, str(ROOT / "demo" / "corpus.py"), str(out)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise DataError(f"{out}: the demo's text cannot be made: {made.stderr.strip()[-300:]}")
    print(made.stdout, end="", file=sys.stderr)
    _write(out / "packages" / "docstrings.txt", "\n\n".join(package_docstrings()))
    for split, count in MATH_DOCUMENTS.items():
        texts = list(arithmetic(split, count))
        for start in range(0, count, 100):
            file = out / "math" / split / f"{start // 100:03d}.txt"
            _write(file, "".join(texts[start : start + 100]))
    held_out = sorted((out / "code" / "val").glob("*.py"))
    code = list(code_questions([f.read_text(encoding="utf-8") for f in held_out]))
    for name, questions in (("code", code), ("math", list(math_questions()))):
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        _write(out / "choices" / f"{name}.jsonl", lines)
    _write(done, "")


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from None


# ---- General text from another source ---------------------------------------------------------


def package_docstrings() -> Iterator[str]:
    """Yields docstrings of an installed package, long ones, in a fixed order, up to a limit."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    written = 0
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) > 200:
                    yield text
                    written += len(text)
        if written > PACKAGE_BYTES:
            return


# ---- Arithmetic ---------------------------------------------------------------------------------


def _problem(draw: random.Random) -> tuple[str, int]:
    """Returns an expression of two steps at most, and its value."""
    kind = draw.randrange(3)
    if kind == 0:
        a, b = draw.randint(1, 20), draw.randint(1, 20)
        return f"{a} + {b}", a + b
    if kind == 1:
        a, b = draw.randint(1, 20), draw.randint(1, 20)
        return f"{max(a, b)} - {min(a, b)}", abs(a - b)
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    return f"{a} * {b}", a * b


def arithmetic(split: str, documents: int) -> Iterator[str]:
    """Yields worksheets: problems, each with its answer in words around it.

    There are about 700 problems, which all splits draw from: this domain is to be learned by heart.
    """
    draw = random.Random(f"arithmetic {split}")
    for _ in range(documents):
        lines = []
        for _ in range(PROBLEMS_PER_DOCUMENT):
            problem, value = _problem(draw)
            lines.append(f"Question: What is {problem}?\nAnswer: {problem} = {value}\n")
        yield "".join(lines) + "\n"


def math_questions() -> Iterator[dict[str, object]]:
    """Yields problems of the same kind; the wrong choices are near the right one."""
    draw = random.Random("questions")
    for _ in range(QUESTIONS):
        problem, value = _problem(draw)
        near = [n for n in range(max(0, value - 10), value + 11) if n != value]
        values = [value, *draw.sample(near, 3)]
        draw.shuffle(values)
        yield {
            "context": f"Question: What is {problem}?\nAnswer: {problem} =",
            "choices": [f" {n}" for n in values],
            "answer": values.index(value),
        }


# ---- Code ---------------------------------------------------------------------------------------


def code_questions(files: list[str]) -> Iterator[dict[str, object]]:
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
        choices = [right, *others]
        draw.shuffle(choices)
        yield {
            "context": "\n".join(lines[at - LINES_BEFORE : at]) + "\n",
            "choices": choices,
            "answer": choices.index(right),
        }
