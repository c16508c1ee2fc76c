"""Self-distillation: what is replayed learns what the base inside says, and nothing else changes.

The same steps on other layouts and numbers of processes are in test_distilled_steps.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro import expansion
from llamapro.checkpoints.base import contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import read_metrics
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import ConfigError
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.scripts import train
from llamapro.training.checks import check
from llamapro.training.objective import Replay, make_objective
from llamapro.training.plan import estimate_memory
from llamapro.training.settings import DataSettings, ModelSettings, ReplaySettings, Settings
from llamapro.training.weights import freeze, mask_gradients

LENGTH = 12
DISTILLED = ReplaySettings(share=0.4, distill=True, weight=2.0)
CPU = torch.device("cpu")


# ---- The base inside -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A base, its expansion, that one's own with an added token, one with new blocks below all."""
    home = tmp_path_factory.mktemp("distill")
    config = tiny_config(num_hidden_layers=2, max_position_embeddings=64)
    base = Checkpoint.open(write_random_checkpoint(home / "base", config))
    expand_checkpoint(base, home / "pro", expansion.interleave(2, 1))
    expand_checkpoint(base, home / "below", expansion.stack(2, 1, "prefix"))
    pro = Checkpoint.open(home / "pro")
    expand_checkpoint(pro, home / "again", expansion.interleave(3, 3), new_tokens=["<|x|>"])
    (home / "train.txt").write_text("def usage(parser): print(parser.usage)\n" * 60)
    (home / "general.txt").write_text("It was the best of times, it was the worst of times.\n" * 20)
    return home


def moved(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The model, with something learnt in the latest new blocks."""
    model = checkpoint.load()
    assert checkpoint.config.expansion
    generator = torch.Generator().manual_seed(0)
    for index in checkpoint.config.expansion.new_layers:
        for p in model.model.layers[index].parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


IDS = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % 400
FOLLOWING = IDS.roll(-1, 1)


def distilling(model: LlamaForCausalLM) -> Replay:
    objective = make_objective(model, replace(DISTILLED, weight=1.0, share=0.5))
    assert isinstance(objective, Replay)
    return objective


@pytest.mark.parametrize("name", ["pro", "below", "again"])
def test_the_teacher_is_the_contained_base_to_the_bit(name: str, home: Path) -> None:
    """The latest generation's blocks are skipped, whatever they hold."""
    checkpoint = Checkpoint.open(home / name)
    model, base = moved(checkpoint), contained_checkpoint(checkpoint).load()
    base_x = model.model(IDS, skip=distilling(model).new_layers)
    assert torch.equal(base_x, base.model(IDS)) and not torch.equal(base_x, model.model(IDS))


def test_the_teacher_sees_the_replayed_sequences_alone(home: Path) -> None:
    """The last ones of the batch: the others cost it nothing, and only those have the KL."""
    model = moved(Checkpoint.open(home / "pro"))
    seen: list[int] = []
    model.model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    objective = distilling(model)
    loss, count = objective(IDS, FOLLOWING, None, 1)
    assert seen == [1, 2] and count == IDS.numel()
    kl, _ = objective(IDS[1:], FOLLOWING[1:], None, 1)
    first, _ = objective(IDS[:1], FOLLOWING[:1])
    torch.testing.assert_close(loss, first + kl)
    same, _ = objective(IDS, FOLLOWING, None, 0)  # none here, but some on another rank
    torch.testing.assert_close(same, objective(IDS, FOLLOWING)[0])


@pytest.mark.parametrize("name", ["pro", "below"])
def test_at_the_first_step_nothing_is_to_be_learnt(name: str, home: Path) -> None:
    """New blocks are the identity: KL and gradient are exactly 0, as both go the same way."""
    model = Checkpoint.open(home / name).load()
    parameters = [model.get_parameter(n) for n in expansion.select_trainable(model, "new_blocks")]
    kl, count = distilling(model)(IDS, FOLLOWING, None, 2)
    kl.backward()
    assert kl.item() == 0 and count == IDS.numel()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_added_tokens_have_no_place_in_what_the_base_says(home: Path) -> None:
    """Its distribution is over its own vocabulary; what the model gives beyond it costs."""
    checkpoint = Checkpoint.open(home / "again")
    model, base = moved(checkpoint), contained_checkpoint(checkpoint).load()
    log_p, log_q = (m(IDS).double().log_softmax(-1) for m in (model, base))
    assert log_p.shape[-1] == log_q.shape[-1] + 1
    expected = (log_q.exp() * (log_q - log_p[..., :-1])).sum()
    kl, _ = distilling(model)(IDS, FOLLOWING, None, 2)
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
    identity, _ = distilling(checkpoint.load())(IDS, FOLLOWING, None, 2)
    at_first = checkpoint.load()(IDS).double().log_softmax(-1)[..., -1].exp()
    assert identity.item() == pytest.approx(-(-at_first).log1p().sum().item(), rel=1e-3)


def test_rows_of_added_tokens_learn_from_it_and_the_bases_do_not(home: Path) -> None:
    """With train.new_tokens only the head's last row has a gradient."""
    checkpoint = Checkpoint.open(home / "again")
    model = build_on_meta(checkpoint.config)
    names = freeze(model, "new_blocks", new_tokens=True)
    load_tensors(model, checkpoint.state_dict())
    mask_gradients({name: model.get_parameter(name) for name in names}, 400)
    distilling(model)(IDS, FOLLOWING, None, 1)[0].backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None and gradient[400:].any() and not gradient[:400].any()


# ---- In a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(
    words: Callable[..., list[str]], home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`run(name, **changes)` trains in this process; returns the run directory."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, **changes: Any) -> Path:
        options = {
            "model.path": home / "pro",
            "data.train": home / "train.txt",
            "data.val": f"general={home / 'general.txt'}",
            "data.seq_len": 24,
            "data.cache_dir": folder / "cache",
            "replay.share": 0.5,
            "replay.data": home / "general.txt",
            "replay.distill": "",
            "train.steps": 4,
            "train.batch_size": 4,
            "train.micro_batch_size": 2,
            "train.device": "cpu",
            "optim.lr": 1e-2,
            "eval.every": 100,
            "save.every": 2,
            "log_every": 1,
            "run_dir": folder / name,
        }
        train.main(words(options, **changes))
        return folder / name

    return run


def losses(run_dir: Path, kind: str = "train") -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if r["kind"] == kind}


