"""The study's pictures: losses over training, learning against forgetting, and new blocks.

A variant has the same colour and marker in all pictures. The compared number of blocks is black.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from summary import done, front, summarize

from llamapro.report import COLOURS, GREY, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = {
    "number": "number of new blocks",
    "place": "place of new blocks",
    "compared": "other ways to train",
    "retention": "against forgetting",
}
SPLIT = (("number", "place"), ("compared",), ("retention",))  # panels of a study of many variants
MARKERS = dict(zip(GROUPS, "osD^", strict=True))
SIZES = {"*": 14, "o": 8, "s": 8, "D": 7.5, "^": 9.5}  # points; these look equally large
LEARNED, FORGOTTEN = "domain loss, change", "general loss, change"
DPI = 150
ACROSS = 4  # panels of curves side by side
FAR = 5  # times the median: a variant that far out would hide all others on a linear axis


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Draws all pictures into a directory; returns their files. Needs matplotlib."""
    pictures = {out / f"{picture.__name__}.png": picture for picture in (curves, pareto, blocks)}
    for file, picture in pictures.items():
        picture(results["studies"]).savefig(file, dpi=DPI, facecolor="white")
    return list(pictures)


def _figure(width: float, height: float, title: str) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    figure.suptitle(title, fontsize=14)
    return figure


