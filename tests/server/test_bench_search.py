"""The search: every candidate on validation images, the best of each method named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from server.bench.methods import METHODS, method_of

SCRIPT = Path(__file__).parents[1] / "bench" / "search.py"
TINY = ["rounds=1", "epochs=1", "prior_epochs=2", "devices=2", "prior_size=60", "part_size=60"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_candidate_is_a_variant_of_a_method_and_none_has_many(script: ModuleType) -> None:
    for name, grid in script.GRIDS.items():
        assert name in METHODS
        assert 2 <= len(grid) <= 5
        assert len({json.dumps(dict(method_of(f"{name}@{c}").settings)) for c in grid}) == len(grid)


def test_a_search_names_the_best_and_records_all(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--methods", "fedprox,fedlwf"]
    command += ["--seeds", "0", "--workers", "1", "--out", str(tmp_path / "out")]
    command += ["--results", str(tmp_path)]
    command += [text for setting in TINY for text in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "search-instance-2-quick.json").read_text())
    assert found["tested_on"] == "20% of every world's training images"
    assert found["settings"]["validate-share"] == 0.2
    assert [m["method"] for m in found["methods"]] == ["fedprox", "fedlwf"]
    for method in found["methods"]:
        assert len(method["tried"]) == 4
        best = max(row["acc"] for row in method["tried"])
        (named,) = (row for row in method["tried"] if row["variant"] == method["best"])
        assert named["acc"] == best
    assert str(tmp_path) not in json.dumps(found)
    assert "--methods " + ",".join(m["best"] for m in found["methods"]) in done.stdout


def test_a_recorded_command_names_no_folder_of_the_machine(script: ModuleType) -> None:
    given = [
        "--data",
        "/a/b",
        "--data=/c",
        "--seeds",
        "0",
        "--out",
        "/d",
        "--results=/e",
        "--quick",
    ]
    kept = ["--data", "FOLDER", "--data", "FOLDER", "--seeds", "0", "--quick"]
    assert script.without_places(given) == kept


def test_a_method_without_candidates_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--methods", "prior", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "methods names 'prior'" in done.stderr
