"""What a message costs on a device, where Flower starts a process for each.

    .venv/bin/python tests/bench/process_cost.py [--repeats 7]

First the start alone: Python, torch, what Flower imports, that with fallow's ClientApp; in turn and
several times each. Then a run with a real SuperLink and one real device: the CPU time of every
`flwr-clientapp` process that the device started, imports and work together. CPU seconds (user +
system) are what a device pays, whatever else the machine does. Writes results/process-cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

from fleet import FAST, fleet
from processes import ENVIRONMENT, ROOT, descendants

STARTS = {
    "python": "pass",
    "torch": "import torch",
    "flwr": "import flwr.supernode.cli.flwr_clientapp",
    "clientapp": "import flwr.supernode.cli.flwr_clientapp, client.app",
}
SETTINGS = {**FAST, "devices": "1", "rounds": "3", "consolidate-rounds": "3", "width": "16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--starts-only", action="store_true", help="leave out the run")
    options = parser.parse_args()
    starts: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(options.repeats + 1):
        for name, code in STARTS.items():
            starts[name].append(start_seconds(code))
    medians = {name: statistics.median(times[1:]) for name, times in starts.items()}  # first: cold
    result: dict[str, Any] = {
        "start_cpu_seconds": {
            name: [round(s, 3) for s in times[1:]] for name, times in starts.items()
        },
        "start_median": {name: round(s, 3) for name, s in medians.items()},
        "clientapp_over_torch": round(medians["clientapp"] / medians["torch"], 3),
        # What Flower's own imports cost is not ours: torch and fallow on top of them.
        "fallow_over_torch": round((medians["clientapp"] - medians["flwr"]) / medians["torch"], 3),
        "versions": {n: version(n) for n in ("flwr", "torch", "numpy")}
        | {"python": platform.python_version()},
    }
    print(
        f"start: Python {medians['python']:.2f} s, torch {medians['torch']:.2f} s, Flower "
        f"{medians['flwr']:.2f} s, ClientApp {medians['clientapp']:.2f} s: "
        f"{result['clientapp_over_torch']:.2f} x torch, without Flower "
        f"{result['fallow_over_torch']:.2f} x"
    )
    if not options.starts_only:
        messages, rounds = run_seconds()
        median = statistics.median(messages)
        share = medians["clientapp"] / median
        result["run"] = {
            "settings": SETTINGS,
            "rounds": rounds,
            "message_cpu_seconds": [round(s, 2) for s in messages],
            "message_median": round(median, 3),
            "start_share_of_a_message": round(share, 3),
        }
        print(f"{len(messages)} messages: {median:.2f} s each, {share:.0%} of it the start")
    (HERE / "results" / "process-cost.json").write_text(json.dumps(result, indent=1) + "\n")


def start_seconds(code: str) -> float:
    """Return the CPU seconds of a Python process that runs `code`."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def run_seconds() -> tuple[list[float], int]:
    """Return the CPU seconds of each ClientApp process of a run, and the run's rounds."""
    seen: dict[int, float] = {}
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as it:
        it.serve()
        device = it.device(0, of=1)

        def watch() -> None:
            while not over.is_set():
                for pid, line in descendants(device.pid).items():
                    # A process that has ended, and waits to be asked for its code, has no line.
                    if "flwr-clientapp" in line or pid in seen:
                        seen[pid] = max(cpu_seconds(pid), seen.get(pid, 0.0))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            run = it.run(SETTINGS)
            if run.wait(1800) != 0:
                raise SystemExit(it.told())
        finally:
            over.set()
            watcher.join()
        return sorted(seen.values()), it.rounds()


def cpu_seconds(pid: int) -> float:
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
