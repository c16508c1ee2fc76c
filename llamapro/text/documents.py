"""Documents of a corpus: files -> documents -> pieces of text.

All are streamed in one order, so memory does not grow with the corpus.
"""

import codecs
import io
import json
import lzma
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

from tqdm import tqdm

from llamapro.errors import DataError, Problems
from llamapro.files import pointer_fix
from llamapro.text.encodings import describe_foreign
from llamapro.text.rows import COMPRESSED, SUFFIXES, has_rows, quote_names, read_rows, suffixes
from llamapro.text.source_files import ARCHIVES, SourceFile

# Length of the pieces of long documents and of batches of short ones. sentencepiece takes twice as
# long for 4 million characters at once, and a file may be larger than the memory.
PIECE_CHARACTERS = 1 << 18
# The last space between two words. No token reaches across the place before it, because
# pre-tokenisation and sentencepiece's vocabulary join a space with the word after it.
_LAST_SPACE = re.compile(r".*\w(?= \w)", re.DOTALL)
_READABLE = f"only UTF-8 text and {', '.join(SUFFIXES)} are read"
_UNSURE = (".json", ".csv", ".tsv")
_TRIES = 20  # rows without a text, after which a file is taken for one of another kind
_SHOWN = 5  # files left out, in a summary


@dataclass
class Counts:
    """Counts of what was read and left out."""

    documents: int = 0
    bytes: int = 0  # UTF-8 length of all text
    long_documents: int = 0
    empty_documents: int = 0
    files_left_out: int = 0
    left_out: list[str] = field(default_factory=list)  # the first of them, with the reason
    # How often names of control tokens stand in the text as plain characters.
    markers: dict[str, int] = field(default_factory=dict)
    end: str = ""  # the first of them that ends documents

    def add(self, other: "Counts") -> None:
        """Adds what was read after this, from other files."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.left_out = (self.left_out + other.left_out)[:_SHOWN]
        for name, count in other.markers.items():
            self.markers[name] = self.markers.get(name, 0) + count
        self.end = self.end or other.end

    def leave_out(self, file: SourceFile, reason: str) -> None:
        """Counts a file that is not read."""
        self.files_left_out += 1
        if len(self.left_out) < _SHOWN:
            self.left_out.append(f"{file.path} ({reason})")

    def check(self, patterns: Sequence[str]) -> None:
        """Raises DataError if these patterns hold no text."""
        if not self.bytes:
            raise DataError(f"{', '.join(patterns)}: no text in it: {self.describe()}")

    def describe(self) -> str:
        """Returns the counts as text."""
        text = f"{self.documents:,} documents, {self.bytes:,} bytes" + describe_unusual(
            {
                "long documents tokenised in pieces": self.long_documents,
                "empty documents left out": self.empty_documents,
                "files left out": self.files_left_out,
            }
        )
        if self.left_out:
            more = self.files_left_out - len(self.left_out)
            text += f": {', '.join(self.left_out)}" + (f" and {more:,} more" if more else "")
        for name, count in list(self.markers.items())[:_SHOWN]:
            text += f"; {name!r} stands in the text {count:,} times"
        if self.markers:
            text += ", as plain characters"
        if self.end:
            text += f" (--data.split-at '{self.end}' begins documents there)"
        return text


def describe_unusual(counts: dict[str, int]) -> str:
    """Returns ", 3 name" for each count that is not zero."""
    return "".join(f", {count:,} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True)
class Piece:
    """Text of one document, usually all of it."""

    text: str
    is_first: bool
    is_last: bool


def read_pieces(
    files: Sequence[SourceFile], text_key: str, counts: Counts, label: str
) -> Iterator[Piece]:
    """Yields the text of all documents, in order, with a progress bar in bytes of the files.

    A document is a text file, or a row of a file that `rows` reads. The first document of every
    file is checked before any file is read, so that one run reports the wrong keys and kinds of all
    files; wrong rows after it are reported together at the end. In a folder, JSON and CSV without
    such rows are left out: settings lie beside code. Raises DataError that names each file or row
    that cannot be used.

    Args:
        text_key: key of the text in a JSON line, or name of its column.
        counts: grow while the pieces are read.
    """
    wrong, read = Problems(limit=20), []
    for file in files:
        problem = file.left_out or _problem_at_start(file, text_key)
        if not problem:
            read.append(file)
        elif file.left_out or (not file.is_named and suffixes(file.path)[0] in _UNSURE):
            counts.leave_out(file, problem.removeprefix(f"{file.path}").lstrip(":0123456789 "))
        else:
            wrong.add(problem)
    _check(wrong, "files")
    sizes = [os.path.getsize(file.path) for file in read]
    with tqdm(total=sum(sizes), desc=label, unit="B", unit_scale=True, disable=None) as bar:
        done = 0  # bytes of the files already read
        for file, size in zip(read, sizes, strict=True):
            with _open(file) as raw:
                for piece in _read_file(file, raw, text_key, counts, wrong.add):
                    counts.bytes += len(piece.text.encode())
                    bar.update(done + raw.tell() - bar.n)
                    yield piece
            done += size
            bar.update(done - bar.n)
    _check(wrong, "rows")


def _check(wrong: Problems, what: str) -> None:
    """Raises DataError if there are problems; one alone stands without a head."""
    if len(wrong) == 1:
        raise DataError(wrong.listed[0])
    wrong.check(DataError, f"{len(wrong):,} {what} cannot be used", one_per_line=True)


@contextmanager
def _open(file: SourceFile) -> Iterator[IO[bytes]]:
    """Opens a file; an error while it is read becomes a DataError that names it."""
    try:
        with open(file.path, "rb") as raw:
            yield raw
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from None


def _problem_at_start(file: SourceFile, text_key: str) -> str:
    """Returns why the first document of a file cannot be read, "" if it can."""
    try:
        with _open(file) as raw:
            if fix := pointer_fix(raw.read(40)):
                return f"{file.path}: {fix}"
            raw.seek(0)
            if has_rows(file.path):
                return _problem_of_rows(file, raw, text_key)
            if file.is_named:  # others are left out if they are not text
                with _unpacked(file, raw) as text:
                    if reason := _not_text(file, text, text_key, only_start=True):
                        return f"{file.path}: {reason}"
    except DataError as error:
        return str(error)
    return ""


def _problem_of_rows(file: SourceFile, raw: IO[bytes], text_key: str) -> str:
    """Returns why none of the first rows of a file has a text, "" if one has.

    Then the wrong ones are told at the end, with all others. Settings have to be right at once.
    """
    problems: list[str] = []
    tries = _TRIES if file.is_named or suffixes(file.path)[0] not in _UNSURE else 1

    def note(problem: str) -> None:
        problems.append(problem)
        if len(problems) == tries:
            raise DataError(problems[0])

    piece = next(_read_texts(file.path, raw, text_key, Counts(), note), None)
    return problems[0] if problems and piece is None else ""


def _read_file(
    file: SourceFile, raw: IO[bytes], text_key: str, counts: Counts, report: Callable[[str], None]
) -> Iterator[Piece]:
    if has_rows(file.path):
        before = counts.documents + counts.empty_documents
        yield from _read_texts(file.path, raw, text_key, counts, report)
        if before == counts.documents + counts.empty_documents:
            counts.leave_out(file, "no row in it")
        return
    with _unpacked(file, raw) as text:
        reason = _not_text(file, text, text_key)
        if reason and file.is_named:
            raise DataError(f"{file.path}: {reason}")
        if reason:
            counts.leave_out(file, reason)
        else:
            yield from _split(io.TextIOWrapper(text, encoding="utf-8-sig", newline=""), counts)


@contextmanager
def _unpacked(file: SourceFile, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    """Gives the content of a text file that may be compressed."""
    packed = suffixes(file.path)[1]
    try:
        yield COMPRESSED[packed](raw) if packed else raw
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if not packed:
            raise
        raise DataError(f"{file.path}: truncated or not {packed[1:]} ({error})") from None


def _not_text(file: SourceFile, raw: IO[bytes], text_key: str, only_start: bool = False) -> str:
    """Returns why a file, or its first MiB, is not a text in UTF-8, or ""; rewinds the file."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    if (suffix := suffixes(file.path)[0]) in ARCHIVES:
        return f"{suffix} is not read; unpack it"
    try:
        while chunk := raw.read(1 << 20):
            if position == 0 and (reason := describe_foreign(chunk)):
                return reason
            if position == 0 and b"\0" in chunk[:8192]:
                return f"binary (it has zero bytes); {_READABLE}"
            decoder.decode(chunk)
            position += len(chunk)
            if only_start:
                break
        decoder.decode(b"", final=not only_start or not raw.read(1))
    except UnicodeDecodeError as error:
        after = f"{position + error.start:,} bytes"
        fix = "convert it, for example with iconv -f ENCODING -t UTF-8"
        return f"not UTF-8 ({error.reason} after about {after}); {fix}"
    raw.seek(0)
    start = raw.read(PIECE_CHARACTERS).decode("utf-8-sig", "ignore").lstrip("[ \t\r\n")
    raw.seek(0)
    try:
        row, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        row, end = None, 0
    is_followed = bool(re.match(r"\s*\n\{", start[end:]))
    if isinstance(row, dict) and (text_key in row or is_followed):
        found = quote_names(row)
        return f"holds rows of JSON with {found}, under another name; rename it to *.json"
    return ""


