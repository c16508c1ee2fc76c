"""The logits of base and expanded model are compared block by block, and never by halves."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion import same_logits
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import CheckpointError
from llamapro.expansion import interleave


def test_a_block_of_both_models_runs_once_if_its_bytes_agree(
    base: Path, pro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed byte makes the base's block run beside it, and shows in the logits."""
    ran: list[Path] = []
    output = same_logits._output

    def counting(checkpoint: Checkpoint, *arguments: Any) -> Any:
        ran.append(checkpoint.path)
        return output(checkpoint, *arguments)

    monkeypatch.setattr(same_logits, "_output", counting)
    assert same_logits.compare_logits(Checkpoint.open(base), Checkpoint.open(pro)).bit_equal
    assert ran == [pro] * 6
    stored = Checkpoint.open(pro).tensors["model.layers.3.mlp.up_proj.weight"]  # the base's 2
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset + 2)
        file.write(b"\xc0\x3f")  # the first number is about 1.5
    ran.clear()
    compared = same_logits.compare_logits(Checkpoint.open(base), Checkpoint.open(pro))
    assert ran == [pro] * 4 + [base, pro, base, pro]
    assert not compared.bit_equal and compared.max_difference > 0


def test_expand_compares_a_file_while_it_writes_the_next(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the disk need not give again what has just been written, and nothing waits."""
    files: list[int] = []
    output = same_logits._output

    def written() -> int:
        return len(list(tmp_path.rglob("model-*.safetensors")))

    def counting(checkpoint: Checkpoint, *arguments: Any) -> Any:
        if not files:  # the first block, of the first file
            end = time.monotonic() + 60
            while written() < 2 and time.monotonic() < end:
                time.sleep(0.01)
        files.append(written())
        return output(checkpoint, *arguments)

    monkeypatch.setattr(same_logits, "_output", counting)
    stored = Checkpoint.open(base)
    expand_checkpoint(
        stored, tmp_path / "pro", interleave(4, 2), max_shard_bytes=stored.nbytes // 6
    )
    assert files[0] >= 2


def test_an_error_of_the_comparison_beside_the_writing_is_raised(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise CheckpointError("seen")

    monkeypatch.setattr(same_logits, "_output", failing)
    with pytest.raises(CheckpointError, match="seen"):
        expand_checkpoint(Checkpoint.open(base), tmp_path / "pro", interleave(4, 2))
    assert list(tmp_path.iterdir()) == []


def test_logits_are_not_compared_before_all_blocks_have_run(base: Path, pro: Path) -> None:
    """A tensor that never came is an error, and not the logits of fewer blocks."""
    whole = Checkpoint.open(pro)
    tensors = {n: t for n, t in whole.tensors.items() if n != "model.layers.4.mlp.up_proj.weight"}
    probe = same_logits.Probe(Checkpoint.open(base), dataclasses.replace(whole, tensors=tensors))
    while probe.advance():
        pass
    with pytest.raises(CheckpointError, match="block 4 has not all tensors of block 3 of"):
        probe.compare()


def test_nothing_is_written_where_logits_differ(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says by how much, and what can be the cause."""
    differing = same_logits.LogitComparison(False, 0.5, 32, 0.0)
    monkeypatch.setattr(same_logits.Probe, "compare", lambda _: differing)
    with pytest.raises(CheckpointError, match=r"pro: not written: .*logits differ.* 5\.000e-01"):
        expand_checkpoint(Checkpoint.open(base), tmp_path / "pro", interleave(4, 2))
    assert list(tmp_path.iterdir()) == []
