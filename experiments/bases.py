"""The bases and domains of a study. Checkpoints are made by the public commands."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from domains import STORIES
from options import ROOT, StudySettings
from trial import TEXT_FILE, device_of, write_json
from variants import Variant, comparisons, nearest_number, plain, retention

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError
from llamapro.text.documents import find_files
from llamapro.text.mixture import parse_named
from llamapro.training.preset import parse as parse_train

PRETRAIN_FILE = "pretrain.json"  # in the base: what it was pre-trained with


@dataclass(frozen=True)
class Study:
    """One base and one domain.

    Attributes:
        s: the settings that all studies share.
        base, checkpoint, num_layers: the base's name, directory and size.
        domain, train, val: the new domain's name and text.
        general: name -> held-out text of other domains.
        general_train: general text to replay, if there is any.
        choices: file of questions, or "".
        is_whole: whether all variants are trained, or only plain expansion, full fine-tuning and
            the ways to forget less.
        is_written: whether a general set is text that the base writes.
    """

    s: StudySettings
    base: str
    checkpoint: Path
    num_layers: int
    domain: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    general: dict[str, list[str]]
    general_train: tuple[str, ...]
    choices: str
    is_whole: bool
    is_written: bool = False

    @property
    def name(self) -> str:
        return "own" if self.base == "own" else f"{self.base}-{self.domain}"

    @property
    def base_sha256(self) -> str:
        """The hash of the base's weights: results belong to these."""
        return _sha256(self.checkpoint)

    @property
    def compared(self) -> int:
        """The number of new blocks at which everything else is compared."""
        return nearest_number(self.num_layers, self.s.compared)

    @property
    def variants(self) -> list[Variant]:
        """The variants of `s.variants` that exist here, and those that they vary."""
        variants = comparisons(self.num_layers, self.s.new_blocks, self.compared)
        if not self.is_whole:
            variants = [v for v in variants if v.name in (plain(self.compared).name, "full")]
        variants += retention(self.s, self.compared, self.general_train, self.train)
        names = set(self.s.variants)
        wanted = names | {v.varies for v in variants if v.name in names}
        chosen = [v for v in variants if not names or v.name in wanted]
        if not chosen:
            raise ConfigError(
                f"--variants {' '.join(self.s.variants)}: none is possible for {self.name}, a "
                f"base of {self.num_layers} layers"
            )
        return chosen

    def start(self, variant: Variant) -> Path:
        """Returns where a variant starts: the base, or an expanded checkpoint."""
        if not variant.expand:
            return self.checkpoint
        return self.s.dir / "bases" / f"{self.base}-{variant.varies or variant.name}"


@cache
def _sha256(checkpoint: Path) -> str:
    return Checkpoint.open(checkpoint).sha256()


def own_study(s: StudySettings) -> Study:
    """Returns the study of the user's base; raises a UserError for what is missing."""
    base = Checkpoint.open(s.base)
    general = parse_named(s.general, "--general")
    if "domain" in general:
        raise ConfigError("--general domain=...: this name is the new domain's; choose another")
    for patterns in filter(None, (s.train, s.val, s.general_train, *general.values())):
        find_files(list(patterns))  # raises DataError for a pattern that matches nothing
    return Study(
        s, "own", base.path, base.config.num_hidden_layers, "domain", s.train, s.val, general,
        s.general_train, s.choices, is_whole=True,
    )  # fmt: skip


