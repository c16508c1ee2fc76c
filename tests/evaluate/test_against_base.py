"""A model beside its base: what changed, the shift, and bases that cannot be compared."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llamapro
from llamapro import evaluate as command
from llamapro.errors import ConfigError
from llamapro.evaluate import Args, evaluate, read_text
from llamapro.inference.distribution_shift import write_greedily
from llamapro.model import LlamaForCausalLM
from llamapro.text.tokenizer import Tokenizer

GENERATOR = torch.Generator().manual_seed(7)


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the single file."""
    (found,) = result["files"].values()
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> Path:
    """The checkpoint with two new blocks that nothing has trained."""
    path = tmp_path_factory.mktemp("expanded") / "ckpt"
    llamapro.save(llamapro.expand(model, 2), path)
    return path


@pytest.mark.parametrize("tuned", ["checkpoint", "expanded"])
def test_untouched_model_against_its_base_shows_no_change(
    args: Args, tuned: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base against itself, or its expansion against it: the same to the bit, 100 % unshifted."""
    monkeypatch.setattr(command, "end_ids", lambda *_: set())  # all positions count
    path = request.getfixturevalue(tuned)
    result = evaluate(replace(args, dir=path, against=args.dir))
    found = only(result)
    assert found["base"] == {key: found[key] for key in found["base"]}
    assert set(found["base"]) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert found["shift"] == {"unshifted": 1.0, "marginal": 0.0, "shifted": 0.0, "positions": 32}
    shown = command.render(result)
    assert "changed 0.0000 nats per token" in shown and "unshifted 100.0%" in shown


@torch.no_grad()
def test_trained_model_is_told_apart_from_its_base(
    args: Args, expanded: Path, tmp_path: Path
) -> None:
    """Change the new blocks: base keeps its loss, this has its own, some tokens are shifted."""
    trained, path = llamapro.load(expanded), tmp_path / "trained"
    for parameter in llamapro.train_only_new(trained):
        parameter += 0.2 * torch.randn(parameter.shape, generator=GENERATOR)
    llamapro.save(trained, path)
    result = evaluate(replace(args, dir=path, against=args.dir))
    found, alone = only(result), only(evaluate(args))
    assert found["base"] == alone
    assert found["loss"] != alone["loss"]
    shares = found["shift"]
    assert shares["unshifted"] < 1
    assert shares["unshifted"] + shares["marginal"] + shares["shifted"] == pytest.approx(1)
    verdict = "learned" if found["loss"] < alone["loss"] else "forgot"
    difference = abs(found["loss"] - alone["loss"])
    assert f"{verdict} {difference:.4f} nats per token" in command.render(result)


def test_prompts_are_cut_evenly_and_continued_greedily(
    model: LlamaForCausalLM, args: Args, text_file: Path, ids: list[int]
) -> None:
    """Prompts are pieces of the text from all its length; a text too short gives none."""
    text = read_text(str(text_file), Tokenizer.load(args.dir), "text")
    samples = write_greedily(model, text.documents, 4, 8, 6)
    assert samples is not None
    prompts, continuations = samples
    places = len(ids) // 8
    starts = [i * places // 4 * 8 for i in range(4)]
    assert prompts.tolist() == [ids[start : start + 8] for start in starts]
    whole = torch.cat((prompts, continuations), dim=1)
    with torch.no_grad():
        logits = model(whole[:, :-1])
    assert isinstance(logits, Tensor)
    assert torch.equal(continuations, logits[:, 7:].argmax(-1))
    assert write_greedily(model, text.documents, 4, len(ids) + 1, 6) is None


def test_file_too_short_for_a_prompt_has_no_shift(args: Args, tmp_path: Path) -> None:
    """Its losses are still measured, and the table is still printed."""
    file = tmp_path / "short.txt"
    file.write_text("if")
    result = evaluate(replace(args, data=(str(file),), against=args.dir))
    assert only(result)["shift"] is None
    assert only(result)["base"]["tokens"] == only(result)["tokens"]
    assert "short.txt" in command.render(result)


def test_answers_are_compared_with_the_bases_one_by_one(
    args: Args, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This: right right wrong; base: wrong wrong right. Two gained, one lost; texts beside."""
    answers = iter(
        [({"accuracy": 2 / 3}, [True, True, False]), ({"accuracy": 1 / 3}, [False, False, True])]
    )
    monkeypatch.setattr(command, "measure_choices", lambda *_: next(answers))
    result = evaluate(replace(args, choices=(questions,), against=args.dir))
    found = result["choices"][questions]
    assert (found["accuracy"], found["base"]) == (2 / 3, {"accuracy": 1 / 3})
    assert (found["gained"], found["lost"]) == (2, 1)
    assert only(result)["tokens"] > 0


def test_base_with_another_tokenizer_is_refused(
    args: Args, tmp_path: Path, train_tokenizer: Callable[..., bytes]
) -> None:
    """Losses per token and ranks cannot be compared across tokenizers."""
    other = tmp_path / "other"
    shutil.copytree(args.dir, other)
    text = Path(args.data[0]).read_text("utf-8")
    (other / "tokenizer.model").write_bytes(train_tokenizer([text * 3], 300))
    with pytest.raises(ConfigError, match=r"other: its tokenizer is not that of"):
        evaluate(replace(args, against=other))


def test_base_with_a_shorter_context_is_refused(args: Args, tmp_path: Path) -> None:
    """The default context is the tuned model's: a base of 16 positions cannot be measured so."""
    short = tmp_path / "short"
    shutil.copytree(args.dir, short)
    raw = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 16}))
    with pytest.raises(ConfigError, match=r"--context 32: .*short takes 1 to 16"):
        evaluate(replace(args, against=short))
    assert only(evaluate(replace(args, against=short, context=16)))["base"]["tokens"] > 0
