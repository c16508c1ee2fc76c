"""Corpora: every document is found, tokenised once, and nothing is left out in silence."""

import base64
import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llamapro.errors import DataError
from llamapro.text import corpus, documents, rows
from llamapro.text.corpus import tokenize
from llamapro.text.rows import read_rows
from llamapro.text.source_files import find_files
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer

Tokenize = Callable[..., TokenStore]
WriteParquet = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The small tokenizer."""
    return Tokenizer.load(tokenizer_file)


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Tokenize:
    """`make(*patterns, **options)`: tokenize with a cache in tmp_path."""

    def tokenized(*patterns: Path, **options: object) -> TokenStore:
        names = [str(pattern) for pattern in patterns]
        return tokenize(names, tokenizer, tmp_path / "cache", **options)  # type: ignore[arg-type]

    return tokenized


def tokens_of(store: TokenStore) -> list[int]:
    return store.read(0, store.tokens).tolist()


def json_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_folder_is_walked_in_order_without_hidden_files(tmp_path: Path) -> None:
    """Files come by name, through links too, without hidden ones and __pycache__."""
    for name in ("b.txt", "a/z.py", "a/.git/x", ".hidden", "a/__pycache__/c.pyc", "linked/m.md"):
        file = tmp_path / "top" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (tmp_path / "top" / "linked").rename(tmp_path / "elsewhere")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "top")
    found = [str(f.path.relative_to(tmp_path / "top")) for f in find_files([str(tmp_path / "top")])]
    assert found == ["a/z.py", "b.txt", "link/m.md"]


def test_globs_are_sorted_and_no_file_comes_twice(tmp_path: Path) -> None:
    """A file named by several patterns is read once, where it is first named."""
    for name in ("b.py", "a.py", "sub/c.py", "x[1].txt", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    patterns = [str(tmp_path / p) for p in ("b.py", "**/*.py", "x[1].txt", "sub", "./b.py")]
    assert [f.path.name for f in find_files(patterns)] == ["b.py", "a.py", "c.py", "x[1].txt"]


def test_an_address_is_no_file() -> None:
    """Data is read from the disk."""
    with pytest.raises(DataError, match="no such file; data is read from the disk: download it"):
        find_files(["hf://datasets/owner/name"])


@pytest.mark.parametrize("pattern", ["nothing.txt", "*.none", "empty"])
def test_pattern_without_files_is_refused(tmp_path: Path, pattern: str) -> None:
    """A misspelt path is an error."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match="no") as error:
        find_files([str(tmp_path / "good.txt"), str(tmp_path / pattern)])
    assert pattern in str(error.value)


def test_each_document_stands_between_bos_and_eos(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer
) -> None:
    """Text files, .jsonl and .jsonl.gz lines become the tokens of their text, in order."""
    (tmp_path / "a.py").write_bytes("\ufeffdef f():\r\n\treturn 'é'\r\n".encode())
    json_lines(tmp_path / "b.jsonl", {"text": "one\u2028line"}, {"id": 1, "text": "two\n"})
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "three"}\n\n{"text": ""}\n{"text": "four"}')
    store = make(tmp_path / "a.py", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz")
    texts = ["def f():\r\n\treturn 'é'\r\n", "one\u2028line", "two\n", "three", "four"]
    expected = [i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)]
    assert tokens_of(store) == expected
    assert (store.documents, store.tokens) == (5, len(expected))
    assert store.index["counts"]["bytes"] == sum(len(text.encode()) for text in texts)


