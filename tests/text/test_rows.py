"""Rows of text files and tables: read part by part, and refused by file and row."""

import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamapro.errors import DataError
from llamapro.text import rows
from llamapro.text.rows import read_rows
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer

Tokenize = Callable[..., TokenStore]
WriteParquet = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"id": "7", "content": "long text"}', None),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}', r"a\.jsonl:2: 'text' is int"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "a", "text": "b"}',
            r"a\.jsonl:2: the key 'text' comes twice in an object: leave one of them",
        ),
        (
            "a.jsonl",
            b'{"text": "x", "meta": {"id": 1, "id": 1}}',
            r"a\.jsonl:1: the key 'id' comes twice",
        ),
        (
            "a.json",
            b'[{"text": "x"},\n {"text": "a", "te\\u0078t": "b"}]',
            r"a\.json:2: the key 'text' comes twice",
        ),
        ("a.jsonl", b'{"text": "x"}\n["text"]', r"a\.jsonl:2: expected a JSON object, found list"),
        ("a.json", b'{\n"text": "x"\n}', r"a\.json:1: expected a list of rows, or one per line"),
        ("a.csv", b"text,id\nx,1\ny,2,3\n", r"a\.csv:2: more fields than the first line has"),
        ("a.csv", b"id, text\n1,long\n", r"a\.csv:1: no 'text' .*; use --data\.text-key ' text'$"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"'messages'\); conversations, which "),
        ("a.json", b'{"data": [{"text": "x"}]}', r"a\.json:1: no 'text' .*the list 'data'\? Save"),
        ("a.csv", b"id,text\n1,x\nid,text\n2,y\n", r"a\.csv:2: the first line again"),
        (
            "a.csv",
            b"text\nx\ry\n",
            r"a\.csv:1: not a line of csv \(CR within it\); put a text with line",
        ),
        ("a.csv", b"text\rx\ry\r", r"a\.csv:1: its lines end with CR alone; convert it with tr"),
        ("a.jsonl", b'{"text": "x"}\r{"text": "y"}', r"a\.jsonl:1: its lines end with CR alone"),
        ("a.csv", b"text,text\nx,y\n", r"a\.csv:1: two columns have the same name: 'text', 'text'"),
        ("a.txt.zst", b"x", r"a\.txt\.zst: \.zst is not read; unpack it"),
        ("a.tsv", b"body\tid\nx\t1\n", r"a\.tsv:1: no 'text' column \(found: 'body', 'id'\)"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", r"run 'git lfs pull'"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", r"run 'git lfs pull'"),
        ("a.txt.gz", b"abc", r"a\.txt\.gz: truncated or not gz"),
        (
            "a.txt",
            b"/annex/objects/SHA256E-s9--0a.txt\n",
            r"a\.txt: a git-annex pointer.*annex get",
        ),
        (
            "a.csv",
            b"/annex/objects/SHA256E-s9--0a.csv\n",
            r"a\.csv: a git-annex pointer.*annex get",
        ),
        ("a.txt", "é".encode("utf-16"), r"a\.txt: UTF-16; convert it"),
        ("a.txt", "é".encode("utf-32"), r"a\.txt: UTF-32; convert it.* -f UTF-32 -t"),
        ("a.txt", "The cat".encode("utf-16-le") * 9, r"a\.txt: UTF-16LE; convert .* -f UTF-16LE"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl:1: UTF-16; convert it"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-be"), r"a\.jsonl:1: UTF-16BE; convert it"),
        ("a.csv", "text,id\nx,1\n".encode("utf-16"), r"a\.csv:1: UTF-16; convert it"),
        (
            "a.txt",
            "日本語のテキスト".encode("iso2022_jp"),
            r"a\.txt: ISO-2022-JP; .* -f ISO-2022-JP",
        ),
        ("a.jsonl", '{"text": "日"}'.encode("iso2022_jp"), r"a\.jsonl:1: ISO-2022-JP; convert"),
        ("a.txt", "안녕하세요".encode("iso2022_kr"), r"a\.txt: ISO-2022-KR; convert"),
        ("a.txt", "中文，文本。\n又一行\n再一行".encode("hz"), r"a\.txt: HZ; convert it to UTF-8$"),
        (
            "a.txt",
            gzip.compress(b"x", mtime=0),
            r"a\.txt: packed by gzip under another name; rename",
        ),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"a\.jsonl:1: packed by gzip under another name",
        ),
        ("a.pq", b"PAR1\x15\0", r"a\.pq: parquet under another name; rename it to \*\.parquet"),
        ("a.docx", b"PK\3\4x", r"a\.docx: a zip archive, as \.docx"),
        ("a.txt", b"{\\rtf1\\ansi Hello}", r"a\.txt: RTF; convert it to text"),
        ("a.pdf", b"%PDF-1.4\nHello", r"a\.pdf: PDF; convert it to text"),
        ("a.csv", b"id;text\n1;x\n", r"a\.csv:1: the first line has ';' between names, not ','"),
        ("a.tsv", b"id,text\n1,x\n", r"a\.tsv:1: the first line has ',' between names, not '\\t'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: 'text' is not valid Unicode"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9],
            r"a\.jsonl\.gz:10: truncated",
        ),
        ("a.jsonl.gz", b'{"text": "x"}', r"a\.jsonl\.gz:1: truncated or not gz"),
        ("a.bin", b"a\0b", r"a\.bin: binary"),
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 .*after about 3 bytes"),
        ("a.txt", b"abc\xe2\x82", r"a\.txt: not UTF-8"),
        ("a.txt", b"", r"a\.txt: no text in it: .*1 empty documents"),
    ],
)
def test_unusable_file_is_refused_by_file_and_line(
    tmp_path: Path, make: Tokenize, name: str, content: bytes, message: str | None
) -> None:
    """Each way a named file can be wrong has a message, and nothing stays in the cache."""
    (tmp_path / name).write_bytes(content)
    # The field that holds the text is guessed from the line.
    message = (
        message or r"a\.jsonl:2: no 'text' key \(found: 'id', 'content'\); use .*-key content$"
    )
    with pytest.raises(DataError, match=message):
        make(tmp_path / name)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[32mOK\x1b[0m\x1b(B done\n",  # a terminal's colours
        '(format nil "~{~a~^, ~}" x) (format nil "~{<~a>~}" y)\n',  # Lisp
        "x = a+MAX(b)+i\n+import os\n",  # a patch
        "$a~{bc~}$, Fig.~{d~}, jane+Abc@example.com, ?q=WHO+THE\n",  # LaTeX, addresses
        "key+" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo/" * 3000 + "\n",  # base64
        "12345,a\0b\n",
    ],
)
def test_ascii_that_looks_like_another_encoding_is_text(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer, text: str
) -> None:
    """Escapes and marks of other encodings stand in code, too, which is read."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n'.replace('"~', '""~').replace('}"', '}""'))
    for name in ("a.jsonl", "a.csv", *(() if "\0" in text else ("a.txt",))):
        store = make(tmp_path / name)
        assert store.read(0, store.tokens).tolist() == tokenizer.encode(text, bos=True, eos=True)


def test_blank_lines_before_a_list_do_not_make_it_rows(tmp_path: Path) -> None:
    """What a .json holds is said by its first line that is not blank."""
    (tmp_path / "a.json").write_text('\n  \n[\n {"text": "x"},\n {"text": "y"}\n]\n')
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [{"text": "x"}, {"text": "y"}]


def test_blank_lines_before_the_names_of_columns_are_none(tmp_path: Path) -> None:
    """As spreadsheets write them; taken for the names, they would hide every row."""
    (tmp_path / "a.csv").write_text("\n \r\nid,text\n1,x\n\n2,y\n")
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [
        {"id": "1", "text": "x"},
        {"id": "2", "text": "y"},
    ]


def test_a_file_of_few_bytes_takes_no_memory(
    tmp_path: Path, write_parquet: WriteParquet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's file that would expand to gigabytes ends in one message, or row by row."""
    import resource

    limit = 8 << 20
    monkeypatch.setattr(rows, "MAX_BYTES", limit)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"a" * (limit + 1), 1))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[" + b" " * limit, 1))
    with pytest.raises(DataError, match=r"b\.json\.gz:1: a list of over 8 MiB"):
        list(read_rows(tmp_path / "b.json.gz"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: a line of over 8 MiB"):
        list(read_rows(tmp_path / "a.jsonl.gz"))
    one = {"text": ["a" * (limit + 1)]}
    write_parquet(tmp_path / "one.parquet", one, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"column 'text' expands from [\d,]+ bytes to 8,38"):
        list(read_rows(tmp_path / "one.parquet"))
    del one
    write_parquet(tmp_path / "many.parquet", {"text": ["a" * (1 << 20)] * 400}, compression="zstd")
    assert (tmp_path / "many.parquet").stat().st_size < 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in read_rows(tmp_path / "many.parquet")) == 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# ---- Tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_group_size", [400, 8000])
def test_tables_are_read_batch_by_batch(
    tmp_path: Path, row_group_size: int, write_parquet: WriteParquet
) -> None:
    """The first row is there when little of the file has been read."""
    rng = np.random.default_rng(0)
    rows = 8000
    table = {"id": range(rows), "text": [rng.bytes(500).hex() for _ in range(rows)]}
    path = tmp_path / "a.parquet"
    write_parquet(path, table, row_group_size=row_group_size, use_dictionary=False)

    class Counted(io.FileIO):
        total = 0

        def read(self, size: int | None = -1, /) -> bytes:
            part = super().read(size)
            self.total += len(part)
            return part

    with Counted(path) as raw:
        found = read_rows(path, choose=lambda names: names[1:], raw=raw)
        assert next(found) == (f"{path}:1", {"text": table["text"][0]})
        assert 0 < raw.total < path.stat().st_size / 3
        assert list(found)[-1] == (f"{path}:{rows}", {"text": table["text"][-1]})
        assert raw.total > 0.9 * path.stat().st_size


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"id": [7], "title": ["short"], "content": ["long text"]}, None),
        ({"text": [1] * 300}, r"a\.parquet:1: 'text' is int, expected a string"),
        ({"text": [1, 2]}, r"a\.parquet:1: 'text' is int, expected a string"),
        ({"text": [["a"], ["b"]]}, r"a\.parquet:1: 'text' is list, expected a string"),
        ({"text": [b"a", b"\xff"]}, r"a\.parquet:1: 'text' is bytes, expected a string"),
    ],
)
def test_unusable_table_is_refused_by_file_and_row(
    tmp_path: Path,
    make: Tokenize,
    write_parquet: WriteParquet,
    rows: dict[str, list[object]],
    message: str | None,
) -> None:
    """A missing column names those there, and the one that is most likely meant."""
    write_parquet(tmp_path / "a.parquet", rows)
    message = message or (
        r"a\.parquet:1: no 'text' column \(found: 'id', 'title', 'content'\); "
        r"use --data\.text-key content$"
    )
    with pytest.raises(DataError, match=message):
        make(tmp_path / "a.parquet")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_table_without_dictionaries_is_read(
    tmp_path: Path, make: Tokenize, write_parquet: WriteParquet
) -> None:
    """pyarrow cannot make dictionaries of texts that are stored as differences."""
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    write_parquet(tmp_path / "a.parquet", {"text": ["abc", "abd"]}, **options)
    assert make(tmp_path / "a.parquet").documents == 2


