"""Adds tokens to a vocabulary: rows in embedding and head, and names in the tokenizer's files.

The id of a token is the number of its row, so the first new id is the base's `vocab_size`. Each new
row is the mean of the base's rows, which is what the model expects of a token it knows nothing
about (Hewitt, 2021). The base's rows stay in front, byte for byte.

The tokenizer's files change; their former content is kept beside them, under `BASE_PREFIX`.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llamapro.checkpoints.tensors import CHUNK_BYTES, DTYPES, StoredTensor, tensor_chunks
from llamapro.errors import ConfigError
from llamapro.files import write_json
from llamapro.text.token_files import COMPANIONS, read_object, read_roles
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import JSON_NAME, AddedToken

# Matched by `hub.COMPANION_FILES`, so that they travel with the weights.
BASE_PREFIX = "tokenizer_base."
_CONFIG_NAME, _ADDED_NAME = COMPANIONS[:2]


def mean_rows(stored: StoredTensor, count: int) -> Iterator[memoryview]:
    """Yields rows that are the mean of a matrix', summed in fp64 and rounded once to its dtype."""
    rows, size = stored.shape
    total = torch.zeros(size, dtype=torch.float64)
    for part in stored.map().split(max(1, CHUNK_BYTES * rows // stored.nbytes)):
        total += part.double().sum(0)
    return tensor_chunks((total / rows).to(DTYPES[stored.dtype]).expand(count, -1))


def check_tokens(directory: Path, tokens: Sequence[str], vocab_size: int) -> None:
    """Raises ConfigError or DataError unless tokens can be added to a checkpoint's tokenizer."""
    tokenizer = Tokenizer.load(directory)
    tokenizer.check_fits(vocab_size, str(directory))
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--add-tokens: {tokenizer.path} has token {tokenizer.vocab_size - 1} without a row, "
            f"whose id a new row would take; remove it from the tokenizer's files first"
        )
    raw = read_object(directory / JSON_NAME)
    # Named in the vocabulary, or written out by it: the libraries would take that id instead.
    known = set(raw["model"]["vocab"]) if raw and isinstance(raw["model"]["vocab"], dict) else set()
    known |= tokenizer.special_tokens.keys()
    written = {tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size)}
    for name in tokens:
        if not name.strip() or tokens.count(name) > 1:
            raise ConfigError(f"--add-tokens: {name!r} is empty or given twice")
        if name in known or name.replace("\u2581", " ").encode() in written:
            raise ConfigError(
                f"--add-tokens: {name!r} is in the vocabulary of {tokenizer.path} already; leave "
                "it out: the model has a row for it"
            )


def add_tokens(directory: Path, tokens: Sequence[str], vocab_size: int) -> None:
    """Writes control tokens into a checkpoint's tokenizer files; `check_tokens` comes before.

    `vocab_size` is the number of rows of the base's embedding, and so the id of the first token. If
    the base's tokenizer has fewer tokens, the rows between get names too ("<|unused_32000|>"),
    because the tokenizers library numbers tokens without a gap, whatever ids a file says.
    """
    files = _changed_files(directory, tokens, vocab_size)
    for kept in _kept_files(directory)[::-1]:  # of an expansion before
        kept.rename(directory / f"{BASE_PREFIX}{kept.name}")
    for name, content in files.items():
        shutil.copyfile(directory / name, directory / f"{BASE_PREFIX}{name}")
        write_json(directory / name, content)


def restore_tokenizer(directory: Path) -> None:
    """Undoes `add_tokens`: the base's files get their names back."""
    for kept in _kept_files(directory):
        kept.replace(directory / kept.name.removeprefix(BASE_PREFIX))


def _kept_files(directory: Path) -> list[Path]:
    """Returns the base's files, and after them those of the base's own base."""
    return sorted(directory.glob(f"{BASE_PREFIX}*"), key=lambda file: len(file.name))


def _changed_files(
    directory: Path, tokens: Sequence[str], vocab_size: int
) -> dict[str, dict[str, Any]]:
    """Returns the tokenizer files that are to change, name -> JSON object."""
    tokenizer = Tokenizer.load(directory)
    by_id = {token.id: name for name, token in tokenizer.added.items()}
    # Those that a role alone names are numbered by whoever reads the files: they are listed now.
    first = next(i for i in range(tokenizer.vocab_size, 0, -1) if i - 1 not in by_id)
    names = [by_id.get(i, f"<|unused_{i}|>") for i in range(first, vocab_size)]
    ids = {name: i for i, name in enumerate([*names, *tokens], first)}

    def entry(name: str) -> dict[str, Any]:
        flags = asdict(tokenizer.added.get(name, AddedToken(0, special=True)))
        return {"content": name, "normalized": False, **flags, "id": (older | ids)[name]}

    raw, older = (read_object(directory / name) for name in (JSON_NAME, _ADDED_NAME))
    listed, changed = raw.get("added_tokens", []), {}
    missing = ids.keys() - {token["content"] for token in listed}
    listed = sorted([*listed, *map(entry, missing)], key=lambda token: token["id"])
    if raw:
        changed[JSON_NAME] = raw | {"added_tokens": listed}
    config = read_object(directory / _CONFIG_NAME)
    if config or not raw:
        # llama.cpp, and transformers without a tokenizer.json, read this table. Where there is one
        # transformers reads no other list and no other roles, so it must have the older ones.
        table = {t["id"]: t for t in [*map(entry, older | ids), *listed]}
        entries = {str(i): {k: v for k, v in t.items() if k != "id"} for i, t in table.items()}
        entries |= config.get("added_tokens_decoder", {})
        changed[_CONFIG_NAME] = read_roles(directory) | {"added_tokens_decoder": entries}
    return changed
