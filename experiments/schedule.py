"""Runs tasks side by side, each once and in a process of its own.

A result is a file that appears when it is complete, so a study that was killed continues with what
is missing. The processes come from a fork server that has loaded the libraries but has computed
nothing. Tasks therefore start at once, and their peaks of memory are their own.
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

import torch
from trial import LOG_FILE, RESULT_FILE, execute

from llamapro.errors import ConfigError, DataError, UserError
from llamapro.formatting import format_duration

# FSDP and the optimizers import torch._dynamo when they are first used, which takes seconds.
PRELOADED = ["trial", "torch._dynamo"]


@dataclass(frozen=True)
class Task:
    """One call of a function of `trial.FUNCTIONS`, by name.

    `about` is its JSON-able argument; a result for another argument is refused. `out` is the
    directory of result and log.
    """

    label: str
    function: str
    about: dict[str, Any]
    out: Path

    def result(self) -> dict[str, Any] | None:
        """Returns the result, or None if there is none yet.

        Raises:
            ConfigError: the result was made with other settings.
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
    """Returns the outcome of a task in one line: its last losses and their changes."""
    if "failed" in result:
        return f"failed: {result['failed'][:80]}"
    texts = []
    for name, curve in result.get("curves", {}).items():
        first, last = curve[0][1], curve[-1][1]
        is_finite = None not in (first, last)
        texts.append(f"{name} {last:.3f} ({last - first:+.3f})" if is_finite else f"{name}: NaN")
    return ", ".join(texts) or "done"


class Runner:
    """Runs tasks, and prints what is done and how long the rest takes on standard error."""

    def __init__(self, workers: int) -> None:
        """Sets the number of tasks that run at a time. They share the machine's threads."""
        self._workers, self._threads = workers, max(1, torch.get_num_threads() // workers)
        self.expect(0)

    def expect(self, count: int) -> None:
        """Starts to count this number of tasks to come."""
        self._count, self._done, self._taken = count, 0, 0.0

    def note(self, task: Task, seconds: float, text: str) -> None:
        """Counts a task that is done, and prints a line if it was expected."""
        self._done, self._taken = self._done + 1, self._taken + seconds
        if (left := self._count - self._done) < 0:
            return
        left_s = left * self._taken / self._done / self._workers
        more = f" · about {format_duration(left_s)} left" if left else ""
        number = f"[{self._done:>{len(str(self._count))}}/{self._count}]"
        line = f"{number} {task.label}: {text} · {format_duration(seconds)}{more}"
        print(line, file=sys.stderr, flush=True)

    def run(self, tasks: Sequence[Task], workers: int = 0) -> list[dict[str, Any]]:
        """Runs the tasks that have no result yet; returns all results, in order.

        Args:
            workers: number of tasks at a time; 0 for the usual one.

        Raises:
            ConfigError, DataError: as `Task.result`; or a task failed, and the message is the
                user's mistake or names the log. Tasks that are running then still end.
        """
        # The fork server finds the modules beside this file through the environment.
        paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
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
                except Exception as error:  # a task is any work, and its log has the trace
                    pool.shutdown(cancel_futures=True)
                    raise DataError(
                        f"{task.label}: failed ({type(error).__name__}): see {task.out / LOG_FILE}"
                        "; what is done is kept, and the same command continues"
                    ) from None
                self.note(task, seconds, describe(task.result() or {}))
        return [result for task in tasks if (result := task.result()) is not None]
