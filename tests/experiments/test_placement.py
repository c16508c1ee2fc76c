"""Placement by measurement: scores, choice, text and command of experiments/placement.py."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import placement
import pytest
import torch
import torch.nn.functional as F
from placement import block_importance, block_similarity, choose, measure
from torch import Tensor

from llamapro.checkpoints.base import layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import CheckpointError
from llamapro.expansion import insert_after, interleave
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.text.tokenizer import Tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 8},
    "tied embeddings": {"tie_word_embeddings": True},
}
CONTEXT, TOKENS = 64, 700  # ten rows and some
IDS = torch.randint(400, (5, 33), generator=torch.Generator().manual_seed(7))


def loaded(config: ModelConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    model = build_on_meta(config)
    load_tensors(model, tensors)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A base, its expansion, a base with a NaN in block 2, and two files of text."""
    home = tmp_path_factory.mktemp("placement")
    config = tiny_config(max_position_embeddings=CONTEXT)
    base = write_random_checkpoint(home / "base", config)
    expand_checkpoint(Checkpoint.open(base), home / "pro", interleave(4, 2))
    write_random_checkpoint(home / "nan", config)
    stored = Checkpoint.open(home / "nan").tensors["model.layers.2.input_layernorm.weight"]
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff\xff\xff\x7f")  # a NaN in fp32
    (home / "a.txt").write_text("def usage(parser): print(parser.usage)\n" * 400)
    (home / "b.txt").write_text("It was the best of times, it was the worst of times.\n" * 400)
    (home / "empty.txt").write_text("")
    return home


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_importance_is_the_loss_of_the_model_without_the_block(
    family: dict[str, Any], tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """A model is built without it; similarity is the cosine of its input and output."""
    config = tiny_config(**family)
    tensors = random_tensors(config)
    layers = list(range(config.num_hidden_layers))

    def loss_sum(kept: list[int]) -> float:
        part = {name: tensor for name, tensor in tensors.items() if "layers" not in name}
        for new, old in enumerate(kept):
            for name in tensors:
                inside = name.removeprefix(f"model.layers.{old}.")
                if inside != name:
                    part[f"model.layers.{new}.{inside}"] = tensors[name]
        logits = loaded(replace(config, num_hidden_layers=len(kept)), part)(IDS)
        targets = IDS[:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()

    model, whole = loaded(config, tensors), loss_sum(layers)
    expected = [loss_sum([*layers[:i], *layers[i + 1 :]]) - whole for i in layers]
    found = block_importance(model, IDS)
    assert found == [loss / IDS[:, 1:].numel() for loss in expected]
    assert len(set(found)) == len(model.model.layers) == len(layers)
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, taken, given: outputs.extend((taken[0], given)))
    similarity = block_similarity(model, IDS)
    for i, score in enumerate(similarity):
        x, y = (hidden.double() for hidden in outputs[2 * i : 2 * i + 2])
        cosine = F.cosine_similarity(x, y, dim=-1).mean().item()
        # Sums of C and of N terms in fp64.
        tolerance = (3 * config.hidden_size + IDS.numel()) * torch.finfo(torch.float64).eps
        assert score == pytest.approx(cosine, abs=tolerance, rel=0)


@pytest.mark.parametrize("score", [block_similarity, block_importance])
def test_batches_do_not_change_the_scores(
    score: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Any,
) -> None:
    """Products of other shapes sum in another order: a few roundings of a loss of about 10."""
    config = tiny_config()
    model = loaded(config, random_tensors(config))
    together = score(model, IDS)
    monkeypatch.setattr(placement, "BATCH_TOKENS", 2 * IDS.shape[1] + 1)
    tolerance = 100 * torch.finfo(torch.float32).eps
    assert score(model, IDS) == pytest.approx(together, abs=tolerance, rel=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_identity_has_similarity_1_and_importance_0(
    dtype: torch.dtype, tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """To the bit, in every dtype: o_proj and down_proj of blocks 1 and 2 are zero."""
    config = tiny_config()
    tensors = random_tensors(config, dtype)
    for layer in (1, 2):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    model = loaded(config, tensors)
    similarity, importance = block_similarity(model, IDS), block_importance(model, IDS)
    assert similarity[1] == similarity[2] == 1.0 > max(similarity[0], similarity[3])
    assert importance[1] == importance[2] == 0.0 != importance[0]


def test_the_most_similar_or_least_important_are_chosen_from_the_bottom_up() -> None:
    """Highest or lowest, a fall of the loss included; of equal ones the lower."""
    assert choose([0.5, 0.9, 0.7, 0.8], 2, "similar") == [1, 3]
    assert choose([0.5, 0.9, -0.1, 0.8], 2, "unimportant") == [0, 2]
    for by in placement.SCORES:
        assert choose([1.0] * 6, 3, by) == [0, 1, 2]


def test_the_base_writes_documents_from_bos_on(home: Path) -> None:
    """None longer than the context, each after BOS; the same text and scores each time."""
    base = Checkpoint.open(home / "base")
    model, tokenizer = base.load(), Tokenizer.load(base.path)
    ids = placement._write(model, tokenizer, 300, 16)
    assert len(ids) == 300 and ids[0] == tokenizer.bos_id
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_id]
    assert max(b - a for a, b in pairwise(starts)) <= 16
    found = measure(base, "unimportant", 2, [], TOKENS)
    assert found == measure(base, "unimportant", 2, [], TOKENS)
    assert (found["text"], found["context"], found["tokens"]) == ([], CONTEXT, 640)
    assert min(found["scores"]) > 0  # without a layer, its own text is less likely to a model


def test_files_are_read_as_documents_and_cut_into_rows(home: Path) -> None:
    """BOS, tokens, EOS, as in training, half from each of two files; the last row is full."""
    base = Checkpoint.open(home / "base")
    tokenizer = Tokenizer.load(base.path)
    files = [home / "a.txt", home / "b.txt"]
    half = [tokenizer.encode(f.read_text(), bos=True, eos=True)[: TOKENS // 2] for f in files]
    found = measure(base, "similar", 1, [str(file) for file in files], TOKENS)
    assert (found["tokens"], found["context"]) == (640, CONTEXT)
    ids = torch.tensor([*half[0], *half[1]])[:640].view(10, CONTEXT)
    assert found["scores"] == block_similarity(base.load(), ids)


@pytest.mark.parametrize("by", placement.SCORES)
def test_scores_that_are_not_finite_are_refused(home: Path, by: str) -> None:
    """A NaN in block 2 reaches all above it, and every loss."""
    base, wrong = Checkpoint.open(home / "nan"), [2, 3] if by == "similar" else [0, 1, 2, 3]
    with pytest.raises(CheckpointError) as caught:
        measure(base, by, 2, [str(home / "a.txt")], TOKENS)
    assert f"NaN or infinity where layers {wrong} are measured" in str(caught.value)
    with pytest.raises(CheckpointError, match="NaN or infinity in the logits after BOS"):
        measure(base, by, 2, [], TOKENS)


# ---- The command ---------------------------------------------------------------------------------


def test_the_command_puts_new_blocks_where_it_measured(
    run_command: Callable[..., tuple[int, str, str]], home: Path, tmp_path: Path
) -> None:
    """Table, list for --after, and an expansion with the record of any other."""
    words: list[Any] = [home / "pro", "--by", "similar", "--num-new-blocks", 2]
    words += ["--tokens", TOKENS, "--text", home / "a.txt"]
    status, out, error = run_command(placement.main, *words)
    lines = out.splitlines()
    assert status == 0, error
    assert lines[0] == f"measured on 640 tokens, {CONTEXT} at a time, of {home / 'a.txt'}"
    assert [int(row.split()[0]) for row in lines[2:8]] == list(range(6))
    marked = [row.split()[0] for row in lines[2:8] if row.endswith("new block on top")]
    # Untrained new blocks do nothing, so they are the most similar of an expanded model.
    assert marked == ["2", "5"] and lines[8] == "--after 2,5" and not list(tmp_path.iterdir())
    words.insert(1, tmp_path / "out")
    status, out, _ = run_command(placement.main, *words, "--json")
    found = json.loads(out)
    assert status == 0 and found["chosen"] == [2, 5]
    config, layout = Checkpoint.open(tmp_path / "out").config, insert_after(6, [2, 5])
    assert tuple(found["expanded"]["new_layers"]) == layout.new_layers
    assert config.expansion is not None and layout_of(config) == layout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-new-blocks", "5"], "--num-new-blocks 5: --by similar chooses 1 to 4 layers"),
        (["--tokens", "1"], "--tokens 1: expected 2 or more"),
        (["--text", "{home}/no"], "{home}/no: no such file"),
        (["--text", "{home}/empty.txt"], "no text in it"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    run_command: Callable[..., tuple[int, str, str]],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    """Exit status 2 and one message with the option; no model is loaded."""
    monkeypatch.setattr(Checkpoint, "load", None)
    given = ["--by", "similar", "--num-new-blocks", 2, *(word.format(home=home) for word in words)]
    status, out, error = run_command(placement.main, home / "base", *given)
    assert status == 2 and out == "" and message.format(home=home) in error


def test_a_real_model_is_measured(tmp_path: Path, root: Path, shared: Path) -> None:
    """TinyStories: its lowest layers change the hidden state least, the highest the loss."""
    from llamapro.conversion.meta import from_meta

    release = shared / "checkpoints" / "tinystories-1m"
    if not release.is_dir():
        pytest.skip(f"{release} is not there")
    from_meta(release, tmp_path / "base", None)
    base = Checkpoint.open(tmp_path / "base")
    stories = [str(root / "experiments" / "stories.txt")]
    similar, unimportant = (measure(base, by, 2, stories, 1024) for by in placement.SCORES)
    assert similar["chosen"] == [0, 1] and unimportant["chosen"] == [3, 4]
    assert all(0 < score < 1 for score in similar["scores"])
    assert all(score > 0.5 for score in unimportant["scores"])
