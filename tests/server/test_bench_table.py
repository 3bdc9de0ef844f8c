"""The table: means and deviations over seeds, ratios within one seed."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from server.bench.chart import frontier, steps
from server.bench.show import markdown, rich_tables
from server.bench.table import Stat, as_json, rows_of


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
        "memory": 3_400_000,
        "unslimmed": [acc, acc + 0.04],
        "params_full": 1000,
        "params_slim": 490,
        "settings": {"rounds": 12},
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
    assert instance.startswith("| method | ACC | unslim |")


def test_costs_are_told_as_they_were_spent() -> None:
    cheap = record("rows", 0, 0.5, 5.0, bytes_up=500_000, bytes_down=1_000_000, unslimmed=None)
    row = rows_of([*CELLS, cheap])[-1]
    shown = {name: stat.mean for name, stat in row.stats.items()}
    assert shown["bytes x"] == pytest.approx(1.5 / 7.5)
    assert (shown["mem MB"], shown["rounds"], shown["slim k"]) == (3_400_000, 12, 490)
    assert math.isnan(shown["unslim"])
    assert rows_of(CELLS)[0].stats["unslim"].mean == pytest.approx((0.52 + 0.54) / 2)


def test_a_cell_of_an_earlier_version_still_fits() -> None:
    old = {k: v for k, v in CELLS[0].items() if k not in ("memory", "unslimmed", "settings")}
    row = rows_of([old])[0]
    assert [row.stats[name].count for name in ("mem MB", "unslim", "rounds")] == [0, 0, 0]


def test_the_table_says_what_was_equal() -> None:
    within = {"kind": "bytes", "limit": 9.0, "spent": 8.0, "rounds": 7}
    text = markdown(rows_of([CELLS[1], record("fedavg", 0, 0.5, 1.0, budget=within)]))
    assert text.startswith("### domain, 2 parts, equal bytes, seeds 0")


def test_markdown_holds_the_whole_matrix_of_a_longer_stream() -> None:
    matrix = [[0.6, 0.2], [0.55, 0.3], [0.5, 0.4]]
    lines = markdown(rows_of([record("fedavg", 0, 0.45, 1.0, matrix=matrix)])).splitlines()
    assert lines[lines.index("Accuracy after each step:") + 2 :][:5] == [
        "| method | after | original | dark |",
        "| --- | --- | --- | --- |",
        "| fedavg | prior | 60.0 | 20.0 |",
        "| fedavg | step 1 | 55.0 | 30.0 |",
        "| fedavg | step 2 | 50.0 | 40.0 |",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_gets_more_tables_and_loses_nothing(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    tables = rich_tables(rows_of(CELLS), console)
    console.print(*tables)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for word in ("original", "dark", "56.5 ± 2.1", "mem MB", "slim %", "unslim"):
        assert word in text
    assert len(tables) == 1 if width == 200 else len(tables) > 1
    assert text.count("fallow") == len(tables)


def test_the_json_holds_the_same() -> None:
    data = json.loads(json.dumps(as_json(rows_of(CELLS)), allow_nan=False))
    assert data[1]["ACC"]["mean"] == pytest.approx(0.565)
    assert data[1]["BWT"] == {"mean": None, "std": None, "seeds": 0}
    assert [stat["mean"] for stat in data[1]["matrix"][0]] == pytest.approx([0.6, 0.2])


def test_charts_name_every_method_and_are_the_same_bytes_again() -> None:
    blank = {"bytes_up": 0, "bytes_down": 0, "matrix": [[0.6, 0.2], [None, None]]}
    rows = rows_of([*CELLS, record("central", 0, 0.7, 0.0, **blank)])
    for draw in (frontier, steps):
        svg = draw(rows)
        assert svg.startswith("<?xml")
        assert draw(rows) == svg
        for row in rows:
            assert f">{row.method}<" in svg
    assert ">dark<" in steps(rows)
    assert ">mean accuracy over the parts, %<" in frontier(rows)
