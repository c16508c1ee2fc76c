"""Rows of data files: JSON lines (.jsonl, .jsonl.gz), JSON lists (.json) and .parquet.

Rows are streamed, so memory does not grow with a file; only a .json file is read as a whole.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llamapro.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_BATCH_ROWS = 256  # rows of a parquet file that are held in memory at once


class UnreadableError(Exception):
    """The rest of a file cannot be read; the message says why."""


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
    on_blank_line: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "file:row", counted from 1, and the row by its keys or columns.

    Args:
        path: a file with one of `SUFFIXES`; blank lines count as rows, but are not yielded.
        report: takes each problem, which begins with its file and row. If it returns, reading goes
            on with the next row, if there can be one.
        choose: takes the names of a parquet file's columns and returns those to read, or raises
            `UnreadableError`.
        noun: the word for a row in messages.
        raw: the file, already open; it is closed.
        on_blank_line: called for each blank line.
    """
    row = 0
    try:
        with raw if raw is not None else open(path, "rb") as file:
            for row, value in enumerate(_values(path.name.lower(), file, choose, noun), 1):
                if isinstance(value, bytes):  # a line
                    if not value.strip():
                        on_blank_line()
                        continue
                    text = value.decode("utf-8-sig")
                    try:
                        value = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        report(f"{path}:{row}: not a line of JSON ({error})")
                        continue
                if isinstance(value, dict):
                    yield f"{path}:{row}", value
                else:
                    kind = type(value).__name__
                    report(f"{path}:{row}: expected a JSON object, found {kind}")
    except UnreadableError as error:
        report(f"{path}:{row + 1}: {error}")
    except UnicodeDecodeError as error:
        # The whole file is in another encoding: one problem, and the rest is not read.
        line_number = max(row, 1) + error.object[: error.start].count(b"\n")
        fix = "convert the file, for example with iconv -t UTF-8"
        report(f"{path}:{line_number}: not UTF-8 ({error.reason}); {fix}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        report(f"{path}:{row + 1}: truncated or not gzip ({error})")
    except OSError as error:
        report(f"{path}:{row + 1}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        line_number = getattr(error, "lineno", 1)
        hint = f"; a {noun} per line is a .jsonl file" if line_number == 2 else ""
        report(f"{path}:{line_number}: not JSON ({error}){hint}")


def _values(
    name: str, file: IO[bytes], choose: Callable[[list[str]], list[str]], noun: str
) -> Iterable[Any]:
    """Returns the rows of a file; those that are lines of JSON as bytes."""
    if name.endswith(".parquet"):
        return _table_rows(file, choose)
    if name.endswith(".jsonl.gz"):
        return gzip.open(file)
    if name.endswith(".jsonl"):
        return file
    if not name.endswith(".json"):
        raise UnreadableError(f"not one of {', '.join(SUFFIXES)}")
    values = json.loads(file.read().decode("utf-8-sig"))
    if not isinstance(values, list):
        raise UnreadableError(f"expected a list of {noun}s, found {type(values).__name__}")
    return values


def _table_rows(
    file: IO[bytes], choose: Callable[[list[str]], list[str]]
) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnreadableError("needs pyarrow: pip install 'llamapro[data]'") from None
    try:
        # With `pre_buffer` it would hold all row groups in memory; without a buffer, a whole one.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 18)
        columns = choose(table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"not a parquet file, or a damaged one ({error})") from None
    except (ValueError, OverflowError) as error:  # such as a time beyond Python's datetime
        raise UnreadableError(f"a column has values that cannot be read ({error})") from None
