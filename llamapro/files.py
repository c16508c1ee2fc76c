"""Files that are complete or absent, and JSON files that a stranger wrote.

Everything is written aside, flushed to the disk and renamed, so a failure, a signal or a full disk
leaves what was there before. `output_directory` reports to the user; `directory_aside` and
`write_file` raise OSError, for callers with a message of their own.
"""

import codecs
import errno
import json
import math
import os
import re
import secrets
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamapro import filesystem
from llamapro.errors import CheckpointError, ConfigError, UserError, warn

# The largest JSON file or safetensors header that is read. The format allows headers of 100 MB,
# which take gigabytes when parsed; that of a LLaMA with 1,000 layers has 1.5 MB.
MAX_JSON_BYTES = 1 << 24
REPLACED = "replaced-"  # before the name of a directory that is being replaced
# Of a shell: at the beginning of a name, or in braces.
_VARIABLE = re.compile(r"(?:^|/)\$[A-Za-z_]|\$\{\w")
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def user_path(path: str | Path) -> Path:
    """Returns a path as a user means it: a shell leaves `~` alone behind `=` and in quotes.

    Raises ConfigError if the path begins in the home directory and there is none, as in some
    containers, or if a variable of the shell or a zero byte is in it.
    """
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r:.200}: a path cannot have a zero byte; write it again")
    meant, unset = os.path.expandvars(path), _VARIABLE.search(str(path))
    if (meant != str(path) or unset) and not os.path.exists(path):
        fix = f"write {meant}" if meant != str(path) else "write what it stands for"
        raise ConfigError(f"{path}: variables are not replaced in a path; {fix}")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        if Path(path).parts[0] != "~":  # a name, unless there is a user of that name
            return Path(path)
        hint = " in --data.cache-dir" if ".cache" in Path(path).parts else ""
        raise ConfigError(
            f"{path}: there is no home directory: set HOME, or give a path without '~'{hint}"
        ) from None


def refuse_source(out_dir: str | Path, *sources: str | Path) -> None:
    """Raises ConfigError if `out_dir` is, or contains, one of the files it is made from.

    --force replaces a directory, and the source would be lost with it. Links are followed.
    """
    out = Path(out_dir).resolve()
    for source in sources:
        path = Path(source).resolve()
        if path.is_relative_to(out):
            relation = "is also the source" if out == path else f"contains the source {source}"
            raise ConfigError(f"{out_dir}: {relation}; choose another output directory")


def copy_companion(file: Path, target: Path) -> None:
    """Copies a file that lies beside weights; raises CheckpointError as `refuse_link`.

    A link to nothing and a pointer to the content are refused, too: the copy would be worthless.
    """
    refuse_link(file)
    refuse_missing(file)
    with open(file, "rb") as handle:
        if fix := pointer_fix(handle.read(128)):
            raise CheckpointError(f"{file}: {fix}, or remove it")
    shutil.copyfile(file, target)


def refuse_link(file: Path) -> None:
    """Refuses a file beside weights that is a link to somewhere else.

    A stranger's LICENSE could be a link to the user's own secrets, which would leave with the
    result. Hugging Face's cache is made of links, to `blobs` beside `snapshots`. Raises
    CheckpointError if the link leaves the directory.
    """
    home, found = file.parent.resolve(), file.resolve()
    home = home.parent if home.name in ("original", "additional_chat_templates") else home
    blobs = [folder.with_name("blobs") for folder in home.parents if folder.name == "snapshots"]
    if not found.is_relative_to(home) and found.parent not in blobs:
        raise CheckpointError(
            f"{file}: a link that leaves its directory, to {found}; put the file there or remove it"
        )


