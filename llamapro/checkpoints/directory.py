"""Checkpoint directories in Hugging Face layout, opened with every check.

Names, sizes and shapes are checked before memory is taken for them, because a stranger may have
made the files. `load` maps a model, so the processes of a machine share one copy.
"""

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamapro.checkpoints.hub import COMPANION_FILES, repository, resolve, suggest_hub
from llamapro.checkpoints.matching import have_same_values, match
from llamapro.checkpoints.tensors import (
    DTYPES,
    StoredTensor,
    combine_hashes,
    hash_tensors,
    read_safetensors,
)
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, warn
from llamapro.expansion import ZERO_IN_NEW_BLOCKS
from llamapro.files import read_json
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Weights in other layouts, which the Hugging Face repository of a model may have beside its own.
OTHER_WEIGHTS = ("pytorch_model*.bin", "consolidated*.pth", "consolidated*.safetensors")
# Suffixes of weights in formats that are not read.
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".distcp", ".h5", ".msgpack", ".npz", ".onnx")
_STATE = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")  # of trainers
MISTRAL_LAYOUT = (
    "this is Mistral's own layout: use config.json and model*.safetensors of the same repository"
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory whose files are complete and have the right shapes."""

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]  # by name, in the order of the model's own parameters
    repository: str | None = None  # "owner/name" if it was fetched from the hub

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Opens a directory, or `hf://owner/name[@revision]`; reads headers only.

        Raises ConfigError if `config.json` is missing or describes another kind of model, and
        CheckpointError that names the file, and every tensor that does not fit `config.json`.
        """
        name, path = repository(path), resolve(path)
        if not path.is_dir():
            fix = f" (give its directory, {path.parent})" if path.exists() else suggest_hub(path)
            raise CheckpointError(f"{path}: no such checkpoint directory{fix}")
        files = _weight_files(path)
        config = ModelConfig.from_file(path / "config.json")
        stored: dict[str, StoredTensor] = {}
        for file in files:
            tensors = read_safetensors(file)[0]
            for twice in tensors.keys() & stored.keys():
                if not have_same_values(tensors[twice], stored[twice]):
                    other = stored[twice].file.name
                    raise CheckpointError(
                        f"{file}: {twice!r} is also in {other}, with other values; keep one"
                    )
            stored |= tensors
        checkpoint = cls(path, config, match(path, config, stored), name)
        said = config.raw.get("dtype") or config.raw.get("torch_dtype")
        found = str(checkpoint.dtype).removeprefix("torch.")
        kinds = sorted({t.dtype for t in checkpoint.tensors.values() if len(t.shape) > 1})
        if said is None and len(kinds) > 1:
            warn(
                f"{path}: matrices are {' and '.join(kinds)}, and config.json names no dtype; they "
                f"are computed in {found}, by transformers in that of the first tensor"
            )
        if said is not None and str(said).removeprefix("torch.") not in (found, "auto"):
            warn(
                f"{path}: the weights are {found}, config.json says dtype {said!r:.80}; they are "
                "used as they are stored, transformers converts them"
            )
        return checkpoint

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

    def sha256(self, cache_dir: str | Path | None = None) -> str:
        """Returns the identity of the weights: names, dtypes, shapes and bytes, not the files."""
        hashes = hash_tensors(self.tensors.values(), f"hash {self.path.name}", cache_dir)
        return combine_hashes((t, hashes[t.name]) for t in self.tensors.values())

    def layer(self, index: int) -> dict[str, StoredTensor]:
        """Returns one block's tensors under their names inside the block."""
        prefix = f"model.layers.{index}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def is_identity(self, index: int) -> bool:
        """Returns whether a block adds exactly 0, as a new block does before it is trained."""
        last = [t for name, t in self.layer(index).items() if name in ZERO_IN_NEW_BLOCKS]
        return not any(tensor.map().any() for tensor in last)

    def companions(self) -> list[Path]:
        """Returns the tokenizer, generation and licence files beside the weights."""
        return sorted(f for pattern in COMPANION_FILES for f in self.path.glob(pattern))

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns name -> mapped tensor, converted if `dtype` is another one than the file's."""
        return {n: t.map().to(dtype or DTYPES[t.dtype]) for n, t in self.tensors.items()}

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> LlamaForCausalLM:
        """Returns the model with these weights, frozen and in evaluation mode.

        The dtype is that of most of the bytes, or `dtype`; it computes in one alone.
        Memory holds one copy of the weights: the model is built on the meta device and the mapped
        tensors are assigned to it.
        """
        model = build_on_meta(self.config)
        load_tensors(model, self.state_dict(dtype or self.dtype))
        return model.to(device).requires_grad_(False).eval()


def _weight_files(path: Path) -> list[Path]:
    """Lists the file or the shards that transformers reads; says so if there are others."""
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    others = [f.name for pattern in OTHER_WEIGHTS for f in path.glob(pattern)]
    if index.exists() or _is_there(single):
        if (adapter := path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{adapter}: a PEFT adapter beside whole weights, which transformers adds to them: "
                "merge it (merge_and_unload), or remove it if it is merged already"
            )
        for name in sorted(others):
            warn(f"{path / name}: not read; the model is in safetensors, as for transformers")
    if _is_there(single):
        if index.exists() and any(path.glob("*-of-*.safetensors")):
            warn(f"{single}: read, as transformers does; {INDEX_FILE} and its shards are not")
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: not a safetensors index: no 'weight_map'")
        names: set[str] = set()
        for name in weight_map.values():
            name = name.removeprefix("./") if isinstance(name, str) else name
            # A name with a path could read files the user never meant to hand over. A link is
            # followed: the user made it, or Hugging Face's cache, whose files all are links.
            if not isinstance(name, str) or not re.fullmatch(
                r"[^/\\\x00-\x1f\x7f]+\.safetensors", name
            ):
                shown = repr(name)[:80]
                raise CheckpointError(
                    f"{index}: shard name {shown} is not a plain file name in .safetensors"
                )
            if name not in names and not _is_there(path / name):
                raise CheckpointError(f"{path / name}: missing, but {INDEX_FILE} lists it")
            names.add(name)
        return [path / name for name in sorted(names)]
    inside = [f for kind in ("*", "snapshots/*") for f in path.glob(f"{kind}/config.json")]
    steps = ("", "step-*/", "checkpoints/step-*/")  # a training checkpoint, and where others are
    foreign = [f for f in path.iterdir() if f.suffix in _FOREIGN and not f.name.startswith(_STATE)]
    if any(path.glob("consolidated*.pth")):
        release = shlex.quote(str(path))
        fix = f"this is a Meta release, convert it first: llamapro from-meta {release} OUT_DIR"
    elif any(path.glob("consolidated*.safetensors")):
        fix = MISTRAL_LAYOUT
    elif any(any(path.glob(f"{kind}trainable.safetensors")) for kind in steps):
        run = shlex.quote(str(path))
        fix = f"this is a run, make a model of it: llamapro merge EXPANDED_DIR {run} OUT_DIR"
    elif any(path.glob("adapter_model*")):
        fix = "this is a PEFT adapter: merge it into its base first (merge_and_unload)"
    elif any(path.glob("*.gguf")):
        fix = f"run 'llamapro from-gguf FILE OUT_DIR' on {next(path.glob('*.gguf')).name} first"
    elif inside:
        newest = max(inside, key=lambda file: file.lstat().st_mtime).parent
        fix = f"give the directory of a model inside it, such as {newest}"
    elif foreign:
        largest = max(foreign, key=lambda file: (file.lstat().st_size, file.name))
        what = "pickled weights" if largest.suffix in _FOREIGN[:5] else "weights in another format"
        fix = f"{what} ({largest.name}) are not read: save the model as safetensors"
    else:
        found = ", ".join(sorted(f.name for f in path.glob("*.safetensors"))[:3])
        fix = f"expected {SINGLE_FILE} or {INDEX_FILE}" + (f", found {found}" if found else "")
    raise CheckpointError(f"{path}: no weights found; {fix}")


def _is_there(file: Path) -> bool:
    """Says whether there is a file, or a link to one that is missing: its reader says so."""
    return file.exists() or file.is_symlink()
