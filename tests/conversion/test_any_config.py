"""What a conversion cannot carry it refuses by name: fields, names of tensors, values.

test_properties.py draws whole configurations.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import choose_layout, expand_checkpoint
from llamapro.conversion.gguf import from_gguf
from llamapro.conversion.merge import merge_checkpoint
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError, ConfigError, UserError


def test_a_release_cannot_say_a_window(
    tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any
) -> None:
    """It would attend to all positions: refused by the field's name, and nothing is written."""
    config = tiny_config(model_type="mistral", sliding_window=16, num_hidden_layers=1)
    path = write_random_checkpoint(tmp_path / "m", config)
    with pytest.raises(ConfigError, match="sliding_window 16 cannot be said in Meta's layout"):
        to_meta(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"sliding_window": 4096}, "refused"),
        ({"moe": {"num_experts": 8}}, "refused"),
        ({"rope_scaling_factor": 16}, "refused"),
        ({"head_dim": 128}, "refused"),
        ({"dropout": 0.1}, "said"),
        ({"hidden_dim": 16, "multiple_of": None}, "Mistral"),
    ],
)
def test_fields_of_a_release_that_we_do_not_know_are_never_dropped_in_silence(
    change: dict[str, Any],
    kind: str,
    tmp_path: Path,
    write_random_checkpoint: Any,
    tiny_config: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused if they decide what is computed, else said."""
    path = write_random_checkpoint(tmp_path / "m", tiny_config(num_hidden_layers=1))
    to_meta(path, tmp_path / "release")
    file = tmp_path / "release" / "params.json"
    params = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    name, value = next(iter(change.items()))
    if kind == "said":
        from_meta(tmp_path / "release", tmp_path / "out", None)
        assert f"{name} {value!r} is not known, and not used" in capsys.readouterr().err
        return
    with pytest.raises(ConfigError) as caught:
        from_meta(tmp_path / "release", tmp_path / "out", None)
    expected = "this is Mistral's own layout" if kind == "Mistral" else f"{name} {value!r} is not"
    assert f"{file}: {expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("mark", "whose"), [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")]
)
def test_names_of_a_wrapper_in_a_release_are_told_apart(
    mark: str, whose: str, tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any
) -> None:
    """The message has the mark, whose it is, and one name that is in the file."""
    path = write_random_checkpoint(tmp_path / "m", tiny_config(num_hidden_layers=1))
    to_meta(path, tmp_path / "release")
    file = tmp_path / "release" / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    torch.save({f"{mark}{name}": t for name, t in tensors.items()}, file)
    with pytest.raises(
        CheckpointError, match=rf"00\.pth: 12 names carry '{mark}' of {whose}.*{mark}"
    ):
        from_meta(tmp_path / "release", tmp_path / "out", None)


# ---- Success means finite ------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any) -> Path:
    """A base in fp16."""
    config = tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    return write_random_checkpoint(tmp_path / "half", config, torch.float16)


def test_a_value_beyond_fp16_is_not_merged_into_it(
    half: Path, tmp_path: Path, write_trained: Any
) -> None:
    """65504 is the largest; 1e5 would be written as infinity."""
    expand_checkpoint(
        Checkpoint.open(half), tmp_path / "pro", choose_layout(2, 1, 1, None, "interleave")
    )
    pro = Checkpoint.open(tmp_path / "pro")
    file = write_trained(tmp_path / "b.safetensors", pro, noise=1e5)
    with pytest.raises(CheckpointError, match=r"merge: .* would hold NaN or infinity in F16"):
        merge_checkpoint(pro, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_conversion_passes_on_what_is_not_finite(
    value: float, tmp_path: Path, write_random_checkpoint: Any, tiny_config: Any, write_gguf: Any
) -> None:
    """expand, with added tokens too, from-meta and from-gguf name the tensor and write nothing."""
    config = tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    path = write_random_checkpoint(tmp_path / "base", config)
    to_meta(path, tmp_path / "release")
    tensors = torch.load(tmp_path / "release" / "consolidated.00.pth", weights_only=True)
    tensors["layers.1.feed_forward.w2.weight"][0, 0] = value
    torch.save(tensors, tmp_path / "release" / "consolidated.00.pth")
    stored = Checkpoint.open(path).state_dict()
    stored["model.layers.1.mlp.down_proj.weight"] = stored[
        "model.layers.1.mlp.down_proj.weight"
    ].clone()
    stored["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    bad = Checkpoint.open(path).tensors["model.layers.1.mlp.down_proj.weight"]
    with open(bad.file, "r+b") as file:
        file.seek(bad.offset)
        file.write(torch.tensor(value).numpy().tobytes())
    out, layout = tmp_path / "out", choose_layout(2, 2, 1, None, "interleave")
    calls: list[Callable[[], Any]] = [
        lambda: expand_checkpoint(Checkpoint.open(path), out, layout),
        lambda: from_meta(tmp_path / "release", out, None),
        lambda: from_gguf(write_gguf(tmp_path / "m.gguf", config, stored), out),
        lambda: to_meta(path, out),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"layers\.[12]\.\S+ (would hold|holds) NaN or inf"):
            call()
        assert not out.exists()
