"""The table as charts: what accuracy costs in bytes, and how it changes step by step.

Files that stand for themselves, on white. Import this module only when something is to be drawn,
matplotlib takes a second to load.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from server.bench.budget import REFERENCE
from server.bench.table import Row, Stat

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
_OURS = "#c8102e"
_COLOURS = ("#1f5fa8", "#e08a00", "#3b8f3b", "#7a4fb0", "#8a5a3c", "#1aa3a3", "#777777")
_SHAPES = "osv^DPX<>ph"
_UPPER_BOUNDS = ("joint", "central")
_WIDE = 4.0  # ratio of bytes from which a linear axis crowds the small ones

Look = dict[str, Any]


def frontier(rows: Sequence[Row]) -> str:
    """Accuracy against bytes, a mark a method; a line joins those that no other one dominates.

    Parameters
    ----------
    rows : sequence of Row
        Of one stream.

    Returns
    -------
    str
        An SVG file. Methods that send nothing are horizontal lines.
    """
    return _drawn("bytes", (7.2, 4.2), lambda figure: _frontier(figure, rows))


def steps(rows: Sequence[Row]) -> str:
    """Accuracy on each part over the steps, a line a method; an SVG file, as of `frontier`."""
    panels = len(rows[0].parts_tested)
    across = 2 if panels == 4 else min(panels, 3)
    size = (2.4 + 2.9 * across, 0.6 + 2.6 * math.ceil(panels / across))
    return _drawn("steps", size, lambda figure: _steps(figure, rows, across))


def _frontier(figure: Figure, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    points = {}
    for row, look in zip(rows, _looks(rows), strict=True):
        acc, size = row.stats["ACC"], row.stats["up MB"].mean + row.stats["down MB"].mean
        if not acc.count:
            continue
        if not size:
            axes.axhline(100 * acc.mean, ls="--", lw=1, color=look["color"], label=row.method)
            continue
        spread = 100 * acc.std if acc.count > 1 else None
        axes.errorbar(
            size / 1e6, 100 * acc.mean, spread, ls="none", capsize=2, label=row.method, **look
        )
        if row.method not in _UPPER_BOUNDS:
            points[row.method] = (size / 1e6, 100 * acc.mean)
    best = [(x, y) for x, y in points.values() if not _dominated(x, y, list(points.values()))]
    if best:
        axes.plot(*zip(*sorted(best), strict=True), color="#bbbbbb", lw=1, zorder=1)
        sent = [x for x, _ in points.values()]
        if max(sent) > _WIDE * min(sent):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("MB up and down, all devices and rounds")
    axes.set_ylabel("mean accuracy over the parts, %")
    axes.set_title(f"{rows[0].protocol}, {rows[0].parts} parts")
    figure.legend(loc="outside right upper")


def _dominated(x: float, y: float, points: Sequence[tuple[float, float]]) -> bool:
    return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)


def _steps(figure: Figure, rows: Sequence[Row], across: int) -> None:
    parts = rows[0].parts_tested
    down = math.ceil(len(parts) / across)
    panels = figure.subplots(down, across, squeeze=False).flat
    for number, axes in enumerate(panels):
        if number >= len(parts):
            axes.set_axis_off()
            continue
        for row, look in zip(rows, _looks(rows), strict=True):
            _line(axes, [stats[number] for stats in row.matrix], row.method, look)
        axes.set_title(parts[number])
        after = range(len(rows[0].matrix))
        axes.set_xticks(list(after), ["prior", *(str(step) for step in after[1:])])
        if number % across == 0:
            axes.set_ylabel("accuracy, %")
        axes.set_xlabel("after step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def _line(axes: Axes, stats: Sequence[Stat], name: str, look: Look) -> None:
    known = [(step, 100 * stat.mean) for step, stat in enumerate(stats) if stat.count]
    axes.plot(*zip(*known, strict=True), label=name, lw=look["ms"] / 4, **look)


def _looks(rows: Sequence[Row]) -> list[Look]:
    """Return colour and mark of every method: ours stands out, no two are alike."""
    looks = []
    others = 0
    for row in rows:
        if row.method == REFERENCE:
            looks.append({"color": _OURS, "marker": "*", "ms": 10.0, "zorder": 5})
            continue
        colour, shape = _COLOURS[others % len(_COLOURS)], _SHAPES[others % len(_SHAPES)]
        looks.append({"color": colour, "marker": shape, "ms": 5.0, "zorder": 3})
        others += 1
    return looks


def _drawn(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw on a figure and return the same SVG for the same numbers, on any machine."""
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": f"fallow-{name}"}]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    return file.getvalue()
