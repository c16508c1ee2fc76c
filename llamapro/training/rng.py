"""The generators that Python, NumPy and PyTorch share within a process: seeded, saved, restored.

The data order and the first weights have generators of their own and do not depend on these. They
are kept for what a change to the model may draw, such as dropout: so that a run with it resumes as
exactly as one without. All states are tensors, for a safetensors file.
"""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llamapro.checkpoints.run import RNG_FILE
from llamapro.checkpoints.tensors import DTYPE_CODES, read_header
from llamapro.errors import CheckpointError
from llamapro.training.distributed import Ranks

Uint32s = np.ndarray[Any, np.dtype[np.uint32]]

_WORDS = 624  # of the Mersenne twister's state; its position in them follows


def seed_all(seed: int, rank: int, step: int = 0) -> None:
    """Seeds all generators of this process, PyTorch's of every device among them.

    Args:
        seed: `train.seed`.
        rank: of this process; each draws other numbers.
        step: optimizer steps made: after a restart with another number of processes, what was drawn
            before is not drawn again.
    """
    # The spawn key keeps (seed, rank, step) apart from every other triple.
    words = np.random.SeedSequence(seed, spawn_key=(rank, step)).generate_state(3, np.uint64)
    python, numpy, pytorch = words.tolist()
    random.seed(python)
    np.random.seed([numpy >> 32, numpy & 0xFFFFFFFF])
    torch.manual_seed(pytorch)


def capture(device: torch.device) -> dict[str, Tensor]:
    """Returns the state of each generator, in new tensors on the CPU.

    Args:
        device: where this process computes; only of a GPU, the state of its generator is kept.

    Returns:
        "python" and "numpy", (625,) int32; "python.gauss" and "numpy.gauss", () float64, the number
        that `random.gauss` and `np.random.randn` have ready, NaN if none; "torch" and on a GPU
        "cuda", uint8.
    """
    _, words, gauss = random.getstate()
    # `legacy` gives a dict, where the tuple's type is not known.
    numpy: Any = np.random.get_state(legacy=False)
    key = np.append(numpy["state"]["key"], np.uint32(numpy["state"]["pos"]))
    states = {
        "python": _from_words(np.array(words, dtype=np.uint32)),
        "python.gauss": _from_gauss(gauss),
        "numpy": _from_words(key),
        "numpy.gauss": _from_gauss(numpy["gauss"] if numpy["has_gauss"] else None),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Puts every generator back to where `capture` found it.

    Without "cuda" among the states a GPU's generator is left as it is; on the CPU it is not used.

    Raises:
        ValueError, RuntimeError: a state is none of its generator.
    """
    words, gauss = _to_words(states["python"]), _to_gauss(states["python.gauss"])
    random.setstate((3, tuple(words.tolist()), gauss))
    words, gauss = _to_words(states["numpy"]), _to_gauss(states["numpy.gauss"])
    *_, position = words.tolist()
    np.random.set_state(("MT19937", words[:_WORDS], position, int(gauss is not None), gauss or 0.0))
    # Of a view, PyTorch would read memory beyond it.
    torch.set_rng_state(states["torch"].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)


def gather_rng(ranks: Ranks) -> dict[str, Tensor]:
    """Returns on the main rank what all ranks `capture`, else nothing; every rank must call it.

    Returns:
        Name -> states, (world size, ...).
    """
    found: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(capture(ranks.device), found, group=ranks.patient)
    return {name: torch.stack([f[name] for f in found]) for name in found[0]} if found else {}


def load_rng(path: Path, ranks: Ranks, seed: int, step: int) -> None:
    """Gives this process's random generators the states that this rank saved.

    If another number of processes saved them, and for a GPU that takes over from a CPU, there is
    none to take: these start anew, from `seed_all(seed, rank, step)`.

    Args:
        path: the training checkpoint.
        ranks: from `process_group`.
        seed: `train.seed`.
        step: optimizer steps made.

    Raises:
        CheckpointError: the file holds no states of these generators.
    """
    seed_all(seed, ranks.rank, step)
    file = path / RNG_FILE
    stored, here = read_header(file), capture(ranks.device)
    if "cuda" not in stored:
        here.pop("cuda", None)
    expected = {name: (DTYPE_CODES[t.dtype], tuple(t.shape)) for name, t in here.items()}
    found = {name: (t.dtype, t.shape[1:]) for name, t in stored.items() if name in here}
    sizes = {tensor.shape[:1] for tensor in stored.values()}
    if found != expected or len(sizes) != 1:
        raise CheckpointError(
            f"{file}: holds no states of this Python's, NumPy's and PyTorch's generators; resume "
            "with the versions that saved it"
        )
    if sizes != {(ranks.world_size,)}:
        return
    try:
        restore({name: stored[name].read()[ranks.rank] for name in found}, ranks.device)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from None


def _from_words(words: Uint32s) -> Tensor:
    return torch.from_numpy(words.view(np.int32))  # safetensors' uint32 is not everywhere


def _to_words(state: Tensor) -> Uint32s:
    words: Uint32s = state.numpy().view(np.uint32)
    if words[_WORDS] > _WORDS:  # NumPy would read beyond its state
        raise ValueError(f"position {words[_WORDS]} in {_WORDS} words")
    return words


def _from_gauss(value: float | None) -> Tensor:
    return torch.tensor(math.nan if value is None else value, dtype=torch.float64)


def _to_gauss(state: Tensor) -> float | None:
    value = state.item()
    return None if math.isnan(value) else value
