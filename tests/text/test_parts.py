"""A corpus that is tokenised in parts gives the store of one process, or says what is missing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro.errors import ConfigError, DataError
from llamapro.text import corpus
from llamapro.text import store as stores
from llamapro.text.corpus import tokenize
from llamapro.text.parts import Part
from llamapro.text.source_files import find_files
from llamapro.text.store import CACHE_TAG, TokenStore
from llamapro.text.tokenizer import Tokenizer

Tokenize = Callable[..., TokenStore]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of many sizes and kinds, some without text; what is said of them differs by part."""
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(12):
        name = "</s> <|endoftext|> " if i % 5 == 2 else ""
        texts = [f"{name}document {i} {n} " * (1 + i) for n in range(1 + 7 * i % 11)]
        lines = "".join(json.dumps({"text": text}) + "\n\n" * (i % 2) for text in texts)
        (path / f"{i:02}.jsonl").write_text(lines.replace("}{", "}\n{"))
    (path / "empty.jsonl").write_text('{"text": ""}\n')
    for i in range(7):
        (path / f"{i:02}.png").write_bytes(b"\x89PNG\0")
    return path


@pytest.fixture
def make(
    tmp_path: Path, folder: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Tokenize:
    """`make(part, cache="cache", tokenizer=...)`: the corpus in shards of 100 tokens."""
    monkeypatch.setattr(stores, "SHARD_TOKENS", 100)
    own = Tokenizer.load(tokenizer_file)

    def made(part: str = "", cache: str = "cache", tokenizer: Tokenizer = own) -> TokenStore:
        which = Part.parse(part) if part else None
        return tokenize([str(folder)], tokenizer, tmp_path / cache, part=which)

    return made


def content_of(store: TokenStore) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.path.iterdir()}


@pytest.mark.parametrize("of", [1, 2, 5, 40])
def test_parts_in_any_order_make_the_store_of_one_process(make: Tokenize, of: int) -> None:
    """Shards and index are equal to the byte, also where a part has no file or no text."""
    whole = make(cache="whole")
    assert len(whole.hashes) > 3
    for number in reversed(range(1, of + 1)):
        make(f"{number}/{of}")
    joined = make()
    assert content_of(joined) == content_of(whole)
    left = {path.name for path in joined.path.parent.iterdir()} - {"hashes", CACHE_TAG}
    assert left == {whole.path.name}


def test_every_file_is_in_one_part_and_parts_are_balanced(folder: Path) -> None:
    files = find_files([str(folder)])
    for of in (1, 3, 7, 50):
        parts = [Part(number, of).select(files) for number in range(1, of + 1)]
        assert [file for part in parts for file in part] == files
    sizes = [sum(file.path.stat().st_size for file in Part(i, 3).select(files)) for i in (1, 2, 3)]
    largest = max(file.path.stat().st_size for file in files)
    assert max(sizes) - min(sizes) <= 2 * largest


def test_a_missing_part_is_named(make: Tokenize) -> None:
    """The run does not begin to tokenise all of it alone, and what is there stays."""
    make("1/4")
    make("3/4")
    with pytest.raises(DataError, match=r"train: .* missing 2/4, 4/4; run 'llamapro prepare"):
        make()
    for part in ("2/4", "4/4"):
        make(part)
    assert make().documents > 30


def test_a_damaged_part_is_named_and_nothing_is_made_of_it(make: Tokenize) -> None:
    part = make("1/2")
    make("2/2")
    shard = part.path / "shard-00001.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(DataError, match=r"part-1-of-2/shard-00001\.bin: damaged: .*remove"):
        make()
    (part.path / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"missing 1/2; .*part-1-of-2 is part 1/2 that is damaged"):
        make()
    assert len(list(part.path.parent.iterdir())) == 3  # nothing but the parts and the tag


def test_a_part_of_another_tokenizer_is_refused_by_name(
    make: Tokenize, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One machine had another; parts for another model alone are no part of this corpus."""
    again = tmp_path / "tokenizer.model"
    again.write_bytes(tokenizer_file.read_bytes() + b"\x9a\x06\x00")  # an unknown, empty field
    other = Tokenizer.load(again)
    make("2/2", tokenizer=other)
    make(cache="cache").path.rename(tmp_path / "whole")
    said = capsys.readouterr().err
    assert "part-2-of-2 is part 2/2 made with another tokenizer" in said and "not used" in said
    first = make("1/2")
    with pytest.raises(
        DataError, match=r"missing 2/2; .*part-2-of-2 is part 2/2 made with another"
    ):
        make()
    (strange,) = first.path.parent.glob("*.part-2-of-2")
    strange.rename(first.path.with_name(first.path.name.replace("1-of", "2-of")))
    with pytest.raises(
        DataError, match=r"missing 2/2; .*part-2-of-2 is part 2/2 made with another"
    ):
        make()


@pytest.mark.parametrize("before", [True, False])
def test_a_part_of_another_text_is_refused_by_name(
    make: Tokenize, folder: Path, before: bool
) -> None:
    """The text changed between two parts, or after all of them; the file is named."""
    make("1/2")
    if not before:
        make("2/2")
    file = folder / "03.jsonl"
    size = file.stat().st_size
    file.write_text(file.read_text() + '{"text": "more"}\n')
    if before:
        make("2/2")
    match = rf"part 1/2 made of another text: .*03\.jsonl had {size:,} bytes, has {size + 17:,}"
    with pytest.raises(DataError, match=match):
        make()
    make("1/2")
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match=r"part 1/2 made of another text: .*03\.jsonl was changed"):
        make()


def test_a_killed_part_leaves_the_others(
    make: Tokenize, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A part is complete or absent."""
    make("1/2")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, "encode_pieces", die)
        make("2/2")
    left = {path.name[-11:] for path in (tmp_path / "cache").iterdir()}
    assert left == {"part-1-of-2", CACHE_TAG[-11:]}
    make("2/2")
    assert content_of(make()) == content_of(make(cache="whole"))


def test_two_processes_may_prepare_the_same_part_and_join_at_once(
    make: Tokenize, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first that is ready stays, and the second takes it."""
    encode, join = corpus.encode_pieces, corpus.join

    def overtaken(*args: object) -> object:
        monkeypatch.setattr(corpus, "encode_pieces", encode)
        make("1/2")  # the other process
        return encode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(corpus, "encode_pieces", overtaken)
    make("1/2")
    make("2/2")

    def gone(*args: object) -> object:
        monkeypatch.setattr(corpus, "join", join)
        make()  # the other process, which removes the parts
        return join(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(corpus, "join", gone)
    assert content_of(make()) == content_of(make(cache="whole"))
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the store and the tag


def test_a_part_of_what_is_already_there_is_not_made(make: Tokenize) -> None:
    """A late machine finds the whole."""
    whole = make()
    assert make("2/3").path == whole.path
    assert len(list(whole.path.parent.iterdir())) == 2  # the store and the tag


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_an_impossible_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard {text}: expected I/N"):
        Part.parse(text)