def made_studies(s: StudySettings) -> list[Study]:
    """Returns the studies of the small base, which is still to be made, and of `more_bases`."""
    layers = ModelConfig.from_file(s.pretrain_config).num_hidden_layers
    bases = {"small": (s.dir / "bases" / "small", layers)}
    for name, paths in parse_named(s.more_bases, "--more-bases").items():
        if name in bases:
            raise ConfigError(f"--more-bases {name}=...: this name is taken; choose another")
        checkpoint = Checkpoint.open(paths[0])
        bases[name] = (checkpoint.path, checkpoint.config.num_hidden_layers)
    corpus, studies = s.dir / "corpus", []
    for base, (checkpoint_dir, num_layers) in bases.items():
        is_small = base == "small"
        if is_small:
            general = {"english": [str(corpus / "english" / "val")]}
            general["packages"] = [str(corpus / "packages")]
        else:  # the text that it was trained on is not known
            written = s.dir / "written" / base / TEXT_FILE
            general = {"written": [str(written)], "stories": [str(STORIES)]}
        for domain in ("code", "math"):
            studies.append(
                Study(
                    s,
                    base,
                    checkpoint_dir,
                    num_layers,
                    domain,
                    train=(str(corpus / domain / "train"),),
                    val=(str(corpus / domain / "val"),),
                    general=general,
                    general_train=(str(corpus / "english" / "train"),) if is_small else (),
                    choices=str(corpus / "choices" / f"{domain}.jsonl"),
                    is_whole=is_small and domain == "code",
                    is_written=not is_small,
                )
            )
    return studies


def flags(options: dict[str, Any]) -> list[str]:
    """Returns options as words of a command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def command(*words: object) -> None:
    """Prints and runs one of the public commands; its output goes to standard error.

    Raises:
        DataError: it fails.
    """
    text = [str(word) for word in words]
    print(f"$ {' '.join(text)}", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *text], env=environment, stdout=sys.stderr)
    if done.returncode:
        raise DataError(f"python {' '.join(text[:3])} ... failed, see above")


def pretrain(s: StudySettings) -> None:
    """Makes the small base with the public commands, unless it is there."""
    tokenizer, base, config = s.dir / "tokenizer", s.dir / "bases" / "small", s.pretrain_config
    made_of = {"preset": (ROOT / s.pretrain).read_text("utf-8"), "seq_len": s.seq_len}
    if base.exists():
        if json.loads((base / PRETRAIN_FILE).read_text(encoding="utf-8")) != made_of:
            raise ConfigError(f"{base} was pre-trained with other settings: choose another --out")
        return
    english = s.dir / "corpus" / "english"
    if not (tokenizer / "tokenizer.model").exists():
        vocab_size = ModelConfig.from_file(config).vocab_size
        words = ("--vocab-size", vocab_size, "--out", tokenizer)
        command(ROOT / "demo" / "train_tokenizer.py", english / "train", *words)
    options = {
        "config": ROOT / s.pretrain, "model.config": config, "model.tokenizer": tokenizer,
        "data.train": english / "train", "data.val": f"english={english / 'val'}",
        "data.seq-len": s.seq_len, "data.cache-dir": s.dir / "cache", "train.device": s.device,
        "run-dir": s.dir / "pretrain",
    }  # fmt: skip
    processes = pretrain_processes(s)
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", processes)
    command(*(launch if processes > 1 else ()), ROOT / "train.py", *flags(options))
    command(ROOT / "convert.py", "merge", config, s.dir / "pretrain", base)
    write_json(base / PRETRAIN_FILE, made_of)


def pretrain_processes(s: StudySettings) -> int:
    """Returns how many processes pre-train: on the CPU one for each worker, if they divide it."""
    t = parse_train(["--config", str(ROOT / s.pretrain)]).train
    divides = t.batch_size % (s.workers * t.micro_batch_size) == 0
    return s.workers if divides and device_of(s.device).type == "cpu" else 1


def expand(studies: Sequence[Study]) -> None:
    """Makes the expanded checkpoints with the public commands, unless they are there."""
    for study in studies:
        for variant in study.variants:
            start = study.start(variant)
            if start.exists():
                record = Checkpoint.open(start).config.expansion
                if variant.expand and (not record or record.base_sha256 != study.base_sha256):
                    raise ConfigError(f"{start} is of another base: choose another --out")
            else:
                is_measured = "--by" in variant.expand
                script = ["experiments/placement.py"] if is_measured else ["convert.py", "expand"]
                command(ROOT / script[0], *script[1:], study.checkpoint, start, *variant.expand)
