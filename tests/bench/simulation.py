"""What a simulation costs: against Flower's on Ray, against pfl, and by the number of devices.

    python tests/bench/simulation.py [--case ray|pfl|scale|linear] [--data X.npz]

Every measurement is a process of its own, from its start to the end of its last round, and the
sides take turns, so that other load falls on all alike. Seconds of CPU, which other load hardly
changes, stand beside those of the clock. Only the rounds are compared: no side trains a prior
model or exports one. Writes results/simulation.json beside this script and prints a table.

ray: 100 devices x 3 rounds of a tiny CNN, the same app on both engines.
pfl: pfl's published CIFAR-10 set-up cut short: 1,000 clients x 50 images, cohort 50, one local
  epoch, batch 10, plain SGD, float32 on the wire. pfl has a virtual environment of its own, made
  in runs/bench. It is measured with its published net and with the same net plus batch norm,
  which is what fallow trains.
scale: memory from 100 to 10,000 devices of which 50 train a round.
linear: seconds a round by the devices trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "simulation.json"
PFL = ("torch==2.13.0", "pfl==0.6.0")
PLAIN = {
    # FedAvg of all weights: no freeing, no look for shifts, no teacher.
    "steps": 1,
    "freeing": "never",
    "shift": "never",
    "scope": "all",
    "epochs": 1,
    "batch": 10,
    "average": 1,
    "kd-teacher": "none",
    "kd-weight": 0.0,
    "label-calibration": 0.0,
    "adaptive": False,
    "regrow": False,
    "partition": "iid",
    "flip": False,
    "crop": 0,
}
TINY = {"net": "nets:tiny", "rounds": 3, "part-size": 5000, "prior-size": 100, **PLAIN}
CIFAR = {
    "net": "nets:cnn2",
    "devices": 1000,
    "sample": 0.05,
    "rounds": 3,
    "prior-size": 200,
    "part-size": 51_000,
    "heldout": 0.02,  # leaves 50 of a client's 51
    "momentum": 0.0,
    "weight-decay": 0.0,
    "lr": 0.1,
    "codec-up": "fp32",
    "codec-down": "fp32",
    **PLAIN,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), action="append")
    parser.add_argument("--data", help="npz with x uint8 [N, 32, 32, 3] and y; default: random")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        from common.garbage import end_process

        print(json.dumps(measured(json.loads(options.side))))
        end_process(0)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(options.data) if options.data else random_images(Path(folder))
        for case in options.case or CASES:
            made = CASES[case](data, options.repeats)
            result = json.loads(RESULTS.read_text()) if RESULTS.exists() else result
            result[case] = {**made, "machine": machine(), "random_images": not options.data}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({case: made}, indent=1))


def random_images(folder: Path) -> Path:
    import numpy as np

    rng, path = np.random.default_rng(0), folder / "images.npz"
    x = rng.integers(0, 256, (52_000, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(len(x)) % 10)
    return path


def machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def ray(data: Path, repeats: int) -> dict[str, Any]:
    """Run both engines in turn."""
    settings = {**TINY, "devices": 100, "data": "digits", "part-size": 1000}
    runs: dict[str, list[dict[str, Any]]] = {"inline": [], "flower": []}
    for _ in range(repeats):
        for engine, made in runs.items():
            made.append(side(settings, engine))
    return {
        **{name: summed(made) for name, made in runs.items()},
        "ray_seconds_by_ours": ratio(runs["flower"], runs["inline"], "wall"),
        "ray_cpu_by_ours": ratio(runs["flower"], runs["inline"], "cpu"),
        "goal": 10,
    }


def pfl(data: Path, repeats: int) -> dict[str, Any]:
    """Measure pfl in one process and in two, and us with one worker and two."""
    import numpy as np

    python = pfl_python()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        users = Path(folder) / "users.npz"
        with np.load(data) as arrays:
            x, y = arrays["x"][:50_000], arrays["y"][:50_000].astype(np.int64)
        np.savez(users, x=x, y=y, users=np.arange(50_000).reshape(1000, 50))
        for _ in range(repeats):
            for workers in (1, 2):
                name = f"fallow, {workers} worker(s)"
                settings = {**CIFAR, "data": str(data), "workers": workers}
                runs.setdefault(name, []).append(side(settings, "inline"))
            for norm in (1, 0):
                for processes, threads in ((1, 1), (2, 1)):
                    name = f"pfl{', batch norm' if norm else ''}, {processes} x {threads}"
                    made = pfl_side(python, users, processes, threads, norm)
                    runs.setdefault(name, []).append(made)
    rates = {name: clients_per_second(made) for name, made in runs.items()}

    def best(side: str, key: str) -> float:
        return max(rate[key] for name, rate in rates.items() if name.startswith(side))

    return {
        "clients": rates,
        **{
            f"ours_by_best_{side.replace(', ', '_').replace(' ', '_')}_{key}": best("fallow", key)
            / best(side, key)
            for side in ("pfl, batch norm", "pfl")
            for key in ("per_second", "per_cpu_second")
        },
        "versions": list(PFL),
    }


def scale(data: Path, repeats: int) -> dict[str, Any]:
    """Measure memory by the number of devices, of which 50 train a round."""
    rows = []
    for devices, sample in ((100, 0.5), (1000, 0.05), (10_000, 0.005)):
        settings = {**TINY, "data": str(data), "devices": devices, "sample": sample}
        settings["part-size"] = 50_000
        made = side({**settings, "average": 1, "rounds": 6}, "inline")
        rows.append({"devices": devices, "trained_a_round": round(devices * sample), **made})
    return {
        "population": rows,
        "memory_1000_by_100": rows[1]["peak_mib"] / rows[0]["peak_mib"],
        "memory_10000_by_100": rows[2]["peak_mib"] / rows[0]["peak_mib"],
    }


def linear(data: Path, repeats: int) -> dict[str, Any]:
    """Measure the seconds of a round by how many devices it trains."""
    rows = []
    for trained in (25, 50, 100, 200, 400):
        settings = {**TINY, "data": str(data), "devices": 400, "sample": trained / 400}
        made = side({**settings, "part-size": 20_000, "rounds": 3}, "inline")
        seconds, cpu = (statistics.median(made[key][1:]) for key in ("rounds", "cpu_rounds"))
        row = {"trained": trained, "ms_each": 1e3 * seconds / trained}
        rows.append({**row, "cpu_ms_each": 1e3 * cpu / trained})
    return {"by_devices_trained": rows}


CASES = {"ray": ray, "pfl": pfl, "scale": scale, "linear": linear}


def side(settings: dict[str, Any], engine: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    text = json.dumps({"settings": settings, "engine": engine})
    return timed([sys.executable, str(Path(__file__).resolve()), "--side", text])


def timed(command: list[str], **environment: str) -> dict[str, Any]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    paths = os.pathsep.join([str(HERE.resolve()), *os.environ.get("PYTHONPATH", "").split(":")])
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return {"wall": wall, "cpu": cpu, **said}  # a side that knows better counts itself


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """Play the rounds of a task on its engine, in this process."""
    from common.garbage import hasten_imports

    hasten_imports()  # as `fallow simulate` does with either engine
    if task["engine"] == "inline":
        from server.workers import prepare

        prepare()
    from common.process import settle

    settle()
    from common.config import Config
    from common.filters import FreeSet
    from common.state import read_state
    from server.fleet import Fleet
    from server.inline import InlineGrid
    from server.plan import start
    from server.progress import NullProgress
    from server.rounds import play_rounds
    from server.world import open_world

    config = Config.parse(task["settings"])
    rounds: list[dict[str, Any]] = []
    peak, spent = [0.0], [0.0]  # seconds of CPU until the rounds began, and after each

    def play(grid: Any) -> None:
        world = open_world(config)
        state = start(world.plan, read_state(world.plan.net), FreeSet({}))

        def after(_: Any, __: Any, record: dict[str, Any]) -> None:
            rounds.append(record)
            peak[0] = max(peak[0], memory())
            spent.append(cpu_seconds())

        spent[0] = cpu_seconds()
        play_rounds(grid, world.plan, state, Fleet(grid), NullProgress(), after)

    with tempfile.TemporaryDirectory() as cache:
        if task["engine"] == "inline":
            with InlineGrid(config.flat(), config.devices, config.workers, cache) as grid:
                play(grid)
        else:
            on_ray(config, cache, play)
    return {
        "rounds": [record["seconds"] for record in rounds],
        "used": [record["devices_used"] for record in rounds],
        "loss": rounds[-1]["train_loss"],
        "until_first_round": time.monotonic() - BEGAN - sum(r["seconds"] for r in rounds),
        "peak_mib": peak[0],
        "cpu": spent[-1],
        "cpu_rounds": [b - a for a, b in itertools.pairwise(spent)],
    }


def on_ray(config: Any, cache: str, play: Any) -> None:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from client.app import make_app

    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        play(grid)

    run_simulation(
        server,
        make_app(config.flat(), cache),
        config.devices,
        backend_config={
            "init_args": {
                "num_cpus": len(os.sched_getaffinity(0)),
                "include_dashboard": False,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


def memory() -> float:
    """Return the memory of this process and all that come from it, shared pages once, MiB."""
    kib = 0
    for process in family():
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kib += int(line.split()[1])
    return kib / 1024


def cpu_seconds() -> float:
    """Return the seconds of CPU of this process and all that come from it, ended ones included."""
    ticks = 0
    for process in family():
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, after_name[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def family() -> list[str]:
    """Return this process and all that come from it."""
    found, waiting = [], ["self"]
    while waiting:
        found.append(waiting.pop())
        tasks = Path(f"/proc/{found[-1]}/task").glob("*/children")
        waiting += [child for task in tasks for child in task.read_text().split()]
    return found


def pfl_python() -> Path:
    """Return the Python of pfl's environment, made if it is not there."""
    folder = Path(os.environ.get("PFL_VENV", HERE.parents[1] / "runs" / "bench" / "pfl"))
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in PFL:  # torch first: as a dependency it would be a CUDA build
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return python


