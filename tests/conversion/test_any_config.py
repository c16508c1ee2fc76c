"""Whatever a config.json says, a conversion carries it or refuses it by name.

The configurations are drawn at random from a fixed seed; transformers says what is right.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import choose_layout, expand_checkpoint
from llamapro.conversion.gguf import from_gguf
from llamapro.conversion.merge import merge_checkpoint
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.conversion.strip import strip_checkpoint
from llamapro.errors import CheckpointError, ConfigError, UserError

IDS = torch.arange(48)[None] % 37
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}


def draw_config(draw: random.Random) -> dict[str, Any]:
    """Fields that change what is computed, and fields that change nothing."""
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([4, 8, 16])
    heads = kv_heads * draw.choice([1, 2])
    hidden = draw.choice([heads * head_dim, heads * head_dim, 24])
    theta = draw.choice([1e4, 5e5, 1234.5])
    tied = draw.random() < 0.4
    scaling = draw.choice(
        [
            None,
            {"type": "linear", "factor": draw.choice([2.0, 4.0])},
            {**LLAMA_3, "factor": 32.0 if tied else 8.0},
        ]
    )
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden + hidden % heads,
        "intermediate_size": draw.choice([16, 24, 40]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": draw.choice([37, 64, 401]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 0.01]),
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "max_position_embeddings": draw.choice([64, 512]),
    }
    if draw.random() < 0.5:
        raw |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        rope = scaling or {"rope_type": "default"}
        raw |= {"rope_parameters": rope | {"rope_theta": theta}}
    if draw.random() < 0.3:
        window = draw.choice([7, 16, None])
        raw |= {"model_type": "mistral", "sliding_window": window}
        raw |= {"architectures": ["MistralForCausalLM"]}
    for name, value in (
        ("pretraining_tp", 2),
        ("hidden_act", "swish"),
        ("attention_dropout", 0.1),
        ("pad_token_id", 3),
    ):
        if draw.random() < 0.3:
            raw[name] = value
    is_known = raw["model_type"] == "llama" or raw["sliding_window"]  # to transformers
    if is_known and draw.random() < 0.3:
        kind = "sliding_attention" if raw.get("sliding_window") else "full_attention"
        raw["layer_types"] = [kind] * raw["num_hidden_layers"]
    return raw


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        return Checkpoint.open(path).load()(IDS)  # (1, T, V)


def round_trips(path: Path, work: Path, write_trained: Callable[..., Path]) -> list[str]:
    """Asserts that each conversion keeps the logits; returns the refusals of the others."""
    expected, base = logits(path), Checkpoint.open(path)
    layers, refused = base.config.num_hidden_layers, []
    layout = choose_layout(layers, layers, 1, None, "interleave")
    expand_checkpoint(base, work / "pro", layout)
    pro = Checkpoint.open(work / "pro")
    merge_checkpoint(pro, write_trained(work / "b.safetensors", pro), work / "merged")
    strip_checkpoint(Checkpoint.open(work / "merged"), work / "stripped")
    for name in ("pro", "merged", "stripped"):
        assert torch.equal(logits(work / name), expected), name
    for source in ("stripped", "merged"):
        release, back = work / f"release-{source}", work / f"back-{source}"
        try:
            to_meta(work / source, release)
        except ConfigError as error:
            refused.append(str(error))
            continue
        positions = base.config.max_position_embeddings
        from_meta(release, back, None, max_position_embeddings=positions)
        assert torch.equal(logits(back), expected), source
        ours, theirs = (Checkpoint.open(p).config for p in (work / source, back))
        assert ours.computation == theirs.computation
    return refused


def check(
    seed: int, tmp_path: Path, write_random: Callable[..., Path], write_trained: Any
) -> list[str]:
    raw = draw_config(random.Random(seed))
    config = ModelConfig.from_dict(raw)
    path = write_random(tmp_path / "base", config, seed=seed)
    hf = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        theirs = hf(IDS).logits
    torch.testing.assert_close(logits(path), theirs, rtol=1e-4, atol=1e-4)
    return round_trips(path, tmp_path, write_trained)


@pytest.mark.parametrize("seed", range(6))
def test_logits_survive_every_conversion(
    seed: int, tmp_path: Path, write_random_checkpoint: Any, write_trained: Any
) -> None:
    """Through expand, merge, strip, to-meta and from-meta, or a refusal that names the field."""
    for message in check(seed, tmp_path, write_random_checkpoint, write_trained):
        assert any(name in message for name in ("sliding_window", "head_dim", "RopeScaling"))


@pytest.mark.slow
def test_logits_survive_every_conversion_of_many(
    tmp_path: Path, write_random_checkpoint: Any, write_trained: Any
) -> None:
    """The same for 100 configurations."""
    for seed in range(100, 200):
        work = tmp_path / str(seed)
        work.mkdir()
        check(seed, work, write_random_checkpoint, write_trained)
        shutil.rmtree(work)


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
