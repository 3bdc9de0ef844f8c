"""Cells as a table: means and standard deviations over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from common import metrics

Record = dict[str, Any]
_REFERENCE, _UPPER_BOUND = "fedavg", "joint"


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over `count` seeds; NaN where there is none."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Stat:
        """Return those of the values that there are."""
        known = np.array([v for v in values if v is not None and not math.isnan(v)])
        if not len(known):
            return cls(math.nan, math.nan, 0)
        return cls(
            float(known.mean()),
            float(known.std(ddof=1)) if len(known) > 1 else math.nan,
            len(known),
        )

    def text(self, factor: float, digits: int) -> str:
        """Return ``mean ± deviation`` in units of 1 / `factor`; no deviation that rounds to 0."""
        if not self.count:
            return "-"
        mean, std = (f"{value * factor:.{digits}f}" for value in (self.mean, self.std))
        return mean if math.isnan(self.std) or not float(std) else f"{mean} ± {std}"


@dataclass(frozen=True)
class Row:
    """A method on a stream: a `Stat` by column."""

    protocol: str
    parts: int
    method: str
    seeds: tuple[int, ...]
    stats: dict[str, Stat]
    final: dict[str, Stat]
    """Accuracy of the last model by world or part."""


# name of the column -> what it reads from a cell, factor, digits. Accuracies and their
# differences are in points; "gap %" is the way from the prior to joint training that is closed,
# "worst" the worst device's accuracy, "time x" the devices' CPU time as a ratio to FedAvg's.
_COLUMNS: dict[str, tuple[Callable[[Record, _Peers], float | None], float, int]] = {
    "ACC": (lambda cell, _: cell["acc"], 100, 1),
    "forget": (lambda cell, _: cell["forgetting"], 100, 1),
    "BWT": (lambda cell, _: cell["bwt"], 100, 1),
    "gap %": (lambda cell, peers: peers.gap_closed(cell), 100, 0),
    "worst": (lambda cell, _: cell["worst_device"], 100, 1),
    "up MB": (lambda cell, _: cell["bytes_up"], 1e-6, 2),
    "down MB": (lambda cell, _: cell["bytes_down"], 1e-6, 2),
    "time x": (lambda cell, peers: peers.time_ratio(cell), 1, 2),
    "slim %": (lambda cell, _: cell["params_slim"] / cell["params_full"], 100, 0),
}


class _Peers:
    """Other methods on the same stream with the same seed."""

    def __init__(self, cells: Sequence[Record]) -> None:
        self._cells = {(*_stream(cell), cell["method"], cell["seed"]): cell for cell in cells}

    def _peer(self, cell: Record, method: str) -> Record | None:
        return self._cells.get((*_stream(cell), method, cell["seed"]))

    def gap_closed(self, cell: Record) -> float | None:
        """Share of the way from the prior to federated joint training; None without that cell."""
        joint = self._peer(cell, _UPPER_BOUND)
        if joint is None:
            return None
        return metrics.gap_closed(cell["acc"], cell["prior_acc"], joint["acc"])

    def time_ratio(self, cell: Record) -> float | None:
        """CPU time of the devices as a ratio to FedAvg's; None without that cell."""
        fedavg = self._peer(cell, _REFERENCE)
        if fedavg is None or not cell["device_cpu_seconds"]:
            return None
        return float(cell["device_cpu_seconds"] / fedavg["device_cpu_seconds"])


def _stream(cell: Record) -> tuple[str, int]:
    return cell["protocol"], cell["parts"]


def rows_of(cells: Sequence[Record]) -> list[Row]:
    """Return a row for every stream and method, in the order in which they first occur."""
    peers = _Peers(cells)
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for cell in cells:
        groups.setdefault((*_stream(cell), cell["method"]), []).append(cell)
    return [
        Row(
            protocol,
            parts,
            method,
            tuple(cell["seed"] for cell in group),
            {
                name: Stat.of([read(cell, peers) for cell in group])
                for name, (read, _, _) in _COLUMNS.items()
            },
            {
                column: Stat.of([cell["matrix"][-1][i] for cell in group])
                for i, column in enumerate(group[0]["columns"])
            },
        )
        for (protocol, parts, method), group in groups.items()
    ]


def _texts(row: Row, *, deviations: bool = True) -> list[str]:
    """Return a row's cells; without deviations only ACC has one."""

    def text(name: str, stat: Stat, factor: float, digits: int) -> str:
        shown = stat if deviations or name == "ACC" else replace(stat, std=math.nan)
        return shown.text(factor, digits)

    final = [text(name, stat, 100, 1) for name, stat in row.final.items()]
    if len(final) == 1:  # it is ACC
        final = []
    stats = [
        text(name, row.stats[name], factor, digits)
        for name, (_, factor, digits) in _COLUMNS.items()
    ]
    return [row.method, *final, *stats]


def _by_stream(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    streams: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        streams.setdefault((row.protocol, row.parts), []).append(row)
    return streams


def _head(rows: Sequence[Row]) -> list[str]:
    final = list(rows[0].final) if len(rows[0].final) > 1 else []
    return ["method", *final, *_COLUMNS]


def _title(stream: tuple[str, int], rows: Sequence[Row]) -> str:
    seeds = sorted({seed for row in rows for seed in row.seeds})
    return f"{stream[0]}, {stream[1]} parts, seeds {', '.join(map(str, seeds))}"


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table for every stream."""
    lines = []
    for stream, mine in _by_stream(rows).items():
        head = _head(mine)
        lines += [f"### {_title(stream, mine)}", "", f"| {' | '.join(head)} |"]
        lines.append("|---" * len(head) + "|")
        lines += [f"| {' | '.join(_texts(row))} |" for row in mine] + [""]
    return "\n".join(lines)


def rich_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the same for a terminal, where deviations of all columns have no room."""
    tables = []
    for stream, mine in _by_stream(rows).items():
        table = Table(
            *_head(mine), title=_title(stream, mine), box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        for column in table.columns:
            column.no_wrap = column.header in ("method", "ACC")
        for row in mine:
            table.add_row(*_texts(row, deviations=False))
        tables.append(table)
    return tables


def as_json(rows: Sequence[Row]) -> list[Record]:
    """Return the rows as JSON data: mean, deviation and number of seeds, None for NaN."""

    def plain(stat: Stat) -> Record:
        values = {"mean": stat.mean, "std": stat.std}
        return {k: None if math.isnan(v) else v for k, v in values.items()} | {"seeds": stat.count}

    return [
        {
            "protocol": row.protocol,
            "parts": row.parts,
            "method": row.method,
            "seeds": list(row.seeds),
            "final": {name: plain(stat) for name, stat in row.final.items()},
            **{name: plain(stat) for name, stat in row.stats.items()},
        }
        for row in rows
    ]
