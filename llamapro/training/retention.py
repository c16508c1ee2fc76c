"""Which training checkpoints of a run stay: the latest, the newest intact one, milestones.

What is removed is hidden first (`.step-*`), so a directory named step-* is complete even after a
kill. Only the process that holds the run's lock may remove anything.
"""

import shutil
from contextlib import suppress
from pathlib import Path

from llamapro.checkpoints.run import newest_intact, read_state, training_checkpoints
from llamapro.errors import CheckpointError, warn


def make_way(target: Path) -> None:
    """Deletes the remains of a killed process, and a damaged training checkpoint at the target."""
    with suppress(OSError):  # the next save tries again
        for stale in target.parent.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)
    if not target.exists():
        return
    try:
        read_state(target)
    except CheckpointError:
        _remove(target)
    else:
        raise CheckpointError(f"{target}: exists and is intact; it is not replaced")


def _remove(path: Path) -> None:
    """Hides, then deletes."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # the next save tries again
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from None


def remove_old(run_dir: Path, keep: int, keep_every: int = 0) -> None:
    """Deletes all but the latest training checkpoints and the newest intact one.

    Before anything is deleted the newest is read back from the disk and checked. What cannot be
    removed is said once, and tried again after every save.

    Args:
        run_dir: the run directory, locked.
        keep: number of the latest checkpoints that stay.
        keep_every: checkpoints whose step is a multiple of this stay too; 0 keeps none of them.

    Raises:
        CheckpointError: none is intact.
    """
    old, failures = list[Path](), list[CheckpointError]()
    try:
        old = training_checkpoints(run_dir)[:-keep]
    except CheckpointError as error:
        failures.append(error)
    if keep_every:
        old = [path for path in old if int(path.name.removeprefix("step-")) % keep_every]
    newest = newest_intact(run_dir)[0] if old else None
    for path in old:
        if path != newest:
            try:
                _remove(path)
            except CheckpointError as error:
                failures.append(error)
    for failure in failures:
        warn(f"{failure}; it stays, and training goes on")