def test_what_is_left_out_is_counted_and_told(
    tmp_path: Path, make: Tokenize, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty documents and blank lines are counted, a folder's files that are no text named."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "lines.jsonl").write_text('{"text": null}\n\n  \n{"text": "x"}\n')
    (folder / "image.png").write_bytes(b"\x89PNG\x00\x00")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "settings.json").write_text('{\n  "a": 1\n}\n')
    (folder / "wide.txt").write_text("x", encoding="utf-16")
    (folder / "word.zip").write_bytes(b"PK\0")
    store = make(folder, label="code")
    counts = store.index["counts"]
    assert (counts["empty_documents"], counts["blank_lines"]) == (2, 2)
    assert counts["files_left_out"] == 6
    captured = capsys.readouterr()
    assert captured.out == "" and f"code: {store.tokens} tokens of 1 documents" in captured.err
    for part in (
        "2 empty documents", "2 blank lines", "6 files left out", "gone.txt (a link to nothing)",
        "image.png (binary", "latin.txt (not UTF-8", "wide.txt (UTF-16; convert",
        "settings.json (expected a list of rows, or one per line; found one object)",
        " and 1 more",
    ):  # fmt: skip
        assert part in captured.err, part


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
        ("a.csv", b"text,text\nx,y\n", r"a\.csv:1: two columns have the same name: 'text', 'text'"),
        ("a.txt.zst", b"x", r"a\.txt\.zst: \.zst is not read; unpack it"),
        ("a.tsv", b"body\tid\nx\t1\n", r"a\.tsv:1: no 'text' column \(found: 'body', 'id'\)"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", r"run 'git lfs pull'"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", r"run 'git lfs pull'"),
        ("a.txt.gz", b"abc", r"a\.txt\.gz: truncated or not gz"),
        ("a.txt", "é".encode("utf-16"), r"a\.txt: UTF-16; convert it"),
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


def test_other_text_key_is_read(tmp_path: Path, make: Tokenize, tokenizer: Tokenizer) -> None:
    """`text_key` names the field."""
    file = json_lines(tmp_path / "a.jsonl", {"content": "here", "text": "not here"})
    assert tokens_of(make(file, text_key="content")) == tokenizer.encode("here", True, True)


def test_long_document_has_the_tokens_of_the_whole(
    tmp_path: Path,
    make: Tokenize,
    tokenizer: Tokenizer,
    real: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces cut at line ends change no token; a line longer than a piece loses no character."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 64)
    text = "    indented\r\n\n\n\tx = 'é'\n y\n" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    json_lines(tmp_path / "a.jsonl", {"text": text})
    (tmp_path / "line.txt").write_text("no line end " * 50)
    (tmp_path / "edge.txt").write_text("x" * 64)
    for name in ("a.txt", "a.jsonl"):
        store = make(tmp_path / name)
        assert tokens_of(store) == tokenizer.encode(text, bos=True, eos=True)
        assert (store.documents, store.index["counts"]["long_documents"]) == (1, 1)
    line = make(tmp_path / "line.txt")
    assert tokenizer.decode(tokens_of(line)) == "no line end " * 50
    assert tokens_of(line).count(tokenizer.bos_id) == tokens_of(line).count(tokenizer.eos_id) == 1
    assert make(tmp_path / "edge.txt").index["counts"]["long_documents"] == 0
    store = tokenize([str(tmp_path / "a.txt")], real, tmp_path / "cache")
    assert tokens_of(store) == real.encode(text, bos=True, eos=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, llama_3: Tokenizer | None) -> Tokenizer:
    """Llama 3's tokenizer where it is at hand, else a small one whose tokens span line ends too."""
    if llama_3 is not None:
        return llama_3
    tokens = [bytes([byte]) for byte in range(256)]
    for whole in (b"    ", b";\n\n\n\n", b"\r\n\r\n", b" word", b"word", b"1234", b"\r\r"):
        tokens += [whole[:end] for end in range(2, len(whole) + 1)]
    unique = sorted(dict.fromkeys(tokens), key=len)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(unique)]
    file = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    file.write_bytes(b"".join(lines))
    return Tokenizer.load(file)


