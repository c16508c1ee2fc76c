"""Models that another tool expanded get the record; from then on they are like ours."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint
from llamapro.conversion.strip import strip_checkpoint
from llamapro.conversion.verify import verify
from llamapro.expansion import insert_after, interleave
from llamapro.scripts import convert as script

Convert = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert(run_command: Any) -> Convert:
    return lambda *arguments: run_command(script.main, *arguments)


@pytest.fixture
def base(tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any) -> Checkpoint:
    config: ModelConfig = tiny_config(hidden_size=16, intermediate_size=16)
    return Checkpoint.open(write_random_checkpoint(tmp_path / "base", config))


def forget_record(path: Path) -> Path:
    """As the paper's script leaves it: the layers are there, and nothing says which are new."""
    raw = json.loads((path / "config.json").read_text())
    del raw["llamapro"]
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (interleave(4, 2), {}),
        (interleave(4, 4, 2), {"attention_bias": True, "mlp_bias": True}),
        (insert_after(4, [0, 1]), {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}),
    ],
)
def test_identity_blocks_are_found_by_their_zeros(
    layout: Any,
    kind: dict[str, Any],
    tmp_path: Path,
    convert: Convert,
    write_random_checkpoint: Any,
    tiny_config: Any,
) -> None:
    """The record is the one that our own expand would have written."""
    config: ModelConfig = tiny_config(hidden_size=16, intermediate_size=16, **kind)
    base = Checkpoint.open(write_random_checkpoint(tmp_path / "base", config))
    expand_checkpoint(base, tmp_path / "ours", layout)
    expected = Checkpoint.open(tmp_path / "ours")
    path = forget_record(tmp_path / "ours")
    status, out, _ = convert("adopt", path, tmp_path / "out")
    assert status == 0 and "bit-equal to the base's" in out and "identity" in out
    adopted = Checkpoint.open(tmp_path / "out")
    assert adopted.config.expansion == expected.config.expansion
    assert adopted.sha256() == expected.sha256()
    assert verify(tmp_path / "out", base.path)["logits_bit_equal"]


def test_layer_types_of_the_base_become_those_of_all_layers(
    base: Checkpoint, tmp_path: Path, convert: Convert
) -> None:
    """Scripts that only raise num_hidden_layers leave a list that transformers refuses."""
    expand_checkpoint(base, tmp_path / "pro", interleave(4, 2))
    file = forget_record(tmp_path / "pro") / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"layer_types": ["full_attention"] * 4})
    )
    status, _, error = convert("adopt", tmp_path / "pro", tmp_path / "out")
    assert status == 0 and "4 entries for 6 layers" in error
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["layer_types"] == ["full_attention"] * 6


def test_trained_blocks_are_named_by_the_user(
    base: Checkpoint, tmp_path: Path, convert: Convert, write_trained: Any
) -> None:
    """Their zeros are gone. The base inside has the base's hash, and strip gives it back."""
    expand_checkpoint(base, tmp_path / "pro", interleave(4, 2))
    pro = Checkpoint.open(tmp_path / "pro")
    blocks = write_trained(tmp_path / "b.safetensors", pro, noise=0.1)
    merge_checkpoint(pro, blocks, tmp_path / "merged")
    path, out = forget_record(tmp_path / "merged"), tmp_path / "out"
    status, _, error = convert("adopt", path, out)
    assert status == 2 and "0 of 6 layers are the identity" in error and "--new-layers" in error
    status, printed, _ = convert("adopt", path, out, "--new-layers", "5,2", "--json")
    result = json.loads(printed)
    assert status == 0 and result["new_blocks"] == "trained"
    assert result["new_layers"] == [2, 5] and result["source_layers"] == [1, 3]
    assert result["base_sha256"] == base.sha256()
    strip_checkpoint(Checkpoint.open(out), tmp_path / "stripped")
    assert Checkpoint.open(tmp_path / "stripped").sha256() == base.sha256()


def test_every_identity_block_must_be_among_the_named(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any, convert: Convert
) -> None:
    """LLaMA-Pro-8B has a new block after every 4 of 32: off by one is refused."""
    config = tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=32)
    base = Checkpoint.open(write_random_checkpoint(tmp_path / "base", config))
    expand_checkpoint(base, tmp_path / "pro", interleave(32, 8))
    path, right = forget_record(tmp_path / "pro"), list(range(4, 40, 5))
    wrong = ",".join(str(layer - 1) for layer in right)
    status, _, error = convert("adopt", path, tmp_path / "out", "--new-layers", wrong)
    assert status == 2 and f"layers {right} of " in error and not (tmp_path / "out").exists()
    words = ("--new-layers", ",".join(map(str, right)), "--json")
    status, printed, _ = convert("adopt", path, tmp_path / "out", *words)
    result = json.loads(printed)
    assert status == 0 and result["base_sha256"] == base.sha256()
    assert result["source_layers"] == list(range(3, 32, 4))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--new-layers", "1,1"], "--new-layers 1,1: expected some of the layers 0 to 3"),
        (["--new-layers", "4"], "--new-layers 4: expected some of the layers 0 to 3"),
        (["--new-layers", "0,1,2,3"], "expected some of the layers 0 to 3"),
        (["--new-layers", "x"], "--new-layers 'x': expected layers like 4,9,14"),
        ([], "0 of 4 layers are the identity"),
    ],
)
def test_impossible_layers_are_refused(
    arguments: list[str], expected: str, base: Checkpoint, tmp_path: Path, convert: Convert
) -> None:
    """Nothing is written."""
    status, _, error = convert("adopt", base.path, tmp_path / "out", *arguments)
    assert status == 2 and expected in error and not (tmp_path / "out").exists()


