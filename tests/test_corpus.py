"""Corpora: every document is found, tokenised once, and nothing is left out in silence."""

import errno
import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llamapro import corpus, data
from llamapro.config import DataError
from llamapro.corpus import find_files, tokenize
from llamapro.tokenizer import Tokenizer

Tokenize = Callable[..., data.TokenStore]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The small tokenizer."""
    return Tokenizer.load(tokenizer_file)


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Tokenize:
    """`make(*patterns, **options)`: tokenize with a cache in tmp_path."""

    def tokenized(*patterns: Path, **options: object) -> data.TokenStore:
        names = [str(pattern) for pattern in patterns]
        return tokenize(names, tokenizer, tmp_path / "cache", **options)  # type: ignore[arg-type]

    return tokenized


def tokens_of(store: data.TokenStore) -> list[int]:
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


@pytest.mark.parametrize("pattern", ["nothing.txt", "*.none", "empty"])
def test_pattern_without_files_is_refused(tmp_path: Path, pattern: str) -> None:
    """A misspelt path is told, not trained without."""
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
    assert store.bytes == sum(len(text.encode()) for text in texts)


def test_what_is_left_out_is_counted_and_told(
    tmp_path: Path, make: Tokenize, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty documents, blank lines and a folder's binary files appear in the summary line."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "lines.jsonl").write_text('{"text": ""}\n\n  \n{"text": "x"}\n')
    (folder / "image.png").write_bytes(b"\x89PNG\x00\x00")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").touch()
    store = make(folder, label="code")
    counts = store.index["counts"]
    assert (counts["empty_documents"], counts["blank_lines"], counts["binary_files"]) == (2, 2, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and f"code: {store.tokens} tokens of 1 documents" in captured.err
    for part in ("2 empty documents", "2 blank lines", "2 binary or non-UTF-8 files"):
        assert part in captured.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"id": "7", "content": "long text"}', None),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}', r"a\.jsonl:2: 'text' is int"),
        ("a.jsonl", b'{"text": "x"}\n["text"]', r"a\.jsonl:2: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2: not a line of JSON in UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: 'text' is not valid Unicode"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9],
            r"a\.jsonl\.gz: truncated",
        ),
        ("a.jsonl.gz", b'{"text": "x"}', r"a\.jsonl\.gz: truncated or not gzip"),
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
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces cut at line ends change no token; a line longer than a piece loses no character."""
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 64)
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
    if (file := shared / "tokenizers" / "llama-2" / "tokenizer.model").exists():
        llama = Tokenizer.load(file)
        store = tokenize([str(tmp_path / "a.txt")], llama, tmp_path / "cache")
        assert tokens_of(store) == llama.encode(text, bos=True, eos=True)


def test_tokens_do_not_depend_on_workers(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread or five: the same stream."""
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 100)
    file = json_lines(tmp_path / "a.jsonl", *({"text": f"document {i} " * i} for i in range(1, 60)))
    one = tokens_of(make(file, workers=1))
    five = tokens_of(tokenize([str(file)], tokenizer, tmp_path / "other", workers=5))
    assert one == five and one.count(tokenizer.bos_id) == 59


def test_reading_stays_a_few_pieces_ahead(tokenizer: Tokenizer) -> None:
    """A corpus larger than memory can be tokenised: documents wait for their tokens to be taken."""
    read = 0

    def pieces() -> Iterator[corpus.Piece]:
        nonlocal read
        for read in range(1, 101):  # noqa: B007
            yield corpus.Piece("a" * corpus.PIECE_CHARACTERS, True, True)

    arrays = corpus._encode_all(pieces(), tokenizer, "uint16", workers=1)
    next(arrays)
    assert read <= 3
    arrays.close()  # type: ignore[attr-defined]


def test_named_binary_file_is_refused_though_its_folder_is_cached(
    tmp_path: Path, make: Tokenize
) -> None:
    """Whether a binary file is an error depends on who named it, and so does the cache."""
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
    """The same files are not tokenised again, and the counts are told again."""
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
    """A failed write is told as such, and its partial output is removed."""

    def fail(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="disk full"):
        make(tmp_path / "a.txt")
    assert list((tmp_path / "cache").iterdir()) == []


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Past 65,536 tokens the ids would wrap in 16 bits."""
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
    check = data.TokenStore.check

    def noted(self: data.TokenStore, label: str) -> None:
        checked.append(label)
        check(self, label)

    monkeypatch.setattr(data.TokenStore, "check", noted)
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