LONG_DOCUMENTS = {
    "blank lines": "x = 1;\n\n\n    \n\t\n\n    word word;\n" * 30,
    "CRLF": "word;\r\n\r\n  word 123\r\n\r\n\r\n" * 30,
    "long lines": ("word word12 " * 30 + "12345 word's; (word)\n") * 4,
    "one line": "word word 1234 'word' word;word  word   word\t" * 40,
    "lone CR": "word word\r\rword\r" * 40,
    "no last line end": "word\n" * 60 + "word " * 60,
    "other scripts": "日本語 word é\u0301 word\u2028 ना word\n\u3000\n" * 30,
    "longer blanks": ("word" + "\n" * 40 + "word") * 25,
}


@pytest.mark.parametrize("kind", LONG_DOCUMENTS)
@pytest.mark.parametrize("size", [24, 64, 100])
def test_pieces_have_llama_3s_tokens_of_the_whole(
    ranks: Tokenizer,
    tokenizer: Tokenizer,
    kind: str,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No cut falls inside what pre-tokenisation, or sentencepiece, would have joined."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", size)
    text, counts = LONG_DOCUMENTS[kind], documents.Counts()
    pieces = list(documents._split(io.StringIO(text, newline=""), counts))
    assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == text
    assert [piece.is_first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for each in (ranks, tokenizer):
        assert corpus.encode_pieces(pieces, each) == each.encode(text, bos=True, eos=True)


def test_a_word_without_end_is_cut_where_reading_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded though there is no good place; nothing is lost."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 64)
    for text in ("a b\n" + "x" * 5000, "a\n" + "\n" * 5000):
        pieces = list(documents._split(io.StringIO(text, newline=""), documents.Counts()))
        assert "".join(piece.text for piece in pieces) == text
        assert max(len(piece.text) for piece in pieces) <= 5 * 64


def test_a_space_where_reading_ends_goes_with_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next character, which tells that a word begins, is looked at, too."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 64)
    text = io.StringIO("x" * 127 + " word")
    assert [p.text for p in documents._split(text, documents.Counts())] == ["x" * 127, " word"]


def test_a_path_stands_for_its_rows_whatever_their_form(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer
) -> None:
    """JSON as lines or a list, CSV, TSV, and text, plain or compressed: the same tokens."""
    rows = [{"text": 'one, "two"\n', "id": 1}, {"text": "é three", "id": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    listed = json.dumps(rows, indent=1)
    table = 'text,id\n"one, ""two""\n",1\né three,2\n'
    tabs = 'id\ttext\n1\t"one, ""two""\n"\n2\té three\n'
    forms = {"a.jsonl": lines, "a.ndjson": lines, "a.json": lines, "b.json": listed}
    forms |= {"c.jsonl": listed, "a.csv": table, "b.csv": "\ufeff" + table, "a.tsv": tabs}
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    expected = [i for r in rows for i in tokenizer.encode(r["text"], bos=True, eos=True)]
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text.encode())
        assert tokens_of(make(tmp_path / name)) == expected, name
    for suffix, pack in packers.items():
        for name in ("a.json", "b.json", "a.csv"):
            (tmp_path / f"p-{name}{suffix}").write_bytes(pack(forms[name].encode()))
            assert tokens_of(make(tmp_path / f"p-{name}{suffix}")) == expected, name + suffix
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"plain"))
        plain = tokenizer.encode("plain", bos=True, eos=True)
        assert tokens_of(make(tmp_path / f"a.txt{suffix}")) == plain


