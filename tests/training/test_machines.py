"""examples/slurm/train.sh on two "machines": two torchrun agents, each in a folder of its own."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro.checkpoints.run import read_metrics, training_checkpoints

STUBS = {  # of Slurm: a list of hosts, and a start on each
    "scontrol": "echo localhost; echo localhost",
    "srun": """shift
        for node in 0 1; do (cd "$NODES/node-$node" && exec "$@") & done
        status=0; wait -n || status=$?; wait -n || status=$?; exit $status""",
}
WORDS = "--model.path pro --data.train corpus.py --data.cache-dir cache --data.seq-len 32 "
WORDS += "--train.batch-size 4 --train.device cpu --save.every 2 --run-dir run/one --train.steps "


@pytest.fixture
def nodes(pro: Path, tmp_path: Path) -> Path:
    """Two folders with the same model and corpus, and a run directory that both see."""
    for node in (tmp_path / "node-0", tmp_path / "node-1"):
        shutil.copytree(pro, node / "pro")
        shutil.copyfile(argparse.__file__, node / "corpus.py")
        (tmp_path / "run").mkdir(exist_ok=True)
        (node / "run").symlink_to(tmp_path / "run")
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(root: Path, nodes: Path, steps: int) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    places = [str(nodes), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "1", "PORT": str(port), "NODES": str(nodes)}
    environment = os.environ | slurm | {"PATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    script = str(root / "examples" / "slurm" / "train.sh")
    return subprocess.run(
        ["bash", script, *WORDS.split(), str(steps)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_machines_and_continues(root: Path, nodes: Path) -> None:
    """Own caches must hold the same: else it is refused, naming them, before anything trains."""
    for node in ("node-0", "node-1"):
        (nodes / node / "cache").mkdir()
    refused = submit(root, nodes, 2)
    assert refused.returncode != 0 and "data.cache_dir" in refused.stderr
    assert not training_checkpoints(nodes / "run" / "one")
    shutil.copytree(nodes / "node-0" / "cache", nodes / "node-1" / "cache", dirs_exist_ok=True)
    for steps in (2, 4):
        done = submit(root, nodes, steps)
        assert done.returncode == 0, done.stderr
        assert f"{steps} steps done" in done.stdout and "(2 process(es) x" in done.stderr
    kinds = [record["kind"] for record in read_metrics(nodes / "run" / "one")]
    assert kinds.count("resume") == 1
    again = submit(root, nodes, 4)
    assert again.returncode == 0 and "is complete: nothing to do" in again.stderr + again.stdout
