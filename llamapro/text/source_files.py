"""Finds the files that paths, globs and folders stand for, and says which are no data."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, warn
from llamapro.text.rows import COMPRESSED, has_rows
from llamapro.text.store import CACHE_TAG

# Beside tables these describe them, and are no data: a data card, a licence, a loader.
_CARD = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation)(\..*|[_-].*\.(txt|md|html)|[_-][^.]*)?|"
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|.*\.(cff|sha256|md5)",
    re.IGNORECASE,
)
_NOTE = re.compile(r".*\.(md|rst|ya?ml)", re.IGNORECASE)  # as these may, if they are few
_FEW = 5
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
# As Hugging Face's datasets names the parts of one; some names end with a hash of the content.
_PART = re.compile(r"(.*?)(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?(.*)")
ARCHIVES = (*".zip .tar .tgz .tbz2 .txz .7z .rar .zst .zstd .lz4 .lzma .gzip .br".split(),)
# Data of other libraries, which is binary.
_FOREIGN = (*".feather .orc .avro .npy .npz .h5 .hdf5 .pkl .xlsx .tfrecord .mds .bin .pq".split(),)

MAX_PATTERN = 4096  # characters, as of a path on Linux


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus."""

    path: Path
    is_named: bool  # by the user or a glob, not only by its folder
    left_out: str = ""  # the reason why it is not read

    def state(self) -> list[Any]:
        """Returns what caches compare: path, how it is read, and if it is, size and time in ns."""
        how = [os.path.abspath(self.path), self.is_named, self.left_out]
        if self.left_out:
            return [*how, 0, 0]
        status = self.path.stat()
        return [*how, status.st_size, status.st_mtime_ns]


def find_files(patterns: Sequence[str]) -> list[SourceFile]:
    """Returns the files that paths, globs (`**` allowed) and folders name, each once.

    Folders are walked recursively, by name, without hidden entries and caches. Raises
    DataError if no pattern is given, a pattern matches no file, or a file is Arrow's.
    """
    files: dict[str, SourceFile] = {}
    problems = []
    if not patterns:
        raise DataError("no data given: name files, folders or globs")
    for pattern in patterns:
        literal = os.path.expanduser(pattern)
        matched: list[SourceFile] = []
        # A name that exists is taken literally, even if it contains '[' or '*'.
        matches = [literal] if os.path.exists(literal) else []
        if not matches and len(literal) < MAX_PATTERN:  # longer ones could take minutes
            matches = glob.glob(literal, recursive=True)
        for match in sorted(matches):
            if os.path.isdir(match):
                seen = set() if match == literal else {""}  # what a glob finds is not named
                inside = _without_cards(match, list(_walk(Path(match), seen)))
                _say_splits(match, inside)
                matched += inside
            else:
                reason = _unreadable(match)
                matched.append(SourceFile(Path(match), not reason, reason))
        if all(file.left_out for file in matched):
            problem = "the folder holds no files" if os.path.isdir(literal) else "no such file"
            if matched:
                problem = f"nothing to read: {matched[0].path} ({matched[0].left_out})"
            fix = "give files, folders or globs like 'd/**/*.py'"
            fix = "data is read from the disk: download it first" if "://" in pattern else fix
            problems.append(f"{pattern}: {problem}; {fix}")
        for file in matched:
            if file.path.suffix.lower() == ".arrow":
                raise DataError(
                    f"{file.path}: Arrow files, as datasets.save_to_disk writes them, are not "
                    "read; save the data as parquet: load_from_disk(DIR)['train'].to_parquet(FILE)"
                )
            real = os.path.realpath(file.path)
            earlier = files.get(real, file)
            is_named = earlier.is_named or file.is_named
            left_out = "" if is_named else earlier.left_out
            files[real] = replace(earlier, is_named=is_named, left_out=left_out)
    if problems:
        raise DataError("\n".join(problems))
    _say_gaps({str(file.path) for file in files.values() if not file.left_out})
    return list(files.values())


def check_corpora(corpora: Mapping[str, Sequence[str]]) -> None:
    """Finds the files of all corpora, label -> patterns, and warns of those that are in several.

    Raises DataError as `find_files`, with the problems of all.
    """
    labels: dict[str, list[str]] = {}
    problems = []
    for label, patterns in corpora.items():
        try:
            files = find_files(patterns)
        except DataError as error:
            problems.append(str(error))
            continue
        for file in files:
            if not file.left_out:
                labels.setdefault(os.path.realpath(file.path), []).append(repr(label))
    if problems:
        raise DataError("\n".join(problems))
    shared = [f"{path}: is in {' and '.join(of)}" for path, of in labels.items() if len(of) > 1]
    if shared:
        warn(shared[0] + (f"; {len(shared) - 1:,} more are in several" if shared[1:] else ""))


