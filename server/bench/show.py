"""The table for people: as Markdown, and for a terminal as wide as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from server.bench.table import COLUMNS, Row, Stat, by_stream

Lines = list[list[str]]


def markdown(rows: Sequence[Row]) -> str:
    """Return Markdown for every stream: the table, and the accuracies after each step."""
    texts = []
    for mine in by_stream(rows).values():
        head, *lines = _table(mine, deviations=True)
        texts += [f"### {_title(mine)}", "", *_markdown(head, lines), ""]
        if len(mine[0].matrix) > 2:
            head, *lines = _matrices(mine)
            texts += ["Accuracy after each step:", "", *_markdown(head, lines), ""]
    return "\n".join([*texts, *_legend()])


def rich_tables(rows: Sequence[Row], console: Console) -> list[Table]:
    """Return the same for a terminal; what has no room beside the rest is a table of its own.

    Deviations are shown of ACC alone: those of all columns have no room.
    """
    tables = []
    for mine in by_stream(rows).values():
        first, *others = _fitting(_table(mine, deviations=False), console.width)
        first.title = _title(mine)
        tables += [first, *others]
    return tables


def _title(rows: Sequence[Row]) -> str:
    seeds = sorted({seed for row in rows for seed in row.seeds})
    first = rows[0]
    budget = "" if first.budget == "rounds" else f", equal {first.budget}"
    return f"{first.protocol}, {first.parts} parts{budget}, seeds {', '.join(map(str, seeds))}"


def _legend() -> list[str]:
    return [f"- {name}: {column.about}" for name, column in COLUMNS.items()]


def _markdown(head: Sequence[str], lines: Lines) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def _table(rows: Sequence[Row], *, deviations: bool) -> Lines:
    """Return head and lines; without deviations only ACC has one."""

    def text(name: str, stat: Stat, factor: float, digits: int) -> str:
        shown = stat if deviations or name == "ACC" else replace(stat, std=math.nan)
        return shown.text(factor, digits)

    # A single part's accuracy is ACC.
    parts = rows[0].parts_tested if len(rows[0].parts_tested) > 1 else ()
    lines = [["method", *parts, *COLUMNS]]
    for row in rows:
        final = [text(name, row.final[name], 100, 1) for name in parts]
        stats = [text(n, row.stats[n], c.factor, c.digits) for n, c in COLUMNS.items()]
        lines.append([row.method, *final, *stats])
    return lines


def _matrices(rows: Sequence[Row]) -> Lines:
    lines = [["method", "after", *rows[0].parts_tested]]
    for row in rows:
        for step, stats in enumerate(row.matrix):
            after = f"step {step}" if step else "prior"
            lines.append([row.method, after, *(stat.text(100, 1) for stat in stats)])
    return lines


def _fitting(lines: Lines, width: int) -> list[Table]:
    """Return tables no wider than `width`, each with the first column and some of the others."""
    columns = list(zip(*lines, strict=True))
    first, rest = columns[0], columns[1:]
    groups: list[list[tuple[str, ...]]] = [[first]]
    for column in rest:
        wider = [*groups[-1], column]
        if len(groups[-1]) > 1 and _width(wider) > width:
            groups.append([first, column])
        else:
            groups[-1] = wider
    return [_rich(group) for group in groups]


def _rich(columns: list[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, (head, *_) in enumerate(columns):
        table.add_column(head, no_wrap=True, justify="right" if number else "left")
    for line in list(zip(*columns, strict=True))[1:]:
        table.add_row(*line)
    return table


def _width(columns: list[tuple[str, ...]]) -> int:
    return Console(width=10_000).measure(_rich(columns)).maximum
