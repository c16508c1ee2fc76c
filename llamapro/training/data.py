"""The data of a run: tokenised on the main process, mapped by all."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llamapro.checkpoints.tensors import hash_tensors
from llamapro.errors import DataError
from llamapro.formatting import format_count
from llamapro.text.mixture import MicroBatch, Mixture, PackedSequences, Source, micro_batches
from llamapro.text.packing import PackedConversations, mark_trained
from llamapro.text.store import TokenStore
from llamapro.training import agreement
from llamapro.training.distributed import Ranks, local_rank, on_several_machines
from llamapro.training.job import Job
from llamapro.training.resume import check_identity
from llamapro.training.settings import TrainSettings
from llamapro.training.state import RunState

# Passes over replayed text in a run. `experiments/passes.py` measures what more of them do.
MOST_PASSES = 10


@dataclass(frozen=True)
class Data:
    """The data of a run; `apart` is the number of the source with a loss or weight of its own."""

    mixture: Mixture
    apart: int | None
    val: dict[str, Source]
    steps: int
    train: TrainSettings

    def batch(self, start: int, ranks: Ranks) -> list[MicroBatch]:
        """Returns a rank's share of the batch that begins with sample number `start`."""
        return micro_batches(
            self.mixture,
            start,
            size=self.train.batch_size,
            rows=self.train.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            last_source=self.apart,
        )


def load_data(job: Job, state: RunState, ranks: Ranks) -> Data:
    """Fills the cache on the main process; then every process maps the data.

    The state gets the run's identity. Prints how conversations were packed, with an example whose
    trained tokens are marked, and how much is replayed.

    Raises:
        ConfigError: the run resumes, and had another base, tokenizer or other data.
        UserError: on every rank, if the main one cannot use a file or the cache.
        Stopped: on every rank, if a signal came to the main one meanwhile.
    """
    s, fingerprint = job.settings, job.tokenizer.fingerprint
    tensors = job.checkpoint.tensors if job.checkpoint is not None else {}
    is_compared = on_several_machines() and local_rank() == 0
    pool = ThreadPoolExecutor(1)  # every machine hashes while the main process tokenises
    compared = tensors.values() if is_compared else ()
    hashes = pool.submit(hash_tensors, compared, "hash weights", s.data.cache_dir)

    def make() -> tuple[agreement.Seen, dict[str, Any]]:
        with ranks.stop.interrupting():
            stores = job.tokenize()
            if s.replay.share and not s.replay.data:
                trained = sum(stores[f"train {path}"].tokens for path in s.data.train)
                stores["replay"] = job.write_replay(ranks.device, trained, state.identity)
            identity = job.identity(stores)
        return agreement.Seen.of(job.run_dir, job.resume_from, stores, hashes.result()), identity

    def compare() -> None:
        if is_compared and not ranks.is_main:
            seen.check(job.run_dir, job.resume_from, fingerprint, hashes.result())

    with ranks.stop.shared(ranks.store):
        seen, identity = ranks.on_main(make)
    ranks.on_all(compare)
    if job.resume_from is not None:
        check_identity(state.identity, identity, job.run_dir, s.resume.allow)
        before, now = state.identity["data"], identity["data"]
        # What the base made of another set is no start of this one.
        same = {name for name in job.val if before.get(f"val {name}") == now[f"val {name}"]}
        state.base_eval = {name: x for name, x in state.base_eval.items() if name in same}
    state.identity = identity

    about: list[str] = []

    def packed(label: str) -> Source:
        store = TokenStore(seen.stores[label][0], fingerprint)
        try:
            if job.template is None:
                return PackedSequences(store, s.data.seq_len)
            conversations = PackedConversations(store, s.data.seq_len, s.data.too_long)
        except DataError as error:
            raise DataError(f"{label}: {error}") from None
        about.append(f"{label}: {conversations.describe()}")
        if len(about) == 1:
            decode, is_terminal = job.tokenizer.decode, sys.stderr.isatty()
            about.append(mark_trained(conversations[0], decode, is_terminal))
        return conversations

    sources = [packed(f"train {path}") for path in s.data.train]
    share = sum(x.store.tokens for x in sources) / (sum(map(len, sources)) * s.data.seq_len)
    if len(sources) > 1 and share < 0.5:  # as of a pattern that the shell has expanded
        text = f"{len(sources)} sources fill {share:.0%} of their sequences"
        about.append(f"warning          {text}: name a folder, or put a pattern in quotes")
    weights = s.data.weights or [1.0] * len(sources)
    replay = packed("replay") if s.replay.share else None
    mixture = Mixture(sources, weights, s.train.seed, replay, s.replay.share)
    val = {name: packed(f"val {name}") for name in job.val}
    steps = s.steps(mixture.samples_per_epoch, state.step, state.samples)
    tokens = format_count(steps * job.plan["tokens_per_step"])
    size, of_epoch = s.train.batch_size, mixture.samples_per_epoch
    read = state.samples + max(0, steps - state.step) * size  # by the whole run
    epochs = read / of_epoch
    about.append(f"steps            {steps} ({tokens} tokens, {epochs:.3g} epochs)")
    if not s.train.steps and abs(epochs / s.train.epochs - 1) > 0.1:
        text = f"a step reads {size:,} sequences (train.batch_size), an epoch has {of_epoch:,}"
        about.append(
            f"warning          not train.epochs {s.train.epochs:g} but {epochs:.3g}: {text}"
        )
    if replay is not None:
        passes = read * s.replay.share / len(replay)
        about.append(
            f"replay           {mixture.samples_per_source[-1]:,} of the {of_epoch:,} sequences of "
            f"an epoch; the run passes {passes:.3g} times over {len(replay):,}"
        )
        if passes > MOST_PASSES:
            more = "replay.data" if s.replay.data else "replay.tokens, or text in replay.data"
            about.append(
                "warning          replayed text that repeats so often is learned by heart, and "
                f"other text is forgotten: give more {more}; up to {MOST_PASSES} passes are safe"
            )
    for text in about:
        ranks.say(text)
    apart = len(sources) if s.replay.is_apart else None
    return Data(mixture, apart, val, steps, s.train)
