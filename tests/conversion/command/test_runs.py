"""Commands that take a run: damage is named, a running save and other versions are known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints import run as run_module
from llamapro.checkpoints.run import (
    LISTED,
    MANIFEST_FILE,
    STATE_FILE,
    TRAINABLE_FILE,
    training_checkpoints,
)
from llamapro.checkpoints.tensors import StoredTensor

Convert = Callable[..., tuple[int, str, str]]


def last(run_dir: Path, step: int = 3) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def flip(file: Path) -> None:
    """Changes a bit of the last byte: in a safetensors file, of a weight."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_merge_and_inspect_take_the_newest_intact_blocks(
    convert: Convert, run_dir: Path, tmp_path: Path
) -> None:
    """Any file of the latest damaged: the one before it, and standard error says why."""
    for name in LISTED:
        flip(last(run_dir) / name)
        words = ["merge", tmp_path / "pro", run_dir, tmp_path / f"out-{name}", "--json"]
        status, out, error = convert(*words)
        assert status == 0 and json.loads(out)["step"] == 2
        said = f"{last(run_dir) / name}: damaged: other bytes than were saved; taking step-00000002"
        assert said in error
        status, out, error = convert("inspect", run_dir, "--json")
        assert status == 0 and json.loads(out)["record"]["step"] == 2
        assert said in error
        flip(last(run_dir) / name)


def test_an_intact_run_is_merged_without_a_word(
    convert: Convert, run_dir: Path, tmp_path: Path
) -> None:
    """Its last step, also by the folder of all; or a copy of one under another name."""
    shutil.copytree(last(run_dir), tmp_path / "best")
    for number, blocks in enumerate(
        (run_dir, last(run_dir).parent, last(run_dir), tmp_path / "best")
    ):
        words = ["merge", tmp_path / "pro", blocks, tmp_path / f"out{number}", "--json"]
        status, out, error = convert(*words)
        assert status == 0 and json.loads(out)["step"] == 3 and "damaged" not in error


def test_a_damaged_training_checkpoint_is_refused_where_it_is_named(
    convert: Convert, run_dir: Path, tmp_path: Path
) -> None:
    """No other one takes its place; nothing is written."""
    step = last(run_dir)
    for name in (*LISTED, MANIFEST_FILE):
        (step / name).rename(tmp_path / name)
        for words in (["merge", tmp_path / "pro", step, tmp_path / "out"], ["inspect", step]):
            status, out, error = convert(*words)
            assert status == 2 and out == "" and f"{step / name}: missing" in error
        (tmp_path / name).rename(step / name)
    assert not (tmp_path / "out").exists()


def test_a_new_block_file_alone_is_checked_by_the_hash_inside(
    convert: Convert, run_dir: Path, tmp_path: Path
) -> None:
    """Shared without its manifest, it still answers for every byte of its tensors."""
    file = tmp_path / "mine.safetensors"
    shutil.copyfile(last(run_dir) / TRAINABLE_FILE, file)
    status, out, _ = convert("verify", file, "--json")
    assert status == 0 and json.loads(out)["intact"] == [str(file)]
    sha256 = json.loads(out)["sha256"]
    assert sha256 == json.loads(convert("inspect", file, "--json")[1])["sha256"]
    assert sha256.encode() in file.read_bytes()
    flip(file)
    for words in (["merge", tmp_path / "pro", file, tmp_path / "out"], ["verify", file]):
        status, out, error = convert(*words)
        assert status == 2 and out == ""
        assert f"{file}: damaged: its tensors hash to" in error and sha256[:16] in error
    assert not (tmp_path / "out").exists()


