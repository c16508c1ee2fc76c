"""Documents of a corpus: files -> documents -> pieces of text.

All are streamed in one order, so memory does not grow with the corpus.
"""

import codecs
import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from tqdm import tqdm

from llamapro.errors import DataError, Problems
from llamapro.text.rows import quote_names, read_rows

# Length of the pieces of long documents and of batches of short ones. sentencepiece takes twice as
# long for 4 million characters at once, and a file may be larger than the memory.
PIECE_CHARACTERS = 1 << 18
# The last space between two words. No token reaches across the place before it, because
# pre-tokenisation and sentencepiece's vocabulary join a space with the word after it.
_LAST_SPACE = re.compile(r".*\w(?= \w)", re.DOTALL)
_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus; `is_named` says that the user or a glob named it, not only its folder."""

    path: Path
    is_named: bool

    def state(self) -> list[Any]:
        """Returns what caches compare: absolute path, is_named, size, time of change in ns."""
        status = self.path.stat()
        return [os.path.abspath(self.path), self.is_named, status.st_size, status.st_mtime_ns]


@dataclass
class Counts:
    """Counts of what was read and left out; `bytes` is the UTF-8 length of all text."""

    documents: int = 0
    bytes: int = 0
    long_documents: int = 0
    empty_documents: int = 0
    blank_lines: int = 0
    binary_files: int = 0

    def describe(self) -> str:
        """Returns the counts as text."""
        return f"{self.documents:,} documents, {self.bytes:,} bytes" + describe_unusual(
            {
                "long documents tokenised in pieces": self.long_documents,
                "empty documents left out": self.empty_documents,
                "blank lines skipped": self.blank_lines,
                "binary or non-UTF-8 files skipped": self.binary_files,
            }
        )


def describe_unusual(counts: dict[str, int]) -> str:
    """Returns ", 3 name" for each count that is not zero."""
    return "".join(f", {count:,} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True)
class Piece:
    """Text of one document, usually all of it."""

    text: str
    is_first: bool
    is_last: bool


def find_files(patterns: Sequence[str]) -> list[SourceFile]:
    """Returns the files that paths, globs (`**` allowed) and folders name, each once.

    Folders are walked recursively, by name, without hidden entries and `__pycache__`.

    Raises:
        DataError: no pattern is given, one matches no file, or a file is Arrow's.
    """
    files: dict[str, SourceFile] = {}
    if not patterns:
        raise DataError("no data given: name files, folders or globs")
    for pattern in patterns:
        literal = os.path.expanduser(pattern)
        matched: list[SourceFile] = []
        # A name that exists is taken literally, even if it contains '[' or '*'.
        matches = [literal] if os.path.exists(literal) else glob.glob(literal, recursive=True)
        for match in sorted(matches):
            if os.path.isdir(match):
                matched += [SourceFile(path, False) for path in _walk(Path(match), set())]
            elif os.path.isfile(match):
                matched.append(SourceFile(Path(match), True))
        if not matched:
            problem = "the folder holds no files" if os.path.isdir(literal) else "no such file"
            raise DataError(f"{pattern}: {problem}; give files, folders or globs like 'd/**/*.py'")
        for file in matched:
            if file.path.suffix.lower() == ".arrow":
                raise DataError(
                    f"{file.path}: Arrow files, as datasets.save_to_disk writes them, are not "
                    "read; save the data as parquet: load_from_disk(DIR)['train'].to_parquet(FILE)"
                )
            real = os.path.realpath(file.path)
            earlier = files.get(real, file)
            files[real] = SourceFile(earlier.path, earlier.is_named or file.is_named)
    return list(files.values())


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

    A document is a text file, a line of a `.jsonl` or `.jsonl.gz` file, or a row of a `.parquet`
    file. The first document of every file is checked before any file is read, so that one run
    reports the wrong keys and kinds of all files.

    Args:
        files: as from `find_files`.
        text_key: key of the text in a JSON line, or name of its column.
        counts: grow while the pieces are read.
        label: names the progress bar.

    Raises:
        DataError: a file cannot be used; the message names it and the line or row.
    """
    wrong = [problem for file in files if (problem := _problem_at_start(file, text_key))]
    if len(wrong) == 1:
        raise DataError(wrong[0])
    head = f"{len(wrong):,} files cannot be used"
    Problems(wrong, limit=20).check(DataError, head, one_per_line=True)
    sizes = [os.path.getsize(file.path) for file in files]
    with tqdm(total=sum(sizes), desc=label, unit="B", unit_scale=True, disable=None) as bar:
        done = 0  # bytes of the files already read
        for file, size in zip(files, sizes, strict=True):
            with _open(file) as raw:
                for piece in _read_file(file, raw, text_key, counts):
                    counts.bytes += len(piece.text.encode())
                    bar.update(done + raw.tell() - bar.n)
                    yield piece
            done += size
            bar.update(done - bar.n)


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
            if file.path.name.lower().endswith(_ROW_SUFFIXES):
                next(_read_texts(file.path, raw, text_key, Counts()), None)
            elif file.is_named:  # others are skipped if they are not text
                _check_text(file, raw, only_start=True)
    except DataError as error:
        return str(error)
    return ""


def _read_file(file: SourceFile, raw: IO[bytes], text_key: str, counts: Counts) -> Iterator[Piece]:
    if file.path.name.lower().endswith(_ROW_SUFFIXES):
        yield from _read_texts(file.path, raw, text_key, counts)
        return
    try:
        _check_text(file, raw)
    except DataError:
        if file.is_named:
            raise
        counts.binary_files += 1
    else:
        yield from _split(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), counts)


def _check_text(file: SourceFile, raw: IO[bytes], only_start: bool = False) -> None:
    """Raises DataError if a file, or its first MiB, is not UTF-8 text, and rewinds the file."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    readable = "only UTF-8 text, .jsonl, .jsonl.gz and .parquet are read"
    try:
        while chunk := raw.read(1 << 20):
            if position == 0 and b"\0" in chunk[:8192]:
                raise DataError(f"{file.path}: binary (it has zero bytes); {readable}")
            decoder.decode(chunk)
            position += len(chunk)
            if only_start:
                break
        decoder.decode(b"", final=not only_start or not raw.read(1))
    except UnicodeDecodeError as error:
        place = f"{error.reason} after about {position + error.start:,} bytes"
        raise DataError(f"{file.path}: not UTF-8 ({place}); {readable}") from None
    raw.seek(0)


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


def _read_texts(path: Path, raw: IO[bytes], text_key: str, counts: Counts) -> Iterator[Piece]:
    """Yields the text of each row."""

    def choose(names: list[str]) -> list[str]:
        # Without the column, all others are read, because their values show which was meant.
        return [text_key] if text_key in names else names

    def count_blank_line() -> None:
        counts.blank_lines += 1

    for location, row in read_rows(path, choose=choose, raw=raw, on_blank_line=count_blank_line):
        if text_key not in row:
            # The longest string is most likely the text.
            lengths = {k: len(v) for k, v in row.items() if isinstance(v, str)}
            longest = max(lengths, key=lengths.__getitem__, default="")
            hint = f"; use --data.text-key {longest}" if longest else ""
            kind = "column" if path.name.lower().endswith(".parquet") else "key"
            found = quote_names(row)
            raise DataError(f"{location}: no {text_key!r} {kind} (found: {found}){hint}")
        text = row[text_key]
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise DataError(f"{location}: {text_key!r} is {kind}, expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{location}: {text_key!r} is not valid Unicode: {error}") from None
        yield from _split(io.StringIO(text, newline=""), counts)
