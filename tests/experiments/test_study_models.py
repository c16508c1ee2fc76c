"""experiments/models.py, variants.py, domains.py: what the study compares, and on what."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import domains
import models
import numpy as np
import pytest
import torch
import trial
import variants
from options import StudySettings

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import read_metrics
from llamapro.expansion import is_in_layers
from llamapro.text.mixture import PackedSequences
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer

LAYERS = 4
TOPS = [1, 3]
IDS = torch.randint(3, 400, (2, 17), generator=torch.Generator().manual_seed(0))
INPUTS = IDS[:, :-1]


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["zero-outputs", "zero-norms"])
def test_a_block_whose_outputs_or_norms_are_zero_is_the_identity(base: Path, keep: str) -> None:
    """The expanded model's logits are the base's, to the bit; its new blocks alone train."""
    model = models.expanded(base, TOPS, keep)
    assert torch.equal(model(INPUTS), Checkpoint.open(base).load()(INPUTS))
    assert model.config.num_hidden_layers == 6
    assert trained(model) == {
        name for name, _ in model.named_parameters() if is_in_layers(name, (2, 5))
    }


def test_copies_are_their_sources_and_change_what_the_base_says(base: Path) -> None:
    """Nothing in them is zero, and they share no storage with what they are copies of."""
    model = models.expanded(base, TOPS, "copies")
    for new, source in ((2, 1), (5, 4)):
        for p, q in zip(
            model.model.layers[new].parameters(),
            model.model.layers[source].parameters(),
            strict=True,
        ):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr() and p.any()
    assert not torch.allclose(model(INPUTS), Checkpoint.open(base).load()(INPUTS), atol=1e-2)


def test_the_moe_baseline_starts_with_a_scaled_w3_as_in_appendix_h(base: Path) -> None:
    """softmax(1, 0) = (0.731, 0.269), the second projection zero: not an identity."""
    model = models.moe(base)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 64)
    plain = Checkpoint.open(base).load().model.layers[0].mlp(x)
    torch.testing.assert_close(mlp(x), plain / (1 + math.exp(-1)))
    assert {name.split(".", 4)[4] for name in trained(model)} == {"new_down_proj.weight", "scales"}
    assert len(trained(model)) == 2 * 4
    model(INPUTS).sum().backward()
    assert all(model.get_parameter(name).grad.any() for name in trained(model))


def test_the_moe_baseline_of_a_bf16_base_computes_in_bf16(
    write_random_checkpoint: Callable[..., Path], tiny_config: Callable, tmp_path: Path
) -> None:
    """As it is measured, whole: real checkpoints are not fp32."""
    base = write_random_checkpoint(tmp_path / "base", tiny_config(), torch.bfloat16)
    model = models.moe(base)
    assert model(INPUTS).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_lora_starts_as_the_base_and_has_as_many_parameters_as_the_blocks(base: Path) -> None:
    """Nearest rank; only the adapters train, on every linear; each seed draws its own."""
    rank = models.lora_rank(base, 2)
    model = models.lora(base, rank, seed=1)
    block = sum(p.numel() for p in Checkpoint.open(base).load().model.layers[0].parameters())
    count = sum(model.get_parameter(name).numel() for name in trained(model))
    assert abs(count - 2 * block) <= count / rank / 2
    assert len(trained(model)) == 2 * 7 * 4 and all("lora_" in name for name in trained(model))
    assert torch.equal(model(INPUTS), Checkpoint.open(base).load()(INPUTS))
    first = [models.lora(base, 2, seed).state_dict() for seed in (1, 1, 2)]
    drawn = next(name for name in first[0] if "lora_A" in name)
    assert torch.equal(first[0][drawn], first[1][drawn])
    assert not torch.equal(first[0][drawn], first[2][drawn])


def test_of_the_originals_just_the_named_blocks_train(base: Path) -> None:
    """The control: as many blocks train, none is added."""
    model = models.build({"model": "originals", "base": base, "layers": TOPS})
    assert trained(model) == {n for n, _ in model.named_parameters() if is_in_layers(n, TOPS)}
    assert len(trained(model)) == 2 * 9


def test_adapters_are_trained_as_train_py_trains_and_come_back_whole(
    base: Path, tmp_path: Path
) -> None:
    """By its step, sharded; the last evaluation is of what is given back."""
    (tmp_path / "text.txt").write_text("def usage(parser): print(parser.usage)\n" * 60)
    text, about = str(tmp_path / "text.txt"), {"model": "lora", "rank": 2, "seed": 0}
    argv = ["--model.path", str(base), "--train.trainable", "all", "--data.train", text]
    argv += ["--data.val", f"code={text}", "--data.seq-len", "32", "--train.device", "cpu"]
    argv += ["--data.cache-dir", str(tmp_path / "cache")]
    argv += ["--train.steps", "3", "--train.batch-size", "2", "--optim.lr", "0.1"]
    argv += ["--log-every", "2", "--eval.every", "3"]
    built = about | {"base": str(base)}
    trial.run_training(argv, tmp_path / "run", models.build(built))
    model, records = trial.trained(built, tmp_path / "run"), read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 3]
    first, last = (r["loss"] for r in records if r["kind"] == "eval")
    assert last < first - 0.1 and any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    (cached,) = {path for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    sequences = PackedSequences(TokenStore(cached, Tokenizer.load(base).fingerprint), 32)
    columns = [torch.from_numpy(np.stack(c)) for c in zip(*sequences, strict=True)]
    with torch.no_grad():
        logits = model(columns[0]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, columns[1].flatten())
    assert loss.item() == pytest.approx(last, rel=1e-4)


def test_nothing_that_is_built_reaches_the_checkpoint(base: Path) -> None:
    """Its files are mapped: a model trained in place must not be those bytes."""
    before = Checkpoint.open(base).sha256()
    for about in (
        {"model": "originals", "layers": TOPS},
        {"model": "copies", "layers": TOPS},
        {"model": "moe"},
        {"model": "lora", "rank": 2, "seed": 0},
    ):
        model = models.build(about | {"base": str(base)})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    assert Checkpoint.open(base).sha256() == before


# ---- The first gradients ------------------------------------------------------------------------


def first_gradients(
    base: Path, layers: Sequence[int], start: str, ids: torch.Tensor
) -> list[dict[str, float]]:
    """Returns the gradient norms of new blocks at the first two steps of AdamW without decay.

    Args:
        ids: (B, T + 1) tokens, the same at both steps.

    Returns:
        For each step, the norm over all new blocks by a tensor's name inside its block. Everything
        is computed in fp64, so a norm of 0 is exact.
    """
    model = models.expanded(base, layers, start).double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=0.0)
    norms = []
    for _ in range(2):
        logits = model(ids[:, :-1]).flatten(0, 1)  # (B * T, V)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        squares: dict[str, float] = {}
        for name, parameter in named.items():
            inside = name.split(".", 3)[3].removesuffix(".weight")
            assert parameter.grad is not None
            squares[inside] = squares.get(inside, 0.0) + parameter.grad.square().sum().item()
        norms.append({name: square**0.5 for name, square in squares.items()})
        optimizer.step()
        optimizer.zero_grad()
    return norms


def test_two_of_nine_tensors_have_a_gradient_at_first_and_all_from_the_second_step(
    base: Path,
) -> None:
    """The paper's identity blocks."""
    first, second = first_gradients(base, TOPS, "zero-outputs", IDS)
    assert {n for n, norm in first.items() if norm} == {"self_attn.o_proj", "mlp.down_proj"}
    assert len(second) == 9 and all(second.values())


