"""The inputs of a run, opened and checked before anything is computed.

The texts that a run prints before its first step and after its last one are made here too.
"""

import hashlib
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llamapro import filesystem
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import resolve
from llamapro.checkpoints.run import load_state, newest_intact, training_checkpoints
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, UserError
from llamapro.files import reason, user_path
from llamapro.inference.sampling import end_ids
from llamapro.model import build_on_meta
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.corpus import check_texts, tokenize
from llamapro.text.mixture import parse_named
from llamapro.text.packing import tokenize_conversations
from llamapro.text.parts import Part
from llamapro.text.source_files import check_corpora
from llamapro.text.store import TokenStore
from llamapro.text.tokenizer import Tokenizer
from llamapro.training import agreement
from llamapro.training.distributed import Ranks
from llamapro.training.objective import allowed
from llamapro.training.plan import compute_dtype, device_type, make_plan, render
from llamapro.training.preset import find_preset
from llamapro.training.proposal import check_float8, propose, render_proposal
from llamapro.training.replay import read_openings, written_by_base
from llamapro.training.resume import changes, check_identity, make_identity
from llamapro.training.settings import Settings
from llamapro.training.state import RunState
from llamapro.training.weights import first_new_row, freeze, stored_name

FORGOT = 0.01  # nats per token; a smaller rise of a validation loss is not spoken of
MISSED = 1.5  # times what replay.hold allows; the KL is an average of a few steps
MOST_WRITTEN = 1_000_000  # tokens that the base writes, unless the user asks for more


