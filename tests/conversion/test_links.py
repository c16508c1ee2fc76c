"""Links beside weights: what leaves the directory is not copied; those of the hub are followed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError
from llamapro.expansion import insert_after


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, write_random_checkpoint: Any, tiny_config: Any
) -> Path:
    """A folder with a checkpoint, and the same as a release."""
    root = tmp_path_factory.mktemp("good")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    write_random_checkpoint(root / "base", tiny_config(**sizes))
    to_meta(root / "base", root / "release")
    return root


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "README.md"])
def test_a_companion_that_links_to_a_secret_is_not_copied(
    name: str, good: Path, tmp_path: Path
) -> None:
    """The message names the link and where it leads; nothing is written."""
    base = shutil.copytree(good / "base", tmp_path / "base")
    (tmp_path / "secret").write_text("my key")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=rf"{name}: a link that leaves its directory, to .*se"
    ):
        expand_checkpoint(Checkpoint.open(base), tmp_path / "out", insert_after(2, [0]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["link", "pointer"])
def test_a_companion_without_its_content_is_not_left_behind(
    kind: str, good: Path, tmp_path: Path
) -> None:
    """The result would lack its tokenizer, or hold a pointer that nothing there can follow."""
    base = shutil.copytree(good / "base", tmp_path / "base")
    file = base / "tokenizer.model"
    file.unlink()
    if kind == "link":
        file.symlink_to("gone")
    else:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    said = {"link": "a link to gone, which does not", "pointer": "a git-lfs pointer, not the file"}
    with pytest.raises(CheckpointError, match=rf"base/tokenizer\.model: {said[kind]}"):
        expand_checkpoint(Checkpoint.open(base), tmp_path / "out", insert_after(2, [0]))
    assert not (tmp_path / "out").exists()


def test_licences_of_a_release_are_not_followed_either(good: Path, tmp_path: Path) -> None:
    """On the way in and on the way out."""
    (tmp_path / "secret").write_text("my key")
    release = shutil.copytree(good / "release", tmp_path / "release")
    base = shutil.copytree(good / "base", tmp_path / "base")
    for path in (release, base):
        (path / "LICENSE").symlink_to(tmp_path / "secret")
    for call in (
        lambda: from_meta(release, tmp_path / "out", None),
        lambda: to_meta(base, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="LICENSE: a link that leaves its directory"):
            call()
        assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(good: Path, tmp_path: Path) -> None:
    """There every file is a link to a blob; so is one inside the directory."""
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((good / "base").iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "LICENSE").symlink_to("config.json")
    expand_checkpoint(Checkpoint.open(snapshot), tmp_path / "out", insert_after(2, [0]))
    assert (tmp_path / "out" / "tokenizer.model").stat().st_size > 1000
    assert (tmp_path / "out" / "LICENSE").exists()
