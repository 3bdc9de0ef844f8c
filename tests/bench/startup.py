"""How long a ClientApp's process takes to start, as a ratio to importing torch alone.

Flower starts such a process for every message: a fresh interpreter, or with `keep-warm` a fork of
one that has loaded torch (`client/warm.py`). Each round of the measurement runs every variant
once, in turn; what counts is the median of the CPU time (user and system), which another process
on the same core does not change as it does the elapsed time.

    python tests/bench/startup.py --repeats 9
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from client.warm import PRELOADED
from common.forks import fork_server

ROOT = Path(__file__).resolve().parents[2]
TORCH = "import torch"
FLOWER = "from flwr.supernode.cli.flwr_clientapp import flwr_clientapp"
VARIANTS = {
    "torch": TORCH,
    "the app": "import client.app, client.own",
    "the app in Flower's process": f"{FLOWER}; import client.app, client.own",
}
WARM = "the app in a fork"


def measured(statement: str) -> tuple[float, float]:
    """Return CPU and elapsed seconds of a fresh interpreter that runs `statement`."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system
    return (
        cpu - before.children_user - before.children_system,
        time.perf_counter() - began,
    )


def forked() -> tuple[float, float]:
    """Return CPU and elapsed seconds of a fork that loads the app; making its parent is not in."""
    context = fork_server(PRELOADED)
    context.Process(target=os.getpid).start()  # waits until it has imported
    ours, theirs = context.Pipe(duplex=False)
    began = time.perf_counter()
    process = context.Process(target=report_loaded, args=(theirs,))
    process.start()
    cpu: float = ours.recv()
    elapsed = time.perf_counter() - began
    process.join()
    return cpu, elapsed


def report_loaded(to: Connection) -> None:
    """Load the app, as a message's process does, and say what CPU time this process has had."""
    import client.app
    import client.own  # noqa: F401

    to.send(time.process_time())


def main() -> None:
    """Measure, print the ratios and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/bench/results/startup.json")
    options = parser.parse_args()
    for statement in VARIANTS.values():  # compiled files and the disk's cache
        measured(statement)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in [*VARIANTS, WARM]}
    for _ in range(options.repeats):
        for name, statement in VARIANTS.items():
            seconds[name].append(measured(statement))
        seconds[WARM].append(forked())
    base = statistics.median(cpu for cpu, _ in seconds["torch"])
    rows = {}
    for name, times in seconds.items():
        cpu = statistics.median(c for c, _ in times)
        elapsed = statistics.median(e for _, e in times)
        rows[name] = {"cpu_seconds": cpu, "elapsed_seconds": elapsed, "ratio": cpu / base}
        print(
            f"{name:30} {cpu:6.2f} s CPU  {elapsed:6.2f} s elapsed  {cpu / base:5.2f}x torch",
            flush=True,
        )
    result = {
        "command": f"python tests/bench/startup.py --repeats {options.repeats}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "flwr", "grpcio", "pydantic")},
        "load": os.getloadavg()[0],
        "variants": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
