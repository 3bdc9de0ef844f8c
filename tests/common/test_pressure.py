"""How much memory is left is told by whoever has least."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

import common.pressure as pressure


def test_the_least_of_system_group_and_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "_PROC", tmp_path)
    monkeypatch.setattr(pressure, "_CGROUP", tmp_path)
    assert pressure.memory_left() == math.inf
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   700 kB\n")
    assert pressure.memory_left() == 700 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert pressure.memory_left() == 700 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert pressure.memory_left() == 10000 - 4096


def test_a_limit_of_the_process_counts() -> None:
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**30, 2**30));"
        "from common.pressure import memory_left; print(memory_left() < 2**30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
