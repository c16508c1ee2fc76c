"""Replay: general text among the training data of the new blocks, against forgetting.

The expanded model contains its base, which can write general text even if its own training data are
unknown. It writes documents once before training, each sampled from the token that begins a
document or from a short prompt (Sun et al., LAMOL, 2020). The user can name files instead. Either
is one more source of the mixture with a given share of its samples.

The base also knows how likely every other token was. With `distill` it is the teacher (Hinton et
al., 2015), and a token's loss is KL(base || model). The base is the model without its new blocks,
so this is Li & Hoiem's "Learning without Forgetting" (2016) with no second set of weights.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.checkpoints.base import contained_base, contained_base_sha256, load_contained
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.tensors import hash_tensors
from llamapro.errors import ConfigError, DataError
from llamapro.inference.sampling import end_ids, generate
from llamapro.model import LlamaForCausalLM
from llamapro.text.mixture import Mixture
from llamapro.text.store import TokenStore, cached
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.settings import ReplaySettings

FORMAT_VERSION = 1


def write_documents(
    base: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    end_ids: set[int],
    length: int,
    settings: ReplaySettings,
) -> Iterator[list[int]]:
    """Yields documents that a model writes, without end.

    A document leaves out its end if that is the token it began with: the next one begins with it.

    Args:
        base: in evaluation mode.
        prompts: token ids with which documents begin; all are drawn equally often. Those that are
            continued at the same time have one length.
        end_ids: a document ends with any of them.
        length: the most tokens of a document; one that reaches it has no end token.
        settings: temperature, seed, and number of documents that are written at a time.
    """
    generator, draw = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    while True:
        size = len(draw.choice(prompts))
        fitting = [prompt for prompt in prompts if len(prompt) == size]
        documents = [list(draw.choice(fitting)) for _ in range(settings.batch_size)]
        is_open = [True] * len(documents)
        prompt = torch.tensor(documents)  # (B, P)
        steps = generate(base, prompt, length - size, settings.temperature, seed=generator)
        for step in steps:
            for row, token_id in enumerate(step[:, 0].tolist()):
                if is_open[row]:
                    documents[row].append(token_id)
                    is_open[row] = token_id not in end_ids
            if not any(is_open):
                break
        for ids in documents:
            is_shared = len(ids) > 1 and ids[-1] in end_ids and ids[-1] == ids[0]
            yield ids[:-1] if is_shared else ids


def read_prompts(file: str, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Returns the prompts of the base's documents: their first token, alone or with a line of text.

    The first token is the one of documents in training: BOS, or EOS where no BOS is added.

    Args:
        file: UTF-8 text whose empty lines are skipped; "" for the first token alone.
        tokenizer: of the base.
        length: the most tokens of a document; a prompt is shorter.

    Raises:
        ConfigError: there is no file, and neither BOS nor EOS.
        DataError: the file cannot be read, has no prompt, or has one that is too long.
    """
    start = tokenizer.document_start()
    if not file:
        if not start:
            raise ConfigError(
                f"replay.share: {tokenizer.path} has no BOS or EOS that the base could write from; "
                "give short texts with replay.prompts, or name text with replay.data instead"
            )
        return [start]
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"replay.prompts {file}: cannot be read as text: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        ids = start + tokenizer.encode(line)
        if line.strip() and len(ids) >= length:
            raise DataError(
                f"{file}:{number}: a prompt of {len(ids)} tokens; a document has data.seq_len "
                f"{length} at most"
            )
        prompts += [ids] if line.strip() else []
    if not prompts:
        raise DataError(f"replay.prompts {file}: has no line of text to use as a prompt")
    return prompts


