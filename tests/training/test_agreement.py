"""Machines that do not hold the same end together, with one message that says what differs."""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.errors import ConfigError
from llamapro.scripts import train
from llamapro.training import agreement

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SHARED = ("cache", "run")
WORDS = "--model.path pro --data.train corpus.py --data.cache-dir cache --data.seq-len 32 "
WORDS += "--train.steps 2 --optim.lr 0.01 --train.batch-size 4 --eval.every 7 --train.seed 11 "
WORDS += "--save.every 1 --run-dir run/one"


def be_machine(home: str, changes: dict[str, str], words: list[str]) -> None:
    """Is train.py on one of two machines with one rank each, which have a folder of their own.

    Args:
        home: has the folders node-0 and node-1, where the machines work.
        changes: words of the second machine's command line -> what it has instead.
        words: the first machine's command line.
    """
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    agreement.HEAR_S = 1.0
    os.chdir(Path(home) / f"node-{rank}")
    train.main([changes.get(word, word) if rank == "1" else word for word in words])


@pytest.fixture
def machines(pro: Path, tmp_path: Path) -> Path:
    """Two folders with the same model and corpus; cache and run directory are shared."""
    for node in (tmp_path / "node-0", tmp_path / "node-1"):
        shutil.copytree(pro, node / "pro")
        shutil.copyfile(argparse.__file__, node / "corpus.py")
        for name in SHARED:
            (tmp_path / name).mkdir(exist_ok=True)
            (node / name).symlink_to(tmp_path / name)
    return tmp_path


@pytest.fixture
def start(fork_ranks: Callable[..., Any], machines: Path) -> Callable[..., Any]:
    """`start(changes, words)`: what both machines said, where the second has other words."""

    def start(changes: dict[str, str] | None = None, words: str = WORDS) -> Any:
        args = (str(machines), changes or {}, words.split())
        return fork_ranks(2, __file__, "be_machine", *args, apart=True)

    return start


def assert_refused(done: Any, named: str) -> None:
    """Both exit with 2 and the same message; nothing was trained."""
    assert done.statuses == [2, 2], done.stderr
    assert done.stderr.count(named) == 2, done.stderr
    assert "Traceback" not in done.stderr and "saved step-" not in done.stderr


@pytest.mark.parametrize(
    ("here", "there", "named"),
    [
        ("0.01", "0.02", "optim.lr is 0.01 on rank 0 on "),
        ("2", "3", "train.steps is 2 on rank 0 on "),
        ("7", "1", "eval.every is 7 on rank 0 on "),
        ("11", "12", "train.seed is 11 on rank 0 on "),
        ("4", "5", "train.batch_size 5 is not a multiple"),
        ("corpus.py", "nowhere", "nowhere: no such file"),
    ],
    ids=["rate", "steps", "interval", "seed", "impossible", "missing"],
)
def test_another_command_line_ends_both(
    start: Callable[..., Any], here: str, there: str, named: str
) -> None:
    """None trains on in silence, and none waits for the other."""
    assert_refused(start({here: there}), named)


def test_an_unknown_option_on_one_machine_ends_both(start: Callable[..., Any]) -> None:
    """Both say what was meant."""
    named = "--optim.rate: no such option (did you mean --optim.lr?)"
    assert_refused(start({"--optim.lr": "--optim.rate"}), named)


def test_a_value_of_another_type_on_one_machine_ends_both(start: Callable[..., Any]) -> None:
    """The one with the mistake prints its usage; the other says where to look."""
    done = start({"0.01": "much"})
    assert done.statuses[0] == 2 and done.statuses[1]
    assert "ConfigError: rank 1 on " in done.stderr
    assert "its command line cannot be used" in done.stderr


def change_weight(folder: Path) -> None:
    tensor = Checkpoint.open(folder).tensors[O_PROJ]
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\1\2\3\4")


def test_other_weights_or_files_on_one_machine_end_both(
    start: Callable[..., Any], machines: Path
) -> None:
    """Another bit of the base, another config.json, a directory that is not shared: each named."""
    second = machines / "node-1"
    change_weight(second / "pro")
    assert_refused(start(), f"model.path on {os.uname().nodename} is another model than")
    config = second / "pro" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    assert_refused(start(), "config.json's rms_norm_eps is 1e-05 on rank 0 on ")
    shutil.rmtree(second / "pro")
    shutil.copytree(machines / "node-0" / "pro", second / "pro")

    (second / "cache").unlink()
    (second / "cache").mkdir()
    assert_refused(start(), "data.cache_dir cache: ")
    shutil.rmtree(second / "cache")
    (second / "cache").symlink_to(machines / "cache")
    (second / "run").unlink()
    (second / "run").mkdir()
    assert_refused(start(), "run_dir run/one: ")
    (second / "run").rmdir()
    (second / "run").symlink_to(machines / "run")

    done = start()  # now they hold the same
    assert done.statuses == [0, 0], done.stderr
    lock = machines / "run" / "one" / ".lock"
    lock.write_text("me\n")
    newest = training_checkpoints(lock.parent)[-1]  # as a second machine might see it
    manifest = newest / "manifest.json"
    seen = agreement.Seen({lock: "me\n", manifest: "{}\n"}, {}, {})
    with pytest.raises(ConfigError, match=r"does not see manifest\.json as the main process wrote"):
        seen.check(lock.parent, newest, "", {})
    seen.files[manifest] = manifest.read_text()
    seen.check(lock.parent, newest, "", {})
    (newest / "trainable.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"trainable\.safetensors: damaged: 0 bytes"):
        seen.check(lock.parent, newest, "", {})
