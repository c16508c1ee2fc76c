"""Damaged files of every kind end in one message or in a right result, never in a traceback.

Each case changes one file of a good input at random, from a fixed seed: a value of its JSON by an
odd one, or some of its bytes. The memory that Python and torch may take is not tested here, but in
test_untrusted.py.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE, Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.gguf import from_gguf
from llamapro.conversion.inspect import describe
from llamapro.conversion.meta import from_meta, to_meta
from llamapro.errors import CheckpointError, UserError
from llamapro.expansion import expand_config, insert_after

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2.5, 1e-300, 1e300, 10**12, 10**30, 1 << 63),
    *(float("nan"), float("inf"), "", "x", "1", "silu", [], [1], [[]], {}, {"a": 1}, [None] * 3),
]


def damaged(file: Path, draw: random.Random) -> None:
    """Changes a file at one place; JSON in its values or its bytes, others in their bytes."""
    data = bytearray(file.read_bytes())
    if file.suffix == ".json" and draw.random() < 0.8:
        raw = json.loads(data)
        at, key = _place(raw, draw)
        if draw.random() < 0.1:
            del at[key]
        else:
            at[key] = draw.choice(ODD)
        file.write_text(json.dumps(raw))
        return
    reach = min(len(data), draw.choice([64, 2000, len(data)]))  # headers come first
    for _ in range(draw.choice([1, 1, 4, 30])):
        data[draw.randrange(reach)] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    if draw.random() < 0.15:
        del data[draw.randrange(len(data)) :]
    file.write_bytes(data)


def _place(raw: Any, draw: random.Random) -> tuple[Any, Any]:
    """Returns an object or a list inside JSON, and a key of it."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(raw)
    return draw.choice(places)


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Any,
    write_gguf: Any,
    tiny_config: Any,
) -> Path:
    """A folder of good inputs: expanded and sharded checkpoints, a release and back, GGUF."""
    root = tmp_path_factory.mktemp("good")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 1e4}
    config = tiny_config(**sizes, rope_parameters=rope, layer_types=["full_attention"] * 2)
    record = expand_config(tiny_config(**sizes), insert_after(2, [0]), "ab" * 32)
    again = expand_config(record, insert_after(3, [1]), "cd" * 32)
    write_random_checkpoint(root / "sharded", config, max_shard_bytes=20_000)
    write_random_checkpoint(root / "single", again)
    write_random_checkpoint(root / "base", tiny_config(**sizes))
    to_meta(root / "base", root / "release")
    from_meta(root / "release", root / "back", None)
    base = Checkpoint.open(root / "base")
    write_gguf(root / "m.gguf", base.config, base.state_dict())
    return root


def cases(good: Path, count: int, seed: int, out: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields a description and what is to be done, after one file of a copy was damaged."""
    targets = [
        *[("sharded/config.json", "load")] * 4,
        *[("single/config.json", "describe")] * 4,
        *[("base/config.json", "to-meta")] * 2,
        ("back/config.json", "to-meta"),
        ("sharded/" + INDEX_FILE, "load"),
        ("base/" + SINGLE_FILE, "load"),
        *[("release/params.json", "from-meta")] * 2,
        *[("release/consolidated.00.pth", "from-meta")] * 4,
        *[("m.gguf", "from-gguf")] * 2,
    ]
    for number in range(count):
        draw = random.Random(seed + number)
        name, action = targets[number % len(targets)]
        shutil.rmtree(out, ignore_errors=True)
        work = out / "in"
        shutil.copytree(good, work)
        damaged(work / name, draw)
        path = (work / name).parent if action != "from-gguf" else work / name
        calls: dict[str, Callable[[], Any]] = {
            "load": lambda p=path: Checkpoint.open(p).load(),
            "describe": lambda p=path: describe(p),
            "to-meta": lambda p=path: to_meta(p, out / "out"),
            "from-meta": lambda p=path: from_meta(p, out / "out", None),
            "from-gguf": lambda p=path: from_gguf(p, out / "out"),
        }
        yield f"seed {seed + number}: {action} of {name}", calls[action]


def run(good: Path, count: int, seed: int, tmp_path: Path) -> tuple[int, list[str]]:
    """Returns how often there was a message, and what else was raised."""
    messages, wrong = 0, []
    for what, call in cases(good, count, seed, tmp_path / "fuzz"):
        try:
            call()
        except UserError as error:
            messages += 1
            if len(str(error)) > 2500 or "\n" in str(error).strip():
                wrong.append(f"{what}: a message of {len(str(error))} characters")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}"[:300])
        if (tmp_path / "fuzz" / "out").exists() and not any((tmp_path / "fuzz" / "out").iterdir()):
            wrong.append(f"{what}: an empty result")
    return messages, wrong


def test_damaged_files_end_in_one_message(good: Path, tmp_path: Path) -> None:
    """A few of each kind."""
    messages, wrong = run(good, 76, 0, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert messages > 35


@pytest.mark.slow
def test_many_damaged_files_end_in_one_message(good: Path, tmp_path: Path) -> None:
    """Thousands."""
    _, wrong = run(good, 4000, 10_000, tmp_path)
    assert not wrong, "\n".join(wrong)


# ---- Links that leave a directory ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "README.md"])
def test_a_companion_that_links_to_a_secret_is_not_copied(
    name: str, good: Path, tmp_path: Path
) -> None:
    """The message names the link and where it leads; nothing is written."""
    base = shutil.copytree(good / "base", tmp_path / "base")
    (tmp_path / "secret").write_text("my key")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=rf"{name}: a link that leaves its directory, to .*se"
    ):
        expand_checkpoint(Checkpoint.open(base), tmp_path / "out", insert_after(2, [0]))
    assert not (tmp_path / "out").exists()


def test_licences_of_a_release_are_not_followed_either(good: Path, tmp_path: Path) -> None:
    """On the way in and on the way out."""
    (tmp_path / "secret").write_text("my key")
    release = shutil.copytree(good / "release", tmp_path / "release")
    base = shutil.copytree(good / "base", tmp_path / "base")
    for path in (release, base):
        (path / "LICENSE").symlink_to(tmp_path / "secret")
    for call in (
        lambda: from_meta(release, tmp_path / "out", None),
        lambda: to_meta(base, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="LICENSE: a link that leaves its directory"):
            call()
        assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(good: Path, tmp_path: Path) -> None:
    """There every file is a link to a blob; so is one inside the directory."""
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((good / "base").iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "LICENSE").symlink_to("config.json")
    expand_checkpoint(Checkpoint.open(snapshot), tmp_path / "out", insert_after(2, [0]))
    assert (tmp_path / "out" / "tokenizer.model").stat().st_size > 1000
    assert (tmp_path / "out" / "LICENSE").exists()
