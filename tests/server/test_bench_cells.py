"""Cells and the command: every protocol runs, what is finished is not run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import server.bench.cell as cells
from common import metrics
from common.errors import ConfigError, RoundError
from common.scenario import Scenario
from common.store import read_json, write_json
from server.bench.cell import Cell, _settings, finished, run_cell
from server.bench.exam import exam_of
from server.bench.plan import FULL, QUICK, cells_of
from server.bench.protocols import settings_of
from server.bench.runner import run_bench
from server.bench.table import as_json
from server.cli import app

TINY: dict[str, Any] = {
    **QUICK,
    "devices": 2,
    "rounds": 1,
    "epochs": 1,
    "prior_epochs": 3,
    "statistics_gap": 1.0,  # a prior so little trained falls behind its statistics
    "freeing_epochs": 2,
    "max_drop": 0.5,
    "consolidate_rounds": 1,
}


def quiet(text: str) -> None:
    return None


SMALL = ["rounds=1", "epochs=1", "prior-epochs=3", "freeing-epochs=2", "devices=2"]
SMALL += ["statistics-gap=1"]


def bench(out: Path, protocol: str, methods: str, *options: str) -> dict[str, Any]:
    """Run the command as a person would, small."""
    arguments = ["bench", "--quick", "--workers", "1", "--seeds", "0", "--out", str(out)]
    arguments += ["--protocol", protocol, "--methods", methods, *options]
    arguments += [text for setting in SMALL for text in ("--set", setting)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return read_json(out if out.suffix == ".json" else out / "results.json")


@pytest.mark.parametrize(
    ("protocol", "parts", "columns"),
    [
        ("instance", 3, ["test"]),
        ("domain", 3, ["original", "dark", "invert"]),
        ("class", 2, ["part 0", "part 1"]),
    ],
)
def test_every_protocol_gives_a_table(
    tmp_path: Path, protocol: str, parts: int, columns: list[str]
) -> None:
    methods = "prior,fedavg,fallow,joint,central"
    results = bench(tmp_path, protocol, methods, "--parts", str(parts))
    assert [row["method"] for row in results["table"]] == methods.split(",")
    assert len({cell["prior_digest"] for cell in results["cells"]}) == 1
    by_method = {cell["method"]: cell for cell in results["cells"]}
    for method, cell in by_method.items():
        assert cell["columns"] == columns
        matrix = np.array([[v or np.nan for v in row] for row in cell["matrix"]], float)
        assert matrix.shape == (parts, len(columns))
        assert cell["matrix"][0] == by_method["prior"]["matrix"][0]
        assert cell["acc"] == pytest.approx(np.mean(cell["matrix"][-1]))
        assert 0 <= cell["worst_device"] <= 1
        plays = method not in ("prior", "central")
        assert (cell["bytes_up"] > 0) == plays
        # new classes are learnt by statistics alone: no backward pass that needs memory
        assert (cell["memory"] > 0) == (plays and (protocol, method) != ("class", "fallow"))
        assert sum(r["device_cpu_seconds"] for r in cell["rounds"]) == pytest.approx(
            cell["device_cpu_seconds"]
        )
    known = np.array(by_method["fedavg"]["matrix"])
    assert by_method["fedavg"]["forgetting"] == pytest.approx(metrics.forgetting(known))
    assert by_method["fedavg"]["bwt"] == pytest.approx(metrics.bwt(known))
    assert by_method["fedavg"]["unslimmed"] is None
    assert len(by_method["fallow"]["unslimmed"] or columns) == len(columns)
    assert by_method["fallow"]["params_slim"] < by_method["fallow"]["params_full"]
    assert by_method["fedavg"]["params_slim"] == by_method["fedavg"]["params_full"]
    assert (tmp_path / "table.md").read_text().startswith(f"### {protocol}, {parts} parts, seeds 0")


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cells_of("instance", 2, "fedavg,prior", "0", TINY, quick=True)
    first = run_bench(asked, tmp_path, 1, quiet)

    def refuse(cell: Cell, out: Path) -> dict[str, Any]:
        raise AssertionError(f"{cell.name} was run again")

    monkeypatch.setattr(cells, "run_afresh", refuse)
    told: list[str] = []
    again = run_bench(asked, tmp_path, 1, told.append)
    assert as_json(again) == as_json(first)
    assert told == ["2 cells, 2 of them finished before"]
    more = cells_of("instance", 2, "fedprox", "0", TINY, quick=True)
    with pytest.raises(AssertionError, match="fedprox seed 0 was run again"):
        run_bench(more, tmp_path, 1, quiet)


def test_a_cell_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run_cell(Cell("instance", 2, "prior", 0, TINY), tmp_path)
    assert run_cell(Cell("instance", 2, "prior", 0, {**TINY, "workers": 2}), tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(lr 0.03 -> 0.1\): choose another"):
        run_cell(Cell("instance", 2, "prior", 0, {**TINY, "lr": 0.1}), tmp_path)


@pytest.mark.parametrize(
    ("method", "setting", "same"),
    [
        ("prior", {"freeing_epochs": 3}, True),
        ("fedavg", {"freeing_epochs": 3}, True),
        ("fedavg", {"opinion_features": 9}, True),
        ("fedavg", {"drop_errors": 3.0}, True),
        ("fedavg-slim", {"freeing_epochs": 3}, True),
        ("fedavg-slim", {"drop_errors": 3.0}, False),
        ("lda", {"statistics_images": 9}, True),
        ("fallow", {"freeing_epochs": 3}, False),
        ("no-gate", {"freeing_epochs": 3}, False),
        ("fallow", {"opinion_features": 9}, False),
    ],
)
def test_settings_that_decide_nothing_in_a_cell_leave_it_finished(
    method: str, setting: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    cell = Cell("instance", 2, method, 0, TINY)
    write_json(cell.path(tmp_path), {"settings": _settings(cell.config), "steps": []})
    asked = replace(cell, settings={**cell.settings, **setting})
    if same:
        assert finished(asked, tmp_path) is not None
        return
    with pytest.raises(ConfigError, match="other settings"):
        finished(asked, tmp_path)


def test_the_same_cell_gives_the_same_model_and_another_seed_another(tmp_path: Path) -> None:
    records = [
        run_cell(Cell("instance", 2, "fedavg", seed, TINY), tmp_path / folder)
        for seed, folder in ((0, "a"), (0, "b"), (1, "a"))
    ]
    digests = [(r["prior_digest"], r["model_digest"], r["matrix"]) for r in records]
    assert digests[0] == digests[1]
    assert not set(map(str, digests[0])) & set(map(str, digests[2]))


def test_two_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    asked = [Cell("instance", 2, name, 0, TINY) for name in ("fedavg", "fallow")]
    runs = []
    for workers in (1, 2):
        run_bench(asked, tmp_path / str(workers), workers, quiet)
        results = read_json(tmp_path / str(workers) / "results.json")
        runs.append({cell["method"]: cell["model_digest"] for cell in results["cells"]})
    assert runs[0] == runs[1]


def test_an_error_in_one_cell_leaves_the_others(tmp_path: Path) -> None:
    asked = [
        Cell("instance", 2, "fedavg@lr=1e9", 0, {**TINY, "repeats": 1, "epochs": 3}),
        Cell("instance", 2, "prior", 0, TINY),
    ]
    with pytest.raises(RoundError, match="training loss is"):
        run_bench(asked, tmp_path, 1, quiet)
    assert [cell["method"] for cell in read_json(tmp_path / "results.json")["cells"]] == ["prior"]


def test_the_worst_device_is_weighed_by_its_own_classes() -> None:
    base = Cell("instance", 2, "fallow", 0, TINY).base
    exam = exam_of(base)
    scenario = Scenario(base)
    labels = [scenario.device(1, d).labels for d in range(2)]
    right_of_class = np.linspace(0.1, 1.0, 10)  # of every class as many, in order
    test = exam.tests["test"].labels
    right = np.zeros(len(test), bool)
    for label, share in enumerate(right_of_class):
        rows = np.flatnonzero(test == label)
        right[rows[: round(share * len(rows))]] = True
    rates = np.array([right[test == label].mean() for label in range(10)])
    expected = min(rates[own].mean() for own in labels)
    assert exam._worst(test, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("protocol", "parts", "message"),
    [
        ("tasks", 2, "protocol is 'tasks': use instance, domain, class"),
        ("instance", 1, "parts is 1: give at least 2"),
        ("domain", 6, "parts is 6: protocol 'domain' has at most 5 from one data"),
    ],
)
def test_wrong_protocols_are_told(protocol: str, parts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(protocol, parts)


def test_what_is_asked_for_goes_before_the_presets() -> None:
    asked = cells_of("instance", 2, None, "0,1", {"rounds": 5, "kd-weight": "0.7"}, quick=True)
    assert len(asked) == 8
    assert {(c.config.rounds, c.base.kd_weight, c.base.width) for c in asked} == {(5, 0.7, 8)}
    full = cells_of("instance", 2, "fallow", "0", {"data": "digits"})[0]
    assert (full.base.width, full.base.rounds) == (FULL["width"], FULL["rounds"])
    with pytest.raises(ConfigError, match="seeds is '0,x'"):
        cells_of("instance", 2, None, "0,x", {}, quick=True)
    with pytest.raises(ConfigError, match="unknown setting 'roundz'"):
        cells_of("instance", 2, None, "0", {"roundz": 1}, quick=True)
