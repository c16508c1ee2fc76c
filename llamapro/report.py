"""Shows what training taught and what it cost: a picture and a page for one or several runs.

    python -m llamapro.report runs/pro runs/full --out report

By how much did the loss fall on the new domain, and by how much did it rise on what the base
already knew? The base is each run's evaluation at step 0.
"""

import os
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from llamapro import cli
from llamapro.errors import ConfigError, needed, note
from llamapro.files import user_path
from llamapro.formatting import format_bytes, format_count, format_duration, perplexity
from llamapro.training.metrics import LAST_RECORDS, Run, read_run, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "-"
LOSS = "{:.3f}".format
# Okabe & Ito's colours, which colour-blind readers can tell apart; grey is the base's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#595959"
STYLES: list[dict[str, Any]] = [
    {"color": c, "linestyle": dashes} for dashes in ("-", "-.", ":") for c in COLOURS
]
NOT_EVALUATED = (
    "has no evaluation both before and after training: what it learned or forgot is not known"
)


def show(value: Any, form: Callable[[Any], str] = str) -> str:
    """Returns a number as text, and a dash where it is None."""
    return MISSING if value is None else form(value)


def _verdict(change: float) -> str:
    if abs(change) < 0.0005:  # what three decimals would show as zero
        return "kept"
    return "learned" if change < 0 else "forgot"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, its columns aligned so that it reads well unrendered too."""
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


def result_table(summaries: Sequence[dict[str, Any]], sets: Sequence[str]) -> str:
    """Returns the Markdown table of what each run trained, learned and forgot."""
    rows = [["run", "trains", "trainable parameters", "tokens"]]
    rows[0] += [f"{name} base -> final" for name in sets]
    for summary in summaries:
        count, total = summary["trainable_parameters"], summary["total_parameters"]
        share = f" ({count / total:.1%})" if count is not None and total else ""
        cells = [summary["run"], show(summary["trains"]), show(count, format_count) + share]
        cells.append(show(summary["tokens"], format_count))
        for result in (summary["sets"][name] for name in sets):
            first, last, change = result["initial_loss"], result["final_loss"], result["change"]
            losses = f"{show(first, LOSS)} -> {show(last, LOSS)}"
            verdict = "" if change is None else f" ({change:+z.3f}, {_verdict(change)})"
            cells.append(MISSING if first is None and last is None else losses + verdict)
        rows.append(cells)
    return table(rows)


def _sentence(summary: dict[str, Any]) -> str:
    """Says in words what the run learned and forgot."""
    parts = [
        f"{_verdict(result['change'])} `{name}` (loss {result['change']:+z.3f}, perplexity "
        f"{perplexity(result['initial_loss']):.2f} -> {perplexity(result['final_loss']):.2f})"
        for name, result in summary["sets"].items()
        if result["change"] is not None
    ]
    return f"- **{summary['run']}** " + ("; ".join(parts) or NOT_EVALUATED) + "."


def _settings_table(runs: Sequence[Run]) -> str:
    parts = ("settings", "new_layers", "tokens_per_step", "device", "world_size", "versions")
    flat = [
        {
            n.removeprefix("settings."): show(v)
            for n, v in run.info.items()
            if n.split(".")[0] in parts
        }
        for run in runs
    ]
    rows = []
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(key, MISSING) for settings in flat]
        rows.append([f"**{key}**" if len(set(values)) > 1 else key, *values])
    rows.sort(key=lambda row: not row[0].startswith("**"))  # differences come first
    return table([["setting", *(run.name for run in runs)], *rows])


def markdown(runs: Sequence[Run], summaries: Sequence[dict[str, Any]], picture: str) -> str:
    """Returns the whole page; `picture` is the image's path relative to it."""
    sets = list(summaries[0]["sets"])
    speed = [["run", "steps", "final training loss", "throughput", "time", "peak memory"]]
    for s in summaries:
        rate = show(s["tokens_per_s"], lambda rate: f"{format_count(rate)} tok/s")
        cells = [s["run"], show(s["steps"]), show(s["final_train_loss"], LOSS), rate]
        speed.append(
            [*cells, show(s["elapsed_s"], format_duration), show(s["memory_bytes"], format_bytes)]
        )
    return "\n\n".join(
        [
            "# Training report: " + ", ".join(run.name for run in runs),
            f"![Validation loss, training loss, learning rate and throughput]({picture})",
            "## Learned and forgotten",
            result_table(summaries, sets),
            "\n".join(map(_sentence, summaries)),
            "Losses are in nats per token; *base* is the evaluation before the first step. A run "
            "*learned* a set if its loss fell, *forgot* it if it rose, and *kept* it if three "
            "decimals show no change.",
            "## Training",
            table(speed),
            f"The final training loss is the mean of the last {LAST_RECORDS} logged steps; the "
            "throughput is the median over all of them.",
            "## Settings",
            _settings_table(runs) + ("\n\nDifferences are in bold." if len(runs) > 1 else ""),
        ]
    )


