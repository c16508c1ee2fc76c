"""Rows of data files: JSON (a row per line, or a list), CSV, TSV and parquet.

All but parquet may be compressed by gzip, bzip2 or xz. Rows are streamed, so memory does not grow
with a file; only a JSON list is read as a whole.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import dropwhile
from pathlib import Path
from typing import IO, Any, cast

from llamapro.errors import DataError, needed
from llamapro.files import RepeatedKeyError, refuse_stand_in, unique_keys
from llamapro.text.encodings import describe_foreign

_JSON, _DELIMITERS = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*_JSON, *_DELIMITERS, ".parquet")
COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
}  # fmt: skip
# A stranger's file of a few kB can expand to gigabytes: no row, or list of rows, is larger.
MAX_BYTES = 1 << 28
_MAX_RATIO = 500  # of a column's bytes to those in the file, above which it has to be small
_FIRST_BYTES = 1 << 16  # that tell a list from rows
_BATCH_ROWS = 256  # rows of a parquet file that are read at once


def _number(digits: str) -> float:
    """Returns an integer; one that Python refuses to read, which no text is, as a float."""
    return int(digits) if len(digits) < 4300 else float(digits)


# Made once: that takes time.
_JSON_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=_number)
_ANY_KEYS = json.JSONDecoder(parse_int=_number)
_REPEATED = "the key {} in an object: leave one of them"
_ROW_START = re.compile(r"[^\s,]")


def suffixes(path: Path) -> tuple[str, str]:
    """Returns the last suffix of a name without compression, in lower case, and the compression."""
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def has_rows(path: Path) -> bool:
    """Returns whether a file's name says that it holds rows."""
    return suffixes(path)[0] in SUFFIXES


class UnreadableError(Exception):
    """The rest of a file cannot be read; the message says why."""


class Wrong(str):
    """What is wrong with a row, in its place."""


def refuse(problem: str) -> None:
    """Raises a problem as a DataError."""
    raise DataError(problem)


def quote_names(keys: Iterable[Any]) -> str:
    """Returns the first eight keys for a message."""
    return ", ".join(repr(key) for key in list(keys)[:8]) or "none"