def written_by_base(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    settings: ReplaySettings,
    length: int,
    cache_dir: str | Path,
    dtype: torch.dtype,
    device: torch.device,
) -> TokenStore:
    """Returns text that the base inside a checkpoint writes; it is written once and then cached.

    The cache's key holds the base's hash and the settings of the text, but not device and dtype:
    with others a few draws differ, and the text is as good.

    Args:
        checkpoint: an expanded one; its new blocks are not used.
        tokenizer: of the checkpoint.
        settings: of the replay.
        length: the most tokens of a document.
        cache_dir: the directory of token stores.
        dtype, device: of the base while it writes; the device holds it whole.

    Raises:
        ConfigError, DataError: as `read_prompts`; or the disk is full, or the store in the cache is
            damaged.
    """
    prompts = read_prompts(settings.prompts, tokenizer, length)
    inside = contained_base(checkpoint)
    hashes = hash_tensors(inside.values(), "hash base")
    made_of = {
        "base_sha256": contained_base_sha256(
            checkpoint, {name: hashes[base.name] for name, base in inside.items()}
        ),
        "tokenizer_sha256": tokenizer.fingerprint,
        "tokens": settings.tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "length": length,
    }
    if settings.prompts:
        made_of["prompts"] = prompts
    ends = end_ids(checkpoint.config, tokenizer)
    if more := ends - {*checkpoint.config.eos_token_ids, tokenizer.eos_id}:
        made_of["more_ends"] = sorted(more)
    vocab_size = inside["model.embed_tokens.weight"].shape[0]
    stored_dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts = {"documents": 0, "bytes": 0}

    def write() -> Iterator[NDArray[Any]]:
        """Loads the base, and yields the first `settings.tokens` tokens of its documents."""
        base = load_contained(checkpoint, dtype, device)
        documents = write_documents(base, prompts, ends, length, settings)
        left = settings.tokens
        with tqdm(total=left, desc="write replay", unit="tok", disable=None) as bar:
            while left > 0:
                ids = next(documents)[:left]
                left -= len(ids)
                counts["documents"] += 1
                counts["bytes"] += sum(len(tokenizer.bytes_of(i)) for i in ids)
                bar.update(len(ids))
                yield np.array(ids, dtype=stored_dtype)

    def summarize(store: TokenStore) -> str:
        return f"{store.tokens:,} tokens of {store.documents:,} documents that the base wrote"

    key = ["replay", FORMAT_VERSION, made_of]
    index = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": vocab_size,
        "dtype": stored_dtype,
        "bos_id": next(iter(tokenizer.document_start()), None),
        "eos_id": tokenizer.eos_id,
        "counts": counts,
        "written_by": made_of,
    }
    return cached(cache_dir, key, index, write(), "replay", summarize)


def split_replayed(
    first_replayed: int, micro_batches: int, rows: int, rank: int, world_size: int
) -> list[int | None]:
    """Returns the number of replayed rows of each micro-batch of a rank; they come last.

    Args:
        first_replayed: the number of samples before the replayed ones in the global batch that
            `mixture.batch` deals out.
        micro_batches: the number of micro-batches of the rank.
        rows: sequences of a micro-batch.
        rank, world_size: of the process.

    Returns:
        A number for each micro-batch, as `objective.Replay` takes it. It is None on all ranks if no
        rank has any. The base inside runs on all ranks or on none, because they gather sharded
        weights together.
    """
    # The samples before the replayed ones on this rank, and on the last, which has the fewest.
    here, least = len(range(rank, first_replayed, world_size)), first_replayed // world_size
    return [
        min(rows, max(0, end - here)) if end > least else None
        for end in range(rows, (micro_batches + 1) * rows, rows)
    ]


def describe_mix(mixture: Mixture) -> str:
    """Returns the line of the start-up block about the last source of a mixture, the replay."""
    samples, sequences = mixture.samples_per_source[-1], len(mixture.sources[-1])
    return (
        f"replay           {samples:,} of the {mixture.samples_per_epoch:,} sequences of an epoch, "
        f"{samples / sequences:.2f} passes over {sequences:,}"
    )
