"""Checkpoint directories in Hugging Face layout, opened with every check.

Names, sizes and shapes are checked before memory is taken for them, because a stranger may have
made the files. A model is mapped (`load`), so it costs one copy, shared between the processes of a
machine.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llamapro.checkpoints.hub import COMPANION_FILES, repository, resolve
from llamapro.checkpoints.tensors import (
    DTYPES,
    StoredTensor,
    combine_hashes,
    hash_tensors,
    read_header,
)
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, Problems
from llamapro.files import read_json, refuse_large
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory whose files are complete and have the right shapes.

    Attributes:
        path: the directory.
        config: its `config.json`.
        tensors: name -> where it is stored, in the order of the model's own parameters.
        repository: "owner/name" if it was fetched from the hub.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    repository: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Opens a directory, or `hf://owner/name[@revision]`; reads headers only.

        Raises:
            ConfigError: `config.json` is missing or describes another kind of model, or the name
                is of another form.
            CheckpointError: naming the file, and every tensor that is missing, unexpected or of
                another shape than `config.json` says; or the hub does not give the files.
        """
        name, path = repository(path), resolve(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint directory")
        files = _weight_files(path)
        if (config_file := path / "config.json").exists():
            refuse_large(config_file)
        config = ModelConfig.from_file(config_file)
        stored: dict[str, StoredTensor] = {}
        for file in files:
            tensors = read_header(file)
            for twice in tensors.keys() & stored.keys():
                raise CheckpointError(f"{file}: {twice!r} is also in {stored[twice].file.name}")
            stored |= tensors
        return cls(path, config, _match(path, config, stored), name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the bytes."""
        nbytes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            nbytes[tensor.dtype] += tensor.nbytes
        return DTYPES[nbytes.most_common(1)[0][0]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def sha256(self) -> str:
        """Returns the identity of the weights: names, dtypes, shapes and bytes, not the files."""
        hashes = hash_tensors(self.tensors.values(), f"hash {self.path.name}")
        return combine_hashes((t, hashes[t.name]) for t in self.tensors.values())

    def layer(self, index: int) -> dict[str, StoredTensor]:
        """Returns one block's tensors under their names inside the block."""
        prefix = f"model.layers.{index}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def companions(self) -> list[Path]:
        """Returns the tokenizer, generation and licence files beside the weights."""
        return sorted(f for pattern in COMPANION_FILES for f in self.path.glob(pattern))

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns name -> mapped tensor, converted if `dtype` is another one than the file's."""
        tensors = {}
        for file in sorted({t.file for t in self.tensors.values()}):
            try:
                tensors.update(load_file(file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: {error}") from None
        return {name: tensors[name].to(dtype or tensors[name].dtype) for name in self.tensors}

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> LlamaForCausalLM:
        """Returns the model with these weights, frozen and in evaluation mode.

        Memory holds one copy of the weights: the model is built on the meta device and the mapped
        tensors are assigned to it.
        """
        model = build_on_meta(self.config)
        load_tensors(model, self.state_dict(dtype))
        return model.to(device).requires_grad_(False).eval()


def _weight_files(path: Path) -> list[Path]:
    """Lists the shards, from the index if there is one."""
    index = path / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: not a safetensors index: no 'weight_map'")
        names: set[str] = set()
        for name in weight_map.values():
            # A name with a path could read files the user never meant to hand over. A link is
            # followed: the user made it, or Hugging Face's cache, whose files all are links.
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                shown = repr(name)[:80]
                raise CheckpointError(f"{index}: shard name {shown} is not a plain file name")
            if name not in names and not (path / name).is_file():
                raise CheckpointError(f"{path / name}: missing, but {INDEX_FILE} lists it")
            names.add(name)
        return [path / name for name in sorted(names)]
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    if any(path.glob("*.pth")):
        fix = f"this is a Meta release: run 'llamapro from-meta {path} OUT_DIR' first"
    elif any(path.glob("pytorch_model*.bin")):
        fix = "pickled weights (pytorch_model*.bin) are not read: save the model as safetensors"
    else:
        fix = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    raise CheckpointError(f"{path}: no weights found; {fix}")


def _match(
    path: Path, config: ModelConfig, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Checks names and shapes against the configuration; returns them in the model's order."""
    # Before a model is built, even on the meta device: a config.json can ask for 10^12 layers.
    widest = max(config.vocab_size, config.intermediate_size)
    widest = max(widest, config.num_attention_heads * config.head_dim)
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    if config.num_hidden_layers > len(stored) or config.hidden_size * widest > numbers:
        raise CheckpointError(
            f"{path / 'config.json'}: describes {config.num_hidden_layers:,} layers and a matrix "
            f"of {config.hidden_size:,} x {widest:,}, but the files hold {len(stored):,} tensors "
            f"of {numbers:,} numbers in all"
        )
    expected = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    # Old versions of transformers wrote these; both are derived and not read.
    derived = [n for n in stored if n.endswith("rotary_emb.inv_freq")]
    derived += ["lm_head.weight"] if config.tie_word_embeddings else []
    wrong = Problems()
    for name, shape in expected.items():
        if name not in stored:
            wrong.add(f"missing tensor {name!r}, expected {list(shape)}")
        elif stored[name].shape != shape:
            found = stored[name]
            wrong.add(
                f"{found.file.name}: {name!r} is {list(found.shape)}, "
                f"config.json says {list(shape)}"
            )
    for name in stored:
        if name not in expected and name not in derived:
            wrong.add(f"{stored[name].file.name}: unexpected tensor {name!r}")
    wrong.check(CheckpointError, str(path))
    return {name: stored[name] for name in expected}
