"""The settings of a study: a TOML preset, overridden by options on the command line."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro

from llamapro.errors import ConfigError
from llamapro.training.preset import read_toml

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = """Compares block expansion with its alternatives, and ways to forget less, from one
base under one budget. Without --base it pre-trains a small base on English, and teaches it code and
arithmetic."""


@dataclass(frozen=True)
class StudySettings:
    """Compare block expansion with its alternatives, from one base under one budget."""

    preset: str = "cpu"
    """cpu, gpu, or a TOML file of these settings. Options on the command line override it."""
    out: str = "study-out"
    """Directory for everything that is made. The same command continues there."""
    base: str = ""
    """Checkpoint directory to study, instead of a base that is pre-trained first."""
    train: tuple[str, ...] = ()
    """With --base: text of the new domain (files, globs, folders)."""
    val: tuple[str, ...] = ()
    """With --base: held-out text of the new domain."""
    general: tuple[str, ...] = ()
    """With --base: held-out general text, as NAME=PATH for each set."""
    general_train: tuple[str, ...] = ()
    """With --base: general text to replay, if you have any."""
    choices: str = ""
    """With --base: questions of the domain, in the format of `llamapro.evaluate --choices`."""
    more_bases: tuple[str, ...] = ()
    """Without --base: checkpoints (NAME=DIR) on which the ways to forget less are compared too."""
    variants: tuple[str, ...] = ()
    """Train these variants only; all if empty."""
    budget_minutes: float = 60.0
    """A study that is estimated to take longer does not start."""
    workers: int = 2
    """Trials that run side by side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trials."""
    seq_len: int = 256
    """Tokens per sequence."""
    steps: int = 72
    """Optimizer steps of a trial."""
    batch_size: int = 4
    """Sequences per step."""
    micro_batch_size: int = 4
    """Sequences per forward pass."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Every variant is trained at each of these with the first seed. The rate with the lowest loss
    on the domain's held-out text is chosen."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the data order, each trained at the chosen learning rate."""
    new_blocks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of new blocks to try; those that do not interleave in the base are left out."""
    compared: int = 4
    """Number of new blocks at which everything else is compared, or the nearest possible."""
    evaluations: int = 4
    """Evaluations during a trial, after the one at its start."""
    eval_sequences: int = 12
    """Sequences of each held-out set in an evaluation."""
    replay_share: float = 0.25
    """Share of replayed sequences in the ways to forget less, which train a ninth more steps."""
    replay_weights: tuple[float, ...] = (1.0, 3.0, 8.0)
    """Weights of the distillation loss on replayed sequences; each is a variant."""
    replay_temperature: float = 1.3
    """Sampling temperature of the text for distillation; 1.0 is the model's own distribution."""
    replay_tokens: int = 16384
    """Tokens that the base writes for replay."""
    pretrain: str = "experiments/cpu-base.toml"
    """Preset of train.py that pre-trains the study's own base, on the demo's English. The base's
    config.json lies beside it: the same name, ending in .json."""
    dry_run: bool = False
    """Print how many trials there are and how long they take, and stop."""
    json: bool = False
    """Print the results as one JSON object."""

    @property
    def dir(self) -> Path:
        return Path(self.out)

    @property
    def pretrain_config(self) -> Path:
        return (ROOT / self.pretrain).with_suffix(".json")

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
    file = Path(__file__).with_name(f"{preset}.toml") if preset.isidentifier() else Path(preset)
    return tyro.cli(
        StudySettings,
        prog="python experiments/study.py",
        description=DESCRIPTION,
        default=dataclasses.replace(read_toml(file, StudySettings), preset=preset),
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def check(s: StudySettings) -> None:
    """Raises ConfigError with every setting that is impossible and every package that is missing.

    Names of variants are checked by `variants.check_names`.
    """
    values = {f"--{key.replace('_', '-')}": value for key, value in vars(s).items()}
    positive = "workers seq-len steps batch-size micro-batch-size compared evaluations"
    positive += " eval-sequences replay-temperature replay-tokens budget-minutes"
    numbers = [(flag, values[flag]) for flag in (f"--{name}" for name in positive.split())]
    for flag in ("--learning-rates", "--replay-weights", "--new-blocks"):
        numbers += [(flag, value) for value in values[flag]]
    wrong = [f"{flag} {value}: expected more than 0" for flag, value in numbers if not value > 0]
    for flag in ("--learning-rates", "--seeds", "--replay-weights"):
        if len(set(values[flag])) < len(values[flag]):
            wrong.append(f"{flag} {values[flag]}: one is named twice")
        if not values[flag] and flag != "--replay-weights":
            wrong.append(f"{flag} is empty")
    if s.micro_batch_size > 0 and s.batch_size % s.micro_batch_size:
        wrong.append(f"--batch-size {s.batch_size}: not a multiple of {s.micro_batch_size}")
    if s.evaluations > 0 and s.steps % s.evaluations:
        wrong.append(f"--steps {s.steps} is not a multiple of --evaluations {s.evaluations}")
    if s.device == "cuda" and not torch.cuda.is_available():
        wrong.append("--device cuda: no GPU is visible; the preset cpu needs none")
    if not 0 < s.replay_share < 1:
        wrong.append(f"--replay-share {s.replay_share}: expected more than 0 and less than 1")
    if s.base:
        missing = (flag for flag in ("--train", "--val", "--general") if not values[flag])
        wrong += [f"--base needs {flag}" for flag in missing]
        if s.more_bases:
            wrong.append("--more-bases goes with the study's own base: leave it or --base out")
    else:
        own = ("--train", "--val", "--general", "--general-train", "--choices")
        wrong += [f"{flag} needs --base" for flag in own if values[flag]]
    packages = ["matplotlib", *(["peft"] if not s.variants or "lora" in s.variants else [])]
    wrong += [f"{package} is not installed: pip install 'llamapro[study]'"
              for package in packages if find_spec(package) is None]  # fmt: skip
    if wrong:
        raise ConfigError("; ".join(wrong))