def test_a_model_with_a_record_needs_none(
    base: Checkpoint, tmp_path: Path, convert: Convert
) -> None:
    """It is used as it is."""
    expand_checkpoint(base, tmp_path / "pro", interleave(4, 2))
    status, _, error = convert("adopt", tmp_path / "pro", tmp_path / "out")
    assert status == 2 and "has a 'llamapro' record already, of new layers [2, 5]" in error


# ---- verify --hf is a test -----------------------------------------------------------------------


def test_verify_beside_transformers_passes_or_fails(
    base: Checkpoint, convert: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that computes something else fails with status 1; --tolerance replaces the bound.

    Random tokens, or those of a text, are compared, and with --grads also gradients.
    """
    status, out, _ = convert("verify", base.path, "--hf")
    assert status == 0 and "\n  PASS: the last may differ by up to " in out
    status, out, _ = convert("verify", base.path, "--hf", "--tolerance", "0", "--dtype", "bfloat16")
    assert status == 1 and "\n  FAIL: the last may differ by up to 0" in out
    (tmp_path / "a.txt").write_text("Once upon a time")
    words = ("verify", base.path, "--hf", "--grads", "--text", tmp_path / "a.txt")
    status, out, _ = convert(*words)
    assert status == 0 and re.search(r"float32, \d+ tokens of .*a.txt\n", out)
    assert re.search(r"  \d+ gradients: the largest error, of .*, is 0.\d+ of what is allowed", out)
    right = Checkpoint.load

    def wrong(self: Checkpoint, dtype: Any = None, device: Any = "cpu") -> Any:
        model = right(self, dtype, device)
        model.model.layers[1].self_attn.q_proj.weight.data.neg_()
        return model

    monkeypatch.setattr(Checkpoint, "load", wrong)
    status, out, _ = convert("verify", base.path, "--hf", "--json")
    assert status == 1 and json.loads(out)["hf"]["passed"] is False
    only_logits = ("verify", base.path, "--hf", "--tolerance", "1e9")
    assert convert(*only_logits)[0] == 0 and convert(*only_logits, "--grads")[0] == 1
    for option in (("--tolerance", "1"), ("--grads",), ("--text", tmp_path / "a.txt")):
        assert convert("verify", base.path, *option)[0] == 2


def test_a_config_without_names_of_results_is_compared(
    base: Checkpoint, convert: Convert, tmp_path: Path
) -> None:
    """`return_dict` false, from scripts that trace models, makes transformers fail in its own."""
    raw = json.loads((base.path / "config.json").read_text()) | {"return_dict": False}
    (base.path / "config.json").write_text(json.dumps(raw))
    assert convert("verify", base.path, "--hf")[0] == 0


def test_what_transformers_cannot_load_is_one_message(base: Checkpoint, convert: Convert) -> None:
    """Its own checks are stricter in places: here of a token without a row."""
    raw = json.loads((base.path / "config.json").read_text()) | {"pad_token_id": 4000}
    (base.path / "config.json").write_text(json.dumps(raw))
    status, _, error = convert("verify", base.path, "--hf")
    assert status == 2 and "transformers cannot load it: " in error


def test_a_home_is_found_in_every_place(
    base: Checkpoint, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves `~` alone in quotes and behind `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert("expand", "~/base", "~/pro", "--num-new-blocks", "2")[0] == 0
    assert convert("verify", "~/pro", "--base=~/base")[0] == 0


def test_a_block_whose_bias_is_left_is_no_identity(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any, convert: Convert
) -> None:
    """A tool that zeroes both matrices and forgets the bias of o_proj changes what is computed."""
    config = tiny_config(attention_bias=True, hidden_size=16, intermediate_size=16)
    base = Checkpoint.open(write_random_checkpoint(tmp_path / "base", config))
    expand_checkpoint(base, tmp_path / "pro", interleave(4, 1))
    path = forget_record(tmp_path / "pro")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.4.self_attn.o_proj.bias"][3] = 1.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    status, _, error = convert("adopt", path, tmp_path / "out")
    assert (
        status == 2
        and "0 of 5 layers are the identity (o_proj and down_proj zero, weights and" in error
    )