def _without_cards(folder: str, files: list[SourceFile]) -> list[SourceFile]:
    """Leaves out what describes tables, if a folder holds nothing else, or is mostly tables.

    One script beside tables loads them; several are code. Many notes are documents. Other texts
    are read, and that is said.
    """
    sizes = {file.path: file.path.stat().st_size for file in files if not file.left_out}
    cards = {path for path in sizes if _CARD.fullmatch(path.name)}
    tables = {p for p in sizes if has_rows(p) or p.suffix.lower() in ARCHIVES} - cards
    foreign = {path for path in sizes if path.suffix.lower() in _FOREIGN}
    scripts = {path for path in sizes if path.suffix == ".py"}
    described = cards | scripts if len(scripts) < 2 else cards
    others = sizes.keys() - tables - foreign - described
    is_mostly_tables = sum(map(sizes.__getitem__, tables)) > sum(map(sizes.__getitem__, others))
    notes = {path for path in others if _NOTE.fullmatch(path.name)}
    if is_mostly_tables and len(notes) < _FEW:
        described |= notes
    texts = sorted(others - described)
    if not (tables or foreign) or (texts and not is_mostly_tables):
        return files
    if texts:
        names = ", ".join(str(path.relative_to(folder)) for path in texts[:3])
        more = f" and {len(texts) - 3:,} more" if len(texts) > 3 else ""
        warn(f"{folder}: holds tables, and {names}{more}: documents too, where text is read")
    reason = "describes the tables beside it"
    return [replace(f, left_out=reason) if f.path in described else f for f in files]


def _say_splits(folder: str, files: list[SourceFile]) -> None:
    """Warns if a folder holds the training split of a data set, and others, which are read too."""
    splits: dict[str, Path] = {}
    for path in (file.path for file in files if not file.left_out and has_rows(file.path)):
        found = [_SPLIT.match(name) for name in path.relative_to(folder).parts[-2:]]
        splits |= {match[1]: path for match in found if match}
    if "train" in splits and len(splits) > 1:
        other = next(path for name, path in splits.items() if name != "train")
        warn(
            f"{folder}: holds the splits {', '.join(sorted(splits))}, and all are read, {other} "
            f"too; name one, such as '{folder}/**/train*'"
        )


def _say_gaps(names: set[str]) -> None:
    """Warns of a data set's parts that are missing, and of files that are read packed, too."""
    numbers = {match.group(1, 3, 4, 2) for match in map(_PART.fullmatch, names) if match}
    for (head, of, tail), count in Counter(key[:3] for key in numbers).items():
        if count < int(of):
            warn(f"{head}*-of-{of}{tail}: {int(of) - count:,} parts are missing; the rest is read")
    for name in names:
        if name.endswith((*COMPRESSED,)) and (plain := name.rpartition(".")[0]) in names:
            warn(f"{plain}: read, and so is {name}, which most likely holds the same")


def _unreadable(path: str | Path) -> str:
    """Returns why a path is neither a file nor a folder; "" if it is."""
    if not os.path.exists(path):  # a link to itself, too
        return "a link to nothing"
    return "" if os.path.isfile(path) or os.path.isdir(path) else "not a plain file"


def _walk(folder: Path, seen: set[str]) -> Iterator[SourceFile]:
    """Yields the files below a folder, following links, each folder once.

    Installed packages, runs and caches are left out, unless the folder is theirs.
    """
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from None
    names = {entry.name for entry in entries}
    if len(seen) > 1 and (folder.name == "node_modules" or "pyvenv.cfg" in names):
        yield SourceFile(folder, False, "installed packages")
        return
    if len(seen) > 1 and {"run.json", "metrics.jsonl"} <= names:
        yield SourceFile(folder, False, "a run directory")
        return
    if len(seen) > 1 and CACHE_TAG in names:  # not named: the run's own is there from its start on
        return
    if {"blobs", "refs", "snapshots"} <= names:  # Hugging Face's cache
        entries = [entry for entry in entries if entry.name == "snapshots"]
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        path = folder / entry.name
        # The kind of what is no link is known without the disk.
        reason = _unreadable(path) if entry.is_symlink() else ""
        if not reason and entry.is_dir():
            yield from _walk(path, seen)
        else:
            is_file = not reason and entry.is_file()
            yield SourceFile(path, False, "" if is_file else _unreadable(path))
