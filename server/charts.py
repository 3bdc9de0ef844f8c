"""The charts of a report, as inline SVG that takes its colours and its font from the page.

Matplotlib draws with stand-in colours, which are then replaced by CSS variables: one SVG
reads well on light and on dark paper. Import this module only when something is to be drawn,
matplotlib takes a second to load. Nothing here touches matplotlib's global state: figures are
made without pyplot, and its settings hold inside a ``with`` block.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#a10001", "#a10002", "#a10003"
DARK, PALE = "#a10007", "#a10008"
GROW, CONSOLIDATE, FREE = "#a10004", "#a10005", "#a10006"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    GROW: "--grow",
    CONSOLIDATE: "--consolidate",
    FREE: "--free",
    DARK: "--dark",
    PALE: "--pale",
}
_PHASES = {"grow": GROW, "consolidate": CONSOLIDATE}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.frameon": False,
}
_WIDTH = 9.4  # inches; at the page's full width one point is then about 1.3 CSS pixels

Summary = dict[str, Any]
Point = tuple[float, float]
Marker = tuple[str, str, float, list[Point]]
Segment = tuple[tuple[int, str, int], int, list[dict[str, Any]]]


def accuracy_by_round(summary: Summary, rounds: list[dict[str, Any]]) -> str:
    """Held-out accuracy over all rounds, phases shaded, test accuracies as markers.

    Parameters
    ----------
    summary
        A valid summary (``summary.schema.json``).
    rounds
        The lines of ``rounds.jsonl``, in the order in which they were run; at least one.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    return _drawn("accuracy", 3.7, lambda figure: _accuracy(figure, summary, rounds))


def freeing(freeings: list[dict[str, Any]]) -> str:
    """Share of the filters asked for and freed, and its cost in points, for every freeing.

    Each has a ``name``, the shares ``asked`` and ``freed``, and the ``cost`` in accuracy, as a
    share, or None.
    """
    return _drawn("freeing", 2.7, lambda figure: _freeing(figure, freeings))


def traffic(summary: Summary) -> str:
    """Bytes of every step, up and down, beside those of dense FedAvg; at least one step."""
    height = 1.0 + 0.62 * len(summary["steps"])
    return _drawn("traffic", height, lambda figure: _traffic(figure, summary))


def sizes(summary: Summary) -> str:
    """Size of the full net's weights in float32 and of every ONNX file, a bar each."""
    models = [("full net, fp32", 4 * summary["prior"]["params_full"], MUTED)]
    for step in summary["steps"]:
        onnx, name = step["onnx"] or {"fp32": None, "int8": None}, f"step {step['step']}"
        models += [(f"{name}, slim ONNX fp32", onnx["fp32"]["bytes"], DARK)] if onnx["fp32"] else []
        models += [(f"{name}, slim ONNX int8", onnx["int8"]["bytes"], PALE)] if onnx["int8"] else []
    return _drawn("sizes", 0.7 + 0.29 * len(models), lambda figure: _sizes(figure, models))


