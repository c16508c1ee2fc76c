"""Fixtures of the kernels' tests: inputs in every layout, the error rule, launches, guards."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro import backends

Function = Callable[..., Any]

# ---- Inputs -------------------------------------------------------------------------------------


@pytest.fixture(
    params=[torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    """The dtypes of the kernels; bf16 only where they are compiled."""
    if device == "cpu" and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    return request.param


@pytest.fixture
def half(device: str) -> torch.dtype:
    """A 16-bit dtype that runs on the device."""
    return torch.float16 if device == "cpu" else torch.bfloat16


@pytest.fixture
def normal(device: str) -> Callable[..., Tensor]:
    """`normal(*shape, seed, dtype=torch.float32)`: normal random numbers on the device."""

    def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(device, dtype)

    return draw


LAYOUTS = ("contiguous", "offset", "padded", "transposed", "every_other", "expanded")


def _in_layout(x: Tensor, layout: str) -> Tensor:
    gap = float("nan") if x.is_floating_point() else -1
    if layout == "contiguous":
        return x.contiguous()
    if layout == "offset":
        out = x.new_full((x.numel() + 1,), gap)[1:].view(x.shape)
    elif layout == "padded":
        out = x.new_full((*x.shape[:-1], x.shape[-1] + 3), gap)[..., : x.shape[-1]]
    elif layout == "transposed":
        out = x.new_full((x.shape[-1], *x.shape[:-1]), gap).movedim(0, -1)
    elif layout == "every_other":
        out = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), gap)[..., ::2]
    elif layout == "expanded":
        return x[:1].expand(x.shape)
    else:
        raise ValueError(layout)
    return out.copy_(x)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """The name of a storage layout, for `in_layout`."""
    return request.param


@pytest.fixture(params=range(len(LAYOUTS)), ids=LAYOUTS)
def layouts(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """All layouts in a cyclic order that begins with each of them once: one for each tensor."""
    return LAYOUTS[request.param :] + LAYOUTS[: request.param]


@pytest.fixture(scope="session")
def in_layout() -> Callable[[Tensor, str], Tensor]:
    """`in_layout(x, layout)`: x's values in other storage, the gaps in it filled with NaN.

    offset: not 16-byte aligned. padded: rows with a gap between. transposed: the last axis is the
    slowest. every_other: last stride 2. expanded: x[:1] repeated along the first axis by stride 0
    (other values than x).
    """
    return _in_layout


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 queries by 32 keys, so that short sequences take several tiles of either."""
    from llamapro.kernels import tiles

    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(16, 32, 4, 2))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """485 logits at a time: 5 tokens of 97 classes."""
    from llamapro.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * 97)


# ---- Values and gradients -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def in_torch() -> Callable[[Function], Function]:
    """`in_torch(ops.NAME)`: the op as plain PyTorch computes it, whatever runs the others."""
    return backends.use("torch")


def _results(
    function: Function,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    constants: Sequence[Any] = (),
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, gradients))


@pytest.fixture(scope="session")
def results() -> Callable[..., list[Tensor]]:
    """`results(function, inputs, gradients, constants=())`: its outputs and input gradients.

    `gradients` are those of the outputs; `constants` are arguments after the inputs.
    """
    return _results


@pytest.fixture(scope="session")
def compare(assert_as_exact_as_torch: Callable[[Tensor, Tensor, Tensor], None]) -> Function:
    """`compare(kernel, reference, inputs, gradients, constants=(), exact=None)`: the error rule.

    Every output and gradient of the kernel is contiguous, and as near to fp64 as those of the
    reference. `exact` computes what is true in fp64; without it the reference does.
    """

    def check(
        kernel: Function,
        reference: Function,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        constants: Sequence[Any] = (),
        exact: Function | None = None,
    ) -> None:
        def wide(values: Sequence[Any]) -> list[Any]:
            return [
                x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values
            ]

        found = _results(kernel, inputs, gradients, constants)
        expected = _results(reference, inputs, gradients, constants)
        true = _results(exact or reference, wide(inputs), wide(gradients), wide(constants))
        assert all(x.is_contiguous() for x in found)
        for ours, theirs, best in zip(found, expected, true, strict=True):
            assert_as_exact_as_torch(ours, theirs, best)

    return check


@pytest.fixture(scope="session")
def opcheck() -> Function:
    """`opcheck(op, arguments)`: the op's schema is true, and its fake tensors are like real ones.

    That it goes through AOTAutograd is held by the test that compiles each op.
    """
    return partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))


# ---- What is launched and written ---------------------------------------------------------------


class _Launches:
    """Stands in for a kernel: launches it, and keeps the arguments by name."""

    def __init__(self, kernel: Any, seen: list[dict[str, Any]], name: str):
        self.kernel, self.seen, self.name = kernel, seen, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.seen.append(named | {"grid": grid, "kernel": self.name})
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """`launches_of(module, *kernel_names)`: their launches' arguments, as they are made.

    A launch also has its "grid" and the name of its "kernel".
    """

    def watch(module: ModuleType, *names: str) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        for name in names:
            monkeypatch.setattr(module, name, _Launches(getattr(module, name), seen, name))
        return seen

    return watch


GUARD = 64


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts a margin around every tensor of `torch.empty` and `torch.empty_like`, and checks it.

    What a kernel writes outside its output is found when the test ends; what it leaves unwritten
    inside, or reads from it, is NaN.
    """
    empty = torch.empty
    made: list[tuple[Tensor, int]] = []

    def guarded_empty(*size: Any, **options: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        storage = empty(shape.numel() + 2 * GUARD, **options)
        storage.fill_(float("nan") if storage.is_floating_point() else -77)
        made.append((storage, shape.numel()))
        return storage[GUARD : GUARD + shape.numel()].view(shape)

    def guarded_empty_like(x: Tensor, **options: Any) -> Tensor:
        options.pop("memory_format", None)
        return guarded_empty(x.shape, **{"dtype": x.dtype, "device": x.device} | options)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", guarded_empty_like)
    yield
    for storage, size in made:
        margins = torch.cat((storage[:GUARD], storage[GUARD + size :]))
        intact = margins.isnan() if margins.is_floating_point() else margins == -77
        assert intact.all(), f"written outside an output of {size} elements"
