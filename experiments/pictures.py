"""The study's pictures: losses over training, the plane of learning and forgetting, and new blocks.

A variant has one colour and marker in all of them; the one all are compared with is black.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from summary import Spread, failure, final_changes, finished, general_change, summarize

from llamapro.config import ConfigError
from llamapro.report import COLOURS, GREY, TOKEN_UNITS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = {
    "number": "number of new blocks",
    "place": "place of new blocks",
    "compared": "other ways to train",
    "retention": "against forgetting",
}
MARKERS = dict(zip(GROUPS, "osD^", strict=True))
LEARNED, FORGOTTEN = "domain loss, change", "general loss, change"
ACROSS = 4  # panels of curves side by side
FAR = 5  # times the median: with a variant that far out, a linear axis shows nothing of the others


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Draws all pictures into a directory; returns their files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    files = []
    for name, picture in (("curves", curves), ("pareto", pareto), ("blocks", blocks)):
        files.append(out / f"{name}.png")
        picture(results["studies"]).savefig(files[-1], dpi=150, facecolor="white")
    return files


def _figure(width: float, height: float, title: str) -> "Figure":
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError(
            "the study's pictures need matplotlib: pip install 'llamapro[study]'"
        ) from None
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    figure.suptitle(title, fontsize=14)
    return figure


def _prepare(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(plain(title), loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _is_compared(study: dict[str, Any], variant: dict[str, Any]) -> bool:
    return bool(variant["name"] == study["compared"])


def _has(study: dict[str, Any], group: str) -> bool:
    """Whether there are variants to put beside the compared one."""
    return any(v["group"] == group and not _is_compared(study, v) for v in study["variants"])


def _done(study: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial for trial in study["trials"] if failure(trial) is None]


def _styles(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each variant: the marker is its group's."""
    styles, seen = {}, dict.fromkeys(GROUPS, 0)
    for variant in study["variants"]:
        name, group = variant["name"], variant["group"]
        if _is_compared(study, variant):
            styles[name] = {"color": "black", "marker": "*"}
            continue
        styles[name] = {"color": COLOURS[seen[group] % len(COLOURS)], "marker": MARKERS[group]}
        seen[group] += 1
    return styles


# ---- Curves -------------------------------------------------------------------------------------


def path(study: dict[str, Any], trial: dict[str, Any], sets: Sequence[str]) -> dict[int, float]:
    """Returns tokens -> mean change over these sets, NaN where a loss was not finite."""
    base = study["base_result"]["losses"]
    return {
        points[0][0]: mean(
            np.nan if loss is None else loss - base[name]
            for name, (_, loss) in zip(sets, points, strict=True)
        )
        for points in zip(*(trial["curves"][name] for name in sets), strict=True)
    }


