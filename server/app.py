"""The operator's Flower app: parses, lets `server.run` do the work."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Config
from server.progress import make_progress
from server.run import conduct

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all steps with the settings of the run config."""
    torch.set_num_threads(1)
    values = dict(context.run_config)
    out = Path(str(values.pop("out")))
    resume = bool(values.pop("resume"))
    config = Config.parse(values)
    with make_progress() as progress:
        conduct(grid, config, out, engine="flower", resume=resume, progress=progress)
