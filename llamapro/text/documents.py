"""Documents of a corpus: found, and read as text in pieces; what is left out is counted.

Files -> documents -> pieces, in one order, streamed: memory does not grow with the corpus.
"""

import codecs
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from tqdm import tqdm

from llamapro.errors import DataError
from llamapro.text.tables import SUFFIXES, read_rows, saved_files

# Longer documents are tokenised in pieces, short ones in batches of this length: sentencepiece is
# half as fast on 4 million characters at once as on 1/4 million, and a file may exceed the memory.
PIECE_CHARACTERS = 1 << 18
# The last place in a long line where no token ends up on both sides: before a space between words,
# which pre-tokenisation and sentencepiece's vocabulary join with the word after it.
_LAST_SPACE = re.compile(r".*\w(?= \w)", re.DOTALL)
_READABLE = "only UTF-8 text, .jsonl, .jsonl.gz, .parquet and .arrow are read"
LISTED = 20  # how many unusable files one message names


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus; `is_named` if the user gave it or a glob did, not a folder it is in."""

    path: Path
    is_named: bool


@dataclass
class Counts:
    """What was read, and what was left out; `bytes` is the UTF-8 length of all text."""

    documents: int = 0
    bytes: int = 0
    long_documents: int = 0
    empty_documents: int = 0
    blank_lines: int = 0
    binary_files: int = 0

    def describe(self) -> str:
        """Returns the counts as text; those of unusual things only where they are not zero."""
        unusual = {
            "long documents tokenised in pieces": self.long_documents,
            "empty documents left out": self.empty_documents,
            "blank lines skipped": self.blank_lines,
            "binary or non-UTF-8 files skipped": self.binary_files,
        }
        more = "".join(f", {count:,} {name}" for name, count in unusual.items() if count)
        return f"{self.documents:,} documents, {self.bytes:,} bytes{more}"


@dataclass(frozen=True)
class Piece:
    """Text of one document, usually all of it."""

    text: str
    is_first: bool
    is_last: bool


def find_files(patterns: Sequence[str]) -> list[SourceFile]:
    """Returns the files that files, globs (`**` allowed) and folders stand for, no file twice.

    A folder is walked with all its folders, by name; hidden entries and `__pycache__` are left out.
    One that `datasets.save_to_disk` made stands for its Arrow files, in their order.

    Raises:
        DataError: a pattern matches no file, or none is given; a saved dataset has several splits.
    """
    found: dict[str, SourceFile] = {}
    if not patterns:
        raise DataError("no data given: name files, folders or globs")
    for pattern in patterns:
        literal = os.path.expanduser(pattern)
        # A name that exists is taken as it is, though it may contain '[' or '*'.
        matches = (
            [literal] if os.path.exists(literal) else sorted(glob.glob(literal, recursive=True))
        )
        files: list[SourceFile] = []
        for match in matches:
            if os.path.isdir(match):
                files += [SourceFile(path, False) for path in _walk(Path(match), set())]
            elif os.path.isfile(match):
                files.append(SourceFile(Path(match), True))
        if not files:
            problem = "the folder holds no files" if os.path.isdir(literal) else "no such file"
            raise DataError(f"{pattern}: {problem}; give files, folders or globs like 'd/**/*.py'")
        for file in files:
            real = os.path.realpath(file.path)
            earlier = found.get(real, file)
            found[real] = SourceFile(earlier.path, earlier.is_named or file.is_named)
    return list(found.values())


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Yields the files below a folder, following links, each folder once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from None
    if (saved := saved_files(folder, [entry.name for entry in entries])) is not None:
        yield from saved
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, seen)
        elif entry.is_file():
            yield folder / entry.name


def read_pieces(
    files: Sequence[SourceFile], text_key: str, counts: Counts, label: str
) -> Iterator[Piece]:
    """Yields the text of all documents, in order, with a progress bar in bytes of the files.

    One text file is one document; so is one line of a `.jsonl` or `.jsonl.gz` file, and one row of
    a `.parquet` or `.arrow` file. The start of every file is looked at before the first is read, so
    that a wrong key or kind of file is told at once, and for all of them.

    Args:
        files: from `find_files`.
        text_key: key of the text in a JSON line, or name of its column.
        counts: added to while reading.
        label: shown by the progress bar.

    Raises:
        DataError: naming the files, and the line or row, that cannot be used.
    """
    problems = [problem for file in files if (problem := _problem_at_start(file, text_key))]
    if len(problems) > 1:
        more = len(problems) - LISTED
        shown = problems[:LISTED] + [f"and {more:,} more"] * (more > 0)
        raise DataError(f"{len(problems):,} files cannot be used:\n  " + "\n  ".join(shown))
    if problems:
        raise DataError(problems[0])
    sizes = [os.path.getsize(file.path) for file in files]
    with tqdm(total=sum(sizes), desc=label, unit="B", unit_scale=True, disable=None) as bar:
        at = 0  # bytes of the files already read
        for file, size in zip(files, sizes, strict=True):
            with _opened(file) as raw:
                for piece in _read_file(file, raw, text_key, counts):
                    counts.bytes += len(piece.text.encode())
                    bar.update(at + raw.tell() - bar.n)
                    yield piece
            at += size
            bar.update(at - bar.n)


@contextmanager
def _opened(file: SourceFile) -> Iterator[IO[bytes]]:
    """Opens a file; what fails while it is read becomes a DataError that names it."""
    try:
        with open(file.path, "rb") as raw:
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.path}: truncated or not gzip ({error})") from None
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from None


def _problem_at_start(file: SourceFile, text_key: str) -> str:
    """Returns why the first document of a file cannot be read, "" if it can."""
    has_rows = file.path.name.lower().endswith((".jsonl", ".jsonl.gz", *SUFFIXES))
    if not has_rows and not file.is_named:
        return ""  # skipped if it is not text
    try:
        with _opened(file) as raw:
            if has_rows:
                next(_read_file(file, raw, text_key, Counts()), None)
            elif problem := _not_text(raw, only_start=True):
                return f"{file.path}: {problem}; {_READABLE}"
    except DataError as error:
        return str(error)
    return ""


def _read_file(file: SourceFile, raw: IO[bytes], text_key: str, counts: Counts) -> Iterator[Piece]:
    name = file.path.name.lower()
    if name.endswith(".jsonl"):
        yield from _pieces(_json_rows(file.path, raw, counts), text_key, "key", counts)
    elif name.endswith(".jsonl.gz"):
        with gzip.open(raw) as lines:
            yield from _pieces(_json_rows(file.path, lines, counts), text_key, "key", counts)
    elif name.endswith(SUFFIXES):

        def choose(names: list[str]) -> list[str]:
            # Without the column, a whole row helps to find what it should have been.
            return [text_key] if text_key in names else names

        yield from _pieces(read_rows(file.path, raw, choose), text_key, "column", counts)
    elif not (problem := _not_text(raw)):
        yield from _split(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), counts)
    elif file.is_named:
        raise DataError(f"{file.path}: {problem}; {_READABLE}")
    else:
        counts.binary_files += 1


def _not_text(raw: IO[bytes], only_start: bool = False) -> str:
    """Returns why a file, or its first MiB, is not UTF-8 text, "" if it is; goes to its start."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        while chunk := raw.read(1 << 20):
            if at == 0 and b"\0" in chunk[:8192]:
                return "binary (it has zero bytes)"
            decoder.decode(chunk)
            at += len(chunk)
            if only_start:
                break
        decoder.decode(b"", final=not only_start or not raw.read(1))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} after about {at + error.start:,} bytes)"
    raw.seek(0)
    return ""