def read_rows(
    path: Path,
    report: Callable[[str], None] = refuse,
    choose: Callable[[list[str]], list[str]] = list,
    noun: str = "row",
    raw: IO[bytes] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "file:row", counted from 1, and the row by its keys or columns.

    Args:
        path: a file with one of `SUFFIXES`, which may be compressed; blank lines count as rows,
            but are not yielded.
        report: takes each problem, which begins with its file and row. If it returns, reading goes
            on with the next row, if there can be one.
        choose: takes the names of a table's columns and returns those to read, or raises
            `UnreadableError`.
        noun: the word for a row in messages.
        raw: the file, already open; it is closed.
    """
    row = 0
    try:
        refuse_stand_in(path, DataError)
    except DataError as error:
        report(str(error))
        return
    try:
        with raw if raw is not None else open(path, "rb") as file:
            for row, value in enumerate(_values(path, file, choose, noun), 1):
                if isinstance(value, bytes):  # a line
                    if not value.strip():
                        continue
                    value = _parsed(value.decode("utf-8-sig"))
                if isinstance(value, dict):
                    yield f"{path}:{row}", value
                else:
                    kind = f"expected a JSON object, found {type(value).__name__}"
                    report(f"{path}:{row}: {value if isinstance(value, Wrong) else kind}")
    except UnreadableError as error:
        report(f"{path}:{row + 1}: {error}")
    except UnicodeDecodeError as error:
        # The whole file is in another encoding: one problem, and the rest is not read.
        line_number = max(row, 1) + error.object[: error.start].count(b"\n")
        fix = "convert it, for example with iconv -f ENCODING -t UTF-8"
        report(f"{path}:{line_number}: not UTF-8 ({error.reason}); {fix}")
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        report(f"{path}:{row + 1}: truncated or not {suffixes(path)[1][1:]} ({error})")
    except csv.Error as error:
        fix = "a quote within a text in quotes is written twice, one at its end once"
        if "new-line" in str(error):
            error, fix = csv.Error("CR within it"), "put a text with line breaks in quotes"
        report(f"{path}:{row + 1}: not a line of {suffixes(path)[0][1:]} ({error}); {fix}")
    except OSError as error:
        report(f"{path}:{row + 1}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        report(f"{path}:{getattr(error, 'lineno', 1)}: not one list in JSON ({error})")


def _values(
    path: Path, file: IO[bytes], choose: Callable[[list[str]], list[str]], noun: str
) -> Iterable[Any]:
    """Returns the rows of a file, or `Wrong` ones; those that are lines of JSON as bytes."""
    suffix, packed = suffixes(path)
    if suffix not in SUFFIXES or (packed and suffix == ".parquet"):
        raise UnreadableError(f"not one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _table_rows(file, choose)
    if packed:
        file = COMPRESSED[packed](file)
    # `read1` stops where a truncated file does, and its rows before that place are still read.
    head = cast(BufferedReader, file).read1(_FIRST_BYTES)
    if reason := describe_foreign(head):
        raise UnreadableError(reason)
    if b"\n" not in head and b"\r" in head.strip() and not head.lstrip().startswith(b"["):
        raise UnreadableError(r"its lines end with CR alone; convert it with tr '\r' '\n'")
    file.seek(0)
    if suffix in _DELIMITERS:
        return _separated(file, _DELIMITERS[suffix], choose)
    start = file.readline(_FIRST_BYTES).removeprefix(codecs.BOM_UTF8).strip()
    while not start and (line := file.readline(_FIRST_BYTES)):  # blank lines before the first
        start = line.strip()
    file.seek(0)
    if not start.startswith(b"["):
        if suffix == ".json" and start.startswith(b"{") and not _is_json(start):
            raise UnreadableError(f"expected a list of {noun}s, or one per line; found one object")
        return _lines(file)
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnreadableError(f"a list of over {MAX_BYTES >> 20} MiB: save one {noun} per line")
    text = content.decode("utf-8-sig")
    try:
        return _JSON_DECODER.decode(text)
    except RepeatedKeyError:
        return _list_rows(text)


def _parsed(line: str) -> Any:
    """Returns the row of a line of JSON, or what is wrong with it."""
    try:
        return _JSON_DECODER.decode(line)
    except RepeatedKeyError as error:
        return Wrong(_REPEATED.format(error))
    except (ValueError, RecursionError) as error:
        return Wrong(f"not a line of JSON ({error})")


def _list_rows(text: str) -> Iterator[Any]:
    """Yields the rows of a JSON list, and what is wrong with each that has a key twice."""
    position = text.index("[") + 1
    while (start := _ROW_START.search(text, position)) and start[0] != "]":
        value, position = _ANY_KEYS.raw_decode(text, start.start())
        try:
            _JSON_DECODER.raw_decode(text, start.start())
        except RepeatedKeyError as error:
            value = Wrong(_REPEATED.format(error))
        yield value


def _is_json(line: bytes) -> bool:
    """Whether a line is JSON, as far as its first bytes show."""
    try:
        _ANY_KEYS.decode(line.decode())
    except (ValueError, RecursionError):
        return len(line) > _FIRST_BYTES - 8
    return True


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_BYTES + 1):
        if len(line) > MAX_BYTES:
            raise UnreadableError(f"a line of over {MAX_BYTES >> 20} MiB")
        yield line


def _separated(
    file: IO[bytes], delimiter: str, choose: Callable[[list[str]], list[str]]
) -> Iterator[dict[str, Any] | Wrong]:
    """Yields the rows of a table in text, or what is wrong with one.

    Its first line has the names of the columns. A field that is wanted must be there: a text that
    was cut at a line break would be lost.
    """
    csv.field_size_limit(MAX_BYTES)
    text = dropwhile(str.isspace, (line.decode("utf-8-sig") for line in _lines(file)))
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    if not (names := [*(rows.fieldnames or ())]):
        return
    if len(names) == 1 and (other := re.search("[;\t|,]", names[0])):
        raise UnreadableError(f"the first line has {other[0]!r} between names, not {delimiter!r}")
    wanted = choose(names)
    if any(names.count(name) > 1 for name in wanted if name):
        raise UnreadableError(f"two columns have the same name: {quote_names(names)}")
    for row in rows:
        if None in row:
            fix = f"put a text with {delimiter!r} in quotes"
            yield Wrong(f"more fields than the first line has names; {fix}")
        elif missing := [name for name in wanted if row[name] is None]:
            fix = "put a text with line breaks in quotes"
            yield Wrong(f"no field for {quote_names(missing)}; {fix}")
        elif names[1:] and all(row[name] == name for name in names):
            yield Wrong("the first line again, as in tables put together: remove it")
        else:
            yield {name: row[name] for name in wanted}


def _without_nulls(value: Any) -> Any:
    """Leaves out the keys that a nested object has only because others of its column have them."""
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


def _table_rows(
    file: IO[bytes], choose: Callable[[list[str]], list[str]]
) -> Iterator[dict[str, Any]]:
    with needed("needs pyarrow", "data", UnreadableError):
        import pyarrow.parquet
    try:
        # With `pre_buffer` it would hold all row groups in memory; without a buffer, a whole one.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 18)
        columns = choose(table.schema_arrow.names)
        # What is stored once and repeated stays so in memory: rows are copied one at a time.
        repeated = _texts(table.metadata, columns)
        table = pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 18, read_dictionary=repeated
        )
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in range(len(batch)):
                values = {name: batch[name][row].as_py() for name in batch.schema.names}
                yield {name: _without_nulls(value) for name, value in values.items()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        # A KeyError is pyarrow's own: its parts name columns differently.
        raise UnreadableError(f"not a parquet file, or a damaged one ({error})") from None
    except (ValueError, OverflowError) as error:  # such as a time beyond Python's datetime
        raise UnreadableError(f"a column has values that cannot be read ({error})") from None


def _texts(metadata: Any, columns: Iterable[str]) -> list[str]:
    """Returns the columns of texts, nested ones too, among these.

    Raises UnreadableError if few bytes of one of these columns expand to gigabytes.
    """
    found, wanted = dict[str, None](), set(columns)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            name = column.path_in_schema
            if name.split(".")[0] not in wanted:
                continue
            size, stored = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if size > MAX_BYTES and size > _MAX_RATIO * stored:
                raise UnreadableError(f"column {name!r} expands from {stored:,} bytes to {size:,}")
            is_delta = any("DELTA" in encoding for encoding in column.encodings)
            if column.physical_type == "BYTE_ARRAY" and not is_delta:  # which has no dictionary
                found[name] = None
    return list(found)