def _prepare(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(plain(title), loc="left", fontsize=10, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _is_compared(study: dict[str, Any], variant: dict[str, Any]) -> bool:
    return bool(variant["name"] == study["compared"])


def _has(study: dict[str, Any], group: str) -> bool:
    """Whether the group has variants beside the compared one."""
    return any(v["group"] == group and not _is_compared(study, v) for v in study["variants"])


def _styles(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns colour and marker by variant. A group has one marker."""
    styles, seen = {}, dict.fromkeys(GROUPS, 0)
    for variant in study["variants"]:
        group = variant["group"]
        style = {"color": COLOURS[seen[group] % len(COLOURS)], "marker": MARKERS[group]}
        is_compared = _is_compared(study, variant)
        styles[variant["name"]] = {"color": "black", "marker": "*"} if is_compared else style
        seen[group] += not is_compared
    return styles


# ---- Curves -------------------------------------------------------------------------------------


def paths(study: dict[str, Any], variant: str, sets: Sequence[str]) -> np.ndarray:
    """Returns each run's tokens and mean change over the sets, (runs, points, 2); NaN is a gap."""
    base = [[[0, study["base_result"]["losses"][name]]] for name in sets]
    curves = [[run["curves"][name] for name in sets] for run in done(study, variant)]
    found = [(np.array(curve, dtype=float) - base).mean(0) for curve in curves]
    points = min(map(len, found), default=0)
    return np.array([curve[:points] for curve in found]).reshape(len(found), points, 2)


def curves(studies: Sequence[dict[str, Any]]) -> "Figure":
    """Draws losses over tokens, a panel per study and group, the compared variant in all."""
    panels = [(study, group) for study in studies for group in GROUPS if _has(study, group)]
    rows = max(1, -(-len(panels) // ACROSS))
    title = "Change of loss over training: lower is better (band: standard deviation over seeds)"
    figure = _figure(4.2 * ACROSS, 7.6 * rows + 0.6, title)
    grid = figure.subplots(2 * rows, ACROSS, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for i, (study, group) in enumerate(panels):
        above, below = (grid[2 * (i // ACROSS) + half, i % ACROSS] for half in (0, 1))
        _curves(above, study, group, [study["domain_set"]], LEARNED)
        _curves(below, study, group, study["general"], FORGOTTEN)
        below.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8, frameon=False)
    return figure


def _curves(
    axes: "Axes", study: dict[str, Any], group: str, sets: Sequence[str], label: str
) -> None:
    """Draws the mean change over these sets, a line per variant of the group."""
    from matplotlib.ticker import EngFormatter

    axes.set_visible(True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    styles = _styles(study)
    for variant in study["variants"]:
        runs, style = paths(study, variant["name"], sets), styles[variant["name"]]
        if not len(runs) or not (variant["group"] == group or _is_compared(study, variant)):
            continue
        x, y = runs.mean(0).T
        axes.plot(x, y, **style, markersize=4, linewidth=1.5, label=plain(variant["label"]))
        if len(runs) > 1:
            sd = runs[..., 1].std(0, ddof=1)
            axes.fill_between(x, y - sd, y + sd, color=style["color"], alpha=0.2, linewidth=0)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    title = f"{study['name']}: {GROUPS[group]}\n{label.split()[0]} ({', '.join(sets)})"
    _prepare(axes, title, "tokens trained on", label)


# ---- Learning and forgetting --------------------------------------------------------------------


def pareto(studies: Sequence[dict[str, Any]]) -> "Figure":
    """Draws what the variants learned and forgot; a study of many has several panels."""
    panels = [
        (study, groups)
        for study in studies
        for groups in (SPLIT if len(study["variants"]) > 10 else [tuple(GROUPS)])
        if any(_has(study, group) for group in groups)
    ]
    across = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // across))
    title = "What is learned and what is forgotten: lower left is better"
    told = "(bars: standard deviation over seeds; dotted: Pareto front of all variants)"
    figure = _figure(7.2 * across, 5.2 * rows + 0.5, f"{title}\n{told}")
    grid = figure.subplots(rows, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (study, groups) in zip(grid.flat, panels, strict=False):
        _plane(axes, study, groups)
    return figure


def _plane(axes: "Axes", study: dict[str, Any], groups: Sequence[str]) -> None:
    """Draws the variants of these groups and the compared one, each with its name beside it."""
    styles, rows = _styles(study), [row for row in summarize(study) if row["runs"]]
    shown = [row for row in rows if row["group"] in groups or _is_compared(study, row)]
    points: list[Any] = [("base", 0.0, 0.0, {"color": GREY, "marker": "P"}, 9.0)]
    for row in shown:
        style, x, y = styles[row["name"]], row["domain_change"], row["general"]
        axes.errorbar(x.mean, y.mean, y.sd, x.sd, ecolor=style["color"], elinewidth=1, fmt="none")
        points.append((plain(row["label"]), x.mean, y.mean, style, SIZES[style["marker"]]))
    best = front(rows).values()
    axes.step(*zip(*best, strict=True), where="post", color=GREY, ls=":", zorder=1)
    scale = _compress(axes, [row["general"].mean for row in shown if row["general"].mean > 0])
    points.sort(key=lambda point: -point[2])
    heights = np.linspace(0.97, 0.03, len(points)) if len(points) > 1 else [0.5]
    for (label, x, y, style, size), height in zip(points, heights, strict=True):
        axes.plot(x, y, **style, markersize=size, markeredgecolor="white", ls="", zorder=3)
        line = {"arrowstyle": "-", "color": style["color"], "linewidth": 0.6, "relpos": (0, 0.5)}
        place: dict[str, Any] = {
            "xytext": (1.06, height),
            "textcoords": "axes fraction",
            "va": "center",
        }
        axes.annotate(label, (x, y), **place, color=style["color"], fontsize=9, arrowprops=line)
    what = ", ".join(GROUPS[g] for g in groups if _has(study, g)) if len(groups) < 4 else "all"
    _prepare(axes, f"{study['name']}: {what}", LEARNED, FORGOTTEN + scale)


def _compress(axes: "Axes", forgot: Sequence[float]) -> str:
    """Makes the axis of forgetting logarithmic if a variant is far out; returns a note of it."""
    if not forgot or max(forgot) <= FAR * median(forgot):
        return ""
    width, (bottom, top) = median(forgot), axes.get_ylim()
    axes.set_yscale("asinh", linear_width=width)
    steps = [m * 10.0**k for k in range(-4, 3) for m in (1, 2, 5) if m * 10.0**k > width / 3]
    ticks = [tick for step in (0.0, *steps) for tick in {step, -step} if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(bottom, top)
    return " (logarithmic far from 0)"


# ---- New blocks ---------------------------------------------------------------------------------


def blocks(studies: Sequence[dict[str, Any]]) -> "Figure":
    """Draws the effect of the number of new blocks and of their place, a row a study."""
    shown = [s for s in studies if _has(s, "number") or _has(s, "place")]
    rows = max(1, len(shown))
    title = "Number and place of new blocks: lower is better (error bars: sd over seeds)"
    figure = _figure(16, 4.6 * rows + 0.5, title)
    grid = figure.subplots(rows, 4, squeeze=False)
    for line, study in zip(grid, shown, strict=False):
        found = [row for row in summarize(study) if row["runs"]]
        for i, (key, label) in enumerate((("domain_change", LEARNED), ("general", FORGOTTEN))):
            _numbers(line[i], found, key)
            _places(line[2 + i], study, found, key)
            for axes, group in ((line[i], "number"), (line[2 + i], "place")):
                _prepare(axes, f"{study['name']}: {GROUPS[group]}", "", label)
                axes.set_visible(_has(study, group))
    return figure


def _numbers(axes: "Axes", rows: Sequence[dict[str, Any]], key: str) -> None:
    """Draws a line over the numbers of new blocks, from the base with none and no change."""
    axis = [row for row in rows if row["group"] == "number" and row["new_blocks"] is not None]
    axis.sort(key=lambda row: row["new_blocks"])
    x = [0, *(row["new_blocks"] for row in axis)]
    y, sd = [0.0, *(row[key].mean for row in axis)], [0.0, *(row[key].sd or 0 for row in axis)]
    axes.errorbar(x, y, sd, color=COLOURS[0], marker="o", capsize=4)
    axes.set_xticks(x)


def _places(axes: "Axes", study: dict[str, Any], rows: Sequence[dict[str, Any]], key: str) -> None:
    """Draws a bar per place. All have the compared number of new blocks."""
    places = [row for row in rows if row["group"] == "place" or _is_compared(study, row)]
    names = ["interleaved" if _is_compared(study, row) else plain(row["name"]) for row in places]
    for i, row in enumerate(places):
        color = _styles(study)[row["name"]]["color"]
        axes.bar(i, row[key].mean, yerr=row[key].sd, color=color, ecolor=GREY, capsize=4)
    axes.set_xticks(range(len(places)), names, rotation=20, ha="right")
    axes.axhline(0, color=GREY, linewidth=1)
