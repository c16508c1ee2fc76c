"""Mistakes in the settings of a run, all of them found before anything starts."""

import math
from collections import Counter
from collections.abc import Callable
from datetime import date

import torch

from llamapro import backends
from llamapro.errors import ConfigError, suggest, warn
from llamapro.training import proposal
from llamapro.training.metrics import is_installed
from llamapro.training.settings import DataSettings, ReplaySettings, Settings, TrainSettings

# Settings of data that only one format reads.
_OF_FORMAT = {"text": ("text_key", "split_at"), "chat": ("chat_template", "date", "too_long")}

# The expected values, the test for other ones (false for nan, which `check` reports by itself), and
# the settings that it is for.
LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "more than 0",
        lambda x: x <= 0,
        "train.batch_size train.micro_batch_size optim.lr optim.clip eval.every "
        "save.every save.keep log_every replay.temperature replay.weight",
    ),
    (
        "0 or more",
        lambda x: x < 0,
        "data.seq_len train.steps eval.sequences data.workers replay.tokens replay.batch_size "
        "optim.weight_decay optim.skip_bad_steps train.shard_size save.keep_every log_seconds "
        "log_spikes processes",
    ),
    (
        "at most 2^20",  # a typing error beyond it would take all memory
        lambda x: x > 1 << 20,
        "train.batch_size train.micro_batch_size replay.batch_size data.workers processes",
    ),
    ("0 to 1", lambda x: x < 0 or x > 1, "optim.warmup_ratio optim.final_lr_ratio"),
    ("0 to 2^64 - 1", lambda x: x < 0 or x >= 1 << 64, "train.seed replay.seed"),
)


def check(settings: Settings, world_size: int) -> None:
    """Raises ConfigError with every setting that is impossible, alone or for this world size."""
    s, wrong = settings, []
    if bool(s.model.path) == bool(s.model.config):
        wrong.append(
            "give model.path (a checkpoint directory) or model.config (a config.json), "
            + ("not both" if s.model.path else "one is needed")
        )
    if s.model.config and not s.model.tokenizer:
        wrong.append("model.config needs model.tokenizer, the tokenizer.model to train with")
    if s.model.config and s.train.trainable == "new_blocks":
        wrong.append("model.config starts from random weights: set train.trainable to 'all'")
    if not s.data.train:
        wrong.append("data.train is empty: name files, globs or folders to train on")
    if s.data.weights and len(s.data.weights) != len(s.data.train):
        wrong.append(
            f"data.weights has {len(s.data.weights)} numbers for {len(s.data.train)} sources"
        )
    try:
        date.fromisoformat(s.data.date or "2024-01-01")
    except ValueError:
        wrong.append(f"data.date is {s.data.date!r}, expected a day such as '2024-07-26'")
    flat = s.flat()
    for kind, names in _OF_FORMAT.items():
        for name in names if kind != s.data.format else ():
            if getattr(s.data, name) != getattr(DataSettings, name):
                warn(f"data.{name} is not read: it is for data.format {kind!r}")
    if s.train.steps and s.train.epochs != TrainSettings.epochs:
        warn(f"train.epochs is not read: train.steps is {s.train.steps}")
    for expected, is_impossible, keys in LIMITS:
        wrong += [
            f"{key} is {flat[key]}, expected {expected}"
            for key in keys.split()
            if is_impossible(flat[key])
        ]
    if not s.train.steps and s.train.epochs <= 0:
        wrong.append(f"train.epochs is {s.train.epochs}, expected more than 0")
    wrong += ["data.cache_dir is empty"] * (not s.data.cache_dir)
    twice = [source for source, n in Counter(s.data.train).items() if n > 1]
    wrong += [f"data.train: {x!r} comes twice, for which there is data.weights" for x in twice]
    wrong += [f"data.weights: {w} is not more than 0" for w in s.data.weights if w <= 0]
    for key, value in flat.items():  # TOML and the command line take nan and inf
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            wrong.append(f"{key} is {value}, expected finite numbers")
    wrong += _check_replay(s) + _check_frozen_dtype(s.train)
    wrong += [
        f"resume.allow: no setting {key!r}{suggest(key, list(flat), cutoff=0.5)}"
        for key in s.resume.allow
        if key not in flat
    ]
    if not all(0 <= beta < 1 for beta in s.optim.betas):
        wrong.append(f"optim.betas is {s.optim.betas}, expected two numbers from 0 to below 1")
    if s.device:
        wrong += _check_device(s)
    elif s.train.device == "cuda" and not torch.cuda.is_available():
        plan = "; a GPU to plan for is --device" if s.dry_run else ""
        wrong.append(f"train.device 'cuda': no GPU is visible; use 'auto' or 'cpu'{plan}")
    try:
        backends.parse(s.train.ops)
    except ValueError as error:
        wrong.append(f"train.ops: {error}")
    if s.train.shard_size > 0 and world_size % s.train.shard_size:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        wrong.append(
            f"train.shard_size {s.train.shard_size} does not divide {world_size} process(es) into "
            f"equal groups, expected one of {fitting}, or 0 for one group"
        )
    wrong += [
        f"log_to: {name} is not installed: pip install -e '.[{name}]'"
        for name in dict.fromkeys(s.log_to)
        if not is_installed(name)
    ]
    unit = world_size * max(1, s.train.micro_batch_size)
    if s.train.batch_size > 0 and s.train.batch_size % unit:
        below = s.train.batch_size // unit * unit
        nearest = " and ".join(str(n) for n in (below, below + unit) if n)
        wrong.append(
            f"train.batch_size {s.train.batch_size} is not a multiple of {world_size} process(es) "
            f"x train.micro_batch_size {s.train.micro_batch_size} = {unit}; nearest that are: "
            f"{nearest}"
        )
    if wrong:
        raise ConfigError("; ".join(wrong))


