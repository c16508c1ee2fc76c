"""Large files are hashed once: what is known of them holds as long as nothing wrote to them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro import known_hashes as module
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.tensors import StoredTensor, hash_tensors
from llamapro.errors import DataError
from llamapro.known_hashes import known_hashes
from llamapro.scripts import convert
from llamapro.text.corpus import tokenize
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written a moment ago count as old."""
    monkeypatch.setattr(module, "SETTLED_NS", -(10**18))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 256)
    with known_hashes(path, tmp_path) as known:
        assert known == {}
        known["all"] = "ab"
    return path


def known_of(file: Path) -> dict[str, str]:
    with known_hashes(file, file.parent) as known:
        return dict(known)


def flip(file: Path, at: int) -> None:
    """Changes a byte and puts the time of change back."""
    status = file.stat()
    with open(file, "r+b") as content:
        content.seek(at)
        byte = content.read(1)[0]
        content.seek(at)
        content.write(bytes([byte ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_hash_is_kept_until_something_writes_to_the_file(settled: None, file: Path) -> None:
    """Not even a change of one byte that puts size and mtime back goes unseen."""
    assert known_of(file) == {"all": "ab"}
    flip(file, 20_000)
    assert known_of(file) == {}


def test_a_moved_or_replaced_file_is_another(settled: None, file: Path, tmp_path: Path) -> None:
    """The same bytes elsewhere, or under the same name in another file, are hashed again."""
    content = file.read_bytes()
    moved = file.rename(tmp_path / "moved")
    assert known_of(moved) == {}
    file.write_bytes(content)
    assert known_of(file) == {}


def test_blocks_of_the_file_are_compared_too(
    settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may keep no times; the first and the last block tell another file then."""
    monkeypatch.setattr(module, "_state", lambda _: ["the same", 0])
    path = tmp_path / "large"
    path.write_bytes(bytes(100_000))
    with known_hashes(path, tmp_path) as known:
        known["all"] = "ab"
    assert known_of(path) == {"all": "ab"}
    for at in (0, 99_999):
        flip(path, at)
        assert known_of(path) == {}
        flip(path, at)
        assert known_of(path) == {"all": "ab"}


def test_what_changed_just_now_is_not_kept(file: Path) -> None:
    """It might change again within one step of the file system's clock."""
    assert known_of(file) == {}


def test_nothing_is_kept_of_a_file_that_changes_meanwhile(settled: None, file: Path) -> None:
    with known_hashes(file, file.parent) as known:
        flip(file, 9)
        known["all"] = "cd"
    assert known_of(file) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": 1, "hashes": 2}'])
def test_a_damaged_record_knows_nothing(settled: None, file: Path, text: str) -> None:
    (record,) = (file.parent / "hashes").iterdir()
    record.write_text(text)
    assert known_of(file) == {}


def test_hashes_are_found_without_a_place_to_keep_them(settled: None, tmp_path: Path) -> None:
    """A cache that cannot be written costs time, and nothing else."""
    (tmp_path / "large").write_bytes(b"content")
    (tmp_path / "hashes").write_bytes(b"a file in the way")
    with known_hashes(tmp_path / "large", tmp_path) as known:
        known["all"] = "ab"
    assert known_of(tmp_path / "large") == {}


def test_weights_are_hashed_once_and_again_after_a_change(
    settled: None,
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the shard that was changed is read again, and gives another hash."""
    path = write_random_checkpoint(tmp_path / "base", tiny_config(), max_shard_bytes=1 << 17)
    tensors = Checkpoint.open(path).tensors
    read: list[str] = []
    sha256 = StoredTensor.sha256

    def noted(self: StoredTensor) -> str:
        read.append(self.name)
        return sha256(self)

    monkeypatch.setattr(StoredTensor, "sha256", noted)
    first = hash_tensors(tensors.values(), "hash", tmp_path)
    assert sorted(read) == sorted(tensors)
    assert hash_tensors(tensors.values(), "hash", tmp_path) == first and len(read) == len(tensors)
    changed = tensors["model.layers.1.mlp.up_proj.weight"]
    flip(changed.file, changed.offset + 20)
    read.clear()
    second = hash_tensors(tensors.values(), "hash", tmp_path)
    assert {name for name in tensors if first[name] != second[name]} == {changed.name}
    assert set(read) == {name for name, t in tensors.items() if t.file == changed.file} < {*tensors}
    assert hash_tensors(tensors.values(), "hash") == second and len(read) > len(tensors)


def test_tokens_are_not_read_at_the_next_start(
    settled: None,
    tmp_path: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    """The store that was written is known; a full check reads it, and so does a start after a
    change, which finds it."""
    tokenizer = Tokenizer.load(tokenizer_file)
    (tmp_path / "a.txt").write_text("the first document\n")

    def start() -> TokenStore:
        return tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "cache")

    store = start()
    shard = store.path / "shard-00000.bin"
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert start().sha256 == store.sha256
        with pytest.raises(TypeError):
            store.check("everything")
    assert run_command(convert.main, "verify", store.path)[:2] == (
        0,
        f"{store.path}: {store.tokens} tokens intact\n",
    )
    flip(shard, 4)
    status, _, err = run_command(convert.main, "verify", store.path)
    assert status == 2 and f"{shard}: damaged" in err
    for _ in range(2):  # what is damaged is never known to be good
        with pytest.raises(DataError, match=r"shard-00000\.bin: damaged"):
            start()
