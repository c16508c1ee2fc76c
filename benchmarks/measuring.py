"""Code that the benchmarks share: options, machine, versions, table, and the file of figures."""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a command's parser with the option --out; its help opens with the first line."""
    made = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--out", type=Path, help="JSON file to write the figures to")
    return made


def machine() -> dict[str, Any]:
    """Returns the processor, the load and, with its clocks and limits, the GPU, JSON-able."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        names = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = names[1] if names else processor
    found: dict[str, Any] = {"system": platform.platform(), "processor": processor}
    found |= {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "gpu": None}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with suppress(OSError, subprocess.CalledProcessError):
            text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            values = text.splitlines()[0].split(", ")
            found |= dict(zip(fields.split(","), values, strict=True))
    return found


def versions(*packages: str) -> dict[str, str | None]:
    """Returns the versions of Python and of these packages; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        found[package] = None
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Stopwatch:
    """Moments of the GPU's work, without waiting for it, or of the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.is_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.is_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Returns the seconds between the marks; waits for the last."""
        pairs = itertools.pairwise(self.marks)
        if not self.is_gpu:
            return [end - start for start, end in pairs]
        self.marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def write(file: Path | None, result: dict[str, Any]) -> None:
    """Writes the figures as JSON, where a file was asked for."""
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns lines of aligned columns; numbers stand to the right. A row may be shorter."""
    body = [[str(cell) for cell in row] + [""] * (len(heads) - len(row)) for row in rows]
    columns = []
    for head, *cells in zip(heads, *body, strict=True):
        width = max(map(len, (head, *cells)))
        is_numeric = all(re.match(r"[-\d]|$", cell) for cell in cells)
        columns.append([f"{cell:{'>' if is_numeric else '<'}{width}}" for cell in (head, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