def make_directory(path: str | Path) -> None:
    """Makes a directory and its parents and flushes each to the disk; raises OSError.

    Without the flush, a power failure could remove a directory whose files were all written.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        filesystem.sync(folder.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file that is complete or as it was before; raises OSError."""
    aside = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        filesystem.sync(aside)
        aside.replace(path)
        filesystem.sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def output_directory(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Gives a hidden directory, as `directory_aside`, for the output that a user asked for.

    Raises ConfigError if the directory exists and may not be replaced, or cannot be created, and
    CheckpointError that names the file if writing failed.
    """
    path = Path(path).resolve()  # a link to another disk: written there, and the link stays
    remove_abandoned(path.parent)
    filesystem.existing(path)
    if path.exists() and any(path.iterdir()):
        if not force:
            raise ConfigError(f"{path}: exists and is not empty; choose another or pass --force")
        if not (path / "config.json").exists() and not (path / "params.json").exists():
            raise ConfigError(f"{path}: holds no checkpoint; --force replaces checkpoints only")
    is_created = False
    try:
        with directory_aside(path) as aside:
            is_created = True
            yield aside
    except OSError as error:
        if not is_created:
            raise ConfigError(f"{path}: cannot be created: {error.strerror}") from None
        file = str(error.filename or path).replace(str(aside), str(path))
        raise CheckpointError(
            f"{file}: {reason(error)} while writing {path}; "
            "the partial output was removed, nothing else was changed"
        ) from None


@contextmanager
def directory_aside(path: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Gives a hidden directory beside `path` that takes its name when the body has succeeded.

    The hidden directory is removed if the body fails, and so are those of killed processes. Raises
    OSError if something cannot be written; then nothing else was changed.

    Args:
        keep_existing: keep, instead of replacing, a directory that another process completed.
    """
    make_directory(path.parent)
    filesystem.lacks(path.parent)
    remove_abandoned(path.parent)
    holder, lock = filesystem.hold(path.parent, path.name)
    try:
        aside = holder / path.name
        aside.mkdir()
        yield aside
        for file in aside.rglob("*"):
            filesystem.sync(file)
        filesystem.sync(aside)
        _put_in_place(aside, path, keep_existing)
    finally:
        os.close(lock)
        shutil.rmtree(holder, ignore_errors=True)


def remove_abandoned(directory: Path) -> None:
    """Removes what killed processes left of `directory_aside`, and puts back what it replaced."""
    try:
        holders = list(directory.glob(".*.partial-*"))
    except OSError:  # it cannot be listed, and need not be
        return
    for holder in holders:
        try:
            lock = os.open(holder / filesystem.LOCK, os.O_RDWR | os.O_CREAT)
        except OSError:
            continue
        try:
            if not filesystem.lock(lock):
                continue  # without locks nobody knows
            for replaced in holder.glob(f"{REPLACED}*"):
                if not (path := directory / replaced.name.removeprefix(REPLACED)).exists():
                    replaced.rename(path)
        except OSError:
            continue
        finally:
            os.close(lock)
        shutil.rmtree(holder, ignore_errors=True)


def _put_in_place(aside: Path, path: Path, keep_existing: bool) -> None:
    """Renames `aside` to `path`. A directory that is replaced stays beside `aside`."""
    # Where two renames are needed, `path` does not exist between them: no signal must land there.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if keep_existing or not path.exists():
            try:
                aside.rename(path)
            except OSError:
                if not (keep_existing and path.exists()):
                    raise
        else:
            _replace(aside, path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    filesystem.sync(path.parent)


def _replace(aside: Path, path: Path) -> None:
    try:
        filesystem.swap(aside, path)
    except OSError:
        old = aside.with_name(REPLACED + path.name)
        path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            old.rename(path)
            raise


def reason(error: OSError) -> str:
    """Returns in words why the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk full"
    return error.strerror or str(error)


# ---- JSON, also of strangers -------------------------------------------------------------------


def read_json(
    file: Path, max_bytes: int = MAX_JSON_BYTES, error: type[UserError] = CheckpointError
) -> dict[str, Any]:
    """Reads a JSON object in which no key comes twice.

    Args:
        error: the kind that is raised, with the file's name, if anything is wrong.
    """
    refuse_large(file, max_bytes, error)
    try:
        content = file.read_bytes()
        parsed = parse_json(content)
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{file}: damaged: {type(problem).__name__}: {problem}") from None
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        warn(f"{file}: begins with a byte order mark; transformers reads UTF-8 without one alone")
    return parsed


def refuse_large(
    file: Path, max_bytes: float = math.inf, error: type[UserError] = CheckpointError
) -> None:
    """Raises `error` if a file is missing, too large, not a plain file or a git-lfs pointer."""
    refuse_missing(file, error)
    if (size := file.stat().st_size) > max_bytes:
        raise error(f"{file}: damaged: {size:,} bytes, over {max_bytes:,}")
    refuse_stand_in(file, error)


def refuse_missing(file: Path, error: type[UserError] = CheckpointError) -> None:
    """Raises `error` if there is no plain file: nothing, a link to nothing, a pipe, a folder."""
    if not file.exists():
        gone = (
            f"a link to {file.readlink()}, which does not exist" if file.is_symlink() else "missing"
        )
        raise error(f"{file}: {gone}") from FileNotFoundError(file)
    if not file.is_file():
        raise error(f"{file}: not a plain file")  # opening a pipe would wait for ever


def refuse_stand_in(file: Path, error: type[UserError] = CheckpointError) -> None:
    """Raises `error` if there is something else in a file's place: a git-lfs pointer, a web page.

    A file that cannot be read is left to the caller.
    """
    try:
        with open(file, "rb") as handle:
            start = handle.read(128).lstrip().lower()
    except OSError:
        return
    if fix := pointer_fix(start):
        raise error(f"{file}: {fix}")
    if start.startswith((b"<!doctype html", b"<html")):
        raise error(f"{file}: a web page, not the file: the download failed; fetch it again")


def pointer_fix(start: bytes) -> str:
    """Returns what to do if a file begins as a pointer to its content; "" if it does not."""
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file: run 'git lfs pull' beside it"
    if start.startswith(b"/annex/objects/"):
        return "a git-annex pointer, not the file: run 'git annex get' beside it"
    return ""


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as people read it, into a directory that is not complete yet."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot say
        data = json.dumps(value, indent=2).encode()
    file.write_bytes(data + b"\n")


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice: which of the two counts depends on the reader."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its keys and values, for `json`; raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise RepeatedKeyError(f"{name[:80]!r} comes twice")
    return found


def parse_json(text: bytes) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError, or RecursionError if it nests too deep."""
    found = json.loads(text, object_pairs_hook=unique_keys)
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found
