"""The next token: greedy, or drawn with the probabilities that temperature and top_p say."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError
from llamapro.inference.cache import KVCache
from llamapro.inference.sampling import choose_sampling, generate, sample
from llamapro.model import LlamaForCausalLM, load_tensors

PROBABILITIES = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
DRAWS = 20_000
# Four standard deviations of a share near 1/2.
NOISE = 4 * 0.5 / DRAWS**0.5


def shares(temperature: float, top_p: float, seed: int = 0) -> Tensor:
    """The share of the draws that each of the four tokens has."""
    generator = torch.Generator().manual_seed(seed)
    logits = (PROBABILITIES.log() + 3.0).expand(DRAWS, -1)  # a constant changes nothing
    drawn = sample(logits, temperature, top_p, generator)
    assert drawn.shape == (DRAWS, 1)
    return torch.bincount(drawn[:, 0], minlength=4) / DRAWS


@pytest.fixture(scope="module")
def model(
    tiny_config: Callable[..., ModelConfig], random_tensors: Callable[..., dict[str, Tensor]]
) -> LlamaForCausalLM:
    """A random model with a context of 48 tokens."""
    made = LlamaForCausalLM(tiny_config(max_position_embeddings=48))
    load_tensors(made, random_tensors(made.config, torch.float32))
    return made.requires_grad_(False).eval()


def argmax_of_full_forward(model: LlamaForCausalLM, prompt: Tensor, count: int) -> Tensor:
    """Greedy decoding without a cache: the whole text anew for each token."""
    ids = prompt
    for _ in range(count):
        logits = model(ids)
        assert isinstance(logits, Tensor)
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[:, prompt.shape[1] :]


def test_greedy_is_the_argmax_of_the_full_forward_at_each_step(model: LlamaForCausalLM) -> None:
    """The cache changes no token, for two prompts of 1 or 9 tokens at a time."""
    for length in (1, 9):
        prompt = torch.randint(3, 400, (2, length), generator=torch.Generator().manual_seed(length))
        written = torch.cat(list(generate(model, prompt, 10)), dim=1)
        assert torch.equal(written, argmax_of_full_forward(model, prompt, 10))


def test_generation_goes_on_from_a_cache_and_a_generator(model: LlamaForCausalLM) -> None:
    """A prompt read in two parts, tokens drawn in two calls: the same as all at once."""
    prompt = torch.randint(3, 400, (1, 9), generator=torch.Generator().manual_seed(5))
    whole = torch.cat(list(generate(model, prompt, 12, 1.5, 1.0, 3)), dim=1)
    cache, generator = KVCache(model, 1, 24), torch.Generator().manual_seed(3)
    model(prompt[:, :4], cache=cache)
    first = torch.cat(list(generate(model, prompt[:, 4:], 7, 1.5, 1.0, generator, cache)), dim=1)
    assert cache.length == 9 + 7 - 1
    then = torch.cat(list(generate(model, first[:, -1:], 5, 1.5, 1.0, generator, cache)), dim=1)
    assert torch.equal(torch.cat((first, then), dim=1), whole)


def test_temperature_0_takes_the_most_likely() -> None:
    """Seed and top_p change nothing."""
    for seed in range(3):
        drawn = sample(PROBABILITIES.log(), 0.0, 0.1, torch.Generator().manual_seed(seed))
        assert drawn.tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_equal_logits_is_taken(dtype: torch.dtype) -> None:
    """In bf16 many are equal."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator).round().to(dtype)
    first = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, 0.0, 1.0, generator)[:, 0].tolist() == first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_power_of_the_probabilities(temperature: float) -> None:
    """Shares are p^(1/T) renormalised: below 1 sharper, at 1 the model's own, above 1 flatter."""
    expected = PROBABILITIES[0] ** (1 / temperature)
    torch.testing.assert_close(
        shares(temperature, 1.0), expected / expected.sum(), rtol=0, atol=NOISE
    )


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.45, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.9, [1, 2, 3]), (1.0, range(4))],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    """No other token is ever drawn, and those that stay keep their ratios."""
    expected = torch.zeros(4)
    expected[list(kept)] = PROBABILITIES[0, list(kept)]
    found = shares(1.0, top_p)
    assert found.nonzero().flatten().tolist() == list(kept)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=NOISE)


def test_tiny_temperatures_are_greedy() -> None:
    """The most likely is drawn, down to the smallest number, by which a division overflows."""
    for temperature in (1e-30, 1e-45, 5e-324):
        assert shares(temperature, 1.0)[1] == 1.0


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_nothing_is_drawn_from_logits_that_are_not_finite(top_p: float) -> None:
    """A broken checkpoint is said to be one."""
    logits = torch.tensor([[0.0, 1.0], [0.0, math.nan]])
    with pytest.raises(CheckpointError, match="the logits are NaN or infinite"):
        sample(logits, 1.0, top_p, torch.Generator())