@dataclass(frozen=True)
class Job:
    """The inputs of a run; all of them exist and fit together.

    Without a checkpoint the weights are random; without a template the data are text. `val` has the
    paths of each validation set, `resume_from` is the newest training checkpoint.
    """

    settings: Settings
    run_dir: Path
    config: ModelConfig
    checkpoint: Checkpoint | None
    tokenizer: Tokenizer
    template: ChatTemplate | None
    val: dict[str, list[str]]
    resume_from: Path | None
    plan: dict[str, Any]

    @classmethod
    def open(cls, settings: Settings) -> "Job":
        """Opens everything the settings name; raises a UserError if any is missing or wrong."""
        checkpoint, source_name = None, settings.model.path or settings.model.config
        if settings.model.path:
            checkpoint = Checkpoint.open(settings.model.path)
            config = checkpoint.config
        else:
            config = ModelConfig.from_file(find_preset(settings.model.config, ".json"))
        length, most = settings.data.seq_len, config.max_position_embeddings
        if length > most:
            raise ConfigError(
                f"data.seq_len {length} is over max_position_embeddings {most} of {source_name}"
            )
        data = replace(settings.data, seq_len=settings.data.length(most))
        if 0 < (tokens := settings.replay.tokens) <= data.seq_len:
            raise ConfigError(
                f"replay.tokens is {tokens}, expected more than a sequence (data.seq_len "
                f"{data.seq_len}); leave it out, or raise it"
            )
        settings = replace(settings, data=data)
        source = resolve(settings.model.tokenizer or settings.model.path)
        tokenizer = Tokenizer.load(source)
        tokenizer.check_fits(config.vocab_size, source_name)
        ends = end_ids(config, tokenizer)
        template = None
        if settings.data.format == "chat":
            directory = source if source.is_dir() else source.parent
            template = ChatTemplate.load(directory, tokenizer, settings.data.chat_template)
            template.end_ids()  # says so if there is none
        val = parse_named(settings.data.val)
        if settings.replay.share and not settings.replay.data and checkpoint:  # raises if it cannot
            read_openings(
                settings.replay.prompts, checkpoint.path, tokenizer, ends, length=data.seq_len
            )
        preset = Path(settings.config).stem or "run"
        run_dir = user_path(settings.run_dir or f"runs/{preset}")
        filesystem.existing(run_dir, "run_dir: ")
        filesystem.existing(user_path(data.cache_dir), "data.cache_dir: ")
        earlier = training_checkpoints(run_dir)
        sources = [user_path(path) for path in chain(settings.data.train, *val.values())]
        is_source = run_dir.exists() and any(p.exists() and p.samefile(run_dir) for p in sources)
        if not earlier and (is_source or (run_dir / "config.json").exists()):
            held = "is data of the run" if is_source else "holds a model"
            raise ConfigError(f"run_dir {run_dir}: {held}; give the run a directory of its own")
        resume_from = earlier[-1] if earlier else None
        recorded: dict[str, Any] = {}
        if resume_from is not None:
            with suppress(UserError):  # a damaged checkpoint is told where it is read
                recorded = load_state(resume_from)["settings"]
        if template is not None and template.prints_date:
            settings = _with_date(settings, recorded)
            template.date = datetime.fromisoformat(settings.data.date)
        check_float8(settings, config)
        plan = make_plan(settings, config, run_dir, resume_from)
        job = cls(
            settings, run_dir, config, checkpoint, tokenizer, template, val, resume_from, plan
        )
        check_corpora(job.corpora)
        return job

    @property
    def first_new_row(self) -> int:
        """The id of the first added token, if added tokens train, else 0."""
        return first_new_row(self.config) if self.settings.train.new_tokens else 0

    def facts(self) -> dict[str, str]:
        """Returns what must be the same in every process, before anything is computed."""
        template = self.template and hashlib.sha256(self.template.source.encode()).hexdigest()
        found = {f"config.json's {key}": str(v) for key, v in asdict(self.config).items()}
        found |= {"the tokenizer": self.tokenizer.fingerprint, "the chat template": str(template)}
        return agreement.facts(self.settings) | found | {"the device": device_type(self.settings)}

    @property
    def corpora(self) -> dict[str, Sequence[str]]:
        """Label -> the paths of each corpus."""
        found: dict[str, Sequence[str]] = {f"train {p}": [p] for p in self.settings.data.train}
        found |= {f"val {name}": paths for name, paths in self.val.items()}
        return found | ({"replay": data} if (data := self.settings.replay.data) else {})

    @property
    def _markers(self) -> dict[str, str]:
        """Label -> the text at which its documents are split."""
        return dict.fromkeys(self.corpora, self.settings.data.split_at) | {"replay": ""}

    def tokenize(self, part: Part | None = None) -> dict[str, TokenStore]:
        """Tokenises every corpus or finds it in the cache; returns label -> its tokens.

        Conversations have no parts. Raises DataError, naming every mistake in conversations.
        """
        data, key = self.settings.data, self.tokenizer.fingerprint
        if self.template is not None:
            return tokenize_conversations(self.corpora, self.template, key, data.cache_dir)
        return {
            label: tokenize(
                paths,
                self.tokenizer,
                data.cache_dir,
                text_key=data.text_key,
                workers=data.workers,
                label=label,
                marker=self._markers[label],
                part=part,
            )
            for label, paths in self.corpora.items()
        }

    def identity(self, stores: dict[str, TokenStore]) -> dict[str, Any]:
        """Returns what a resumed run must have, too, as `make_identity`; `stores` by label."""
        trains, cache_dir = self.settings.train, self.settings.data.cache_dir
        trainable = freeze(build_on_meta(self.config), trains.trainable, trains.new_tokens)
        names = [stored_name(name, self.first_new_row) for name in trainable]
        key = self.tokenizer.fingerprint
        return make_identity(self.checkpoint, names, key, stores, self.config, cache_dir)

    def write_replay(self, device: torch.device, trained: int, saved: dict[str, Any]) -> TokenStore:
        """Returns the replayed text that the base writes on this device, as `written_by_base`.

        Args:
            trained: tokens of an epoch, without replay.
            saved: the run's identity; a run that resumes keeps the text that it had.
        """
        s = self.settings
        assert self.checkpoint is not None  # else all weights train, which `check` refuses
        tokens = s.replay.tokens
        if not tokens and self.resume_from is not None:
            tokens = saved["data"].get("replay", {}).get("tokens", 0)
        if not tokens:
            steps = s.steps(round(trained / s.data.seq_len / (1 - s.replay.share)))
            sequences = math.ceil(steps * s.train.batch_size * s.replay.share / 2)
            tokens = min(max(sequences * s.data.seq_len, s.data.seq_len + 1), MOST_WRITTEN)
        replay, data, dtype = replace(s.replay, tokens=tokens), s.data, compute_dtype(s)
        return written_by_base(
            self.checkpoint, self.tokenizer, replay, data.seq_len, data.cache_dir, dtype, device
        )

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """Makes the checks that a run would make; returns the plan, JSON-able and as text.

        Raises ConfigError if the run directory holds a run with other settings or data, and
        DataError if a conversation cannot be used. What resumes is tokenised, as then.
        """
        earlier, _ = newest_intact(self.run_dir)
        saved = load_state(earlier) if earlier else {}
        if saved:
            changes(saved["settings"], self.settings, str(self.run_dir))
        cache_dir = user_path(self.settings.data.cache_dir)
        for name, directory in (("run_dir", self.run_dir), ("data.cache_dir", cache_dir)):
            try:
                folder = filesystem.existing(directory)
                TemporaryDirectory(dir=folder).cleanup()  # the next line tries a disk once
                filesystem.lacks(folder)
            except OSError as error:
                if directory == cache_dir and any(directory.glob("*/index.json")):
                    continue  # a cache that is read, and not written, is enough
                raise ConfigError(f"{name} {directory}: not usable: {reason(error)}") from None
        s, plan, text = self.settings, self.plan, render(self.plan, self.settings)
        if saved:
            found = self.identity(self.tokenize())
            before = saved.get("identity", {})
            if s.replay.share and not s.replay.data and "replay" in before.get("data", {}):
                found["data"]["replay"] = before["data"]["replay"]  # what the base wrote
            check_identity(before, found, self.run_dir, s.resume.allow)
        elif s.data.format == "chat":
            self.tokenize()
        else:
            check_texts(self.corpora, self.tokenizer, s.data.text_key, self._markers)
        if proposal := propose(s, self.config, plan["world_size"]):
            plan = plan | {"proposal": proposal}
            text += "\n" + render_proposal(proposal, s.device)
        more = " and --device" if s.device else ""
        return plan, f"{text}\nnext: the same command without --dry-run{more}"

    def result(self, state: RunState) -> tuple[dict[str, Any], str]:
        """Returns the result of the run, JSON-able and as text."""
        result: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "loss": state.loss}
        result |= {"eval": state.eval, "elapsed_s": state.elapsed_s}
        result |= {"run_dir": str(self.run_dir), "stopped": state.stopped}
        if state.stopped:
            text = f"{state.step} steps done, stopped by a signal: the same command continues"
            return result, f"{self.run_dir}: {text}"
        losses, lines, replay = [], [], self.settings.replay
        fix = f"a smaller replay.hold than {replay.hold}" if replay.hold else "--replay.hold 3%"
        if replay.hold and state.control:
            kl, bound = state.control["kl"] or 0.0, allowed(replay, state.control)
            if kl > MISSED * bound:
                # At a high weight the KL that is left is the noise of the steps themselves.
                fix = "a lower optim.lr, or a higher replay.share"
                lines.append(
                    f"replay.hold {replay.hold} is not met: KL {kl:.3g} where {bound:.3g} is "
                    f"allowed, at a weight of {state.control['weight']:.3g}; what lowers it: {fix}"
                )
        for name, loss in state.eval.items():
            change = loss - state.base_eval.get(name, loss)
            losses.append(f"{name} {loss:.4f}" + (f" ({change:+.4f})" if change else ""))
            if change > FORGOT and self.settings.train.trainable == "new_blocks":
                lines.append(
                    f"{name} is worse by {change:.3f} nats per token; what holds it: {fix}"
                )
        done = f"{self.run_dir}: {state.step} steps done"
        lines.insert(0, f"{done}; {', '.join(losses)}" if losses else done)
        model = self.settings.model.path or self.settings.model.config
        lines.append(f"next: llamapro merge {shlex.join((model, str(self.run_dir)))} OUT_DIR")
        return result, "\n".join(lines)


