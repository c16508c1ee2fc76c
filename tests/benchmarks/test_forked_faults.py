"""benchmarks/forked_faults.py: its judge tells rounding from a difference, and real faults pass."""

import shutil
from pathlib import Path

import forked_faults
import pytest
from fault_injection import STEPS, Start
from fault_ranks import REMOVED
from faults import Fault


@pytest.mark.parametrize(
    ("found", "is_near"),
    [
        ({"kind": "train", "step": 3, "loss": 5.5000001}, True),
        ({"kind": "train", "step": 3, "loss": 5.501}, False),
        ({"kind": "train", "step": 4, "loss": 5.5}, False),
        ({"kind": "train", "step": 3}, False),
    ],
)
def test_only_rounding_in_the_log_is_passed_over(found: dict[str, object], is_near: bool) -> None:
    """Two processes add the same losses in another order."""
    truth = forked_faults.LogTruth({}, {})
    straight = {"kind": "train", "step": 3, "loss": 5.5}
    assert truth._is_near(f"log: train 3 is {found}, not {straight}") is is_near
    assert truth._is_near(f"log: train 3 was {straight}, then {found}") is is_near
    assert not truth._is_near("log: train 3 is missing")


def test_a_removed_directory_must_hold_what_was_computed() -> None:
    """Where the run noticed; steps after the last checkpoint are lost otherwise."""
    lines = [
        "resume from      new run",
        f"         5/{STEPS}   1.0",
        "x: was removed while the run ...",
    ]
    for newest, lost in ((5, 0), (4, 1)):
        fault = Fault(REMOVED, 0, "")
        forked_faults.judge(fault, Start(lines, 2), newest)
        assert (fault.lost_steps, fault.broken) == (lost, [])
    fault = Fault(REMOVED, 0, "")
    forked_faults.judge(fault, Start(["Traceback"], 1), 0)
    assert len(fault.broken) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_short_campaign_keeps_every_promise(tmp_path: Path) -> None:
    """A few faults of all sorts over text, on one process and two."""
    campaign = forked_faults.Campaign(tmp_path, 4, 5, 600.0, ["text"])
    campaign.run()
    result = forked_faults.summary(campaign, 5)
    assert result["totals"]["faults"] >= 4 and result["wrong"] == result["unprovoked"] == []