def test_with_zero_norms_the_ffn_never_learns_and_the_attention_only_by_its_values(
    base: Path,
) -> None:
    """Appendix A holds for the FFN, exactly 0 at each step; the attention's norm has a gradient."""
    first, second = first_gradients(base, TOPS, "zero-norms", IDS)
    assert {n for n, norm in first.items() if norm} == {"input_layernorm"}
    ffn = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"}
    assert {n for n, norm in second.items() if not norm} == ffn


# ---- Variants -----------------------------------------------------------------------------------


def test_what_does_not_interleave_is_left_out() -> None:
    """Of a base of 8 blocks +3 is not one of the paper's; +2 is, and what all is compared with."""
    found = variants.comparisons(8, [1, 3, 4, 16], 2)
    assert [v.name for v in found if v.group == "number"] == ["new-1", "new-2", "new-4"]
    originals = next(v for v in found if v.name == "originals")
    assert originals.built == {"model": "originals", "layers": [3, 7]}
    assert len({v.name for v in found}) == len(found)


@pytest.mark.parametrize(("layers", "wanted", "nearest"), [(8, 4, 4), (5, 4, 5), (6, 4, 3)])
def test_the_compared_number_is_the_nearest_that_interleaves(
    layers: int, wanted: int, nearest: int
) -> None:
    """A base of five blocks takes one or five."""
    assert variants.nearest_number(layers, wanted) == nearest


def test_the_ways_to_forget_less_start_where_plain_expansion_does() -> None:
    """They differ in options of train.py alone; without general text there is none to replay."""
    s = StudySettings(replay_weights=(1.0, 3.0), replay_tokens=4096)
    names = ["self-replay", "distill-1", "distill-3", "hold", "distill-domain"]
    found = variants.retention(s, 4, [], ["code"])
    assert [v.name for v in found] == names
    assert variants.retention(s, 4, ["english"], ["code"])[0].name == "replay"
    plain = variants.plain(4)
    assert all(v.expand == plain.expand and v.varies == plain.name for v in found)
    shares = [v.options[:2] for v in found]
    assert shares == [("--replay.share", x) for x in ("0.25", "0.25", "0.25", "0.125", "0.25")]
    assert [v.writing[3:4] for v in found] == [("1",), ("1.3",), ("1.3",), ("1",), ()]
    assert found[1].writing == found[2].writing != found[0].writing
    assert [v.writing[:2] for v in (found[0], found[3])] == [
        ("--replay.tokens", "4096"),
        ("--replay.tokens", "0"),
    ]


# ---- Text ---------------------------------------------------------------------------------------


def test_arithmetic_is_right_and_its_held_out_part_is_another_draw() -> None:
    """Each answer is what Python computes; the same text every time."""
    texts = list(domains.arithmetic("val", 20))
    for line in "".join(texts).splitlines():
        if line.startswith("Answer:"):
            problem, answer = line.removeprefix("Answer: ").split(" = ")
            assert eval(problem) == int(answer)
    assert texts == list(domains.arithmetic("val", 20))
    assert texts != list(domains.arithmetic("train", 20))


def test_each_question_has_one_right_choice_among_four() -> None:
    """Sums: the right one is computed. Lines of code: the one that follows in the file."""
    for question in domains.math_questions():
        right = question["choices"][question["answer"]]
        assert eval(question["context"].rsplit("Answer: ")[1].removesuffix("=")) == int(right)
        assert len(set(question["choices"])) == 4
    draw = random.Random(0)
    lines = [f"    value_{draw.random()} = {i}" for i in range(400)]
    files = ["\n".join(lines[:200]), "\n".join(lines[200:])]
    questions = list(domains.code_questions(files))
    assert len(questions) == domains.QUESTIONS
    for question in questions:
        right = question["choices"][question["answer"]]
        assert any(question["context"] + right in text for text in files)
        assert len(set(question["choices"])) == 4