def test_a_run_does_not_go_on_with_another_loss(run: Callable[..., Path]) -> None:
    """Both settings decide what is computed."""
    run("one", train__steps=2)
    with pytest.raises(ConfigError, match=r"replay\.distill true -> false"):
        run("one", replay__distill=None)
    with pytest.raises(ConfigError, match=r"replay\.weight 1\.0 -> 2\.0"):
        run("one", replay__weight=2.0)


def test_the_loss_of_replayed_tokens_is_apart_from_the_one_that_is_logged(
    run: Callable[..., Path],
) -> None:
    """Where it is a KL or has a weight; at weight 1 all sequences are alike."""
    first = {
        (distill, weight): losses(
            run(
                f"{distill}{weight}", replay__distill=distill, replay__weight=weight, train__steps=1
            )
        )[1]
        for distill in ("", None)
        for weight in (1.0, 3.0)
    }
    assert first["", 1.0] == first["", 3.0] == first[None, 3.0]
    assert abs(first[None, 1.0] - first["", 1.0]) > 0.01


def test_distillation_keeps_what_the_base_says_of_the_replayed_text(
    run: Callable[..., Path], home: Path
) -> None:
    """Its loss there stays closer than without, while what is learnt is learnt."""
    changes = {"train__steps": 30, "optim__lr": 3e-3, "log_every": 30, "save__every": 30}
    changes["data__val"] = f"general={home / 'general.txt'} code={home / 'train.txt'}"
    found = {}
    for name, more in {"none": dict.fromkeys(("share", "data", "distill")), "distill": {}}.items():
        path = run(name, **changes, **{f"replay__{key}": value for key, value in more.items()})
        found[name] = {
            set_: [r["loss"] for r in read_metrics(path) if r.get("set") == set_]
            for set_ in ("general", "code")
        }
    drift = {name: abs(sets["general"][-1] - sets["general"][0]) for name, sets in found.items()}
    assert drift["distill"] < drift["none"] / 2
    assert all(sets["code"][-1] < sets["code"][0] - 0.5 for sets in found.values())


def test_the_plan_says_how_replay_is_learnt_and_counts_the_teacher(
    run: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a dry run already; without the settings it says what it said before."""
    for distill, weight, told in (
        ("", 0.5, "50.0% replay, distilled, weight 0.5\n"),
        (None, 1.0, "50.0% replay\n"),
        (None, 2.0, "50.0% replay, weight 2\n"),
    ):
        assert not run("dry", dry_run="", replay__distill=distill, replay__weight=weight).exists()
        assert told in capsys.readouterr().out
    config, settings = Checkpoint.open(home / "pro").config, Settings(data=DataSettings(seq_len=24))
    model = build_on_meta(config)
    expansion.select_trainable(model, "new_blocks")
    plain, distilled = (
        estimate_memory(replace(settings, replay=replay), model, torch.bfloat16, CPU, 1)
        for replay in (ReplaySettings(), DISTILLED)
    )
    # Hidden states in bf16; of the logits three times fp32 and once bf16.
    teacher = 24 * config.hidden_size * 2 + 24 * config.vocab_size * (3 * 4 + 2)
    assert distilled == plain | {"teacher": teacher, "total": plain["total"] + teacher}


# ---- Settings ------------------------------------------------------------------------------------

VALID = Settings(model=ModelSettings(path="m"), data=DataSettings(train=("t",)), replay=DISTILLED)


@pytest.mark.parametrize(
    ("replay", "told"),
    [
        (ReplaySettings(distill=True), ["replay.distill True needs replay.share"]),
        (ReplaySettings(weight=2.0), ["replay.weight 2.0 needs replay.share"]),
        (
            ReplaySettings(data=("x",), distill=True, weight=2.0),
            ["replay.data ('x',) needs", "replay.distill True needs", "replay.weight 2.0 needs"],
        ),
        (ReplaySettings(share=0.1, weight=0.0), ["replay.weight is 0.0, expected more than 0"]),
        (ReplaySettings(share=0.1, weight=-1.0), ["replay.weight is -1.0, expected more than 0"]),
        (ReplaySettings(share=0.1, weight=float("inf")), ["replay.weight is inf, expected finite"]),
        (ReplaySettings(share=0.1, weight=float("nan")), ["replay.weight is nan, expected finite"]),
    ],
)
def test_impossible_settings_are_refused(replay: ReplaySettings, told: list[str]) -> None:
    """All in one message, and nothing else is complained about."""
    check(VALID, 1)
    with pytest.raises(ConfigError) as caught:
        check(replace(VALID, replay=replay), 1)
    message = str(caught.value)
    assert all(text in message for text in told) and message.count("; ") == len(told) - 1
