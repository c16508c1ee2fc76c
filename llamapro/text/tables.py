"""Rows of tables on disk, streamed: parquet files, and the Arrow files of the datasets library.

`datasets.save_to_disk` leaves a folder of `data-*.arrow` files with `dataset_info.json` and
`state.json`, and a folder of such folders with `dataset_dict.json` where there are several splits.
pyarrow alone reads them.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llamapro.errors import DataError

SUFFIXES = (".parquet", ".arrow")
BATCH_ROWS = 256  # in memory at once; Arrow files have batches of their own


class TableError(DataError):
    """What is wrong with a table.

    Attributes:
        where: the file, or "file:row".
        problem: what is wrong there.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


def saved_files(folder: Path, names: Sequence[str]) -> list[Path] | None:
    """Returns the files of a folder that `datasets.save_to_disk` made, None for any other folder.

    Args:
        folder: the folder.
        names: of what is in it.

    Raises:
        DataError: it holds several splits, of which some are not to be trained on; or its list of
            files is damaged.
    """
    if "dataset_dict.json" in names:
        path = folder / "dataset_dict.json"
        splits = _read_object(path).get("splits")
        if not isinstance(splits, list) or not splits or any(s not in names for s in splits):
            raise DataError(f"{path}: its splits are {splits}, which are not all there; copy again")
        if len(splits) > 1:
            raise DataError(
                f"{folder}: a saved dataset with several splits; name those to be read: "
                + ", ".join(str(folder / split) for split in splits)
            )
        folder = folder / splits[0]
        names = os.listdir(folder) if folder.is_dir() else []
    elif not {"dataset_info.json", "state.json"}.issubset(names):
        return None
    path = folder / "state.json"
    listed = _read_object(path).get("_data_files")
    files = [
        file["filename"] if isinstance(file, dict) and "filename" in file else file
        for file in (listed if isinstance(listed, list) else [])
    ]
    if not files or any(file not in names for file in files):
        raise DataError(f"{path}: its files are {files}, which are not all there; copy again")
    return [folder / file for file in files]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def read_rows(
    path: Path, raw: IO[bytes], choose: Callable[[list[str]], list[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a table, batch by batch: memory does not grow with the file.

    Args:
        path: names the file; `.arrow` is Arrow's stream or file format, anything else parquet.
        raw: the file, opened.
        choose: takes the names of its columns, returns those to be read.

    Yields:
        "file:row", counted from 1, and the row's values by column.

    Raises:
        TableError: pyarrow is not installed, or the file is damaged; and whatever `choose` raises.
    """
    try:
        import pyarrow
    except ImportError:
        raise TableError(str(path), "needs pyarrow: pip install 'llamapro[data]'") from None
    is_arrow, row = path.suffix.lower() == ".arrow", 0
    batches = _arrow_batches(raw, choose) if is_arrow else _parquet_batches(raw, choose)
    while True:
        # Only the library's own work is guarded: what is done with a row is the caller's.
        try:
            rows = next(batches, None)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            kind = "an Arrow" if is_arrow else "a parquet"
            problem = f"not {kind} file, or a damaged one ({error})"
            raise TableError(f"{path}:{row + 1}", problem) from None
        except (ValueError, OverflowError) as error:  # a time that Python's datetime has not
            problem = f"a column has values that cannot be read ({error})"
            raise TableError(f"{path}:{row + 1}", problem) from None
        if rows is None:
            return
        for value in rows:
            row += 1
            yield f"{path}:{row}", value


def _parquet_batches(
    raw: IO[bytes], choose: Callable[[list[str]], list[str]]
) -> Iterator[list[dict[str, Any]]]:
    import pyarrow.parquet

    # Read ahead, it would hold all row groups at once; unbuffered, all of one.
    table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 18)
    columns = choose(table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        yield batch.to_pylist()


def _arrow_batches(
    raw: IO[bytes], choose: Callable[[list[str]], list[str]]
) -> Iterator[list[dict[str, Any]]]:
    import pyarrow.ipc

    is_file = raw.read(6) == b"ARROW1"  # else a stream, which is what datasets writes
    raw.seek(0)
    if is_file:
        table = pyarrow.ipc.open_file(raw)
        columns = choose(table.schema.names)
        for i in range(table.num_record_batches):
            yield table.get_batch(i).select(columns).to_pylist()
    else:
        stream = pyarrow.ipc.open_stream(raw)
        columns = choose(stream.schema.names)
        for batch in stream:
            yield batch.select(columns).to_pylist()