def test_rows_are_drawn_independently() -> None:
    """Each sequence of a batch has its own distribution."""
    logits = torch.full((3, 5), -100.0)
    logits[0, 4] = logits[1, 0] = logits[2, 2] = 100.0
    drawn = sample(logits, 1.0, 0.9, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [[4], [0], [2]]


LINE = " from generation_config.json"


@pytest.mark.parametrize(
    ("content", "options", "expected", "said"),
    [
        # Without a file, or one that says so, the most likely token is taken, and nothing is said.
        (None, {}, (0.0, 1.0), ""),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {}, (0.0, 1.0), ""),
        ({"do_sample": False, "temperature": 0.6}, {}, (0.0, 1.0), ""),
        # With do_sample its values count, and 1.0 for a temperature that it does not name.
        ({"do_sample": True, "temperature": 0.6}, {}, (0.6, 1.0), f"temperature 0.6{LINE}"),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {},
            (0.6, 0.9),
            f"temperature 0.6, top_p 0.9{LINE}",
        ),
        ({"do_sample": True, "temperature": None}, {}, (1.0, 1.0), f"temperature 1.0{LINE}"),
        # An option counts more; the file's top_p counts wherever tokens are drawn.
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, (0, 1), ""),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"top_p": 1.0},
            (0.6, 1.0),
            f"temperature 0.6{LINE}",
        ),
        ({"top_p": 0.9}, {"temperature": 0.7}, (0.7, 0.9), f"top_p 0.9{LINE}"),
        ({"do_sample": True, "top_p": 7}, {"temperature": 0.7, "top_p": 0.5}, (0.7, 0.5), ""),
        # What is not applied is named where it would change the text.
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
            {},
            (0.7, 1.0),
            f"temperature 0.7{LINE}; repetition_penalty 1.05, top_k 20 of generation_config.json "
            "not applied",
        ),
        (
            {"stop_strings": ["a"], "suppress_tokens": [3], "bad_words_ids": [], "min_length": 0},
            {},
            (0.0, 1.0),
            "suppress_tokens [3], stop_strings ['a'] of generation_config.json not applied",
        ),
        ({"do_sample": True, "temperature": 1.0, "top_k": 0, "num_beams": 1}, {}, (1, 1), None),
        (
            {"repetition_penalty": 1.05, "top_k": 20},
            {},
            (0.0, 1.0),
            "repetition_penalty 1.05 of generation_config.json not applied",
        ),
        (
            {"encoder_repetition_penalty": 1.2, "watermarking_config": {"bias": 2.0}, "top_h": 0.4},
            {},
            (0.0, 1.0),
            "encoder_repetition_penalty 1.2, watermarking_config {'bias': 2.0} of "
            "generation_config.json not applied",
        ),
        (
            {"do_sample": True, "temperature": 0.7, "top_h": 0.4, "token_healing": False},
            {},
            (0.7, 1.0),
            f"temperature 0.7{LINE}; top_h 0.4 of generation_config.json not applied",
        ),
        (
            {"max_new_tokens": 5},
            {},
            (0, 1),
            "max_new_tokens 5 of generation_config.json not applied",
        ),
    ],
)
def test_sampling_is_that_of_generation_config_unless_options_say_otherwise(
    model: LlamaForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, Any] | None,
    options: dict[str, float],
    expected: tuple[float, float],
    said: str | None,
) -> None:
    """One line says what comes from the file; transformers reads the same from it."""
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    config = dataclasses.replace(model.config, directory=tmp_path)
    assert choose_sampling(config, **options) == expected
    said = f"temperature 1.0{LINE}" if said is None else said
    assert capsys.readouterr().err == said + "\n" * bool(said)
    if content is not None and not options:
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        drawn = (theirs.temperature or 1.0, theirs.top_p or 1.0)
        assert expected == (drawn if theirs.do_sample else (0.0, 1.0))


def test_without_generation_config_the_settings_of_config_json_count(
    model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models from before that file say there how they sample; transformers reads it."""
    said = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.2}
    raw = model.config.raw | said
    config = dataclasses.replace(model.config, raw=raw, directory=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path, "config.json")
    assert choose_sampling(config) == (0.5, 0.8) == (theirs.temperature, theirs.top_p)
    line = "temperature 0.5, top_p 0.8 from config.json; repetition_penalty 1.2 of config.json not"
    assert line in capsys.readouterr().err
    (tmp_path / "generation_config.json").write_text("{}")
    assert choose_sampling(config) == (0.0, 1.0)
