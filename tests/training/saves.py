"""What the tests of training checkpoints save, how they look at it, and how they damage it.

The tests, and the ranks that they fork, run this file by its path.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from llamapro.checkpoints.new_blocks import BlocksInfo, read_blocks
from llamapro.checkpoints.run import read_state, training_checkpoints
from llamapro.training.checkpoint import Saver
from llamapro.training.distributed import Ranks
from llamapro.training.resume import load_optimizer
from llamapro.training.settings import SaveSettings

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]
INFO = BlocksInfo("new_blocks", "ab" * 32, (1,), 0)
SHAPES = {"model.layers.1.a.weight": (5, 3), "model.layers.1.b.weight": (7,)}
Trained = tuple[dict[str, nn.Parameter], torch.optim.AdamW]


def trained(step: int, ranks: Ranks | None = None) -> Trained:
    """What trains, and AdamW after one step of it; the values depend on the step. Sharded over
    the ranks, unevenly, if there are any."""
    generator = torch.Generator().manual_seed(step)
    parameters = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator)
        whole = value if ranks is None else distribute_tensor(value, ranks.mesh, [Shard(0)])
        parameters[name] = nn.Parameter(whole)
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return parameters, optimizer


def state_at(step: int) -> dict[str, Any]:
    state = {"step": step, "tokens": 10 * step, "elapsed_s": 1.0, "loss": 2.5}
    return state | {"eval": {"code": 1.0}, "settings": {}}


def saving(in_background: bool, keep: int = 1) -> SaveSettings:
    return SaveSettings(keep=keep, background="yes" if in_background else "no")


def save_with(saver: Saver, step: int, of: Trained) -> Path:
    saved = saver.save(step, *of, INFO, state_at(step)) or saver.finish()
    assert saved is not None and saved["step"] == step
    return Path(saved["path"])


def save_step(
    run_dir: Path,
    step: int,
    ranks: Ranks,
    of: Trained | None = None,
    in_background: bool = False,
    keep: int = 99,
) -> Path:
    """Saves what is trained at the step."""
    with Saver(run_dir, saving(in_background, keep), ranks) as saver:
        return save_with(saver, step, of or trained(step, ranks))


def assert_loads(path: Path, step: int) -> None:
    """The files are what was saved, and a fresh optimizer takes the moments."""
    assert read_state(path)["step"] == step
    parameters, optimizer = trained(step)
    _, tensors, info = read_blocks(path / "trainable.safetensors")
    assert info == INFO and list(tensors) == list(parameters)
    again, fresh = trained(0)
    load_optimizer(path, again, fresh, step)
    for name, parameter in parameters.items():
        assert torch.equal(tensors[name].read(), parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            found = fresh.state[again[name]][moment]
            assert torch.equal(found, optimizer.state[parameter][moment])


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """The steps of everything in checkpoints/, which must hold nothing else."""
    found = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert found == [path.name for path in training_checkpoints(run_dir)]
    return [int(name.removeprefix("step-")) for name in found]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
