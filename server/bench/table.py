"""Cells as rows of a table: means and standard deviations over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import metrics

Record = dict[str, Any]
Stream = tuple[str, int]
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
    """A method on a stream.

    Attributes
    ----------
    budget : str
        What is equal for all methods of its table (see `server.bench.budget`).
    stats : dict of Stat
        By name of the column.
    parts_tested : tuple of str
        Worlds or parts with test images of their own.
    matrix : tuple of tuples of Stat
        Accuracy after each step, the prior's first, on each of them; in [0, 1].
    """

    protocol: str
    parts: int
    method: str
    seeds: tuple[int, ...]
    budget: str
    stats: dict[str, Stat]
    parts_tested: tuple[str, ...]
    matrix: tuple[tuple[Stat, ...], ...]

    @property
    def final(self) -> dict[str, Stat]:
        """Accuracy of the last model by world or part."""
        return dict(zip(self.parts_tested, self.matrix[-1], strict=True))


@dataclass(frozen=True)
class Column:
    """A column of the table: what it reads from a cell, and how it is shown."""

    read: Callable[[Record, _Peers], float | None]
    factor: float
    digits: int
    about: str


def _played(cell: Record) -> float | None:
    return cell.get("settings", {}).get("rounds") if cell["bytes_up"] else None


def _unslimmed(cell: Record) -> float | None:
    parts = cell.get("unslimmed")
    return None if parts is None else float(np.mean(parts))


COLUMNS: dict[str, Column] = {
    "ACC": Column(lambda cell, _: cell["acc"], 100, 1, "mean accuracy over the parts, slimmed"),
    "unslim": Column(lambda cell, _: _unslimmed(cell), 100, 1, "the same before slimming"),
    "forget": Column(lambda cell, _: cell["forgetting"], 100, 1, "forgetting, points"),
    "BWT": Column(lambda cell, _: cell["bwt"], 100, 1, "backward transfer, points"),
    "gap %": Column(
        lambda cell, peers: peers.gap_closed(cell), 100, 0, "of the way from prior to joint"
    ),
    "worst": Column(lambda cell, _: cell["worst_device"], 100, 1, "accuracy on the worst device"),
    "rounds": Column(lambda cell, _: _played(cell), 1, 0, "of growing, a step"),
    "up MB": Column(lambda cell, _: cell["bytes_up"], 1e-6, 2, "devices to server, all rounds"),
    "down MB": Column(lambda cell, _: cell["bytes_down"], 1e-6, 2, "server to devices"),
    "bytes x": Column(
        lambda cell, peers: peers.bytes_ratio(cell), 1, 2, "both, as a ratio to fedavg's"
    ),
    "time x": Column(
        lambda cell, peers: peers.time_ratio(cell), 1, 2, "devices' CPU time, likewise"
    ),
    "mem MB": Column(
        lambda cell, _: cell.get("memory") or None,
        1e-6,
        1,
        "that a device's training step saves for its backward pass",
    ),
    "slim k": Column(lambda cell, _: cell["params_slim"], 1e-3, 0, "parameters, thousands"),
    "slim %": Column(
        lambda cell, _: cell["params_slim"] / cell["params_full"], 100, 0, "of the net's"
    ),
}
"""Accuracies and their differences are in points; `about` says what the name does not."""


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
        return self._ratio(cell, lambda some: float(some["device_cpu_seconds"]))

    def bytes_ratio(self, cell: Record) -> float | None:
        """Bytes both ways as a ratio to FedAvg's; None without that cell."""
        return self._ratio(cell, lambda some: float(some["bytes_up"] + some["bytes_down"]))

    def _ratio(self, cell: Record, read: Callable[[Record], float]) -> float | None:
        fedavg = self._peer(cell, _REFERENCE)
        return None if fedavg is None or not read(cell) else read(cell) / read(fedavg)


def _stream(cell: Record) -> Stream:
    return cell["protocol"], cell["parts"]


def rows_of(cells: Sequence[Record]) -> list[Row]:
    """Return a row for every stream and method, in the order in which they first occur."""
    peers = _Peers(cells)
    groups: dict[tuple[str, int, str], list[Record]] = {}
    budgets: dict[Stream, str] = {}
    for cell in cells:
        groups.setdefault((*_stream(cell), cell["method"]), []).append(cell)
        if cell.get("budget"):
            budgets[_stream(cell)] = cell["budget"]["kind"]
    return [
        Row(
            protocol,
            parts,
            method,
            tuple(cell["seed"] for cell in group),
            budgets.get((protocol, parts), "rounds"),
            {
                name: Stat.of([column.read(cell, peers) for cell in group])
                for name, column in COLUMNS.items()
            },
            tuple(group[0]["columns"]),
            tuple(
                tuple(
                    Stat.of([cell["matrix"][step][part] for cell in group])
                    for part in range(len(group[0]["columns"]))
                )
                for step in range(len(group[0]["matrix"]))
            ),
        )
        for (protocol, parts, method), group in groups.items()
    ]


def by_stream(rows: Sequence[Row]) -> dict[Stream, list[Row]]:
    """Return the rows of every stream, by its protocol and number of parts."""
    streams: dict[Stream, list[Row]] = {}
    for row in rows:
        streams.setdefault((row.protocol, row.parts), []).append(row)
    return streams


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
            "budget": row.budget,
            "final": {name: plain(stat) for name, stat in row.final.items()},
            "matrix": [[plain(stat) for stat in line] for line in row.matrix],
            **{name: plain(stat) for name, stat in row.stats.items()},
        }
        for row in rows
    ]
