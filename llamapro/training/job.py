"""A run's inputs: opened and checked before anything is computed, then its data."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import resolve
from llamapro.checkpoints.run import training_checkpoints
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError, UserError
from llamapro.model import build_on_meta
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.corpus import tokenize
from llamapro.text.documents import find_files
from llamapro.text.mixture import Mixture, PackedSequences, Source, parse_named
from llamapro.text.packing import PackedConversations, mark_trained, tokenize_conversations
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.distributed import Ranks
from llamapro.training.preemption import Stopped, StopRequest
from llamapro.training.replay import describe_mix, read_prompts, written_by_base
from llamapro.training.resume import make_identity
from llamapro.training.settings import Settings
from llamapro.training.weights import first_new_row, select_trainable, stored_name


@dataclass(frozen=True)
class Job:
    """The run's inputs, all found and fitting together."""

    settings: Settings
    run_dir: Path
    config: ModelConfig
    checkpoint: Checkpoint | None  # None: random weights from model.config
    tokenizer: Tokenizer
    template: ChatTemplate | None  # of conversations
    val: dict[str, list[str]]
    resume_from: Path | None

    @classmethod
    def open(cls, settings: Settings) -> "Job":
        """Opens everything the settings name; raises a UserError for what is missing or wrong."""
        checkpoint, where = None, settings.model.path or settings.model.config
        if settings.model.path:
            checkpoint = Checkpoint.open(settings.model.path)
            config = checkpoint.config
        else:
            config = ModelConfig.from_file(settings.model.config)
        if settings.data.seq_len > config.max_position_embeddings:
            raise ConfigError(
                f"data.seq_len {settings.data.seq_len} is over max_position_embeddings "
                f"{config.max_position_embeddings} of {where}"
            )
        if settings.train.trainable == "new_blocks":
            # Raises without a record.
            select_trainable(build_on_meta(config), "new_blocks", settings.train.new_tokens)
        source = resolve(settings.model.tokenizer or settings.model.path)
        tokenizer = Tokenizer.load(source)
        tokenizer.check_fits(config.vocab_size, where)
        template = None
        if settings.data.format == "chat":
            directory = source if source.is_dir() else source.parent
            template = ChatTemplate.load(directory, tokenizer, settings.data.chat_template)
        val = parse_named(settings.data.val)
        replay = [settings.replay.data] if settings.replay.data else []
        for patterns in [settings.data.train, *val.values(), *replay]:
            find_files(patterns)  # raises DataError for a pattern that matches nothing
        if settings.replay.share and not settings.replay.data:  # raises if there is no prompt
            read_prompts(settings.replay.prompts, tokenizer, settings.data.seq_len)
        preset = Path(settings.config).stem or "run"
        run_dir = Path(settings.run_dir or f"runs/{preset}")
        earlier = training_checkpoints(run_dir)
        resume_from = earlier[-1] if earlier else None
        return cls(settings, run_dir, config, checkpoint, tokenizer, template, val, resume_from)

    @property
    def first_new_row(self) -> int:
        """The id of the first added token, if added tokens train, else 0."""
        return first_new_row(self.config) if self.settings.train.new_tokens else 0

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.settings.train.dtype != "auto":
            return getattr(torch, self.settings.train.dtype)
        on_gpu = torch.cuda.is_available() and self.settings.train.device != "cpu"
        return torch.bfloat16 if on_gpu else torch.float32

    def tokenize(self) -> dict[str, TokenStore]:
        """Tokenises, or finds in the cache, every corpus; returns label -> its tokens.

        Raises:
            DataError: naming what cannot be used, of conversations everything at once.
        """
        s = self.settings
        corpora: dict[str, Sequence[str]] = {f"train {path}": [path] for path in s.data.train}
        corpora |= {f"val {name}": paths for name, paths in self.val.items()}
        if self.template is not None:
            fingerprint = self.tokenizer.fingerprint
            return tokenize_conversations(corpora, self.template, fingerprint, s.data.cache_dir)
        return {
            label: tokenize(
                paths, self.tokenizer, s.data.cache_dir, s.data.text_key, s.data.workers, label
            )
            for label, paths in corpora.items()
        }

    def replay(self, device: torch.device) -> TokenStore:
        """Returns the text that is replayed: the user's, or what the base writes on this device.

        Raises:
            ConfigError, DataError: as `written_by_base` and `tokenize`.
        """
        s = self.settings
        if s.replay.data:
            how = (s.data.cache_dir, s.data.text_key, s.data.workers, "replay")
            return tokenize(s.replay.data, self.tokenizer, *how)
        assert self.checkpoint is not None  # else all weights train, which `check` refuses
        where = (s.data.cache_dir, self.compute_dtype, device)
        return written_by_base(self.checkpoint, self.tokenizer, s.replay, s.data.seq_len, *where)


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        mixture: the training samples in their order; the replay's source is the last.
        apart: the number of that source, if its loss is another than the others' or weighs more or
            less.
        val: the sequences of each validation set.
        identity: hashes of what the run is made of: `resume.make_identity`.
        about: lines for people: how conversations were packed, and one with what trains marked; how
            much is replayed.
    """

    mixture: Mixture
    apart: int | None
    val: dict[str, Source]
    identity: dict[str, Any]
    about: list[str]


def load_data(job: Job, ranks: Ranks, stop: StopRequest) -> Data:
    """Makes on the main process what is not yet in the cache; then every process maps it.

    Texts are tokenised, and the base writes what is replayed.

    Raises:
        DataError: on every rank, if the main one could not.
        Stopped: on every rank, if a signal came to the main one meanwhile.
    """
    s = job.settings
    error, paths, identity, stopped = None, {}, {}, False
    if ranks.is_main:
        try:
            with stop.interrupting():
                stores = job.tokenize()
                if s.replay.share:
                    stores["replay"] = job.replay(ranks.device)
                paths = {label: store.path for label, store in stores.items()}
                model = build_on_meta(job.config)
                trainable = select_trainable(model, s.train.trainable, s.train.new_tokens)
                fingerprint = job.tokenizer.fingerprint
                names = [stored_name(name, job.first_new_row) for name in trainable]
                identity = make_identity(job.checkpoint, names, fingerprint, stores)
        except UserError as failure:
            error = str(failure)
        except Stopped:
            stopped = True
    error, paths, identity, stopped = ranks.from_main((error, paths, identity, stopped))
    if stopped:
        raise Stopped
    if error:
        raise DataError(error)

    about: list[str] = []

    def packed(label: str) -> Source:
        store = TokenStore(paths[label], job.tokenizer.fingerprint)
        if job.template is None:
            return PackedSequences(store, s.data.seq_len)
        conversations = PackedConversations(store, s.data.seq_len, s.data.too_long)
        about.append(f"{label}: {conversations.describe()}")
        if len(about) == 1:
            decode, is_terminal = job.tokenizer.decode, sys.stderr.isatty()
            about.append(mark_trained(conversations[0], decode, is_terminal))
        return conversations

    sources = [packed(f"train {path}") for path in s.data.train]
    weights = s.data.weights or [1.0] * len(sources)
    if s.replay.share:
        mixture = Mixture(sources, weights, s.train.seed, packed("replay"), s.replay.share)
        about.append(describe_mix(mixture))
    else:
        mixture = Mixture(sources, weights, s.train.seed)
    val = {name: packed(f"val {name}") for name in job.val}
    apart = len(sources) if s.replay.is_apart else None
    return Data(mixture, apart, val, identity, about)
