"""Which training checkpoints of a run stay: the latest, the newest intact one, milestones.

What is removed is hidden first (`.step-*`), so a directory named step-* is complete even after a
kill. Only the process that holds the run's lock may remove anything.
"""

import shutil
from contextlib import suppress
from pathlib import Path

from llamapro.checkpoints.run import newest_intact, read_state, training_checkpoints
from llamapro.errors import CheckpointError


def make_way(target: Path) -> None:
    """Deletes the remains of a killed process, and a damaged training checkpoint at the target."""
    _remove_leftovers(target.parent)
    if not target.exists():
        return
    try:
        read_state(target)
    except CheckpointError:
        _remove(target)
    else:
        raise CheckpointError(f"{target}: exists and is intact; it is not replaced")


def _remove_leftovers(directory: Path) -> None:
    with suppress(OSError):  # the next save tries again
        for stale in directory.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)


def _remove(path: Path) -> None:
    """Hides, then deletes, so that a directory named step-* is complete even after a kill."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # the next save tries again
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from None


def remove_old(run_dir: Path, keep: int, keep_every: int = 0) -> list[str]:
    """Deletes all but the latest training checkpoints and the newest intact one.

    Before anything is deleted the newest is read back from the disk and checked.

    Args:
        run_dir: the run directory, locked.
        keep: number of the latest checkpoints that stay.
        keep_every: checkpoints whose step is a multiple of this stay too; 0 keeps none of them.

    Returns:
        A message for each one that cannot be removed, or if they cannot be listed.

    Raises:
        CheckpointError: none is intact.
    """
    _remove_leftovers(run_dir / "checkpoints")
    failures: list[str] = []
    try:
        old = training_checkpoints(run_dir)[:-keep]
    except CheckpointError as error:
        return [str(error)]
    if keep_every:
        old = [path for path in old if int(path.name.removeprefix("step-")) % keep_every]
    if not old:
        return failures
    newest, _ = newest_intact(run_dir)
    for path in old:
        if path != newest:
            try:
                _remove(path)
            except CheckpointError as error:
                failures.append(str(error))
    return failures