def _with_date(settings: Settings, recorded: dict[str, Any]) -> Settings:
    """Returns the settings with the day that the run's data have: given, recorded, or today."""
    day = settings.data.date or recorded.get("data.date") or datetime.now().date().isoformat()
    return replace(settings, data=replace(settings.data, date=day))


def find_state(job: Job, ranks: Ranks) -> tuple[Job, RunState, list[str]]:
    """Finds where the run stands, and prints its plan; every rank must call it.

    Returns the job with the newest intact training checkpoint to resume from; the state; and the
    settings that were changed, as text. Raises CheckpointError if there are training checkpoints
    and none is intact, and ConfigError if a setting was changed that decides the result.
    """

    def find() -> tuple[Path | None, dict[str, Any] | None, list[str]]:
        path, damaged = newest_intact(job.run_dir)
        return path, load_state(path) if path else None, damaged

    resume_from, saved, damaged = ranks.on_main(find)  # which alone reads and hashes
    plan = job.plan | {"resume_from": str(resume_from) if resume_from else None}
    job = replace(job, resume_from=resume_from, plan=plan)
    ranks.say(render(plan, job.settings))
    for text in damaged:
        ranks.say(f"warning          {text}; resuming from the one before it")
    if resume_from is None or saved is None:
        return job, RunState(), []
    changed = changes(saved["settings"], job.settings, str(job.run_dir))
    for text in changed:
        ranks.say(f"changed          {text}")
    state = RunState.from_json(saved, resume_from)
    if any(text.startswith(("eval.sequences ", "data.seq_len ")) for text in changed):
        state.base_eval = {}  # of other sequences
    return job, state, changed