def test_verify_names_all_that_is_damaged_in_a_run_and_what_is_not(
    convert: Convert, run_dir: Path
) -> None:
    """A flipped byte, a shortened and a missing file, a directory under another's name."""
    status, out, _ = convert("verify", run_dir)
    assert status == 0
    assert out.splitlines() == [f"{last(run_dir, step)}: intact" for step in (1, 2, 3)]
    assert convert("verify", last(run_dir))[1] == f"{last(run_dir)}: intact\n"

    flip(last(run_dir, 1) / TRAINABLE_FILE)
    (last(run_dir, 1) / STATE_FILE).unlink()
    with open(last(run_dir, 3) / "optimizer.safetensors", "r+b") as file:
        file.truncate(3)
    shutil.copytree(last(run_dir, 2), last(run_dir, 4))
    status, out, error = convert("verify", run_dir)
    assert status == 2 and out == ""
    for message in (
        f"{last(run_dir, 1) / TRAINABLE_FILE}: damaged: other bytes than were saved",
        f"{last(run_dir, 1) / STATE_FILE}: missing",
        f"{last(run_dir, 3) / 'optimizer.safetensors'}: damaged: 3 bytes, 10 were saved",
        f"{last(run_dir, 4) / STATE_FILE}: 'step' is 2, but it lies in step-00000004",
        f"intact: {last(run_dir, 2)}",
    ):
        assert message in error
    assert (
        convert("verify", last(run_dir, 1))[0] == 2 and convert("verify", last(run_dir, 2))[0] == 0
    )


def test_verify_compares_a_run_with_no_base(
    convert: Convert, base: Path, run_dir: Path, tmp_path: Path
) -> None:
    """--base and --hf are for checkpoint directories; an empty run has nothing to verify."""
    status, _, error = convert("verify", run_dir, "--base", base)
    assert status == 2 and "--base and --hf are for checkpoint directories" in error
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    status, _, error = convert("verify", tmp_path / "new")
    assert status == 2 and "has no training checkpoint yet" in error


@pytest.mark.parametrize("verb", ["merge", "inspect"])
def test_a_training_checkpoint_that_a_running_save_removes_is_looked_for_again(
    verb: str, convert: Convert, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between list and reading, and between reading its header and its tensors: no mistake."""
    step, right = last(run_dir), StoredTensor.chunks
    words = [verb, run_dir] if verb == "inspect" else [verb, tmp_path / "pro", run_dir]
    words += [tmp_path / "out", "--force"] if verb == "merge" else []
    listed = training_checkpoints(run_dir)
    left = [[*listed, run_dir / "checkpoints" / "step-00000009"]]
    monkeypatch.setattr(
        run_module, "training_checkpoints", lambda path: left.pop() if left else listed
    )
    status, out, error = convert(*words, "--json")
    assert status == 0 and "damaged" not in error and "missing" not in error

    def vanishing(self: StoredTensor) -> Any:
        if self.file == step / TRAINABLE_FILE and step.exists():
            shutil.rmtree(step)
        return right(self)

    monkeypatch.undo()
    monkeypatch.setattr(StoredTensor, "chunks", vanishing)
    status, out, error = convert(*words, "--json")
    found = json.loads(out)
    assert status == 0, error
    assert (found["step"] if verb == "merge" else found["record"]["step"]) == 2


def test_what_another_version_wrote_is_not_called_damaged(
    convert: Convert, run_dir: Path, tmp_path: Path
) -> None:
    """A manifest of an unknown format, of other files, and a new-block file without a hash."""
    manifest = last(run_dir) / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    assert content["format_version"] == run_module.FORMAT_VERSION
    manifest.write_text(json.dumps(content | {"format_version": 99}))
    status, _, error = convert("inspect", last(run_dir))
    assert status == 2 and "written by another version of llamapro (format 99" in error
    manifest.write_text(json.dumps({"model.pt": content[STATE_FILE]}))
    status, _, error = convert("inspect", last(run_dir))
    assert status == 2 and "written by an older version" in error and "damaged" not in error
    file = tmp_path / "old.safetensors"
    data = (last(run_dir, 1) / TRAINABLE_FILE).read_bytes()
    file.write_bytes(data.replace(b'"llamapro_sha256"', b'"llamapro_sha999"'))
    status, _, error = convert("inspect", file)
    assert status == 2 and "older version, which stored no hash" in error


def test_a_manifest_of_the_first_format_is_read(convert: Convert, run_dir: Path) -> None:
    """It does not say its version."""
    manifest = last(run_dir) / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    del content["format_version"]
    manifest.write_text(json.dumps(content))
    assert convert("verify", run_dir)[0] == 0
