"""Replay: general text among the training data of the new blocks, against forgetting.

The expanded model contains its base, which can write general text even if its own training data are
unknown. It writes documents once before training, each sampled from the token that begins a
document or from a short prompt (Sun et al., LAMOL, 2020). The user can name files instead. Either
is one more source of the mixture with a given share of its samples. `objective.py` has its losses.
"""

import datetime
import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.checkpoints.base import contained_checkpoint
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import ConfigError, DataError
from llamapro.files import user_path
from llamapro.inference.cache import KVCache
from llamapro.inference.sampling import end_ids, sample
from llamapro.model import LlamaForCausalLM
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.store import TokenStore, cached
from llamapro.text.template_files import own_template
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.settings import ReplaySettings

FORMAT_VERSION = 3
# Templates that print today's date print this one: what is written must not depend on the day.
DATE = datetime.datetime(2024, 7, 26)


class Opening(NamedTuple):
    """The beginning of a document."""

    ids: Sequence[int]
    # Ids that follow the first end token. In a chat the base writes the user's message; these ids
    # close it and open the answer. Without them the first end token ends the document.
    then: Sequence[int] = ()


class _Row:
    """One row of the batch: the document that is being written in it."""

    def __init__(self, number: int, opening: Opening) -> None:
        self.number, self.document = number, list[int]()
        self._given, self._then = list(opening.ids), list(opening.then)
        self.is_ended = self.has_written = False

    def take(self, sampled: int, end_ids: Collection[int]) -> int:
        """Appends the next token, given or sampled, and returns it."""
        is_end = not self._given and sampled in end_ids
        if is_end and self._then:
            self._given, self._then, is_end = self._then, [], False
        self.has_written |= not self._given
        token = self._given.pop(0) if self._given else sampled
        self.document.append(token)
        self.is_ended = is_end
        return token


@torch.inference_mode()
def write_documents(
    base: LlamaForCausalLM,
    openings: Sequence[Opening],
    end_ids: Collection[int],
    length: int,
    settings: ReplaySettings,
    tokens: float = math.inf,
) -> Iterator[list[int]]:
    """Yields documents that a model writes, in the order in which they were begun.

    A row of the batch whose document is complete begins the next one at once: attention does not
    look over the border between two documents of a row, as in packed training sequences. Where EOS
    begins documents, no document ends with one: the next one begins with it.

    Args:
        openings: each is drawn as often as any other.
        end_ids: a document ends with any of them.
        length: the most tokens of a document; one that reaches it has no end token.
        settings: temperature, seed, and number of documents that are written at a time.
        tokens: stop when all documents have this many together. Unfinished ones are yielded as
            they are, unless the base has written nothing in them yet.
    """
    generator, draw = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    device, size, capacity = base.lm_head.weight.device, settings.batch_size, 2 * length
    cache = KVCache(base, size, capacity)
    rows = [_Row(number, draw.choice(openings)) for number in range(size)]
    numbers = torch.zeros(size, capacity, dtype=torch.int64, device=device)
    complete: dict[int, list[int]] = {}
    started, yielded, finished = size, 0, 0
    sampled = [-1] * size  # every document begins with tokens that are given
    while True:
        for index, row in enumerate(rows):
            if row.is_ended or len(row.document) == length:
                complete[row.number] = document = row.document
                if len(document) > 1 and row.is_ended and document[-1] == document[0]:
                    document.pop()
                finished += len(document)
                rows[index] = _Row(started, draw.choice(openings))
                started += 1
        while yielded in complete:
            yield complete.pop(yielded)
            yielded += 1
        begun = [row for row in rows if row.has_written]
        if finished + sum(len(row.document) for row in begun) >= tokens:
            break
        if cache.length == capacity:  # no document reaches back further than `length`
            for buffer in (*cache.keys, *cache.values, numbers):
                buffer[:, :length] = buffer[:, length:].clone()
            cache.length = length
        ids = [row.take(token, end_ids) for row, token in zip(rows, sampled, strict=True)]
        numbers[:, cache.length] = torch.tensor([r.number for r in rows], device=device)
        inputs = torch.tensor(ids, device=device)[:, None]  # (B, 1)
        x = base.model(inputs, cache, numbers[:, : cache.length + 1])
        logits = base.lm_head(x[:, -1])  # (B, V)
        sampled = sample(logits, settings.temperature, 1.0, generator)[:, 0].tolist()
    complete |= {row.number: row.document for row in begun}
    yield from (complete[number] for number in sorted(complete))


