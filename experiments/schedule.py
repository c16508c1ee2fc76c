"""Runs tasks side by side, each in a process of its own, and none twice.

A task's result is a file that appears when it is complete, so a study that was killed continues
with what is missing. The processes come from a fork server that has loaded the libraries and has
computed nothing: a task starts at once, and its peak of memory is its own.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trial import LOG_FILE, RESULT_FILE, execute

from llamapro.errors import ConfigError, DataError, UserError
from llamapro.formatting import format_duration


@dataclass(frozen=True)
class Task:
    """One call of a function of `trial.FUNCTIONS`.

    Attributes:
        label: shown in the progress.
        function: name of the function.
        about: its JSON-able argument; a result that was made from another one is refused.
        out: directory of its result and its log.
        estimate_s: how long it takes, estimated before anything like it has run.
    """

    label: str
    function: str
    about: dict[str, Any]
    out: Path
    estimate_s: float = 6.0

    def result(self) -> dict[str, Any] | None:
        """Returns the result if it is there.

        Raises:
            ConfigError: it was made from other settings.
            DataError: the file is damaged.
        """
        file = self.out / RESULT_FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            about, result = stored["about"], stored["result"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{file}: damaged; remove it, and it is made again") from None
        now = json.loads(json.dumps(self.about))
        if differing := [key for key in {**about, **now} if about.get(key) != now.get(key)]:
            raise ConfigError(
                f"{file} was made with other settings ({', '.join(differing)}): choose another "
                "--out, or remove it"
            )
        return result


def describe(result: dict[str, Any]) -> str:
    """Returns the outcome of a task in a line: the last losses with their changes."""
    if "failed" in result:
        return f"failed: {result['failed'][:80]}"
    texts = []
    for name, curve in result.get("curves", {}).items():
        first, last = curve[0][1], curve[-1][1]
        is_finite = None not in (first, last)
        texts.append(
            f"{name} {last:.3f} ({last - first:+.3f})" if is_finite else f"{name} not finite"
        )
    return ", ".join(texts) or "done"


class Runner:
    """Runs tasks, and prints on standard error what is done and how long the rest will take."""

    def __init__(self, workers: int) -> None:
        """Sets how many tasks run at a time; they share the machine's threads."""
        self._workers, self._threads = workers, max(1, (os.cpu_count() or 1) // workers)
        self.expect(0, 0.0)

    def expect(self, count: int, seconds: float) -> None:
        """Sets how many tasks will come, and how long they take one after another."""
        self._count, self._seconds = count, seconds
        self._done, self._estimated, self._taken = 0, 0.0, 0.0

    def note(self, task: Task, seconds: float, text: str) -> None:
        """Counts a task that is done, and prints a line if it was expected."""
        if not self._count:
            return
        self._done += 1
        self._estimated, self._taken = self._estimated + task.estimate_s, self._taken + seconds
        left = (self._seconds - self._estimated) * self._taken / self._estimated / self._workers
        more = f" · about {format_duration(left)} left" if self._done < self._count else ""
        number = f"[{self._done:>{len(str(self._count))}}/{self._count}]"
        line = f"{number} {task.label}: {text} · {format_duration(seconds)}{more}"
        print(line, file=sys.stderr, flush=True)

    def run(self, tasks: Sequence[Task], workers: int = 0) -> list[dict[str, Any]]:
        """Runs the tasks that have no result yet; returns all results, in order.

        Args:
            tasks: what to run, started in this order.
            workers: how many at a time, if not as many as usual.

        Raises:
            ConfigError, DataError: as `Task.result`, or a task failed: the message is the user's
                mistake, or names the log. Tasks that are running then still end.
        """
        # The fork server finds the modules beside this file by the environment.
        paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trial"])
        with ProcessPoolExecutor(workers or self._workers, context, max_tasks_per_child=1) as pool:
            futures = {
                pool.submit(execute, task.function, task.about, task.out, self._threads): task
                for task in tasks
                if task.result() is None
            }
            for future in as_completed(futures):
                task = futures[future]
                try:
                    seconds = future.result()
                except UserError as error:
                    pool.shutdown(cancel_futures=True)
                    raise DataError(f"{task.label}: {error}") from None
                except Exception as error:
                    pool.shutdown(cancel_futures=True)
                    raise DataError(
                        f"{task.label}: failed ({type(error).__name__}): see {task.out / LOG_FILE}"
                        "; what is done is kept, and the same command continues"
                    ) from None
                self.note(task, seconds, describe(task.result() or {}))
        return [result for task in tasks if (result := task.result()) is not None]
