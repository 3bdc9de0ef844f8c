"""Simulated devices on one machine: our own engine, or Flower's on Ray."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Config
from common.process import settle
from server.inline import InlineGrid
from server.progress import Progress
from server.run import conduct
from server.world import open_world

Summary = dict[str, Any]


def simulate_inline(
    config: Config, out: Path, *, resume: bool, progress: Progress, command: str | None
) -> Summary:
    """Run on worker processes of ours; see `server.run.conduct`."""
    settle()
    with (
        _disks(out) as cache,
        InlineGrid(config.flat(), config.devices, config.workers, cache) as grid,
    ):
        return conduct(
            grid, config, out, engine="inline", resume=resume, progress=progress, command=command
        )


def simulate_flower(
    config: Config, out: Path, *, resume: bool, progress: Progress, command: str | None
) -> Summary:
    """Run the same on Flower's Simulation Runtime (Ray); see `server.run.conduct`."""
    from flwr.simulation import run_simulation

    from client.app import make_app

    settle()
    open_world(config)  # what is wrong with the settings is told before Ray starts
    logging.getLogger("flwr").setLevel(logging.ERROR)
    result: Summary = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        result.update(
            conduct(
                grid,
                config,
                out,
                engine="flower",
                resume=resume,
                progress=progress,
                command=command,
            )
        )

    with _disks(out) as cache:
        cores = config.workers or len(os.sched_getaffinity(0))
        run_simulation(
            server,
            make_app(config.flat(), cache),
            config.devices,
            backend_config={
                "init_args": {"num_cpus": cores, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    return result


@contextmanager
def _disks(out: Path) -> Iterator[str]:
    """Yield a folder for what the devices keep.

    As a real device's disk it outlasts a run that is killed: to give the same bytes, a resumed
    run needs what the devices still owe (see `client.feedback`).
    """
    folder = out.resolve() / "devices"
    yield str(folder)
    shutil.rmtree(folder, ignore_errors=True)
