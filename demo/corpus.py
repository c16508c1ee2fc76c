"""Collects real text that every Python installation has, for the demo.

    python demo/corpus.py OUT_DIR

English is the general domain. Its text is the language reference that `help()` shows, and the
docstrings of the standard library. Code is the new domain. Its text is the library's source without
docstrings, so the two do not overlap. Every tenth document is held out for validation.
"""

import argparse
import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
MAX_CODE_BYTES = 2_000_000


def library_files() -> Iterator[Path]:
    """Yields the standard library's source files, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED & set(parts) and "pydoc_data" not in parts and "lib2to3" not in parts:
            yield path


def parse(path: Path) -> tuple[str, ast.Module] | None:
    """Returns a file's text and syntax tree; None if it is not UTF-8 Python."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return None


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yields the statements that are docstrings, with their text."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        value = getattr(node.body[0], "value", None) if node.body else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield node.body[0], value.value


def english() -> Iterator[str]:
    """Yields the topics of the language reference, then the docstrings of each module."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for path in library_files():
        if parsed := parse(path):
            texts = [inspect.cleandoc(text) for _, text in docstrings(parsed[1])]
            if long := [text for text in texts if len(text) > 80]:
                yield "\n\n".join(long) + "\n"


def code() -> Iterator[str]:
    """Yields source files of all packages without their docstrings, up to a limit."""
    written = 0
    files = list(library_files())
    # With every seventh file first, the limit cuts all packages alike.
    for path in [path for start in range(7) for path in files[start::7]]:
        if not (parsed := parse(path)):
            continue
        text, tree = parsed
        lines = text.splitlines(keepends=True)
        for node, _ in docstrings(tree):
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[line] = ""
        if len(stripped := "".join(lines)) > 200:
            yield stripped
            written += len(stripped)
        if written > MAX_CODE_BYTES:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description="Collects English and code for the demo.")
    parser.add_argument("out", type=Path, help="directory to write english/ and code/ to")
    out = parser.parse_args().out
    for domain, suffix, documents in (("english", "txt", english()), ("code", "py", code())):
        sizes = {"train": 0, "val": 0}
        for number, text in enumerate(documents):
            split = "val" if number % 10 == 9 else "train"
            folder = out / domain / split
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05d}.{suffix}").write_text(text, encoding="utf-8")
            sizes[split] += len(text.encode())
        print(f"{domain}: {sizes['train']:,} bytes to train on, {sizes['val']:,} held out")


if __name__ == "__main__":
    main()
