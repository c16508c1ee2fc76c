"""Whatever the model, dtype and layout: an expanded model is its base; conversions lose no bit.

hypothesis draws the cases and shrinks one that fails. transformers says what the logits are.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llamapro import expansion, ops
from llamapro.checkpoints.base import contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.gguf import from_gguf
from llamapro.conversion.merge import merge
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.conversion.strip import strip_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import ConfigError
from llamapro.expansion import Layout
from llamapro.model import build_on_meta, load_tensors

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}
FIELDS = ("sliding_window", "head_dim", "RopeScaling", "rope_freqs.weight", "model_type")
FEW = hypothesis.settings(
    max_examples=25, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
MANY = hypothesis.settings(FEW, max_examples=150, derandomize=False, print_blob=True)


# ---- What is drawn ------------------------------------------------------------------------------


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """A config.json: fields that change what is computed, and fields that change nothing."""
    kv_heads, head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([4, 8, 16]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    hidden = draw(st.sampled_from([heads * head_dim, 24]))
    tied = draw(st.booleans())
    llama_3 = LLAMA_3 | {"factor": 32.0 if tied else 8.0}
    linear = {"type": "linear", "factor": draw(st.sampled_from([2.0, 4.0]))}
    scaling = draw(st.sampled_from([None, linear, llama_3]))
    theta = draw(st.sampled_from([1e4, 5e5, 1234.5]))
    raw = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden + -hidden % heads, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": draw(st.sampled_from([16, 24, 40])),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "vocab_size": draw(st.sampled_from([400, 401, 402, 403, 512])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 0.01])),
        "tie_word_embeddings": tied, "initializer_range": 0.3,
        "max_position_embeddings": draw(st.sampled_from([64, 512])),
    }  # fmt: skip
    if draw(st.booleans()):
        raw |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        rope = scaling or {"rope_type": "default"}
        raw |= {"rope_parameters": rope | {"rope_theta": theta}}
    if draw(st.integers(0, 3)) == 3:
        raw |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        raw |= {"sliding_window": draw(st.sampled_from([7, 16, None]))}
    elif draw(st.integers(0, 3)) == 3:
        kind = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
        raw |= {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
        raw |= {"attention_bias": draw(st.booleans()), "use_sliding_window": draw(st.booleans())}
        raw |= {"max_window_layers": draw(st.sampled_from([0, 4])), "sliding_window": 7}
    spare = {"pretraining_tp": 2, "hidden_act": "swish", "attention_dropout": 0.1}
    raw |= draw(st.fixed_dictionaries({}, optional={k: st.just(v) for k, v in spare.items()}))
    is_known = raw["model_type"] == "llama" or raw["sliding_window"]  # to transformers
    if is_known and draw(st.booleans()):
        is_on = ModelConfig.from_dict(raw).sliding_window is not None
        kind = "sliding_attention" if is_on else "full_attention"
        raw["layer_types"] = [kind] * raw["num_hidden_layers"]
    return raw


def layouts(layers: int) -> list[Layout]:
    """All placements of new blocks in so many layers."""
    found = [
        expansion.interleave(layers, n * p, p)
        for n in range(1, layers + 1)
        for p in range(1, layers // n + 1)
        if layers % n == 0
    ]
    for count in range(1, layers + 1):
        found += [expansion.stack(layers, count, kind) for kind in ("prefix", "suffix")]
    subsets = ([i for i in range(layers) if mask >> i & 1] for mask in range(1, 1 << layers))
    return found + [expansion.insert_after(layers, subset) for subset in subsets]


@dataclass(frozen=True)
class Case:
    """A base, and how it is expanded, once or again and again."""

    raw: dict[str, Any]
    dtype: torch.dtype
    seed: int
    steps: list[tuple[Layout, int]]  # of each expansion: its layout, and how many tokens it adds
    shard_bytes: int


@st.composite
def cases(draw: Any) -> Case:
    raw, steps = draw(configs()), []
    layers = raw["num_hidden_layers"]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        if layers > 8:
            break
        layout = draw(st.sampled_from(layouts(layers)))
        steps.append((layout, draw(st.sampled_from([0, 0, 1, 3]))))
        layers = len(layout.sources)
    shard_bytes = draw(st.sampled_from([1_000, 20_000, 10**9]))
    return Case(raw, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)), steps, shard_bytes)


# ---- What holds ---------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Any, tokens: int = 48) -> Tensor:
    """Of a model, or of the one at a path; (1, T, V)."""
    model = Checkpoint.open(model).load() if isinstance(model, Path) else model
    return model(torch.arange(tokens)[None] % 37)


@dataclass(frozen=True)
class Tools:
    """Fixtures that make files, and a folder."""

    home: Path
    write_random: Callable[..., Path]
    write_trained: Callable[..., Path]
    write_gguf: Callable[..., Path]

    @contextmanager
    def base(self, raw: dict[str, Any], dtype: torch.dtype, seed: int) -> Iterator[Path]:
        """Gives the path of a random base, in a folder that is removed at the end."""
        work = self.home / "work"
        try:
            yield self.write_random(work / "base", ModelConfig.from_dict(raw), dtype, seed)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(scope="module")
def tools(
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Any,
    write_trained: Any,
    write_gguf: Any,
) -> Tools:
    home = tmp_path_factory.mktemp("properties")
    return Tools(home, write_random_checkpoint, write_trained, write_gguf)


def check_in_memory(case: Case, random_tensors: Callable[..., dict[str, Tensor]]) -> None:
    """However often it is expanded, a model computes the logits of its base."""
    config = ModelConfig.from_dict(case.raw)
    tensors = random_tensors(config, case.dtype, case.seed)
    expected: dict[int, Tensor] = {}
    for layout in [None, *(layout for layout, _ in case.steps)]:
        if layout is not None:
            config = expansion.expand_config(config, layout, "ab" * 32)
            tensors = expansion.expand_state_dict(tensors, layout)
        model = build_on_meta(config)
        load_tensors(model, tensors)
        for tokens in (1, 2, 3, 48):
            found = logits(model, tokens)
            assert torch.equal(found, expected.setdefault(tokens, found))


def check_on_disk(case: Case, tools: Tools) -> None:
    """Each expansion computes its base's logits; trained and stripped, it gives its base back."""
    with tools.base(case.raw, case.dtype, case.seed) as path:
        for number, (layout, added) in enumerate(case.steps):
            work, names = path.parent, [f"<|{number}-{i}|>" for i in range(added)]
            out, merged, stripped = (work / f"{n}-{number}" for n in ("pro", "merged", "stripped"))
            base = Checkpoint.open(path)
            expand_checkpoint(base, out, layout, False, case.shard_bytes, names)
            pro = Checkpoint.open(out)
            expected, found = logits(path), logits(out)
            assert torch.equal(logits(contained_checkpoint(pro).load()), expected)
            if added:  # more rows may be summed in another order
                found = found[..., : base.config.vocab_size]
                torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-5)
            else:
                assert torch.equal(found, expected)
            blocks = tools.write_trained(work / f"b-{number}.safetensors", pro, noise=0.1)
            merge(out, [blocks], merged)
            assert verify(merged, path)["base_intact"]
            assert not torch.equal(logits(merged), logits(out))
            strip_checkpoint(Checkpoint.open(merged), stripped)
            back = Checkpoint.open(stripped)
            assert back.sha256() == base.sha256()
            assert back.config == base.config
            path = out


