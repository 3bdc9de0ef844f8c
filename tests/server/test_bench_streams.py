"""Streams from several data sets, budgets, and what a person sees of the command."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from common.errors import ConfigError
from common.store import read_json
from server.bench.budget import Budget, rounds_within
from server.bench.memory import SavedBytes
from server.bench.plan import QUICK, cells_of, data_of
from server.bench.protocols import settings_of
from server.bench.runner import run_bench
from server.cli import app

TINY: dict[str, Any] = {
    **QUICK,
    "devices": 2,
    "rounds": 2,
    "epochs": 1,
    "prior_epochs": 3,
    "freeing_epochs": 2,
    "max_drop": 0.5,
    "consolidate_rounds": 1,
}
TOY = [text for key, value in TINY.items() if key != "data" for text in ("--set", f"{key}={value}")]


def quiet(text: str) -> None:
    return None


def shapes(path: Path, size: int, ink: int, count: int = 90, test: int = 0) -> str:
    """Three classes, a bar at the top, in the middle or at the bottom, in some grey."""
    rng = np.random.default_rng(ink)

    def images(number: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(number) % 3
        pixels = rng.integers(0, 60, (number, size, size))
        for image, label in zip(pixels, labels, strict=True):
            image[label * size // 3 : (label + 1) * size // 3] += ink
        return pixels.astype(np.uint8), labels

    arrays = dict(zip(("x_train", "y_train"), images(count), strict=True))
    if test:
        arrays |= dict(zip(("x_test", "y_test"), images(test), strict=True))
    np.savez(path, **arrays)
    return str(path)


def run(*arguments: str) -> str:
    given = ["bench", "--quick", "--workers", "1", "--seeds", "0", *TOY, *arguments]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# several data sets


def test_a_natural_stream_has_a_part_and_a_test_for_every_data(tmp_path: Path) -> None:
    first = shapes(tmp_path / "first.npz", 16, 60, test=15)
    second = shapes(tmp_path / "second.npz", 12, 120, count=100)
    third = shapes(tmp_path / "third.npz", 16, 190)
    out = tmp_path / "stream.json"
    data = [text for path in (first, second, third) for text in ("--data", path)]
    told = run("--protocol", "domain", "--methods", "prior,fedavg", *data, "--out", str(out))
    results = read_json(out)
    cell = {cell["method"]: cell for cell in results["cells"]}["fedavg"]
    assert (cell["parts"], cell["columns"]) == (3, ["first.npz", "second.npz", "third.npz"])
    assert np.array(cell["matrix"]).shape == (3, 3)
    # What has no test split gave a fifth of its images; no machine's folders are in the record.
    assert cell["settings"]["data"] == "first.npz,second.npz|20%,third.npz|20%"
    assert str(tmp_path) not in (tmp_path / "stream" / "table.md").read_text()
    made = {path.name for path in (tmp_path / "stream").iterdir()}
    assert made == {"cells", "priors", "table.md", "domain-3-bytes.svg", "domain-3-steps.svg"}
    assert "domain, 3 parts" in told


def test_test_images_come_from_where_they_are_said_to_be(tmp_path: Path) -> None:
    data, other = shapes(tmp_path / "d.npz", 16, 60, test=9), shapes(tmp_path / "t.npz", 16, 190)
    out = tmp_path / "out"
    sizes = {"prior_size": 40, "part_size": 40}
    flags = [text for key, value in sizes.items() for text in ("--set", f"{key}={value}")]
    run("--methods", "prior", "--data", data, "--test", other, "--out", str(out), *flags)
    own = run_bench(
        cells_of("instance", None, "prior", "0", {**TINY, **sizes, "data": data}, quick=True),
        tmp_path / "own",
        1,
        quiet,
    )
    (cell,) = read_json(out / "results.json")["cells"]
    assert cell["settings"]["data"] == "d.npz|t.npz"
    assert cell["acc"] != own[0].stats["ACC"].mean
    assert (90 * cell["acc"]) % 1 == pytest.approx(0, abs=1e-6)  # of the other's 90 images


def test_what_makes_no_stream_is_told() -> None:
    with pytest.raises(ConfigError, match="data names 2 worlds and protocol is 'class'"):
        settings_of("class", 2, 2)
    with pytest.raises(ConfigError, match="has at most 3 with 3 worlds in data"):
        settings_of("domain", 4, 3)
    with pytest.raises(ConfigError, match=r"--test is given 1 time\(s\) for 2 --data"):
        data_of(["a", "b"], ["c"])
    assert data_of(["a", "b"], ["c", "d"]) == "a|c,b|d"
    assert settings_of("domain", 2, 3) == {"steps": 1}


# budgets


def test_others_get_as_many_rounds_as_the_bytes_of_fallow_allow(tmp_path: Path) -> None:
    asked = cells_of("instance", 2, "fedavg-int8,joint", "0", TINY, quick=True, budget="bytes")
    told: list[str] = []
    rows = run_bench(asked, tmp_path, 1, told.append)
    assert [row.method for row in rows] == ["fedavg-int8", "joint", "fallow"]
    sent = {row.method: row.stats["up MB"].mean + row.stats["down MB"].mean for row in rows}
    assert {row.budget for row in rows} == {"bytes"}
    rounds = {row.method: int(row.stats["rounds"].mean) for row in rows}
    one_more = sent["fedavg-int8"] / rounds["fedavg-int8"] * (rounds["fedavg-int8"] + 1)
    assert sent["fedavg-int8"] <= sent["fallow"] < one_more
    assert rounds["joint"] == rounds["fallow"] == 2
    assert rounds["fedavg-int8"] >= 1
    (record,) = [c for c in read_json(tmp_path / "results.json")["cells"] if c.get("budget")]
    assert record["budget"]["spent"] == sent["fedavg-int8"]
    assert record["budget"]["rounds"] == record["settings"]["rounds"] == rounds["fedavg-int8"]
    assert f"{rounds['fedavg-int8']} rounds a step" in "\n".join(told)
    told.clear()
    run_bench(asked, tmp_path, 1, told.append)
    assert told == ["3 cells, 3 of them finished before"]


def test_half_the_compute_is_about_half_the_rounds(tmp_path: Path) -> None:
    settings = {**TINY, "rounds": 4, "freeing": "never", "scope": "all"}
    asked = cells_of("instance", 2, "fallow", "0", settings, quick=True, budget="compute:0.5")
    (row,) = run_bench(asked, tmp_path, 1, quiet)
    record = next(c for c in read_json(tmp_path / "results.json")["cells"] if c.get("budget"))
    assert record["budget"]["kind"] == "compute:0.5"
    assert row.stats["rounds"].mean <= 3


@pytest.mark.parametrize(
    ("limit", "overhead", "steps", "rounds"),
    [(100, 0, 1, 9), (100, 30, 1, 6), (100, 0, 2, 4), (5, 0, 1, 1), (1e9, 0, 1, 60)],
)
def test_rounds_follow_from_their_cost(
    limit: float, overhead: float, steps: int, rounds: int
) -> None:
    assert rounds_within(limit, overhead, 20.0, 10.0, steps, 60) == rounds
    if 1 < rounds < 60:
        assert overhead + 20 + 10 * (rounds * steps - 1) <= limit


def test_a_budget_is_read_or_refused() -> None:
    assert Budget.parse("bytes:0.5") == Budget("bytes", 0.5)
    assert Budget.parse("bytes").of("fallow") == Budget.parse("bytes").of("joint") == "rounds"
    assert Budget.parse("bytes").of("prior") == "rounds"
    assert Budget.parse("compute:2").of("fallow") == "compute:2"
    for text in ("time", "bytes:0", "bytes:x", "rounds:2"):
        with pytest.raises(ConfigError, match=f"budget is '{text}'"):
            Budget.parse(text)


# memory


def test_saved_bytes_are_those_of_one_step_at_its_peak() -> None:
    net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    x = torch.zeros(8, 100)
    peaks = []
    for steps in (1, 3):
        with SavedBytes() as saved:
            for _ in range(steps):
                net(x).square().sum().backward()
        peaks.append(saved.peak)
    assert peaks[0] == peaks[1]
    # the input, the hidden values (a ReLU saves what the next layer reads), the second weight,
    # the logits
    assert peaks[0] == 4 * (8 * 100 + 8 * 50 + 50 * 10 + 8 * 10)
    with SavedBytes() as saved, torch.no_grad():
        net(x)
    assert saved.peak == 0


# the table of a folder


def test_the_table_holds_all_cells_that_were_run_alike(tmp_path: Path) -> None:
    def rows(methods: str, seeds: str = "0", **changes: Any) -> list[tuple[str, int]]:
        asked = cells_of("instance", 2, methods, seeds, {**TINY, **changes}, quick=True)
        return [(row.method, len(row.seeds)) for row in run_bench(asked, tmp_path, 1, quiet)]

    assert rows("prior") == [("prior", 1)]
    assert rows("fedavg") == [("fedavg", 1), ("prior", 1)]
    assert rows("prior", "1") == [("prior", 2), ("fedavg", 1)]
    assert rows("prior@lr=0.02", lr=0.02) == [("prior@lr=0.02", 1)]


def test_an_interrupted_benchmark_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out put"
    # A suite in the background may have been started with Ctrl-C ignored. Not by preexec_fn: that
    # forks, and gRPC, which other tests started here, may abort a fork (grpc/grpc#43055).
    heard = "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", f"import os, signal, sys; {heard}", sys.executable]
    command += ["-m", "server.cli", "bench", "--quick", "--methods", "prior,fedavg"]
    command += ["--seeds", "0", "--workers", "2", "--rounds", "400"]
    command += ["--set", "prior-epochs=1", "--out", str(out)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for _ in range(600):
        if list(out.glob("cells/*.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert time.monotonic() - began < 20
    assert "interrupted: the finished cells are kept in" in told
    assert told.rstrip().endswith(f"--out '{out}'")
    assert "--resume" not in told
    assert "Traceback" not in told
    assert list(out.glob("cells/*prior*.json"))
