"""Rows of parquet files, streamed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from llamapro.errors import DataError

SUFFIX = ".parquet"
_BATCH_ROWS = 256  # held in memory at once


def read_rows(
    path: Path, raw: IO[bytes], choose: Callable[[list[str]], list[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a parquet file batch by batch: memory does not grow with the file.

    Args:
        path: names the file in locations and messages.
        raw: the opened file.
        choose: takes the names of the columns and returns those to read.

    Yields:
        "file:row", counted from 1, and the row's values by column.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged; and whatever `choose` raises.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: needs pyarrow: pip install 'llamapro[data]'") from None

    def read_batches() -> Iterator[list[dict[str, Any]]]:
        # With `pre_buffer` it would hold all row groups in memory; without a buffer, a whole one.
        table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 18)
        columns = choose(table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            yield batch.to_pylist()

    row, batches = 0, read_batches()
    while True:
        # The try covers pyarrow's work only: what fails at the caller is not a damaged file.
        try:
            rows = next(batches, None)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"not a parquet file, or a damaged one ({error})"
            raise DataError(f"{path}:{row + 1}: {problem}") from None
        except (ValueError, OverflowError) as error:  # such as a time beyond Python's datetime
            problem = f"a column has values that cannot be read ({error})"
            raise DataError(f"{path}:{row + 1}: {problem}") from None
        if rows is None:
            return
        for value in rows:
            row += 1
            yield f"{path}:{row}", value
