"""The bases and domains of a study; checkpoints are made by the public commands."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from domains import ROOT, STORIES
from options import StudySettings, replay
from schedule import Task
from trial import TEXT_FILE, device_of, write_json
from variants import Variant, comparisons, fitting, plain, retention

from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError
from llamapro.text.documents import find_files
from llamapro.text.mixture import parse_named

PRETRAIN_FILE = "pretrain.json"  # beside the base: what it was trained with


@dataclass(frozen=True)
class Study:
    """One base and one domain.

    Attributes:
        name: of its directory.
        base: of the base; checkpoint: its directory.
        domain: its name; train, val: its text.
        general: name -> held-out text of other domains.
        general_train: to replay.
        choices: questions, or "".
        num_layers: of the base.
        is_written: a general set is text that the base writes, with a seed of its own.
        is_whole: all variants, or only plain expansion, full fine-tuning and the ways to forget
            less.
    """

    name: str
    base: str
    checkpoint: Path
    domain: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    general: dict[str, list[str]]
    general_train: tuple[str, ...]
    choices: str
    is_whole: bool
    num_layers: int
    is_written: bool = False

    def identity(self) -> str:
        """Returns the hash of the base's weights, once it is there: results are of this one."""
        return _sha256(self.checkpoint)

    def compared(self, s: StudySettings) -> int:
        """Returns the number of new blocks at which other things are compared."""
        return fitting(self.num_layers, s.compared)

    def variants(self, s: StudySettings) -> list[Variant]:
        """Returns what is trained; of `s.variants`, with those that these vary."""
        compared = self.compared(s)
        found = comparisons(self.num_layers, s.new_blocks, compared)
        if not self.is_whole:
            found = [v for v in found if v.name in (plain(compared).name, "full")]
        found += retention(compared, self.general_train, self.train, replay(s))
        wanted = set(s.variants) | {v.varies for v in found if v.name in s.variants}
        found = [v for v in found if not s.variants or v.name in wanted]
        if not found:
            raise ConfigError(
                f"--variants {' '.join(s.variants)}: none is possible for {self.name}, a base of "
                f"{self.num_layers} layers"
            )
        return found


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
    how = (s.general_train, s.choices, True, base.config.num_hidden_layers)
    return Study("own", "own", base.path, "domain", s.train, s.val, general, *how)


def made_studies(s: StudySettings, out: Path) -> list[Study]:
    """Returns the studies of the small base, which is made in `out`, and of the others, each in
    both domains.
    """
    config = ModelConfig.from_file(ROOT / s.pretrain.config)
    bases = {"small": (out / "bases" / "small", config.num_hidden_layers)}
    for name, paths in parse_named(s.more_bases, "--more-bases").items():
        if name in bases:
            raise ConfigError(f"--more-bases {name}=...: this name is taken; choose another")
        checkpoint = Checkpoint.open(paths[0])
        bases[name] = (checkpoint.path, checkpoint.config.num_hidden_layers)
    corpus = out / "corpus"
    found = []
    for base, (checkpoint_dir, num_layers) in bases.items():
        general = {"english": [str(corpus / "english" / "val")]}
        general["packages"] = [str(corpus / "packages")]
        replayed: tuple[str, ...] = (str(corpus / "english" / "train"),)
        if base != "small":  # of what it was trained on, nothing need be known
            written = str(out / "written" / base / TEXT_FILE)
            general, replayed = {"written": [written], "stories": [str(STORIES)]}, ()
        for domain in ("code", "math"):
            found.append(
                Study(
                    name=f"{base}-{domain}",
                    base=base,
                    checkpoint=checkpoint_dir,
                    domain=domain,
                    train=(str(corpus / domain / "train"),),
                    val=(str(corpus / domain / "val"),),
                    general=general,
                    general_train=replayed,
                    choices=str(corpus / "choices" / f"{domain}.jsonl"),
                    is_whole=base == "small" and domain == "code",
                    num_layers=num_layers,
                    is_written=base != "small",
                )
            )
    return found


