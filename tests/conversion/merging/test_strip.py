"""`strip` gives the base back, of one generation or two; what is not a base is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.merge import merge, merge_many
from llamapro.conversion.strip import strip_checkpoint
from llamapro.errors import CheckpointError

Write = Callable[..., Path]


def test_stripping_gives_the_base_back_byte_for_byte(
    base: Checkpoint, pro: Checkpoint, files: list[Path], tmp_path: Path
) -> None:
    """Tensors, configuration, companions and model card; as expanded, and with blocks of two."""
    merge_many(pro, files, tmp_path / "merged")
    for path in (pro.path, tmp_path / "merged"):
        found = strip_checkpoint(Checkpoint.open(path), tmp_path / f"{path.name}-base")
        back = Checkpoint.open(tmp_path / f"{path.name}-base")
        assert found["sha256"] == back.sha256() == base.sha256()
        for file in ("model.safetensors", "config.json", "tokenizer.model", "LICENSE.txt"):
            assert (back.path / file).read_bytes() == (base.path / file).read_bytes(), file
        assert (back.path / "README.md").read_text() == "# The base"
        # What transformers needs beside a tokenizer.model is written wherever it was missing.
        more = {f.name for f in back.path.iterdir()} ^ {f.name for f in base.path.iterdir()}
        assert more <= {"tokenizer.json", "tokenizer_config.json"}


def test_all_weights_of_another_model_are_refused_and_the_right_command_is_named(
    base: Checkpoint,
    pro: Checkpoint,
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    write_step: Write,
) -> None:
    """Of an expanded model, of an unexpanded one, of another vocabulary; and a file alone."""
    small = tiny_config(hidden_size=16, intermediate_size=16, vocab_size=300)
    other = Checkpoint.open(write_random_checkpoint(tmp_path / "other", small))
    cases = [
        (base.path, pro, r"trained all weights of a model of 6 layers; \S+/base has 4 layers"),
        (pro.path, base, r"trained all weights of a model of 4 layers; \S+/pro has 6 layers"),
        (pro.path / "config.json", base, r"model of 4 layers; \S+/config\.json has 6 layers"),
        (base.path, other, r"model\.embed_tokens\.weight \[300, 16\]; .*weight \[400, 16\]"),
    ]
    for number, (given, trained, message) in enumerate(cases):
        run = tmp_path / f"run {number}"
        state = {"settings": {"model.path": str(trained.path)}}
        file = write_step(run, trained, 1, state, trainable="all")
        fix = rf": llamapro merge {trained.path} '{run}' OUT_DIR$"
        with pytest.raises(CheckpointError, match=f"^{run}: .*{message}.*{fix}"):
            merge(given, [run], tmp_path / "out")
        alone = shutil.copyfile(file, tmp_path / "alone.safetensors")
        with pytest.raises(CheckpointError, match=rf"^{alone}: .*\(model\.path of the run\)$"):
            merge(given, [alone], tmp_path / "out")
    merge(other.path, [run], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").sha256() == other.sha256()
