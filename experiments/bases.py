"""The bases and domains of a study."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from domains import STORIES, write_corpus
from options import ROOT, StudySettings
from trial import CHECKPOINT, TEXT_FILE, device_of, write_json
from variants import Variant, comparisons, nearest_number, plain, retention

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError
from llamapro.text.mixture import parse_named
from llamapro.text.source_files import find_files
from llamapro.training.preset import parse as parse_train

PRETRAIN_FILE = "pretrain.json"  # in the base: what it was pre-trained with


@dataclass(frozen=True)
class Study:
    """One base and one domain.

    Attributes:
        general: held-out text of other domains, by name.
        general_train: general text to replay; may be empty.
        choices: file of questions, or "".
        is_whole: whether all variants train, or only plain expansion, full fine-tuning and the ways
            to forget less.
        is_written: whether the base writes one of the general sets.
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
        """The hash of the base's weights, to which all results belong."""
        return _sha256(self.checkpoint)

    @property
    def text_sha256(self) -> str:
        """The hash of all text that is trained on or measured: a path may get another content."""
        sets = [self.train, self.val, self.general_train, *map(tuple, self.general.values())]
        return _text_sha256(tuple(sets))

    @property
    def compared(self) -> int:
        """The number of new blocks in all comparisons that are not about this number."""
        return nearest_number(self.num_layers, self.s.compared)

    @property
    def possible(self) -> list[Variant]:
        """All variants for this base and domain."""
        variants = comparisons(self.num_layers, self.s.new_blocks, self.compared)
        if not self.is_whole:
            variants = [v for v in variants if v.name in (plain(self.compared).name, "full")]
        return variants + retention(self.s, self.compared, self.general_train, self.train)

    @property
    def variants(self) -> list[Variant]:
        """The variants that `s.variants` names, and those that they vary."""
        names, possible = set(self.s.variants), self.possible
        wanted = names | {v.varies for v in possible if v.name in names}
        return [v for v in possible if not names or v.name in wanted]

    def expanded(self, variant: Variant) -> Path:
        """Returns the directory of the task that makes a variant's expanded checkpoint."""
        return self.s.dir / "expanded" / f"{self.base}-{variant.varies or variant.name}"

    def start(self, variant: Variant) -> Path:
        """Returns the checkpoint from which a variant starts."""
        return self.expanded(variant) / CHECKPOINT if variant.expand else self.checkpoint


@cache
def _sha256(checkpoint: Path) -> str:
    return Checkpoint.open(checkpoint).sha256()


@cache
def _text_sha256(sets: tuple[tuple[str, ...], ...]) -> str:
    digest = hashlib.sha256()
    for patterns in filter(None, sets):
        for file in find_files(patterns):
            digest.update(b"" if file.left_out else file.path.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()


def with_variants(studies: Sequence[Study]) -> list[Study]:
    """Returns the studies that have variants; raises ConfigError for names that none has."""
    known = dict.fromkeys(v.name for study in studies for v in study.possible)
    if unknown := [name for name in studies[0].s.variants if name not in known]:
        names = " ".join(unknown)
        raise ConfigError(f"--variants {names}: not possible here; possible are {', '.join(known)}")
    return [study for study in studies if study.variants]


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
    """Returns the studies of the small base, which may not exist yet, and of `more_bases`."""
    layers = ModelConfig.from_file(s.pretrain_config).num_hidden_layers
    bases = {"small": (s.dir / "bases" / "small", layers)}
    for name, paths in parse_named(s.more_bases, "--more-bases").items():
        if name in bases:
            raise ConfigError(f"--more-bases {name}=...: this name is taken; choose another")
        checkpoint = Checkpoint.open(paths[0])
        bases[name] = (checkpoint.path, checkpoint.config.num_hidden_layers)
    corpus, studies = s.dir / "corpus", []
    english = {"english": [str(corpus / "english" / "val")], "packages": [str(corpus / "packages")]}
    for base, (path, num_layers) in bases.items():
        is_small = base == "small"
        # The training text of other bases is not known, so they write one of the sets.
        written = [str(s.dir / "written" / base / TEXT_FILE)]
        other = {"written": written, "stories": [str(STORIES)]}
        for domain in ("code", "math"):
            studies.append(
                Study(
                    s,
                    base,
                    path,
                    num_layers,
                    domain,
                    train=(str(corpus / domain / "train"),),
                    val=(str(corpus / domain / "val"),),
                    general=english if is_small else other,
                    general_train=(str(corpus / "english" / "train"),) if is_small else (),
                    choices=str(corpus / "choices" / f"{domain}.jsonl"),
                    is_whole=is_small and domain == "code",
                    is_written=not is_small,
                )
            )
    return studies


# ---- The study's own base -----------------------------------------------------------------------


def flags(options: dict[str, Any]) -> list[str]:
    """Returns options as words of a command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def command(*words: object) -> None:
    """Prints and runs one of the project's scripts; its output goes to standard error.

    Raises:
        DataError: the script fails.
    """
    text = [str(word) for word in words]
    print(f"$ {' '.join(text)}", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *text], env=environment, stdout=sys.stderr)
    if done.returncode:
        raise DataError(f"python {' '.join(text[:3])} ... failed, see above")


def pretrain(s: StudySettings) -> None:
    """Makes the corpus and the small base with the public commands, unless they are there."""
    corpus, tokenizer, base = s.dir / "corpus", s.dir / "tokenizer", s.dir / "bases" / "small"
    if not (corpus / "complete").exists():
        command(ROOT / "demo" / "corpus.py", corpus)
        write_corpus(corpus)
    made_of = {"preset": (ROOT / s.pretrain).read_text("utf-8"), "seq_len": s.seq_len}
    if base.exists():
        if json.loads((base / PRETRAIN_FILE).read_text(encoding="utf-8")) != made_of:
            raise ConfigError(f"{base} was pre-trained with other settings: choose another --out")
        return
    english, config = corpus / "english", s.pretrain_config
    if not (tokenizer / "tokenizer.model").exists():
        words = ("--vocab-size", ModelConfig.from_file(config).vocab_size, "--out", tokenizer)
        command(ROOT / "demo" / "train_tokenizer.py", english / "train", *words)
    options = {
        "config": ROOT / s.pretrain, "model.config": config, "model.tokenizer": tokenizer,
        "data.train": english / "train", "data.val": f"english={english / 'val'}",
        "data.seq-len": s.seq_len, "data.cache-dir": s.dir / "cache", "train.device": s.device,
        "run-dir": s.dir / "pretrain", "processes": pretrain_processes(s),
    }  # fmt: skip
    command(ROOT / "train.py", *flags(options))
    command(ROOT / "convert.py", "merge", config, s.dir / "pretrain", base)
    write_json(base / PRETRAIN_FILE, made_of)


def pretrain_processes(s: StudySettings) -> int:
    """Returns the number of pre-training processes: on a CPU one per worker, if they divide it."""
    t = parse_train(["--config", str(ROOT / s.pretrain)]).train
    divides = t.batch_size % (s.workers * t.micro_batch_size) == 0
    return s.workers if divides and device_of(s.device).type == "cpu" else 1
