"""Source files: which are found, which are left out, and what is told of it."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro.errors import DataError
from llamapro.text.source_files import find_files
from llamapro.text.store import TokenStore

Tokenize = Callable[..., TokenStore]
WriteParquet = Callable[..., Path]


def json_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ---- What a path stands for ----------------------------------------------------------------------


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


def test_a_pattern_longer_than_any_path_is_not_searched_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python takes minutes for 50,000 brackets."""
    monkeypatch.setattr("glob.glob", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(DataError, match="no such file"):
        find_files(["a" + "[" * 50_000])


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


# ---- What is left out of a folder ----------------------------------------------------------------


def test_what_is_left_out_is_counted_and_told(
    tmp_path: Path, make: Tokenize, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty documents are counted, a folder's files that are no text named."""
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
    assert counts["empty_documents"] == 2
    assert counts["files_left_out"] == 6
    captured = capsys.readouterr()
    assert captured.out == "" and f"code: {store.tokens} tokens of 1 documents" in captured.err
    for part in (
        "2 empty documents", "6 files left out", "gone.txt (a link to nothing)",
        "image.png (binary", "latin.txt (not UTF-8", "wide.txt (UTF-16; convert",
        "settings.json (expected a list of rows, or one per line; found one object)",
        " and 1 more",
    ):  # fmt: skip
        assert part in captured.err, part


def test_links_without_an_end_are_left_out(tmp_path: Path) -> None:
    """A link to itself or to nothing, and a pipe, are named: in a folder, by a glob, and alone."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    expected = {
        "a.txt": "",
        "gone": "a link to nothing",
        "loop": "a link to nothing",
        "pipe": "not a plain file",
    }
    for pattern in (tmp_path, tmp_path / "*"):
        files = find_files([str(pattern)])
        assert {file.path.name: file.left_out for file in files} == expected
        assert all(file.state() for file in files)
    for name in ("gone", "loop", "pipe"):
        message = rf"{name}: nothing to read: .*{name} \({expected[name]}\)"
        with pytest.raises(DataError, match=message):
            find_files([str(tmp_path / name)])


def test_installed_packages_beside_code_are_left_out(tmp_path: Path) -> None:
    """A virtual environment and node_modules are named, and read if they are asked for."""
    names = ("a.py", "env/pyvenv.cfg", "env/lib/b.py", "web/node_modules/c/c.js", "web/d.js")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = {str(f.path.relative_to(tmp_path)): f.left_out for f in find_files([str(tmp_path)])}
    reason = "installed packages"
    assert found == {"a.py": "", "env": reason, "web/node_modules": reason, "web/d.js": ""}
    glob = find_files([str(tmp_path / "*")])  # does not name what it finds
    assert {file.path.name: file.left_out for file in glob if file.left_out} == {
        "env": reason, "node_modules": reason
    }  # fmt: skip
    asked = find_files([str(tmp_path / name) for name in ("env", "web/node_modules")])
    assert [file.path.name for file in asked] == ["b.py", "pyvenv.cfg", "c.js"]


def test_a_cache_of_tokens_within_a_corpus_is_left_out(tmp_path: Path, make: Tokenize) -> None:
    """Its index and hashes are no tables of the corpus; the next start finds the same text."""
    (tmp_path / "a.txt").write_text("text")
    assert make(tmp_path).path == make(tmp_path).path
    assert [file.path.name for file in find_files([str(tmp_path)])] == ["a.txt"]


def test_files_without_a_row_are_left_out_and_named(
    tmp_path: Path, make: Tokenize, write_parquet: WriteParquet, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table with its first line alone, an empty list or file: in a folder, and by name."""
    for name, text in {"a.csv": "text,label\n", "b.json": "[]", "c.jsonl": ""}.items():
        (tmp_path / name).write_text(text)
    write_parquet(tmp_path / "d.parquet", {"text": []})
    with pytest.raises(DataError, match=r"no text in it: .*a\.csv \(no row in it\)"):
        make(tmp_path / "a.csv")
    json_lines(tmp_path / "e.jsonl", {"text": "x"})
    for patterns in ([tmp_path], sorted(tmp_path.glob("?.*"))):
        assert make(*patterns).index["counts"]["files_left_out"] == 4
        assert capsys.readouterr().err.count("(no row in it)") == 4


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
    json_lines(snapshot / "citation_pairs.jsonl", {"text": "three"})  # named like a card
    assert make(snapshot).documents == 3
    (snapshot / "citation_pairs.jsonl").unlink()
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "README.md").write_text("a card")
    (packed / "c4.json.zst").write_bytes(b"\x28\xb5\x2f\xfd\0\0\0 data")
    with pytest.raises(
        DataError, match=r"no text in it: .*2 files .*zst \(\.zst is not read; unpack"
    ):
        make(packed)
    (packed / "c4.json.zst").rename(packed / "c4.tfrecord")
    with pytest.raises(DataError, match=r"no text in it: .*2 files .*README\.md \(describes"):
        make(packed)
    for name in ("requirements.txt", "vocab.txt"):
        (snapshot / name).write_text("words")
    assert make(snapshot).documents == 4
    told = "holds tables, and requirements.txt, vocab.txt: documents too, where text is read"
    assert told in capsys.readouterr().err
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(6):
        (notes / f"{number}.md").write_text("words of a page")
    (notes / "package.json").write_text('{"name": "site"}')
    assert make(notes).documents == 6
    json_lines(notes / "few.jsonl", {"text": "x" * 999})
    assert make(notes).documents == 7
    code = tmp_path / "code"
    code.mkdir()
    (code / "weights.bin").write_bytes(b"\0" * 9999)
    (code / "LICENSE").write_text("words")
    for name in ("main.py", "tests.py"):
        (code / name).write_text("print('hello')\n" * 9)
    json_lines(code / "few.jsonl", {"text": "x"})
    assert make(code).documents == 4


def test_rows_of_json_under_another_name_are_no_text(tmp_path: Path, make: Tokenize) -> None:
    """Spark's part-00000 and others: refused, in a folder left out, never read as syntax."""
    row = json.dumps({"text": "words"}) + "\n"
    folder = tmp_path / "spark"
    folder.mkdir()
    (folder / "part-00000").write_text(row * 3)
    (folder / "a.txt").write_text('{"other": 1} is a text')
    with gzip.open(tmp_path / "data.txt.gz", "wt") as file:
        file.write(row)
    (tmp_path / "list.txt").write_text(json.dumps([{"text": "words"}] * 2, indent=1))
    (tmp_path / "chats.jl").write_text('{"turns": 2}\n{"turns": 3}\n')
    with pytest.raises(DataError, match=r"chats\.jl: holds rows of JSON with 'turns', under"):
        make(tmp_path / "chats.jl")
    for file in (folder / "part-00000", tmp_path / "data.txt.gz", tmp_path / "list.txt"):
        with pytest.raises(DataError, match=f"{file.name}: holds rows of JSON with 'text', under"):
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
    assert make(tmp_path / "[ot]*").documents == 4  # each folder by itself


def test_missing_parts_and_packed_copies_are_said(
    tmp_path: Path, make: Tokenize, capsys: pytest.CaptureFixture[str]
) -> None:
    """A download that broke off, and a file that was unpacked beside its archive."""
    for number in (0, 2):
        json_lines(tmp_path / f"train-0000{number}-of-00003.jsonl", {"text": "words"})
        json_lines(tmp_path / f"a-0000{number // 2}-of-00002-{number:016x}.jsonl", {"text": "x"})
    make(tmp_path)
    said = capsys.readouterr().err
    assert "train-*-of-00003.jsonl: 1 parts are missing; the rest is read" in said
    assert "a-*" not in said
    file = json_lines(tmp_path / "train-00001-of-00003.jsonl", {"text": "words"})
    make(tmp_path)
    assert "warning" not in capsys.readouterr().err
    Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert make(tmp_path).documents == 6
    assert f"{file}: read, and so is {file}.gz" in capsys.readouterr().err


def test_a_folder_of_the_hub_s_cache_stands_for_its_snapshots(
    tmp_path: Path, make: Tokenize
) -> None:
    """`refs` holds the name of a commit, and `blobs` the files without theirs."""
    for name in ("blobs", "refs", "snapshots/abc"):
        (tmp_path / "repo" / name).mkdir(parents=True)
    json_lines(tmp_path / "repo/blobs/1f", {"text": "one"}, {"text": "two"})
    (tmp_path / "repo/refs/main").write_text("abc")
    (tmp_path / "repo/snapshots/abc/train.jsonl").symlink_to("../../blobs/1f")
    store = make(tmp_path / "repo")
    assert store.documents == 2 and not store.index["counts"]["files_left_out"]


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


# ---- What is told of many mistakes ---------------------------------------------------------------


def assert_rows_refused(make: Tokenize, file: Path, told: list[str]) -> None:
    """One message has a line for each of these rows, in order, and none for another."""
    with pytest.raises(DataError) as error:
        make(file)
    head, *lines = str(error.value).splitlines()
    assert head == f"{len(told)} rows cannot be used:"
    assert all(f"{file.name}:{t}" in line for t, line in zip(told, lines, strict=True))


def test_all_wrong_rows_are_told_in_one_message(tmp_path: Path, make: Tokenize) -> None:
    """Null counts as an empty document; nothing stays in the cache."""
    good = {"text": "x"}
    wrong = [{"text": 5}, {"id": 1}, {"text": ["x"]}, {"text": None}]
    file = json_lines(tmp_path / "a.jsonl", good, *(r for row in wrong for r in (row, good)))
    told = ["2: 'text' is int", "4: no 'text' key", "6: 'text' is list"]
    assert_rows_refused(make, file, told)
    assert not list((tmp_path / "cache").iterdir())


def test_wrong_rows_before_the_first_good_one_are_told_with_the_others(
    tmp_path: Path, make: Tokenize
) -> None:
    """A file that begins with a wrong row is no file of another kind."""
    wrong = [{"id": 1}, {"text": float("nan")}]
    file = json_lines(tmp_path / "a.jsonl", *wrong, {"text": "x"}, {"text": 5})
    told = ["1: no 'text' key", "2: 'text' is float, expected a string (nan)", "4: 'text' is int"]
    assert_rows_refused(make, file, told)
    table = tmp_path / "a.csv"
    table.write_text("id,text\n1,a, b\n2,cut\nhere\n3,x\n4,y,z\n")
    told = ["1: more fields", "3: no field for 'text'; put a text with line breaks", "5: more"]
    assert_rows_refused(make, table, told)
    for name, text in {"b.csv": "text,note\nx\n", "c.csv": ",text,\n0,x,\n"}.items():
        (tmp_path / name).write_text(text)  # what is not read may be missing, or have no name
        assert make(tmp_path / name).documents == 1


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