def check_conversions(raw: dict[str, Any], seed: int, tools: Tools) -> list[str]:
    """Each conversion keeps the logits, which are those of transformers; returns refusals."""
    with tools.base(raw, torch.float32, seed) as path:
        expected, work, refused = logits(path), path.parent, []
        hf = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            theirs = hf(torch.arange(48)[None] % 37).logits
        torch.testing.assert_close(expected, theirs, rtol=1e-4, atol=1e-4)
        base = Checkpoint.open(path)
        config, layers = base.config, base.config.num_hidden_layers
        expand_checkpoint(base, work / "pro", expansion.interleave(layers, layers))
        pro = Checkpoint.open(work / "pro")
        blocks = tools.write_trained(work / "b.safetensors", pro)
        merge(work / "pro", [blocks], work / "merged")
        for source in ("base", "merged"):
            release, back = work / f"release-{source}", work / f"back-{source}"
            try:
                to_meta(work / source, release)
            except ConfigError as error:
                refused.append(str(error))
                continue
            positions = config.max_position_embeddings
            from_meta(release, back, None, max_position_embeddings=positions)
            assert torch.equal(logits(back), expected), source
            theirs_, ours_ = (Checkpoint.open(p).config for p in (back, work / source))
            assert theirs_.computation == ours_.computation
        if config.model_type == "llama" and not config.attention_bias:
            values: dict[str, Any] = {}
            extra: dict[str, Tensor] = {}
            if scaling := config.rope_scaling:
                D, theta = config.head_dim, config.rope_theta
                plain, slowed = (ops.rope_frequencies(D, theta, s) for s in (None, scaling))
                if scaling.kind == "linear":
                    values = {"llama.rope.scaling.type": "linear"}
                    values |= {"llama.rope.scaling.factor": scaling.factor}
                else:
                    extra = {"rope_freqs.weight": plain / slowed}
            file = work / "m.gguf"
            tools.write_gguf(file, config, base.state_dict(), values=values, extra=extra)
            try:
                from_gguf(file, work / "from-gguf", torch.float32)
            except ConfigError as error:  # few factors do not say what they were made of
                assert extra and config.head_dim < 16
                return [*refused, str(error)]
            found = logits(work / "from-gguf")
            if extra:  # the factors are rounded
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(found, expected)
    return refused


@hypothesis.given(case=cases())
@FEW
def test_an_expanded_model_is_its_base(
    case: Case, random_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    """To the bit, for every placement, dtype and number of expansions and tokens."""
    check_in_memory(case, random_tensors)


@hypothesis.given(case=cases())
@hypothesis.settings(FEW, max_examples=4)
def test_an_expanded_checkpoint_gives_its_base_back(case: Case, tools: Tools) -> None:
    """After any number of expansions, with added tokens, trained and merged."""
    check_on_disk(case, tools)


@hypothesis.given(raw=configs(), seed=st.integers(0, 99))
@hypothesis.settings(FEW, max_examples=4)
def test_logits_survive_every_conversion(raw: dict[str, Any], seed: int, tools: Tools) -> None:
    """Through to-meta, from-meta and from-gguf, or a refusal that names the field."""
    for message in check_conversions(raw, seed, tools):
        assert any(name in message for name in FIELDS)


@pytest.mark.slow
@hypothesis.given(case=cases())
@MANY
def test_both_hold_in_many_cases(
    case: Case, tools: Tools, random_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    """Other ones every time."""
    check_in_memory(case, random_tensors)
    check_on_disk(case, tools)


@pytest.mark.slow
@hypothesis.given(raw=configs(), seed=st.integers(0, 99))
@MANY
def test_logits_survive_every_conversion_in_many_cases(
    raw: dict[str, Any], seed: int, tools: Tools
) -> None:
    """The same for other cases every time."""
    check_conversions(raw, seed, tools)