def _paths(
    study: dict[str, Any], variant: str, sets: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens at which all of a variant's runs were evaluated; the changes (seeds, points)."""
    paths = [path(study, run, sets) for run in finished(study, variant)]
    tokens = sorted(set.intersection(*map(set, paths))) if paths else []
    return np.array(tokens), np.array([[found[at] for at in tokens] for found in paths])


def curves(studies: Sequence[dict[str, Any]]) -> "Figure":
    """Draws losses over tokens: each study's groups side by side, the compared variant in all."""
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
    """One panel: a line a variant of the group, its mean change over these sets."""
    axes.set_visible(True)
    most = max((c[-1][0] for t in _done(study) for c in t["curves"].values()), default=0)
    unit, unit_name = next((pair for pair in TOKEN_UNITS if most >= pair[0]), TOKEN_UNITS[-1])
    styles = _styles(study)
    for variant in study["variants"]:
        tokens, values = _paths(study, variant["name"], sets)
        if not len(values) or not (variant["group"] == group or _is_compared(study, variant)):
            continue
        x, y, style = tokens / unit, values.mean(0), styles[variant["name"]]
        axes.plot(x, y, **style, markersize=4, linewidth=1.5, label=plain(variant["label"]))
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            axes.fill_between(x, y - sd, y + sd, color=style["color"], alpha=0.2, linewidth=0)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    title = f"{study['name']}: {GROUPS[group]}\n{label.split()[0]} ({', '.join(sets)})"
    _prepare(axes, title, f"tokens trained on{unit_name}", label)


# ---- Learning and forgetting --------------------------------------------------------------------


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points to which no other is lower in one number and not higher in the other."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def pareto(studies: Sequence[dict[str, Any]]) -> "Figure":
    """Draws each trial by what it learned and forgot, chosen means over them, and their front."""
    across = min(2, max(1, len(studies)))
    rows = max(1, -(-len(studies) // across))
    title = "What is learned and what is forgotten: lower left is better"
    figure = _figure(8.2 * across, 6.2 * rows + 0.5, title)
    grid = figure.subplots(rows, across, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i < len(studies):
            _plane(axes, studies[i])
        else:
            axes.set_visible(False)
    return figure


def _plane(axes: "Axes", study: dict[str, Any]) -> None:
    styles, rows = _styles(study), [row for row in summarize(study) if row["runs"]]
    axes.plot(0, 0, marker="P", color=GREY, markersize=9, linestyle="", label="base")
    for row in rows:
        style, x, y = styles[row["name"]], row["domain_change"], row["general"]
        sides = [_paths(study, row["name"], s) for s in ([study["domain_set"]], study["general"])]
        line = [changes.mean(0) for _, changes in sides]
        axes.plot(*line, color=style["color"], linewidth=0.7, alpha=0.6)
        axes.errorbar(x.mean, y.mean, y.sd, x.sd, ecolor=style["color"], elinewidth=1, fmt="none")
        size = 13 if style["marker"] == "*" else 8
        look = {"linestyle": "", "markersize": size, "markeredgecolor": "white"}
        axes.plot(x.mean, y.mean, **style | look, zorder=3, label=plain(row["label"]))
    means = [(row["domain_change"].mean, row["general"].mean) for row in rows]
    best = front([(0.0, 0.0), *means])
    axes.step(*zip(*best, strict=True), where="post", color=GREY, ls=":", label="Pareto front")
    forgot = sorted(y for _, y in means if y > 0)
    scale = ""
    if forgot and forgot[-1] > FAR * median(forgot):
        axes.set_yscale("asinh", linear_width=median(forgot))
        scale = " (nearly logarithmic above)"
    # The view is that of the chosen runs; what lies beyond is drawn at its edge, not hidden.
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    beyond = 0
    for trial in _done(study):
        changes = final_changes(study, trial)
        x, y = changes[study["domain_set"]], general_change(study, changes)
        where = min(max(x, left), right), min(max(y, bottom), top)
        is_beyond = where != (x, y)
        beyond += is_beyond
        look = {"alpha": 0.35, "markersize": 4, "linestyle": "", "clip_on": not is_beyond}
        face = {"markerfacecolor": "none"} if is_beyond else {}
        axes.plot(*where, **styles[trial["variant"]] | look | face, zorder=2)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    title = f"{study['name']}: change from the base"
    title += f" ({beyond} beyond the view: hollow, at its edge)" if beyond else ""
    _prepare(axes, title, LEARNED, FORGOTTEN + scale)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8.5, frameon=False)


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
            _prepare(line[i], f"{study['name']}: {GROUPS['number']}", "new blocks", label)
            _places(line[2 + i], study, found, key)
            _prepare(line[2 + i], f"{study['name']}: {GROUPS['place']}", "", label)
    return figure


def _numbers(axes: "Axes", rows: Sequence[dict[str, Any]], key: str) -> None:
    """A line over the numbers of new blocks; the base has none, and no change."""
    axis = [row for row in rows if row["group"] == "number" and row["new_blocks"] is not None]
    axis.sort(key=lambda row: row["new_blocks"])
    x = [0, *(row["new_blocks"] for row in axis)]
    spreads = [Spread(0.0, None, 1), *(row[key] for row in axis)]
    sd = [spread.sd or 0 for spread in spreads]
    axes.errorbar(x, [s.mean for s in spreads], sd, color=COLOURS[0], marker="o", capsize=4)
    axes.set_xticks(x)


def _places(axes: "Axes", study: dict[str, Any], rows: Sequence[dict[str, Any]], key: str) -> None:
    """A bar a place, of as many new blocks as the compared variant has."""
    places = [row for row in rows if row["group"] == "place"]
    for row in rows:
        if _is_compared(study, row):
            number = row["new_blocks"]
            places = [row, *(r for r in places if r["new_blocks"] == number and r is not row)]
    names = ["interleaved" if _is_compared(study, row) else plain(row["label"]) for row in places]
    for i, row in enumerate(places):
        color = GREY if _is_compared(study, row) else _styles(study)[row["name"]]["color"]
        axes.bar(i, row[key].mean, yerr=row[key].sd, color=color, capsize=4, width=0.65)
    axes.set_xticks(range(len(places)), names, rotation=20, ha="right")
    axes.axhline(0, color=GREY, linewidth=1)