def _accuracy(figure: Figure, summary: Summary, rounds: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    segments = list(_segments(rounds))
    seen: list[float] = []

    for (_, phase, attempt), start, records in segments:
        axes.axvspan(start, start + len(records), color=_PHASES[phase], alpha=0.13, lw=0)
        if attempt:
            axes.axvline(start, color=MUTED, lw=0.8, ls=":")
        values = [record["heldout_accuracy"] for record in records]
        known = [(start + at, 100 * value) for at, value in enumerate(values) if value is not None]
        seen += [y for _, y in known]
        marker = "o" if len(rounds) <= 80 else None
        axes.plot(*_columns(known), color=_PHASES[phase], lw=1.6, marker=marker, ms=3)

    markers = _test_markers(summary, segments)
    for name, shape, size, points in markers:
        seen += [y for _, y in points]
        filled = {"color": INK} if name == "prior" else {"mec": INK, "mfc": "none", "mew": 1.4}
        axes.plot(*_columns(points), ls="none", marker=shape, ms=size, zorder=4, **filled)

    for step, group in groupby(segments, key=lambda segment: segment[0][0]):
        parts = list(group)
        left, right = parts[0][1], parts[-1][1] + len(parts[-1][2])
        if left:
            axes.axvline(left, color=INK, lw=1)
        axes.text(
            (left + right) / 2,
            1.02,
            f"step {step}" if step else "first freeing",
            transform=axes.get_xaxis_transform(),
            ha="center",
        )

    axes.set_xlim(-0.01 * len(rounds), 1.01 * len(rounds))
    axes.set_ylim(*_limits(seen))
    axes.set_xlabel("rounds since the start")
    axes.set_ylabel("accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    _accuracy_legend(figure, [p for p in _PHASES if any(s[0][1] == p for s in segments)], markers)


def _segments(rounds: list[dict[str, Any]]) -> Iterator[Segment]:
    """Yield ((step, phase, attempt), rounds before it, its rounds).

    The exchange that only measures what a phase came to belongs to that phase.
    """
    keys: list[tuple[int, str, int]] = []
    for record in rounds:
        # they follow whichever phase ends the step
        ends = record["phase"] in ("tally", "advise", "anchor") and keys
        keys.append(keys[-1] if ends else _segment_of(record))
    start = 0
    for key, group in groupby(zip(keys, rounds, strict=True), key=lambda pair: pair[0]):
        records = [record for _, record in group]
        yield key, start, records
        start += len(records)


def _segment_of(record: dict[str, Any]) -> tuple[int, str, int]:
    belongs = {"look": "grow", "weigh": "grow", "judge": "consolidate"}
    phase = belongs.get(record["phase"], record["phase"])
    return record["step"], phase, record["attempt"]


def _test_markers(summary: Summary, segments: list[Segment]) -> list[Marker]:
    """Return (name, marker, size, points) of the test accuracies that were measured."""
    found: dict[str, list[Point]] = {"prior": [], "grown": [], "slim": []}
    for step in summary["steps"]:
        own = [segment for segment in segments if segment[0][0] == step["step"]]
        if not own:
            continue
        ends = {phase: start + len(records) - 1 for (_, phase, _), start, records in own}
        at = {"prior": own[0][1], "grown": ends.get("grow"), "slim": ends.get("consolidate")}
        for name, x in at.items():
            value = step[f"{name}_accuracy"]
            if x is not None and value is not None:
                found[name].append((x, 100 * value))
    shapes = [("prior", "o", 5.0), ("grown", "^", 8.0), ("slim", "s", 9.0)]
    return [(name, shape, size, found[name]) for name, shape, size in shapes if found[name]]


def _accuracy_legend(
    figure: Figure,
    phases: list[str],
    markers: list[Marker],
) -> None:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_PHASES[phase], marker="o", ms=3, label=f"held-out: {phase}")
        for phase in phases
    ]
    for name, shape, size, _ in markers:
        face = INK if name == "prior" else "none"
        handles.append(
            Line2D(
                [], [], ls="none", marker=shape, ms=size, mec=INK, mfc=face, label=f"test: {name}"
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _freeing(figure: Figure, freeings: list[dict[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    at = range(len(freeings))
    asked = [100 * row["asked"] for row in freeings]
    freed = [100 * row["freed"] for row in freeings]
    left.bar([x - 0.19 for x in at], asked, 0.34, fc="none", ec=MUTED, label="asked for")
    left.bar([x + 0.19 for x in at], freed, 0.34, color=FREE, label="freed")
    for x, value in zip(at, freed, strict=True):
        _above(left, x + 0.19, value, f"{value:.0f}")
    left.set_title("Filters freed, % of all")
    left.set_ylim(0, 1.35 * max([*asked, *freed, 1]))
    left.legend(loc="upper right", ncols=2)

    costs = {x: 100 * row["cost"] for x, row in enumerate(freeings) if row["cost"] is not None}
    right.bar(list(costs), list(costs.values()), 0.45, color=FREE)
    for x in at:
        _above(right, x, costs.get(x, 0), f"{costs[x]:+.1f}" if x in costs else "not measured")
    right.set_title("Its cost, points of held-out accuracy (below 0: a gain)")
    low, high = min([*costs.values(), 0]), max([*costs.values(), 0.5])
    right.set_ylim(low - (0.2 * (high - low) if low < 0 else 0), high + 0.2 * (high - low))
    right.axhline(0, color=MUTED, lw=0.8)
    for axes in (left, right):
        axes.set_xticks(list(at), [row["name"].lower() for row in freeings])
        axes.set_xlim(-0.6, max(len(freeings), 3) - 0.4)
        axes.grid(axis="y")


def _above(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text.replace("-", "\N{MINUS SIGN}"),
        (x, y),
        xytext=(0, 2 if y >= 0 else -2),
        textcoords="offset points",
        ha="center",
        va="bottom" if y >= 0 else "top",
    )


def _traffic(figure: Figure, summary: Summary) -> None:
    axes = figure.subplots()
    steps = summary["steps"]
    totals = [step["bytes_up"] + step["bytes_down"] for step in steps]
    longest = max(totals + [step["bytes_dense_fedavg"] for step in steps] + [1])
    unit, name = unit_of(longest)
    ticks, labels = [], []
    for row, (step, total) in enumerate(zip(steps, totals, strict=True)):
        up, dense = step["bytes_up"] / unit, step["bytes_dense_fedavg"]
        y = -2.6 * row
        axes.barh(y, up, 0.9, color=DARK)
        axes.barh(y, step["bytes_down"] / unit, 0.9, left=up, color=PALE)
        axes.barh(y - 1, dense / unit, 0.9, fc="none", ec=MUTED)
        share = f" ({100 * total / dense:.0f} %)" if dense else ""
        _beside(axes, total / unit, y, f"{total / unit:.3g} {name}{share}")
        _beside(axes, dense / unit, y - 1, f"{dense / unit:.3g} {name}")
        ticks += [y, y - 1]
        labels += [f"step {step['step']}", "dense FedAvg"]
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * longest / unit)
    axes.set_xlabel(name)
    axes.grid(axis="x")
    handles = [
        Patch(color=DARK, label="up, devices to server"),
        Patch(color=PALE, label="down, server to devices"),
        Patch(fc="none", ec=MUTED, label="dense FedAvg, both ways"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _sizes(figure: Figure, models: list[tuple[str, int, str]]) -> None:
    axes = figure.subplots()
    longest = max(size for _, size, _ in models)
    unit, name = unit_of(longest)
    for row, (_, size, colour) in enumerate(models):
        axes.barh(-row, size / unit, 0.66, color=colour)
        _beside(axes, size / unit, -row, f"{size / unit:.3g} {name}")
    axes.set_yticks([-row for row in range(len(models))], [label for label, _, _ in models])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.15 * longest / unit)
    axes.set_xlabel(name)
    axes.grid(axis="x")


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center")


def unit_of(size: float) -> tuple[float, str]:
    """Return (bytes, name) of the unit in which `size` bytes read best: kB, MB or GB."""
    if size >= 1e9:
        return 1e9, "GB"
    return (1e6, "MB") if size >= 1e6 else (1e3, "kB")


def _limits(values: list[float]) -> tuple[float, float]:
    """Axis limits in %, at least 10 points apart, so that noise does not look like progress."""
    if not values:
        return 0.0, 100.0
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (10 - (high - low)) / 2)
    return max(low - room, 0.0), min(high + room, 100.5)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _drawn(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Draw on a figure and return the same SVG for the same numbers, on any machine.

    Ids are hashed with `name`, so that several charts can stand in one page.
    """
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": f"fallow-{name}"}]):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue())


def _for_page(svg: str) -> str:
    """Cut an SVG file down to an element that takes colours and width from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*|<!--.*?-->\s*", "", svg, flags=re.S
    )
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    used = set(re.findall(r'"#([\w-]+)"|url\(#([\w-]+)\)', svg))
    names = {name for pair in used for name in pair}
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m.group(0) if m.group(1) in names else "", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
