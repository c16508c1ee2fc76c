"""What a study is asked to do: a TOML preset, overridden by typed options of the command line."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro
from variants import Replay, comparisons, fitting, plain, retention

from llamapro.errors import ConfigError
from llamapro.training.preset import read_toml

PRESETS = Path(__file__).parent
DESCRIPTION = """Compares block expansion with its alternatives, and ways to forget less, from one
base under one budget. Without --base it pre-trains a small base on English, and teaches it code and
arithmetic."""


@dataclass(frozen=True)
class PretrainSettings:
    """The base that a study trains for itself, on the demo's English."""

    config: str = "experiments/cpu-base.json"
    """Its shape; beside this project's files, if the path is relative."""
    vocab_size: int = 2048
    """Of its tokenizer."""
    steps: int = 800
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences per step."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one process."""
    lr: float = 4e-3
    """Peak learning rate."""


@dataclass(frozen=True)
class StudySettings:
    """Compare block expansion with its alternatives, from one base under one budget."""

    preset: str = "cpu"
    """cpu, gpu, or a TOML file of these settings; options given beside it win."""
    out: str = "study-out"
    """Where everything goes; the same command goes on there."""
    base: str = ""
    """A checkpoint directory to study, instead of a base that is pre-trained first."""
    train: tuple[str, ...] = ()
    """With --base: text of the new domain: files, globs, folders."""
    val: tuple[str, ...] = ()
    """With --base: held-out text of it."""
    general: tuple[str, ...] = ()
    """With --base: held-out general text as NAME=PATH; several are told apart."""
    general_train: tuple[str, ...] = ()
    """With --base: general text to replay, if there is any."""
    choices: str = ""
    """With --base: questions of the domain, as `llamapro.evaluate --choices` reads them."""
    more_bases: tuple[str, ...] = ()
    """Without --base: checkpoints (NAME=DIR) for which the ways to forget less are compared too."""
    variants: tuple[str, ...] = ()
    """Only these; all if empty."""
    budget_minutes: float = 60.0
    """A study that would take longer does not start."""
    workers: int = 2
    """Trials side by side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where trials compute."""
    seq_len: int = 256
    """Tokens per sequence."""
    steps: int = 72
    """Optimizer steps of a trial."""
    batch_size: int = 4
    """Sequences per step."""
    micro_batch_size: int = 4
    """Sequences per forward pass."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Each variant is trained at all of them, with the first seed; the one with the lowest loss on
    the domain's held-out text is its best."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the data's order, at the best learning rate."""
    new_blocks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of new blocks; those that interleave in the base are tried."""
    compared: int = 4
    """The number at which other things are compared, or the nearest that interleaves."""
    evaluations: int = 4
    """Points of the curves, after the first."""
    eval_sequences: int = 12
    """Sequences of each held-out set at a point."""
    replay_share: float = 0.25
    """Of the sequences, in the ways to forget less; they make a ninth more steps."""
    replay_weights: tuple[float, ...] = (1.0, 3.0, 8.0)
    """Of their loss, where the base is the teacher: each is tried."""
    replay_temperature: float = 1.3
    """Of the text on which it teaches."""
    replay_tokens: int = 16384
    """How much the base writes."""
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    dry_run: bool = False
    """Say what would be trained and about how long it takes, and stop."""
    json: bool = False
    """Print the results as one JSON object."""

    @property
    def replay_steps(self) -> int:
        """Optimizer steps of the ways to forget less, a multiple of `evaluations`."""
        return max(1, round(self.steps * 10 / 9 / self.evaluations)) * self.evaluations


def parse(argv: Sequence[str]) -> StudySettings:
    """Reads preset and command line; raises ConfigError for what is impossible."""
    preset = StudySettings.preset
    for at, word in enumerate(argv):
        if word == "--preset" and at + 1 < len(argv):
            preset = argv[at + 1]
        elif word.startswith("--preset="):
            preset = word.removeprefix("--preset=")
    file = PRESETS / f"{preset}.toml" if preset.isidentifier() else Path(preset)
    return tyro.cli(
        StudySettings,
        prog="python experiments/study.py",
        description=DESCRIPTION,
        default=dataclasses.replace(read_toml(file, StudySettings), preset=preset),
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def check(s: StudySettings) -> None:
    """Raises ConfigError with everything that is impossible or missing."""
    wrong = []
    positive = "workers seq_len steps batch_size micro_batch_size compared".split()
    positive += [
        "evaluations",
        "eval_sequences",
        "replay_temperature",
        "replay_tokens",
        "budget_minutes",
    ]
    wrong += [f"--{k.replace('_', '-')} {getattr(s, k)}: expected more than 0" for k in positive
              if not getattr(s, k) > 0]  # fmt: skip
    wrong += [f"--learning-rates {rate}: expected more than 0" for rate in s.learning_rates
              if not rate > 0]  # fmt: skip
    wrong += [f"--replay-weights {w}: expected more than 0" for w in s.replay_weights if not w > 0]
    wrong += [f"--{k.replace('_', '-')} is empty" for k in ("learning_rates", "seeds")
              if not getattr(s, k)]  # fmt: skip
    for key in ("learning_rates", "seeds", "replay_weights"):
        if len(set(getattr(s, key))) < len(getattr(s, key)):
            wrong.append(f"--{key.replace('_', '-')} {getattr(s, key)}: one is named twice")
    wrong += [f"--new-blocks {n}: expected more than 0" for n in s.new_blocks if n < 1]
    if s.micro_batch_size > 0 and s.batch_size % s.micro_batch_size:
        wrong.append(f"--batch-size {s.batch_size}: not a multiple of {s.micro_batch_size}")
    if s.device == "cuda" and not torch.cuda.is_available():
        wrong.append("--device cuda: no GPU is visible; the preset cpu needs none")
    if not 0 < s.replay_share < 1:
        wrong.append(f"--replay-share {s.replay_share}: expected more than 0 and less than 1")
    own = ("train", "val", "general", "general_train", "choices")
    if s.base:
        wrong += [f"--base needs --{k}" for k in ("train", "val", "general") if not getattr(s, k)]
        if s.more_bases:
            wrong.append("--more-bases goes with the study's own base: leave it or --base out")
    else:
        wrong += [f"--{k.replace('_', '-')} needs --base" for k in own if getattr(s, k)]
    if s.evaluations > 0 and s.steps % s.evaluations:
        wrong.append(f"--steps {s.steps} is not a multiple of --evaluations {s.evaluations}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    known = known_variants(s)
    wrong += [f"--variants {name}: unknown; known are {', '.join(known)}" for name in s.variants
              if name not in known]  # fmt: skip
    for module, package in (("matplotlib", "study"), ("peft", "study")):
        needs = module != "peft" or not s.variants or "lora" in s.variants
        if needs and find_spec(module) is None:
            wrong.append(f"{module} is not installed: pip install 'llamapro[{package}]'")
    if wrong:
        raise ConfigError("; ".join(wrong))


def known_variants(s: StudySettings) -> list[str]:
    """Returns the names that --variants takes, for a base in which every number interleaves."""
    layers = max([s.compared, *s.new_blocks, 1])
    names = [plain(n).name for n in sorted({s.compared, *s.new_blocks})]
    names += [v.name for v in comparisons(layers, (), fitting(layers, 1)) if v.group != "number"]
    return names + [v.name for v in retention(1, ["x"], ["x"], replay(s))]


def replay(s: StudySettings) -> Replay:
    """Returns how the ways to forget less replay."""
    return Replay(s.replay_share, s.replay_weights, s.replay_tokens, s.replay_temperature)
