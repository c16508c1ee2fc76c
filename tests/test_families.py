"""Every LLaMA-shaped base computes what transformers' own class does, and expands to itself.

The configurations are the published ones with small sizes: what makes a family different is kept.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llamapro import expansion, ops
from llamapro.__main__ import run_command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.meta import to_meta
from llamapro.errors import ConfigError
from llamapro.inference.cache import KVCache
from llamapro.model import LlamaForCausalLM
from llamapro.testing import assert_matches_hf

SIZES = {
    "vocab_size": 403,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "initializer_range": 0.1,  # with 0.02 blocks this narrow would hardly do anything
}
LLAMA_3_SCALING = {  # of Llama 3.1, with an original context that the tests go beyond
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-1": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "llama-2": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "torch_dtype": "float16"},
    "code-llama": {"rope_theta": 1000000, "max_position_embeddings": 16384},
    "tinyllama": {"num_key_value_heads": 1, "max_position_embeddings": 2048},
    "llama-3": {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": None},
    "llama-3.1": {
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3_SCALING,
        "max_position_embeddings": 131072,
        "eos_token_id": [2, 3],
    },
    "llama-3.2": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA_3_SCALING | {"rope_theta": 500000.0, "factor": 32.0},
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 8192},
    "mistral-v0.1": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "max_position_embeddings": 32768,
    },
    "mistral-v0.3": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "max_window_layers": 0,
        "use_sliding_window": False,
        "bos_token_id": 7,
    },
    "qwen2-window": {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "sliding_window": 8,
        "max_window_layers": 0,
        "use_sliding_window": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1000000,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "qwen3-biases": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,  # in no layer
        "max_window_layers": 2,
    },
}
WITH_BIASES_OR_NORMS = ("llama-biases", "qwen2", "qwen2-window", "qwen3", "qwen3-biases")
LENGTH = 24  # beyond the window and the original context


@pytest.fixture(scope="module")
def base(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A random checkpoint of one family."""
    raw = {"model_type": "llama"} | SIZES | FAMILIES[request.param]
    raw["architectures"] = [f"{raw['model_type'].capitalize()}ForCausalLM"]
    path = tmp_path_factory.mktemp("families") / "base"
    return write_random_checkpoint(path, ModelConfig.from_dict(raw))


def families(*names: str) -> pytest.MarkDecorator:
    """Runs a test on checkpoints of these families."""
    return pytest.mark.parametrize("base", names, indirect=True)


def theirs(path: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def random_ids(shape: tuple[int, int] = (2, LENGTH)) -> Tensor:
    return torch.randint(3, 400, shape, generator=torch.Generator().manual_seed(0))


@families(*FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(base: Path) -> None:
    """Against transformers in fp64, the error is at most twice that of transformers in fp32."""
    assert_matches_hf(base, random_ids(), gradients=True)


@families("llama-2", "llama-3.1", "llama-3.2", "linear", "mistral-v0.1", *WITH_BIASES_OR_NORMS)
def test_an_expanded_export_is_the_base_in_transformers_too(base: Path, tmp_path: Path) -> None:
    """The same class reads it, and its logits are the base's to the bit; so are ours."""
    expand_checkpoint(Checkpoint.open(base), tmp_path / "pro", expansion.interleave(2, 1))
    their_pro, their_base = theirs(tmp_path / "pro"), theirs(base)
    assert type(their_pro) is type(their_base)
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(their_pro(ids).logits, their_base(ids).logits)
        ours = [Checkpoint.open(path).load()(ids) for path in (tmp_path / "pro", base)]
    assert torch.equal(*ours)
    written = json.loads((tmp_path / "pro" / "config.json").read_text())
    assert "rope_theta" in written or "rope_parameters" not in written


@families("llama-3.1", "mistral-v0.1", "qwen2-window", "qwen3-biases")
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_text(base: Path) -> None:
    """Token by token, past the window's end and past the original context."""
    model = Checkpoint.open(base).load()
    ids = random_ids()
    cache = KVCache(model, 2, LENGTH)
    one_by_one = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(LENGTH)], dim=1)
    assert torch.allclose(one_by_one, model(ids), rtol=0, atol=2e-5)


@families("llama-3.1", "mistral-v0.1")
@torch.no_grad()
def test_documents_in_one_sequence_are_as_if_alone(base: Path) -> None:
    """Neither text nor positions are shared, in a window and continued from a cache too."""
    model: LlamaForCausalLM = Checkpoint.open(base).load()
    ids = random_ids((1, LENGTH))
    documents = torch.tensor([[0] * 10 + [3] * 13 + [4]])
    alone = torch.cat([model(part) for part in ids.split([10, 13, 1], dim=1)], dim=1)
    packed = model(ids, documents=documents)
    assert torch.allclose(packed, alone, rtol=0, atol=2e-5)
    assert not torch.allclose(packed, model(ids), rtol=0, atol=1e-2)
    cache = KVCache(model, 1, LENGTH)
    parts = [
        model(ids[:, start:end], cache=cache, documents=documents[:, :end])
        for start, end in ((0, 7), (7, 8), (8, 20), (20, 24))
    ]
    assert torch.allclose(torch.cat(parts, dim=1), alone, rtol=0, atol=2e-5)


@families("llama-2")
def test_a_document_starts_at_position_0(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE is relative, so the logits alone would not tell."""
    seen, table = [], ops.rope_table

    def watched(positions: Tensor, *rest: Any) -> Any:
        seen.append(positions.tolist())
        return table(positions, *rest)

    monkeypatch.setattr(ops, "rope_table", watched)
    model = Checkpoint.open(base).load()
    model(random_ids((1, 6)), documents=torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert seen == [[[0, 1, 0, 1, 2, 0]]]


@families("llama-biases", "qwen2", "qwen3-biases")
def test_new_blocks_of_it_train_merge_and_load_in_transformers(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a new block moves, nothing else does, and `verify --hf` passes the merged model."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    pro, run, merged = (str(tmp_path / name) for name in ("pro", "run", "merged"))
    run_command("expand", [str(base), pro, "--num-new-blocks", "1", "--force"])
    options = {
        "--model.path": pro, "--data.train": tmp_path / "text.txt", "--run-dir": run,
        "--data.cache-dir": tmp_path / "cache", "--data.seq-len": 16, "--train.steps": 3,
        "--train.batch-size": 2, "--optim.lr": 1e-2,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    run_command("train", [*words, "--train.recompute"])
    run_command("merge", [str(base), run, merged])
    before, after = (Checkpoint.open(path).state_dict() for path in (pro, merged))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("model.layers.2.")}
    assert_matches_hf(merged, random_ids())
    capsys.readouterr()
    run_command("verify", [merged, "--base", str(base), "--hf"])
    assert "PASS" in capsys.readouterr().out
    run_command("generate", [merged, "--prompt", "The quick", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("The quick")
    run_command("strip", [merged, str(tmp_path / "stripped")])
    assert Checkpoint.open(tmp_path / "stripped").sha256() == Checkpoint.open(base).sha256()


@families("llama-biases", "qwen2", "qwen3")
def test_meta_s_layout_has_no_place_for_it(base: Path, tmp_path: Path) -> None:
    """Biases and norms of queries would be lost: refused by name, and nothing is written."""
    with pytest.raises(ConfigError, match=r"model_type '\w+' has (biases|norms of q)"):
        to_meta(base, tmp_path / "release")
    assert not (tmp_path / "release").exists()