def _split(stream: TextIO, counts: Counts) -> Iterator[Piece]:
    """Yields a document, cut between lines if it is long, and counts it.

    A cut is before a line that is not blank: Llama 3's pre-tokenisation joins the blank ones with
    the end of the line above. A line that is itself too long is cut between two words if it has
    any, and else where the second read ends. So the tokens are those of the whole document, but
    where blank lines or a word without end fill a piece.
    """

    def read(start: str) -> tuple[str, str]:
        """Returns a piece that starts with `start`, and what the next one starts with."""
        text = start + stream.read(PIECE_CHARACTERS) + stream.readline(PIECE_CHARACTERS)
        line = stream.readline(PIECE_CHARACTERS)
        while line.isspace() and len(text) < 4 * PIECE_CHARACTERS:
            text, line = text + line, stream.readline(PIECE_CHARACTERS)
        is_cut = line and not text.endswith(("\n", "\r"))
        if is_cut and (words := _LAST_SPACE.match(text + line[0])):
            text, line = words.group(), text[words.end() :] + line
        return text, line

    text, start = read("")
    is_first = True
    counts.documents += bool(text)
    counts.empty_documents += not text
    while text:
        following, start = read(start) if start else ("", "")
        counts.long_documents += is_first and bool(following)
        yield Piece(text, is_first, not following)
        text, is_first = following, False


def _json_rows(
    path: Path, lines: Iterable[bytes], counts: Counts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "file:line" and the object that stands there."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            counts.blank_lines += 1
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a line of JSON in UTF-8 ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record


def _pieces(
    rows: Iterable[tuple[str, dict[str, Any]]], text_key: str, called: str, counts: Counts
) -> Iterator[Piece]:
    """Yields the text of each row; `called` is "key" or "column"."""
    for where, record in rows:
        if text_key not in record:
            strings = {k: v for k, v in record.items() if isinstance(v, str)}
            found = ", ".join(repr(k) for k in list(record)[:8]) or f"no {called}s"
            # The longest string is most likely what is wanted.
            longest = max(strings, key=lambda k: len(strings[k]), default=None)
            hint = f"; use --data.text-key {longest}" if longest is not None else ""
            raise DataError(f"{where}: no {text_key!r} {called} (found: {found}){hint}")
        text = record[text_key]
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise DataError(f"{where}: {text_key!r} is {kind}, expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: {text_key!r} is not valid Unicode: {error}") from None
        yield from _split(io.StringIO(text, newline=""), counts)