def command(*words: str) -> None:
    """Runs one of the public commands, shown before; its output goes to standard error.

    Raises:
        DataError: it fails.
    """
    print(f"$ {' '.join(words)}", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, *words], env=environment, stdout=sys.stderr)
    if found.returncode:
        raise DataError(f"python {' '.join(words[:3])} ... failed, see above")


def flags(options: dict[str, Any]) -> list[str]:
    """Returns options as words of a command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def pretrain(s: StudySettings, out: Path) -> None:
    """Makes the small base with the public commands, unless it is there."""
    p, tokenizer, base = s.pretrain, out / "tokenizer", out / "bases" / "small"
    made_of = dataclasses.asdict(p) | {"seq_len": s.seq_len}
    if base.exists():
        if json.loads((base / PRETRAIN_FILE).read_text(encoding="utf-8")) != made_of:
            raise ConfigError(f"{base} was pre-trained with other settings: choose another --out")
        return
    english = str(out / "corpus" / "english" / "train")
    if not (tokenizer / "tokenizer.model").exists():
        words = ("--vocab-size", str(p.vocab_size), "--out", str(tokenizer))
        command(str(ROOT / "demo" / "train_tokenizer.py"), english, *words)
    processes = pretrain_processes(s)
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    run_dir = str(out / "pretrain")
    options = {
        "model.config": ROOT / p.config, "model.tokenizer": tokenizer, "data.train": english,
        "data.val": f"english={out / 'corpus' / 'english' / 'val'}", "data.seq-len": s.seq_len,
        "data.cache-dir": out / "cache", "train.trainable": "all", "train.steps": p.steps,
        "train.batch-size": p.batch_size, "train.micro-batch-size": p.micro_batch_size,
        "train.seed": 1, "train.device": s.device, "optim.lr": p.lr,
        "optim.final-lr-ratio": 0.05, "eval.every": max(1, p.steps // 4), "eval.sequences": 32,
        "save.every": max(1, p.steps // 4), "save.keep": 1, "log-every": max(1, p.steps // 8),
        "run-dir": run_dir,
    }  # fmt: skip
    command(*(launch if processes > 1 else ()), str(ROOT / "train.py"), *flags(options))
    command(str(ROOT / "convert.py"), "merge", str(ROOT / p.config), run_dir, str(base))
    write_json(base / PRETRAIN_FILE, made_of)


def pretrain_processes(s: StudySettings) -> int:
    """Returns how many processes pre-train: on the CPU one for each worker, if they divide it."""
    fits = s.pretrain.batch_size % (s.workers * s.pretrain.micro_batch_size) == 0
    return s.workers if fits and device_of(s.device).type == "cpu" else 1


def written_task(s: StudySettings, out: Path, study: Study) -> Task:
    """Returns the task of writing held-out text with the base, of another seed than replay's."""
    about = {"base": str(study.checkpoint), "tokens": s.replay_tokens, "length": s.seq_len}
    about |= {"base_sha256": study.identity(), "device": s.device}
    return Task(f"text of {study.base}", "write", about, out / "written" / study.base)


def expanded_dir(out: Path, study: Study, variant: Variant) -> Path:
    """Returns where a variant starts: the base, or an expanded checkpoint of its own."""
    if not variant.expand:
        return study.checkpoint
    return out / "bases" / f"{study.base}-{variant.varies or variant.name}"


def expand(s: StudySettings, out: Path, studies: Sequence[Study]) -> None:
    """Makes the expanded checkpoints with the public command."""
    for study in studies:
        for variant in study.variants(s):
            start = expanded_dir(out, study, variant)
            if start.exists():
                record = Checkpoint.open(start).config.expansion
                if variant.expand and (not record or record.base_sha256 != study.identity()):
                    raise ConfigError(f"{start} is of another base: choose another --out")
            else:
                script = ["convert.py", "expand"]
                if "--by" in variant.expand:
                    script = ["experiments/placement.py"]
                words = (str(ROOT / script[0]), *script[1:], str(study.checkpoint), str(start))
                command(*words, *variant.expand)
