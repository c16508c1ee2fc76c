"""The ranks of test_resume_exact.py: runs of train.py that are watched, and killed.

Hooks of PyTorch note what the objective is really given and what the optimizer really holds, and
kill the process in the middle of an accumulation window.
"""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from llamapro.model import LlamaForCausalLM
from llamapro.scripts import train
from llamapro.training.objective import NextToken


def train_watched(log: str, doomed: int, die_at: int, words: list[str]) -> None:
    """Is `python train.py WORDS` on one rank, watched."""
    rank = int(os.environ.get("RANK", "0"))
    watch(Path(log), rank, die_at if rank == doomed else 0)
    train.main(words)


def local(tensor: Tensor) -> Tensor:
    """What of it this rank holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def sha256(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def watch(log: Path, rank: int, die_at: int) -> None:
    """Notes a line of every optimizer step and, at the first, the state it starts from.

    Args:
        log: folder of the notes.
        rank: of this process.
        die_at: forward pass in training, counted from 1, before which it is killed; 0: none.
    """
    steps = open(log / f"steps-{rank}", "w", encoding="utf-8")  # noqa: SIM115 (as long as we live)
    models: list[LlamaForCausalLM] = []
    rows: list[str] = []
    forwards = 0

    def before_forward(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal forwards
        if isinstance(module, NextToken) and torch.is_grad_enabled():
            forwards += 1
            if forwards == die_at:
                (log / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            models[:] = [module.model]
            rows.extend(sha256(*row) for row in zip(*args[:2], strict=True))  # inputs, targets

    def named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        names = {id(p): name for name, p in models[0].named_parameters()}
        return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        file = log / f"loaded-{rank}.pt"
        if file.exists():
            return
        found: dict[str, Tensor] = {}
        for name, parameter in named(optimizer).items():
            found[name] = local(parameter).clone()
            for key, value in optimizer.state[parameter].items():
                found[f"{name}.{key}"] = local(value).clone()
        torch.save(found, file)

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = named(optimizer)
        frozen = {n: sha256(local(p)) for n, p in models[0].named_parameters() if n not in trained}
        note = {"rows": rows, "trained": list(trained), "frozen": frozen}
        print(json.dumps(note), file=steps, flush=True)
        rows.clear()

    register_module_forward_pre_hook(before_forward)
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