def _check_device(s: Settings) -> list[str]:
    """Returns the mistakes in `device`, the GPU of a plan."""
    wrong = [] if s.dry_run else [f"device {s.device} is for --dry-run: leave it out to train"]
    if s.train.device == "cpu":
        wrong.append(f"device {s.device} is a GPU and train.device is 'cpu': leave one of them out")
    try:
        proposal.usable_bytes(s.device)
    except ConfigError as error:
        wrong.append(str(error))
    return wrong


def _check_frozen_dtype(t: TrainSettings) -> list[str]:
    """Returns the settings of training that contradict `train.frozen_dtype`."""
    wrong, name = [], f"train.frozen_dtype is {t.frozen_dtype}"
    if t.frozen_dtype != "auto" and t.trainable == "all":
        wrong.append(f"{name} and train.trainable 'all' freezes nothing: set it to 'auto'")
    if t.frozen_dtype != "auto" and t.frozen in ("shard", "gather"):
        wrong.append(
            f"{name} and train.frozen is {t.frozen}: rounded weights are whole on every process; "
            "set train.frozen to 'replicate' or 'auto'"
        )
    return wrong


def _check_replay(s: Settings) -> list[str]:
    """Returns the mistakes in `replay`, alone or beside the other settings."""
    share = s.replay.share
    if not 0 <= share < 1:
        return [f"replay.share is {share}, expected 0 to below 1"]
    if not share:
        given = {key: getattr(s.replay, key) for key in ("data", "prompts", "distill", "weight")}
        return [
            f"replay.{key} {value} needs replay.share"
            for key, value in given.items()
            if value != getattr(ReplaySettings, key)
        ]
    wrong, hold = [], s.replay.hold
    name = f"replay.hold is {hold}" if hold else f"replay.share is {share}"
    if hold:
        try:
            _ = s.replay.held
        except ValueError:
            wrong.append(
                f"replay.hold is {hold!r}, expected nats per token, such as 0.02, or a share of "
                "what is learned, such as 3%"
            )
    if hold and s.replay.weight != 1:
        wrong.append(
            f"{name} and replay.weight is {s.replay.weight}: the weight follows from replay.hold; "
            "leave one of them out"
        )
    if 0 < s.train.steps * s.train.batch_size * share < 1:
        wrong.append(
            f"replay.share {share} of {s.train.steps} steps x {s.train.batch_size} sequences is "
            "less than one sequence; raise it"
        )
    if s.replay.data and s.replay.prompts:
        wrong.append("replay.prompts is for text that the base writes: omit it or replay.data")
    if s.train.trainable == "all":
        wrong.append(
            f"{name}: replay goes with train.trainable 'new_blocks', whose base "
            "stays inside; leave it out and name general text in data.train"
        )
    if s.data.format == "chat":
        wrong.append(f"{name}: data.format 'chat' has no replay; leave it out")
    return wrong