def pfl_side(python: Path, users: Path, processes: int, threads: int, norm: int) -> dict[str, Any]:
    arguments = [str(HERE / "pfl_side.py"), str(users), str(CIFAR["rounds"])]
    arguments += [str(threads), str(norm)]
    command = [str(python), *arguments]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [str(python), *run, *arguments]
    made = timed(command, OMP_NUM_THREADS=str(threads))
    return {**made, "cpu_rounds": [processes * seconds for seconds in made["cpu_rounds"]]}


def clients_per_second(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return clients trained by second of the clock; the first round warms up."""
    rates = [50 / statistics.median(run["rounds"][1:]) for run in runs]
    cpu = [50 / statistics.median(run["cpu_rounds"][1:]) for run in runs]
    return {
        "per_second": statistics.median(rates),
        "per_cpu_second": statistics.median(cpu),
        "round_seconds": [run["rounds"] for run in runs],
    }


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("wall", "cpu", "peak_mib", "until_first_round")
    return {
        **{key: statistics.median(run[key] for run in runs) for key in keys},
        "rounds": runs[-1]["rounds"],
        "loss": runs[-1]["loss"],
    }


def ratio(many: list[dict[str, Any]], few: list[dict[str, Any]], key: str) -> float:
    pairs = zip(many, few, strict=True)
    return statistics.median(a[key] / b[key] for a, b in pairs)


if __name__ == "__main__":
    main()