def rows_at_a_time(config: ModelConfig, length: int, tokens: int) -> int:
    """Returns how many documents of up to `length` tokens are written at the same time.

    More are faster, by twice from 16 to 64 on a CPU. There are 64, if as many of full length are
    needed and their keys and values, in two bytes each, take no more than 16 GiB.
    """
    width = 2 * config.num_key_value_heads * config.head_dim
    row_bytes = 2 * config.num_hidden_layers * width * 2 * length
    return max(1, min(64, tokens // length, (16 << 30) // row_bytes))


def read_openings(
    file: str, model: str | Path, tokenizer: Tokenizer, ends: Collection[int], length: int
) -> list[Opening]:
    """Returns what the base's documents begin with.

    A base without a chat template writes text: from what stands before a document in training (BOS,
    or EOS where no BOS is added), or from each line of a file. A base with one also writes chats.
    Without a file it makes up the user's message too, from the header that stands before it (Xu et
    al., "Magpie", 2024), and half of the documents are plain text; there are no chats if `length`
    has no room for the headers. With a file each line is a user's message.

    Args:
        file: UTF-8 text; empty lines are passed over. "": none.
        length: tokens of a document; an opening leaves room for one at least.

    Raises:
        ConfigError: no file, and neither BOS nor EOS.
        DataError: the file cannot be read, has no prompt, or one that is too long; or the chat
            template cannot be used.
    """
    start = tokenizer.document_start()
    template = ChatTemplate.load(model, tokenizer) if own_template(model) else None
    if template is not None:
        template.date = DATE
    if not file:
        if not start:
            raise ConfigError(
                f"replay.share: {tokenizer.path} has no BOS or EOS that the base could write from; "
                "give short texts with replay.prompts, or name text with replay.data instead"
            )
        chat = Opening(()) if template is None else _chat_opening(template, tokenizer, ends)
        has_room = 0 < len(chat.ids) + len(chat.then) < length
        return [Opening(start), chat] if has_room else [Opening(start)]
    try:
        lines = user_path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"replay.prompts {file}: cannot be read as text: {error}") from None
    openings = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if template is None:
            ids = start + tokenizer.encode(line)
        else:
            ids = template.encode_prompt([{"role": "user", "content": line}])
        if len(ids) >= length:
            raise DataError(
                f"{file}:{number}: a prompt of {len(ids)} tokens, not under data.seq_len {length}"
            )
        openings.append(Opening(ids))
    if not openings:
        raise DataError(f"replay.prompts {file}: has no line of text to use as a prompt")
    return openings


def _chat_opening(template: ChatTemplate, tokenizer: Tokenizer, ends: Collection[int]) -> Opening:
    """Returns a user's message without its text, and what stands between it and the answer."""
    message = "\ue000"  # a private character: no template has it
    text = template.render([{"role": "user", "content": message}], add_generation_prompt=True)
    before, _, after = text.partition(message)
    header, then = (tokenizer.encode(part, special=True) for part in (before, after))
    return Opening(header, then if then and then[0] in ends else ())


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
    with others a few draws differ, and the text is as good. Raises ConfigError and DataError as
    `read_openings` and `cached`.

    Args:
        length: the most tokens of a document.
        dtype, device: of the base while it writes; the device holds it whole.
    """
    rows = settings.batch_size or rows_at_a_time(checkpoint.config, length, settings.tokens)
    settings = replace(settings, batch_size=rows)
    ends = end_ids(checkpoint.config, tokenizer)
    openings = read_openings(settings.prompts, checkpoint.path, tokenizer, ends, length)
    inside = contained_checkpoint(checkpoint)
    made_of = {
        "base_sha256": inside.sha256(cache_dir),
        "tokenizer_sha256": tokenizer.fingerprint,
        "tokens": settings.tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "length": length,
        "openings": openings,
        "ends": sorted(ends),
    }
    record = checkpoint.config.expansion
    if record is not None and record.computation is not None:  # older records keep their cache
        made_of["computation"] = record.computation
    stored_dtype = "uint16" if inside.config.vocab_size <= 1 << 16 else "uint32"
    counts = {"documents": 0, "bytes": 0}

    def write() -> Iterator[NDArray[Any]]:
        """Loads the base, and yields the first `settings.tokens` tokens of its documents."""
        base = inside.load(dtype, device)
        left = settings.tokens
        documents = write_documents(base, openings, ends, length, settings, left)
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

    index = {
        "tokenizer_sha256": tokenizer.fingerprint,
        "dtype": stored_dtype,
        "bos_id": next(iter(tokenizer.document_start()), None),
        "eos_id": tokenizer.eos_id,
        "counts": counts,
    }
    key = ["replay", FORMAT_VERSION, made_of]
    return cached(cache_dir, key, index, write(), "replay", summarize)
