"""The table: means and deviations over seeds, ratios within one seed."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from server.bench.table import Stat, as_json, markdown, rich_tables, rows_of


def record(method: str, seed: int, acc: float, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "protocol": "domain",
        "parts": 2,
        "method": method,
        "seed": seed,
        "columns": ["original", "dark"],
        "matrix": [[0.6, 0.2], [acc - 0.1, acc + 0.1]],
        "acc": acc,
        "prior_acc": 0.4,
        "forgetting": 0.05,
        "bwt": None,
        "worst_device": 0.3,
        "bytes_up": 2_500_000,
        "bytes_down": 5_000_000,
        "device_cpu_seconds": seconds,
        "params_full": 1000,
        "params_slim": 490,
        **changes,
    }


CELLS = [
    record("fedavg", 0, 0.50, 10.0),
    record("fallow", 0, 0.55, 5.0),
    record("joint", 0, 0.60, 20.0),
    record("fedavg", 1, 0.52, 8.0),
    record("fallow", 1, 0.58, 6.0),
    record("joint", 1, 0.70, 16.0),
]


def test_means_and_deviations_are_those_of_numpy() -> None:
    row = rows_of(CELLS)[1]
    assert (row.method, row.seeds) == ("fallow", (0, 1))
    assert row.stats["ACC"].mean == pytest.approx(np.mean([0.55, 0.58]))
    assert row.stats["ACC"].std == pytest.approx(np.std([0.55, 0.58], ddof=1))
    dark = row.final["dark"]
    assert (dark.mean, dark.count) == (pytest.approx(np.mean([0.65, 0.68])), 2)


def test_gap_and_time_are_ratios_within_a_seed() -> None:
    row = rows_of(CELLS)[1]
    gaps = [(0.55 - 0.4) / (0.60 - 0.4), (0.58 - 0.4) / (0.70 - 0.4)]
    assert row.stats["gap %"].mean == pytest.approx(np.mean(gaps))
    assert row.stats["time x"].mean == pytest.approx(np.mean([5 / 10, 6 / 8]))


def test_without_the_cell_to_compare_with_there_is_no_ratio() -> None:
    row = rows_of([CELLS[1]])[0]
    assert row.stats["gap %"].count == row.stats["time x"].count == 0
    assert row.stats["ACC"] == Stat(0.55, row.stats["ACC"].std, 1)
    assert math.isnan(row.stats["ACC"].std)


def test_unknown_values_are_left_out_of_the_mean() -> None:
    stat = Stat.of([0.5, None, math.nan, 0.7])
    assert (stat.mean, stat.count) == (pytest.approx(0.6), 2)
    assert Stat.of([None]).text(100, 1) == "-"
    assert Stat.of([0.5]).text(100, 1) == "50.0"
    assert Stat.of([0.5, 0.5]).text(100, 1) == "50.0"


def test_markdown_has_a_table_for_every_stream() -> None:
    other = {"protocol": "instance", "columns": ["test"], "matrix": [[0.4], [0.5]]}
    text = markdown(rows_of([*CELLS, record("fedavg", 0, 0.5, 1.0, **other)]))
    lines = text.splitlines()
    assert lines[0] == "### domain, 2 parts, seeds 0, 1"
    head = lines[2].strip("| ").split(" | ")
    assert head[:4] == ["method", "original", "dark", "ACC"]
    fallow = dict(zip(head, lines[5].strip("| ").split(" | "), strict=True))
    assert fallow["ACC"] == "56.5 ± 2.1"
    assert (fallow["up MB"], fallow["slim %"], fallow["BWT"]) == ("2.50", "49", "-")
    assert "### instance, 2 parts, seeds 0" in lines
    instance = next(line for line in reversed(lines) if line.startswith("| method"))
    assert instance.startswith("| method | ACC | forget |")


def test_the_terminal_and_the_json_hold_the_same() -> None:
    rows = rows_of(CELLS)
    console = Console(file=io.StringIO(), width=140)
    console.print(*rich_tables(rows))
    assert "56.5 ± 2.1" in console.file.getvalue()  # type: ignore[attr-defined]
    data = json.loads(json.dumps(as_json(rows), allow_nan=False))
    assert data[1]["ACC"]["mean"] == pytest.approx(0.565)
    assert data[1]["BWT"] == {"mean": None, "std": None, "seeds": 0}
