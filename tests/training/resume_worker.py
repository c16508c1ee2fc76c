"""The processes of tests/test_resume_exact.py: runs of train.py that can be watched and killed.

Run as a script, this file has PyTorch and train.py imported once and forks every process of every
run from there. Hooks of PyTorch note what the model is really given, what the optimizer really
holds, and kill the process in the middle of an accumulation window.
"""

import hashlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from llamapro import cli
from llamapro.model import LlamaForCausalLM


def serve(train_file: Path) -> None:
    """Answers each request, a line of JSON, with the exit statuses of its processes."""
    spec = importlib.util.spec_from_file_location("train", train_file)
    assert spec and spec.loader
    train = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    import sentencepiece  # noqa: F401 (these two each process would import for itself)
    import torch._dynamo  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        ranks: dict[int, int] = {}
        for rank in range(request["processes"]):
            if not (pid := os.fork()):
                be_rank(train, rank, request)
            ranks[pid] = rank
        statuses: dict[int, int] = {}
        while len(statuses) < len(ranks):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid]:  # the others wait for it: end them, as torchrun does
                for other in ranks.keys() - statuses.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([statuses[pid] for pid in ranks]), flush=True)


def be_rank(train: ModuleType, rank: int, request: dict[str, Any]) -> None:
    """Is `python train.py WORDS`, under torchrun if there are several; does not return."""
    signal.alarm(240)  # ends it if it waits for ever; nothing else here looks at a clock
    log = Path(request["log"])
    with open(log / f"output-{rank}", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if request["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(request["processes"]), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(request["port"]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    doomed, forward = request["die"]
    watch(log, rank, forward if rank == doomed else 0)
    sys.argv = ["train.py", *request["words"]]
    try:
        cli.run(train.main, leave=os._exit)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


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
        if isinstance(module, LlamaForCausalLM) and torch.is_grad_enabled():
            forwards += 1
            if forwards == die_at:
                (log / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            models[:] = [module]
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


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
