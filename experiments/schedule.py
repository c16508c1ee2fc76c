"""Runs tasks side by side, each in a process of its own, and none twice.

A task's result is a file, there when it is complete; a study that was killed goes on with what is
missing. The processes come from a fork server that has the libraries loaded already and has
computed nothing, so that a task starts at once and its peak of memory is its own.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from trial import LOG_FILE, MESSAGE_FILE, RESULT_FILE, execute

from llamapro.errors import ConfigError, DataError
from llamapro.formatting import format_duration


@dataclass(frozen=True)
class Task:
    """One call of a function of `trial.FUNCTIONS`.

    Attributes:
        label: for people.
        function: its name.
        about: its argument, JSON-able; a result made from another one is refused.
        out: its directory, where its result and its log go.
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
            found = json.loads(file.read_text(encoding="utf-8"))
            about, result = found["about"], found["result"]
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

    def failure(self, status: int | None) -> str:
        """Returns why there is no result, for people."""
        if status == 2:
            return (self.out / MESSAGE_FILE).read_text(encoding="utf-8")
        return (
            f"failed (exit status {status}): see {self.out / LOG_FILE}; what is done is kept, the "
            "same command goes on"
        )


class Progress:
    """Says on standard error what is done and how long the rest will take."""

    def __init__(self, count: int, seconds: float, workers: int) -> None:
        """Expects so many tasks, estimated to take so long one after another."""
        self._count, self._seconds, self._workers = count, seconds, workers
        self._done, self._estimated, self._taken = 0, 0.0, 0.0

    def done(self, task: Task, seconds: float, text: str) -> None:
        """Notes a task that was just done, and prints a line."""
        self._done += 1
        self._estimated, self._taken = self._estimated + task.estimate_s, self._taken + seconds
        left = self._seconds - self._estimated
        left *= self._taken / self._estimated / self._workers
        more = f" · about {format_duration(left)} left" if self._done < self._count else ""
        took = format_duration(seconds)
        where = f"[{self._done:>{len(str(self._count))}}/{self._count}]"
        print(f"{where} {task.label}: {text} · {took}{more}", file=sys.stderr, flush=True)


def run(
    tasks: Sequence[Task],
    workers: int,
    threads: int,
    progress: Progress | None = None,
    describe: Callable[[Task, dict[str, Any]], str] = lambda task, result: "done",
) -> list[dict[str, Any]]:
    """Runs the tasks that have no result yet; returns all results, in order.

    Args:
        tasks: what to do; their order is kept, but for what runs side by side.
        workers: how many at a time.
        threads: of each.
        progress: is told of each.
        describe: a result in a few words, for the progress.

    Raises:
        ConfigError, DataError: as `Task.result`; or a task failed: its log is named, and the other
            processes are ended.
    """
    waiting = [task for task in tasks if task.result() is None]
    # The fork server finds the modules beside this file by the environment.
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trial"])
    running: dict[Any, tuple[ForkServerProcess, Task, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.pop(0)
                arguments = (task.function, task.about, str(task.out), threads)
                process = context.Process(target=execute, args=arguments)
                process.start()
                running[process.sentinel] = (process, task, time.perf_counter())
            for sentinel in wait(list(running)):
                process, task, started = running.pop(sentinel)
                process.join()
                if process.exitcode or (result := task.result()) is None:
                    raise DataError(f"{task.label}: {task.failure(process.exitcode)}")
                if progress is not None:
                    progress.done(task, time.perf_counter() - started, describe(task, result))
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()
    found = [task.result() for task in tasks]
    return [result for result in found if result is not None]
