"""Random generators go on where they were saved, and start apart on every rank."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llamapro.errors import CheckpointError
from llamapro.training.distributed import Ranks, process_group
from llamapro.training.rng import capture, gather_rng, load_rng, restore, seed_all

CPU = torch.device("cpu")


def draw() -> list[float]:
    """Three numbers of each generator, by each way it has of making them."""
    found = [random.random(), *(random.gauss(0, 1) for _ in range(3)), random.getrandbits(40)]
    found += [np.random.rand(), *np.random.randn(3).tolist(), np.random.randint(1 << 30)]
    return found + torch.rand(3).tolist() + torch.randn(3).tolist()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Other tests' draws do not matter here."""
    seed_all(3, 0)


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A group of one process, this one."""
    with process_group("cpu") as ranks:
        yield ranks


@pytest.mark.parametrize("gauss", [0, 1, 2, 3])
def test_every_generator_goes_on_where_it_was(gauss: int) -> None:
    """Also after an odd number of normal draws, when Python and NumPy have the next one ready."""
    for _ in range(gauss):
        random.gauss(0, 1), np.random.randn(), torch.randn(())
    state = capture(CPU)
    expected = draw()
    assert draw() != expected
    restore(state, CPU)
    assert draw() == expected


def test_a_state_stays_when_its_generator_goes_on() -> None:
    """What is written in the background is a copy, not a view of the generator."""
    state = capture(CPU)
    before = {name: tensor.clone() for name, tensor in state.items()}
    draw()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]) or tensor.isnan()


def test_every_seed_rank_and_step_draws_other_numbers() -> None:
    """And the same draws the same, in every generator; seeds go up to 2^64 - 1."""
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1 << 32, 0, 0), ((1 << 64) - 1, 7, 500)]
    drawn = []
    for key in keys:
        seed_all(*key)
        drawn.append(draw())
        seed_all(*key)
        assert draw() == drawn[-1]
    assert all(len(set(numbers)) == len(keys) for numbers in zip(*drawn, strict=True))


def save(folder: Path, states: dict[str, torch.Tensor]) -> Path:
    save_file(states, folder / "rng.safetensors")
    return folder


def test_a_rank_takes_its_own_state(tmp_path: Path, alone: Ranks) -> None:
    """Of two ranks' states, the second one takes the second."""
    seed_all(3, 0)
    first = gather_rng(alone)
    seed_all(3, 1)
    second = gather_rng(alone)
    expected = draw()
    states = {name: torch.cat([first[name], second[name]]) for name in first}
    ranks = Ranks(1, 2, alone.device, alone.mesh, alone.patient)
    load_rng(save(tmp_path, states), ranks, seed=0, step=0)
    assert draw() == expected


@pytest.mark.parametrize("change", ["more ranks", "fewer ranks"])
def test_another_number_of_ranks_starts_anew(tmp_path: Path, alone: Ranks, change: str) -> None:
    """From the seed, the rank and the step."""
    states = gather_rng(alone)
    world_size = 3
    if change == "fewer ranks":
        states = {name: torch.cat([state, state]) for name, state in states.items()}
        world_size = 1
    ranks = Ranks(0, world_size, alone.device, alone.mesh, alone.patient)
    load_rng(save(tmp_path, states), ranks, seed=5, step=40)
    found = draw()
    seed_all(5, 0, 40)
    assert found == draw()


def test_a_gpus_state_is_not_needed_on_a_cpu(tmp_path: Path, alone: Ranks) -> None:
    """The others are taken."""
    states = gather_rng(alone) | {"cuda": torch.zeros(1, 16, dtype=torch.uint8)}
    expected = draw()
    load_rng(save(tmp_path, states), alone, seed=0, step=0)
    assert draw() == expected


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "one missing": lambda s: s.pop("numpy"),
    "another size": lambda s: s.update(torch=s["torch"][:, :-1]),
    "another dtype": lambda s: s.update(python=s["python"].long()),
    "another rank count in one": lambda s: s.update(numpy=torch.cat([s["numpy"]] * 2)),
    "Python's position": lambda s: s["python"].__setitem__((0, -1), 625),
    "NumPy's position": lambda s: s["numpy"].__setitem__((0, -1), 625),
    "a negative position": lambda s: s["numpy"].__setitem__((0, -1), -1),
    "PyTorch's content": lambda s: s["torch"].fill_(255),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_states_of_other_generators_are_refused(tmp_path: Path, alone: Ranks, kind: str) -> None:
    """By the file's name, before any of them could read beyond its memory."""
    states = gather_rng(alone)
    DAMAGE[kind](states)
    states = {name: state.contiguous() for name, state in states.items()}
    with pytest.raises(CheckpointError, match=r"rng.safetensors: (holds no states|damaged)"):
        load_rng(save(tmp_path, states), alone, seed=0, step=0)


@pytest.mark.gpu
def test_a_gpus_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    """And starts from the seed where a CPU had saved."""
    with process_group("cuda") as ranks:
        torch.rand(5, device=ranks.device)
        path = save(tmp_path, gather_rng(ranks))
        expected = torch.rand(5, device=ranks.device)
        load_rng(path, ranks, seed=0, step=0)
        assert torch.equal(torch.rand(5, device=ranks.device), expected)
        states = load_file(path / "rng.safetensors")
        del states["cuda"]
        load_rng(save(tmp_path, states), ranks, seed=4, step=9)
        found = torch.rand(5, device=ranks.device)
        seed_all(4, 0, 9)
        assert torch.equal(torch.rand(5, device=ranks.device), found)
