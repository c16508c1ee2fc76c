"""Parts of a corpus that machines tokenise apart, ahead of training, and that become one store.

A part is a run of neighbouring files, so the parts one after another are the tokens of the whole.
It lies beside the place of the whole store, under its name and `.part-I-of-N`.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from llamapro.errors import ConfigError, DataError, Problems, warn
from llamapro.files import read_json
from llamapro.text.documents import Counts
from llamapro.text.source_files import SourceFile
from llamapro.text.store import INDEX_FILE, MAX_INDEX_BYTES, TokenStore

_NAME = re.compile(r"\.part-([1-9]\d*)-of-([1-9]\d*)")


@dataclass(frozen=True)
class Part:
    """One of the parts of a corpus, which are counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads "3/8", the third of eight parts; raises ConfigError for anything else."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise ConfigError(
                f"--shard {text}: expected I/N with I from 1 to N, such as 3/8 for the third of 8"
            )
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def suffix(self) -> str:
        return f".part-{self.number}-of-{self.of}"

    def select(self, files: Sequence[SourceFile]) -> list[SourceFile]:
        """Returns the files of this part: neighbours, and all parts have about as many bytes."""
        sizes = [file.state()[-2] for file in files]
        total, before, selected = max(1, sum(sizes)), 0, []
        for file, size in zip(files, sizes, strict=True):
            # The part in which the middle of the file lies.
            if min(self.of - 1, (2 * before + size) * self.of // (2 * total)) == self.number - 1:
                selected.append(file)
            before += size
        return selected


def find_parts(directory: Path, key: list[Any], label: str) -> list[Path]:
    """Returns the parts of the store at this place, in order; [] if nothing was prepared for it.

    A part's `index.json` has the key, which decides the tokens, as `made_of`. Raises DataError that
    names each if parts are missing, or were made with another tokenizer or text.
    """
    found: dict[int, dict[int, Path]] = {}
    others: list[tuple[str, bool]] = []  # what is wrong, and whether it was meant for this corpus
    wanted = json.loads(json.dumps(key))
    for path in sorted(directory.parent.glob("*.part-*-of-*")):
        name = _NAME.fullmatch(path.name[path.name.find(".part-") :])
        if name is None or path.name.startswith("."):
            continue
        number, of = map(int, name.groups())
        made_of = None
        with suppress(DataError):  # a damaged part is a missing one, and named as it
            index = read_json(path / INDEX_FILE, MAX_INDEX_BYTES, DataError)
            made_of = index.get("made_of")
        if made_of == wanted:
            found.setdefault(of, {})[number] = path
            continue
        is_named = path.name.startswith(f"{directory.name}.")
        if is_named or _is_of_same_files(made_of, wanted):
            reason, is_text = _difference(made_of, wanted)
            others.append((f"{path} is part {number}/{of} {reason}", is_named or is_text))
    for of, parts in found.items():
        if len(parts) == of:
            return [parts[number] for number in range(1, of + 1)]
    wrong = Problems(limit=6)
    for of, parts in found.items():
        missing = [str(Part(i, of)) for i in range(1, of + 1) if i not in parts]
        shown = ", ".join(missing[:20]) + (" and more" if len(missing) > 20 else "")
        wrong.add(f"missing {shown}")
    if found or any(is_meant for _, is_meant in others):
        wrong.add(*(text for text, _ in others))
        place = directory.parent / f"{directory.name}.part-*"
        wrong.add(
            "run 'llamapro prepare --shard I/N' for what is missing"
            + (f", or remove {place} to tokenise all here" if found else "")
            + ("; remove parts that are of no use" if others else "")
        )
    for text, _ in others if not wrong else ():
        warn(f"{label}: {text}: it is not used")
    wrong.check(DataError, f"{label}: its tokens were prepared in parts, which are not all here")
    return []


def _is_of_same_files(made_of: Any, wanted: list[Any]) -> bool:
    """Whether tokens of other settings, or of files before a change, have a file in common."""
    with suppress(TypeError, IndexError, KeyError):
        paths = {state[0] for state in made_of[-1]}
        return any(state[0] in paths for state in wanted[-1])
    return False


def _difference(made_of: Any, wanted: list[Any]) -> tuple[str, bool]:
    """Returns in words how a part was made otherwise, and whether its text alone differs."""
    if not isinstance(made_of, list) or len(made_of) != len(wanted) or made_of[0] != wanted[0]:
        return "that is damaged, or of another version of llamapro", False
    names = ("tokenizer", "data.text_key", "data.split_at")
    for name, then, here in zip(names, made_of[1:4], wanted[1:4], strict=True):
        if then != here:
            return f"made with another {name}: {str(then)[:16]!r}, here {here[:16]!r}", False
    before, now = ({state[0]: state[1:] for state in made[4]} for made in (made_of, wanted))
    for path in before | now:
        if before.get(path) != now.get(path):
            sizes = (files.get(path, [0, 0])[-2] for files in (before, now))
            then, today = (f"{size:,} bytes" for size in sizes)
            change = f"had {then}, has {today}" if then != today else "was changed since"
            return f"made of another text: {path} {change}", True
    return "made of another text: its files came in another order", True


def join(
    parts: Sequence[Path], fingerprint: str, counts: Counts, label: str
) -> Iterator[NDArray[Any]]:
    """Yields the tokens of all parts, and adds up their counts; raises DataError for damage."""
    stores = [TokenStore(path, fingerprint) for path in parts]
    total = sum(store.tokens * store.dtype.itemsize for store in stores)
    with tqdm(total=total, desc=f"join {label}", unit="B", unit_scale=True, disable=None) as bar:
        for store in stores:
            counts.add(Counts(**store.index["counts"]))
            for array in store.arrays():
                yield array
                bar.update(array.nbytes)


def remove_parts(directory: Path) -> None:
    """Removes the parts of a store that is complete."""
    for path in directory.parent.glob(f"{directory.name}.part-*-of-*"):
        shutil.rmtree(path, ignore_errors=True)