def test_what_describes_tables_is_no_data(
    tmp_path: Path, make: Tokenize, write_parquet: WriteParquet, capsys: pytest.CaptureFixture[str]
) -> None:
    """A snapshot of the hub: its card, licence and loader are named. Beside code they are text."""
    snapshot = tmp_path / "snapshot"
    (snapshot / "data").mkdir(parents=True)
    write_parquet(snapshot / "data" / "train.parquet", {"text": ["one ", "two"]})
    for name in ("README.md", "LICENSE", "loader.py", "dataset_infos.json"):
        (snapshot / name).write_text("words of a card" * 999)
    store = make(snapshot)
    assert store.documents == 2 and store.index["counts"]["files_left_out"] == 4
    assert "README.md (describes the tables beside it)" in capsys.readouterr().err
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "README.md").write_text("a card")
    (packed / "c4.json.zst").write_bytes(b"\x28\xb5\x2f\xfd\0\0\0 data")
    with pytest.raises(
        DataError, match=r"no text in it: .*2 files .*zst \(\.zst is not read; unpack"
    ):
        make(packed)
    code = tmp_path / "code"
    code.mkdir()
    (code / "LICENSE").write_text("words")
    for name in ("main.py", "tests.py"):
        (code / name).write_text("print('hello')\n" * 9)
    json_lines(code / "few.jsonl", {"text": "x"})
    assert make(code).documents == 4


def test_lines_of_json_under_another_name_are_no_text(tmp_path: Path, make: Tokenize) -> None:
    """Spark's part-00000 and others: refused, in a folder left out, never read as syntax."""
    row = json.dumps({"text": "words"}) + "\n"
    folder = tmp_path / "spark"
    folder.mkdir()
    (folder / "part-00000").write_text(row * 3)
    (folder / "a.txt").write_text('{"other": 1} is a text')
    with gzip.open(tmp_path / "data.txt.gz", "wt") as file:
        file.write(row)
    for file in (folder / "part-00000", tmp_path / "data.txt.gz"):
        with pytest.raises(DataError, match=f"{file.name}: holds lines of JSON with 'text', under"):
            make(file)
    assert make(folder).index["counts"]["files_left_out"] == 1