def test_damaged_table_is_refused_by_name(
    tmp_path: Path, make: Tokenize, write_parquet: WriteParquet
) -> None:
    """Cut off, or of another kind altogether."""
    content = write_parquet(tmp_path / "a.parquet", {"text": ["some text"] * 1000}).read_bytes()
    for damaged in (content[: len(content) // 2], b"plain text, of some length\n" * 9, b""):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet:1: not a parquet file, or a damaged one"):
            make(tmp_path / "a.parquet")


def test_a_parquet_file_that_names_a_column_differently_is_refused(
    tmp_path: Path, write_parquet: WriteParquet
) -> None:
    """The schema has the name, and so has each part; one changed letter is no traceback."""
    write_parquet(tmp_path / "a.parquet", {"rows": [[{"zebra": "one"}], [{"zebra": "two"}]]})
    data, said = (tmp_path / "a.parquet").read_bytes(), set()
    for found in re.finditer(b"zebra", data):
        changed = data[: found.start()] + b"zebrA" + data[found.end() :]
        (tmp_path / "b.parquet").write_bytes(changed)
        try:
            said.add(len(list(read_rows(tmp_path / "b.parquet"))))
        except DataError as error:
            said.add(str(error))
    assert any("not a parquet file, or a damaged one" in str(text) for text in said), said


def test_missing_pyarrow_is_told_with_the_command(
    tmp_path: Path, make: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table in a folder is refused, not skipped, when the extra is missing."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet:1: needs pyarrow: .*'\.\[data\]'"):
        make(tmp_path / "folder")


@pytest.mark.parametrize("form", ["lines", "list"])
def test_an_integer_that_python_refuses_is_no_reason_to_refuse_a_row(
    tmp_path: Path, form: str
) -> None:
    """Over 4,300 digits, in a field that nobody reads."""
    row = f'{{"text": "a", "id": {"7" * 5000}}}'
    file = tmp_path / "a.json"
    file.write_text(f"[{row}, {row}]" if form == "list" else f"{row}\n{row}\n")
    assert [found["text"] for _, found in read_rows(file)] == ["a", "a"]
