"""benchmarks/growth.py: its ideals and laws, and one point in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import growth
import pytest


def test_a_law_is_the_exponent_of_growth() -> None:
    points = [{"blocks": x, "step_s": 3.0 * x**1.5, "peak_bytes": 7.0} for x in (8, 16, 64)]
    assert growth.laws("blocks", points) == pytest.approx({"step_s": 1.5, "peak_bytes": 0.0})


def test_operations_grow_with_blocks_and_stop_where_backward_stops() -> None:
    """Each block costs the same; a new block on top spares the others' backward."""
    few, more, most = (growth.count_operations(growth.size_at("blocks", n)) for n in (16, 32, 64))
    assert most - more == pytest.approx(2 * (more - few), rel=0.1)  # the new blocks stay 4
    one, sixteen = (growth.count_operations(growth.size_at("new_blocks", n)) for n in (1, 16))
    forward_alone = 2 * 16 * (4 * 256**2 + 3 * 256 * 688) * 1024
    assert forward_alone < one < sixteen / 3


def test_a_point_runs_in_a_process_of_its_own(root: Path) -> None:
    command = [sys.executable, str(root / "benchmarks" / "growth.py"), "--steps", "1"]
    command += ["--worker", "tokens", "512"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["step_s"] > 0 and found["peak_bytes"] > 1e7


def test_processes_share_what_is_not_frozen() -> None:
    """Simulated, by the plan: each step to more processes needs less memory on each."""
    needed = [point["plan_bytes"] for point in growth.simulate()["points"]]
    assert needed == sorted(needed, reverse=True) and needed[-1] < needed[0] / 3
