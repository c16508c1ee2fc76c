"""Switches between the three implementations of every op in `ops.py`.

    torch    the formulas of `ops.py`, as a textbook prints them: the reference
    cpu      `kernels/cpu.py`: plain PyTorch that keeps less for backward, on any device
    triton   the Triton kernels, on a GPU

`auto`, the default, takes Triton on an NVIDIA GPU wherever the kernel can run, and `cpu` everywhere
else. On AMD GPUs the kernels compile but spill registers, and nobody has timed them yet.

PyTorch's fused attention may add its gradients in another order every time on a GPU. Where all bits
must be the same, attention takes the Triton kernel or, where that cannot run, the formula.

    with backends.use("triton,attention=torch"): ...
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamapro.kernels import cpu

TRITON_OPS = ("rms_norm", "rope", "attention", "swiglu", "linear_cross_entropy")
OPS = ("linear", *TRITON_OPS, "linear_kl")
BACKENDS = ("auto", "torch", "cpu", "triton")
# From the fastest: on Hopper cuDNN's attention takes half the time of PyTorch's FlashAttention-2,
# which PyTorch would choose by itself.
SDPA_ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_chosen: dict[str, str] = dict.fromkeys(OPS, "auto")
_deterministic = [False]  # whether attention must be; the last one counts
_planned: list[torch.device] = []  # what `planning_for` names; the last one counts

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


class BackendError(ValueError):
    """An op was told to use a backend that cannot run there, or is not deterministic."""


def parse(choice: str) -> dict[str, str]:
    """Reads a choice such as "auto" or "triton,attention=torch" into a backend for each of `OPS`.

    Raises ValueError if an op or backend is unknown, or the op has no Triton kernel.
    """
    chosen = dict.fromkeys(OPS, "auto")
    for part in choice.split(","):
        op, _, backend = part.strip().rpartition("=")
        if op and op not in OPS:
            raise ValueError(f"{choice!r}: no op {op!r} (known: {', '.join(OPS)})")
        if backend not in BACKENDS:
            raise ValueError(f"{choice!r}: no backend {backend!r} (known: {', '.join(BACKENDS)})")
        if backend == "triton" and op and op not in TRITON_OPS:
            known = ", ".join(TRITON_OPS)
            raise ValueError(f"{choice!r}: {op} has no Triton kernel (known: {known})")
        chosen |= {op: backend} if op else dict.fromkeys(OPS, backend)
    return chosen


@contextmanager
def use(choice: str = "auto", deterministic_attention: bool = False) -> Iterator[None]:
    """Computes with these backends inside the with-block; the choice is read by `parse`.

    On a GPU, attention that PyTorch computes there takes the first of `SDPA_ORDER` that can run.
    With `deterministic_attention` it does so only for a single query, which nothing trains.
    """
    before = dict(_chosen)
    _chosen.update(parse(choice))
    _deterministic.append(deterministic_attention)
    has_gpu = torch.cuda.is_available()
    try:
        with sdpa_kernel(list(SDPA_ORDER), set_priority=True) if has_gpu else nullcontext():
            yield
    finally:
        _chosen.update(before)
        _deterministic.pop()


def takes_cpu() -> bool:
    """Returns whether every op on a CPU takes the backend `cpu`: none was told to take another."""
    return set(_chosen.values()) <= {"auto", "cpu"}


@contextmanager
def planning_for(device: torch.device) -> Iterator[None]:
    """Chooses inside the with-block as for tensors on this device, wherever they are.

    The device need not exist here: a GPU of another machine is taken for one that runs kernels.
    """
    _planned.append(device)
    try:
        yield
    finally:
        _planned.pop()


def choose(op: str, device: torch.device, dtype: torch.dtype, size: int) -> tuple[str, str]:
    """Returns the backend that computes an op, "torch", "cpu" or "triton", and the reason.

    `size` is the length of the input's last axis. Raises BackendError if "triton" was asked for,
    and the kernel cannot take such input; or "cpu" for attention on a GPU, and its gradients must
    be deterministic.
    """
    device = _planned[-1] if _planned else device
    backend, why = _choose(op, device, dtype, size)
    if op != "attention" or device.type != "cuda" or not _deterministic[-1]:
        return backend, why
    if _chosen[op] == "cpu":
        raise BackendError(
            "attention: on a GPU the gradients of backend 'cpu' differ from run to run, and "
            "train.deterministic_attention is true"
        )
    return ("torch" if backend == "cpu" else backend), f"{why}, deterministic"


def _choose(op: str, device: torch.device, dtype: torch.dtype, size: int) -> tuple[str, str]:
    asked = _chosen[op]
    if asked in ("torch", "cpu"):
        return asked, "asked for"
    if op not in TRITON_OPS:
        return "cpu", "no Triton kernel"
    if asked == "auto" and device.type != "cuda":
        return "cpu", f"device is {device.type}"
    if asked == "auto" and torch.version.hip:
        return "cpu", "not measured on AMD GPUs"
    reason = _cannot_run(op, device, dtype, size)
    if asked == "auto":
        return ("cpu", reason) if reason else ("triton", f"device is {device.type}")
    if reason:
        raise BackendError(f"{op}: the Triton kernel cannot run: {reason}")
    return "triton", "asked for"


def summary(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Returns one line that names the backend of each op with a Triton kernel, as `choose`."""
    sizes = dict.fromkeys(TRITON_OPS, config.hidden_size)
    sizes |= {"swiglu": config.intermediate_size}
    sizes |= {"rope": config.head_dim, "attention": config.head_dim}
    groups: dict[tuple[str, str], list[str]] = {}
    for op, size in sizes.items():
        groups.setdefault(choose(op, device, dtype, size), []).append(op)
    return "; ".join(
        f"{'all' if len(groups) == 1 else ', '.join(names)}: {backend} ({why})"
        for (backend, why), names in groups.items()
    )


def _cannot_run(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    try:
        return _triton_module(op).unsupported(device, dtype, size)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "the package triton is not installed"


def _triton_module(op: str) -> Any:
    # Written out, because `torch.compile` follows import statements but not `import_module`.
    from llamapro.kernels import attention, cross_entropy, rms_norm, rope, swiglu

    modules = {"rms_norm": rms_norm, "rope": rope, "attention": attention, "swiglu": swiglu}
    return modules.get(op, cross_entropy)


def switched(op: str) -> Callable[[Callable[Inputs, Output]], Callable[Inputs, Output]]:
    """Makes a reference formula call the function of the same name of the chosen backend."""

    def decorate(reference: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
        name = reference.__name__

        @wraps(reference)
        def call(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
            x: Any = args[0]
            backend, _ = choose(op, x.device, x.dtype, x.shape[-1])
            # With one query, a tile of the kernel would be almost empty.
            if op == "attention" and x.shape[1] == 1 and _chosen[op] == "auto":
                backend = "cpu"
            if backend == "torch":
                return reference(*args, **kwargs)
            module = _triton_module(op) if backend == "triton" else cpu
            return getattr(module, name)(*args, **kwargs)

        return call

    return decorate