def test_all_splits_of_a_folder_are_read_and_that_is_said(
    tmp_path: Path, make: Tokenize, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody trains on the test split without knowing it; one split is no mistake."""
    for name in ("one/train-0.jsonl", "one/trainer.jsonl", "two/train/a.jsonl", "two/test/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        json_lines(tmp_path / name, {"text": "words"})
    make(tmp_path / "one")
    assert "splits" not in capsys.readouterr().err
    make(tmp_path / "two")
    assert "holds the splits test, train, and all are read" in capsys.readouterr().err


def test_all_wrong_rows_are_told_in_one_message(tmp_path: Path, make: Tokenize) -> None:
    """Null counts as an empty document; nothing stays in the cache."""
    good = {"text": "x"}
    wrong = [{"text": 5}, {"id": 1}, {"text": ["x"]}, {"text": None}]
    file = json_lines(tmp_path / "a.jsonl", good, *(r for row in wrong for r in (row, good)))
    with pytest.raises(DataError) as error:
        make(file)
    head, *lines = str(error.value).splitlines()
    assert head == "3 rows cannot be used:"
    told = ["2: 'text' is int", "4: no 'text' key", "6: 'text' is list"]
    assert all(f"a.jsonl:{t}" in line for t, line in zip(told, lines, strict=True))
    assert not list((tmp_path / "cache").iterdir())


def test_documents_are_split_at_a_marker_or_its_name_is_told(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of EOS between documents of one file are plain characters unless asked for."""
    texts = ["Once.\n", "Twice, " * 40, "three"]
    file = tmp_path / "stories.txt"
    file.write_text("</s>".join(["", *texts, ""]))
    assert make(file).documents == 1
    assert "'</s>' stands in the text 4 times" in capsys.readouterr().err
    assert make(file).documents == 1  # from the cache
    assert "'</s>' stands in the text 4 times" in capsys.readouterr().err
    expected = [i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARACTERS", 64)
        store = make(file, marker="</s>")
    assert store.documents == 3 and store.index["counts"]["markers"] == {}
    assert tokens_of(store) == expected


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


# ---- Tables -----------------------------------------------------------------------------------

TEXTS = ["one\n", "", "two 'é'\r\n", *(f"text {i} " * (i % 7 + 1) for i in range(600)), "last"]


def test_tables_have_the_tokens_of_the_same_texts_as_json_lines(
    tmp_path: Path, make: Tokenize, write_parquet: WriteParquet
) -> None:
    """Batches, row groups and other columns change nothing."""
    table = {"id": range(len(TEXTS)), "body": TEXTS}
    write_parquet(tmp_path / "a.parquet", table, row_group_size=250)
    lines = json_lines(tmp_path / "a.jsonl", *({"body": text} for text in TEXTS))
    store, expected = make(tmp_path / "a.parquet", text_key="body"), make(lines, text_key="body")
    assert tokens_of(store) == tokens_of(expected)
    assert store.index["counts"] == expected.index["counts"]
    assert store.documents == len(TEXTS) - 1


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


@pytest.mark.parametrize("pattern", ["saved", "saved/train", "saved/train/*.arrow"])
def test_datasets_saved_as_arrow_are_refused(tmp_path: Path, pattern: str) -> None:
    """The message for a folder of `datasets.save_to_disk` says how to save it as parquet."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "data-00000-of-00001.arrow").write_bytes(b"some")
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: .*save.*as parquet"):
        find_files([str(tmp_path / pattern)])


def test_the_mistakes_of_all_files_are_told_before_any_is_read(
    tmp_path: Path, make: Tokenize, write_parquet: WriteParquet
) -> None:
    """One run names every file that has to be repaired; a file's later lines are for later."""
    folder = tmp_path / "folder"
    folder.mkdir()
    json_lines(folder / "a.jsonl", {"content": "long text"})
    json_lines(folder / "b.jsonl", {"text": "good"})
    (folder / "c.jsonl.gz").write_bytes(b"not gzip")
    write_parquet(folder / "d.parquet", {"body": ["x"]})
    (folder / "latin.txt").write_bytes(b"caf\xe9")  # of a folder: left out
    named = tmp_path / "latin.txt"
    named.write_bytes(b"caf\xe9 " * 9)
    with pytest.raises(DataError) as error:
        make(folder, named)
    first, *lines = str(error.value).splitlines()
    assert first == "4 files cannot be used:"
    for line, name, problem in zip(
        lines,
        ("folder/a.jsonl:1", "folder/c.jsonl.gz:1", "folder/d.parquet:1", "latin.txt"),
        ("--data.text-key content", "not gz", "--data.text-key body", "not UTF-8"),
        strict=True,
    ):
        assert line.startswith(f"  {tmp_path / name}: ") and problem in line


def test_a_text_is_looked_at_only_where_it_starts(tmp_path: Path, make: Tokenize) -> None:
    """A character may lie across the end of the first MiB; later mistakes wait for their turn."""
    (tmp_path / "good.txt").write_text("x" + "é" * (1 << 19) + "x")
    assert make(tmp_path / "good.txt").documents == 1
    (tmp_path / "late.txt").write_bytes(b"x" * (1 << 20) + b"\xff")
    (tmp_path / "start.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=rf"^{tmp_path / 'start.txt'}: not UTF-8"):
        make(tmp_path / "late.txt", tmp_path / "start.txt")
    with pytest.raises(DataError, match=r"late\.txt: not UTF-8"):
        make(tmp_path / "late.txt")


def test_many_unusable_files_are_counted(tmp_path: Path, make: Tokenize) -> None:
    """The first twenty are named."""
    for i in range(25):
        json_lines(tmp_path / f"{i:02}.jsonl", {"body": "x"})
    with pytest.raises(DataError) as error:
        make(tmp_path / "*.jsonl")
    lines = str(error.value).splitlines()
    assert lines[0] == "25 files cannot be used:" and len(lines) == 22
    assert "19.jsonl" in lines[20] and lines[21] == "  and 5 more"


def test_tokens_do_not_depend_on_workers(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread or five: the same stream."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 100)
    file = json_lines(tmp_path / "a.jsonl", *({"text": f"document {i} " * i} for i in range(1, 60)))
    one = tokens_of(make(file, workers=1))
    five = tokens_of(tokenize([str(file)], tokenizer, tmp_path / "other", workers=5))
    assert one == five and one.count(tokenizer.bos_id) == 59


def test_reading_stays_a_few_pieces_ahead(tokenizer: Tokenizer) -> None:
    """A corpus larger than memory can be tokenised: documents wait for their tokens to be taken."""
    read = 0

    def pieces() -> Iterator[documents.Piece]:
        nonlocal read
        for read in range(1, 101):  # noqa: B007
            yield documents.Piece("a" * documents.PIECE_CHARACTERS, True, True)

    arrays = corpus._encode_all(pieces(), tokenizer, "uint16", workers=1)
    next(arrays)
    assert read <= 3
    arrays.close()  # type: ignore[attr-defined]


def test_named_binary_file_is_refused_though_its_folder_is_cached(
    tmp_path: Path, make: Tokenize
) -> None:
    """A binary file is an error only if the user named it; the cache tells the two apart."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.bin").write_bytes(b"\0")
    make(folder)
    with pytest.raises(DataError, match=r"b\.bin: binary"):
        make(folder / "*")


def test_second_call_reuses_the_store(
    tmp_path: Path, make: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files are not tokenised again."""
    (tmp_path / "a.txt").write_text("hello")
    first = make(tmp_path / "a.txt")
    monkeypatch.setattr(corpus, "_encode_all", None)
    second = make(tmp_path / "a.txt")
    assert second.path == first.path and tokens_of(second) == tokens_of(first)


def test_changed_file_or_tokenizer_makes_a_new_store(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer
) -> None:
    """Content of the same length, another key and another tokenizer are all noticed."""
    file = json_lines(tmp_path / "a.jsonl", {"text": "hello", "other": "x"})
    first = make(file)
    json_lines(file, {"text": "jello", "other": "x"})
    os.utime(file, ns=(1, 1))
    changed = make(file)
    assert tokenizer.decode(tokens_of(changed)) == "jello"
    assert tokenizer.decode(tokens_of(make(file, text_key="other"))) == "x"
    again = tmp_path / "tokenizer.model"
    again.write_bytes(tokenizer.path.read_bytes() + b"\x9a\x06\x00")  # an unknown, empty field
    other = Tokenizer.load(again)
    store = tokenize([str(file)], other, tmp_path / "cache")
    assert len({first.path, changed.path, store.path}) == 3


def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, make: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says that the disk is full, and partial output is removed."""

    def fail(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="disk full"):
        make(tmp_path / "a.txt")
    assert list((tmp_path / "cache").iterdir()) == []


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Ids above 65,535 would wrap in 16 bits."""
    (tmp_path / "a.txt").write_text("hello")
    large = Tokenizer.load(tokenizer.path)
    large.vocab_size = 65_537
    large.encode = lambda *_, **__: [65_536]  # type: ignore[method-assign]
    store = tokenize([str(tmp_path / "a.txt")], large, tmp_path / "cache")
    assert tokens_of(store) == [65_536] and store.index["dtype"] == "uint32"
    assert np.dtype(
        tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "c").index["dtype"]
    ) == (np.uint16)


def test_a_changed_byte_in_the_cache_is_found_before_training(
    tmp_path: Path, make: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would go on from other tokens in silence; a store just written is not read again."""
    checked: list[str] = []
    check = TokenStore.check

    def noted(self: TokenStore, label: str, cache_dir: Path) -> None:
        checked.append(label)
        check(self, label, cache_dir)

    monkeypatch.setattr(TokenStore, "check", noted)
    (tmp_path / "a.txt").write_text("the first document\n")
    store = make(tmp_path / "a.txt")
    assert checked == []
    again = make(tmp_path / "a.txt", label="val code")
    assert checked == ["check val code"] and again.sha256 == store.sha256
    shard = store.path / "shard-00000.bin"
    status, content = shard.stat(), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"shard-00000\.bin: damaged: .*remove .* and run again"):
        make(tmp_path / "a.txt")