def _split(stream: TextIO, counts: Counts) -> Iterator[Piece]:
    """Yields a document, cut between lines if it is long, and counts it.

    The pieces have the tokens of the whole document, unless blank lines or one word fill a piece.
    A cut lies before a line that is not blank, because Llama 3's pre-tokenisation joins blank lines
    with the end of the line above. A line that is too long is cut between two words, or where the
    second read ends.
    """

    def read(start: str) -> tuple[str, str]:
        """Returns a piece that begins with `start`, and the beginning of the next one."""
        text = start + stream.read(PIECE_CHARACTERS) + stream.readline(PIECE_CHARACTERS)
        line = stream.readline(PIECE_CHARACTERS)
        while line.isspace() and len(text) < 4 * PIECE_CHARACTERS:
            text, line = text + line, stream.readline(PIECE_CHARACTERS)
        is_inside_line = line and not text.endswith(("\n", "\r"))
        if is_inside_line and (words := _LAST_SPACE.match(text + line[0])):
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


def _read_texts(
    path: Path, raw: IO[bytes], text_key: str, counts: Counts, report: Callable[[str], None]
) -> Iterator[Piece]:
    """Yields the text of each row, and reports the rows that have none."""

    def choose(names: list[str]) -> list[str]:
        # Without the column, all others are read, because their values show which was meant.
        return [text_key] if text_key in names else names

    for location, row in read_rows(path, report, choose, "row", raw):
        if text_key not in row:
            kind = "key" if suffixes(path)[0] in (".jsonl", ".ndjson", ".json") else "column"
            found = quote_names(row)
            report(f"{location}: no {text_key!r} {kind} (found: {found}){_hint(row)}")
            continue
        text = "" if row[text_key] is None else row[text_key]  # null: an empty document
        if not isinstance(text, str):
            kind = type(text).__name__
            report(f"{location}: {text_key!r} is {kind}, expected a string ({text!r:.40})")
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            report(f"{location}: {text_key!r} is not valid Unicode: {error}")
            continue
        yield from _split(io.StringIO(text, newline=""), counts)


def _hint(row: dict[str, Any]) -> str:
    """Returns where the text of a row most likely is."""
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if value[0].keys() & {"role", "from"}:
                return "; conversations, which training reads with --data.format chat"
            return f"; are its rows the list {key!r}? Save that alone"
    # The longest string is most likely the text.
    lengths = {key: len(value) for key, value in row.items() if isinstance(value, str)}
    longest = max(lengths, key=lengths.__getitem__, default="")
    return f"; use --data.text-key {shlex.quote(longest)}" if longest else ""