def plot(runs: Sequence[Run], summaries: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws validation losses above, and training loss, learning rate and throughput below."""
    with needed("the report's picture needs matplotlib", "report"):
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import EngFormatter, FuncFormatter
    sets = list(summaries[0]["sets"])
    across = 2 if len(sets) == 4 else min(3, max(1, len(sets)))
    rows = -(-len(sets) // across)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02)  # pads in inches
    tall = 3.4 + 0.2 * len(runs)  # inches: a panel and its legend, a line a run
    figure = Figure(figsize=(12, 0.6 + tall * rows + 2.9), layout=layout)
    # Six columns hold one, two or three panels of the same width.
    grid = figure.add_gridspec(rows + 1, 6, height_ratios=[tall] * rows + [2.9])
    heading = "Validation loss: below the dashed line is learned, above it is forgotten"
    figure.suptitle(heading if sets else "Training (no evaluation records)", fontsize=14)

    def panel(row: int, column: int, width: int, title: str, label: str) -> "Axes":
        axes = figure.add_subplot(grid[row, column * width : (column + 1) * width])
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(label)
        axes.grid(True, color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    for i, name in enumerate(sets):
        axes = panel(i // across, i % across, 6 // across, plain(name), "loss (nats per token)")
        _draw_losses(axes, name, runs, summaries)
    loss = panel(rows, 0, 2, "training", "loss (nats per token)")
    rate = panel(rows, 1, 2, "learning rate", "learning rate")
    speed = panel(rows, 2, 2, "throughput", "tokens per second")
    for run, style in zip(runs, cycle(STYLES), strict=False):
        x, y = _series(run.train, "tokens", "loss")
        loss.plot(x, y, **style, alpha=0.2, linewidth=0.8)
        loss.plot(x, _smooth(y), **style, linewidth=1.8, label=plain(run.name))
        rate.plot(*_series(run.train, "tokens", "learning_rate"), **style, linewidth=1.8)
        speed.plot(*_series(run.train, "tokens", "tokens_per_s"), **style, linewidth=1.2)
    if any(run.train for run in runs):
        loss.legend(fontsize=9, frameon=False)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.1e}" if y else "0"))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    rate.set_ylim(bottom=0)
    speed.set_ylim(bottom=0)
    figure.savefig(file, dpi=150, facecolor="white")


def _draw_losses(
    axes: "Axes", name: str, runs: Sequence[Run], summaries: Sequence[dict[str, Any]]
) -> None:
    """Draws one validation set: a line for each run, and a dashed one for each base."""
    bases: list[float] = []
    for run, summary, style in zip(runs, summaries, cycle(STYLES), strict=False):
        if name not in run.evals:
            continue
        result = summary["sets"][name]
        x, y = _series(run.evals[name], "tokens_seen", "loss")
        change = "" if result["change"] is None else f" ({result['change']:+z.3f})"
        label = f"{plain(run.name)}: {show(result['final_loss'], LOSS)}{change}"
        marker = "o" if len(x) <= 40 else None
        axes.plot(x, y, **style, linewidth=2, marker=marker, markersize=3.5, label=label)
        base = result["initial_loss"]
        # Runs of one base begin at one loss, up to the order of summation.
        if base is not None and not any(abs(base - seen) < 1e-3 for seen in bases):
            bases.append(base)
    for base in bases:
        axes.axhline(base, color=GREY, linestyle="--", linewidth=1.3, label=f"base: {base:.3f}")
    low, high = axes.get_ylim()
    if high - low < 0.02:  # a set that does not move should look flat
        middle = (low + high) / 2
        axes.set_ylim(middle - 0.01, middle + 0.01)
    # Below the panel: inside, it would hide a line as soon as one falls and another rises.
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17), fontsize=9, frameon=False)
    axes.ticklabel_format(axis="y", useOffset=False)


def _series(records: Sequence[dict[str, Any]], x: str, y: str) -> np.ndarray:
    """Returns the points of a line; a loss that was not finite (null) leaves a gap."""
    kept = [(record[x], record.get(y)) for record in records if record.get(x) is not None]
    return np.array(kept, dtype=float).reshape(-1, 2).T  # None becomes NaN


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the running mean over a tenth of the points, without the gaps."""
    if not len(values):
        return values
    window = np.ones(2 * round(len(values) / 20) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def plain(text: str) -> str:
    """Returns text that matplotlib draws as it stands."""
    return text.replace("$", r"\$")  # matplotlib would read what stands between as a formula


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Writes `report.png` and `report.md` for one run or several, side by side.

    `out` is the directory to write to, the first run's if None.

    Returns:
        runs, their numbers, as `summarize` gives them; files, the paths that were written.

    Raises:
        ConfigError: no run, the same run twice, no matplotlib, or `out` cannot be written.
        DataError: a directory is not a run's, or its records are damaged.
    """
    if not run_dirs:
        raise ConfigError("no run directory given; usage: llamapro report RUN_DIR...")
    names = _names(run_dirs)
    runs = [read_run(path, name) for path, name in zip(run_dirs, names, strict=True)]
    sets = list(dict.fromkeys(name for run in runs for name in run.evals))
    summaries = [summarize(run, sets) for run in runs]
    out = run_dirs[0] if out is None else out
    picture, page = out / "report.png", out / "report.md"
    try:
        out.mkdir(parents=True, exist_ok=True)
        plot(runs, summaries, picture)
        text = markdown(runs, summaries, picture.name) + "\n"
        page.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    return {"runs": summaries, "files": [str(picture), str(page)]}


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Returns the directories' names, with as many parents as tell them apart."""
    paths = [Path(os.path.abspath(user_path(path))) for path in run_dirs]
    if len(set(paths)) < len(paths):
        twice = next(str(d) for d, p in zip(run_dirs, paths, strict=True) if paths.count(p) > 1)
        raise ConfigError(f"{twice}: given twice; name each run directory once")
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    names = (["/".join(path.parts[-depth:]) for path in paths] for depth in depths)
    return next(found for found in names if len(set(found)) == len(found))


def report(
    run_dirs: tyro.conf.Positional[list[Path]],
    out: Path | None = None,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Show what runs learned and forgot: a table, report.md and report.png.

    Args:
        run_dirs: Run directories, for example one that trained new blocks and one that trained all.
        out: Directory for report.md and report.png; the first run directory by default.
        json: Print the result as one JSON object.
    """
    result = write_report(run_dirs, out)
    for file in result["files"]:
        note(f"wrote {file}")
    for summary in result["runs"]:
        if all(numbers["change"] is None for numbers in summary["sets"].values()):
            note(f"{summary['run']} {NOT_EVALUATED}")
    sets = list(result["runs"][0]["sets"])
    cli.print_result(result, json, result_table(result["runs"], sets))


def main(argv: list[str] | None = None, prog: str = "python -m llamapro.report") -> None:
    """Runs the command with these arguments, those of the process by default."""
    tyro.cli(report, args=argv, prog=prog)


if __name__ == "__main__":
    cli.run(main)
