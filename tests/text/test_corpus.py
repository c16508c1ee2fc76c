"""Corpora: every document is tokenised once, as if it were the only one, and then kept."""

import base64
import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llamapro.errors import DataError
from llamapro.text import corpus, documents
from llamapro.text.corpus import tokenize
from llamapro.text.source_files import find_files
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer

Tokenize = Callable[..., TokenStore]
WriteParquet = Callable[..., Path]


def tokens_of(store: TokenStore) -> list[int]:
    return store.read(0, store.tokens).tolist()


def json_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ---- Documents in every form ---------------------------------------------------------------------


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


def test_other_text_key_is_read(tmp_path: Path, make: Tokenize, tokenizer: Tokenizer) -> None:
    """`text_key` names the field."""
    file = json_lines(tmp_path / "a.jsonl", {"content": "here", "text": "not here"})
    assert tokens_of(make(file, text_key="content")) == tokenizer.encode("here", True, True)


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
    assert "no text has" not in capsys.readouterr().err
    make(file, marker="\\n")  # as a shell gives it
    assert r"no text has data.split_at '\\n'" in capsys.readouterr().err


def test_a_marker_at_the_end_of_a_piece_is_found(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long line without spaces is cut anywhere, within a marker too."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 16)
    file = tmp_path / "a.txt"
    for length in range(20, 40):
        texts = ["a" * length, "b<|endof", "<" * length, "c"]
        file.write_text("<|endoftext|>".join(texts))
        store = make(file, marker="<|endoftext|>")
        found = "".join(tokenizer.decode([i]) for i in tokens_of(store) if i not in (1, 2))
        assert store.documents == 4 and found.replace(" ", "") == "".join(texts)


def test_a_document_may_begin_with_a_piece(
    tmp_path: Path, make: Tokenize, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A marker that ends a line ends a piece, too: the next document is as it would be alone."""
    texts = ["one two three four\n" * n for n in (1, 2, 3)]
    expected = [i for t in [*texts, "five\n"] for i in tokenizer.encode(t, bos=True, eos=True)]
    for size in range(16, 40):
        monkeypatch.setattr(documents, "PIECE_CHARACTERS", size)
        file = tmp_path / f"{size}.txt"
        file.write_text("---\n".join([*texts, " \n", "five\n"]))
        assert tokens_of(make(file, marker="---\n")) == expected


def test_names_of_control_tokens_in_a_text_are_told(
    tmp_path: Path, make: Tokenize, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chats that were rendered to text have them, and other tools make tokens of them."""
    (tmp_path / "a.txt").write_text("<s>Hi</s><s>Ho</s><s> <unk>")
    make(tmp_path / "a.txt")
    said = capsys.readouterr().err
    assert "; '</s>' stands in the text 2 times; '<unk>' stands in the text 1 times; '<s>'" in said
    assert ", as plain characters (--data.split-at '</s>' begins documents there)" in said
    store = make(tmp_path / "a.txt", marker="</s>")
    assert store.index["counts"]["markers"] == {"<unk>": 1, "<s>": 3}


# ---- Long documents, in pieces -------------------------------------------------------------------


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
    ranks: Tokenizer, tokenizer: Tokenizer, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
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


# ---- The cache -----------------------------------------------------------------------------------


def test_second_call_reuses_the_store(
    tmp_path: Path, make: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files are not tokenised again."""
    (tmp_path / "a.txt").write_text("hello")
    first = make(tmp_path / "a.txt")
    monkeypatch.setattr(corpus, "_encode_all", None)
    second = make(tmp_path / "a.txt")
    assert second.path == first.path and tokens_of(second) == tokens_of(first)


def test_a_store_of_another_way_to_read_is_not_used(tmp_path: Path) -> None:
    """Whoever changes what is read of a file raises the version, or old tokens would be used."""
    table, lines = 'text,id\n"a, ""b""\n",1\n\n,2\n', '{"text": "a"}\n\n{"text": null}\n{"x": 1}'
    files = {"a.csv": table, "a.tsv": table, "b.csv": table.replace(",", ";"), "a.jsonl": lines}
    files |= {
        "a.json": "[" + lines[:13] + "]",
        "b.json": '{"text":\n"a"}',
        "a.txt": "\ufeffa\r\n\0",
    }
    files |= {
        "b.txt": lines,
        "c.txt": "%PDF-1",
        "d.txt": "\x1b$BF|",
        "README.md": "card",
        "c.csv": "text,id\na,1\ntext,id\nb,2\n",
        "c.jsonl": lines[:-2] * 2,
    }
    found: list[object] = []
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    for path in [tmp_path / name for name in files] + [tmp_path]:
        counts = documents.Counts()
        try:
            pieces = documents.read_pieces(find_files([str(path)]), "text", counts, "x")
            found.append([piece.text for piece in pieces])
        except DataError:
            found.append("refused")
        found.append(counts.files_left_out)
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8]
    assert (corpus.FORMAT_VERSION, digest) == (10, "96773729"), found


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
