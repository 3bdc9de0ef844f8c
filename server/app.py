"""The operator's Flower app: parses, lets `server.run` do the work."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Config
from common.process import settle
from server.progress import make_progress
from server.run import conduct

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all steps with the settings of the run config."""
    settle()
    values = dict(context.run_config)
    out = Path(str(values.pop("out")))
    resume = bool(values.pop("resume"))
    config = Config.parse(values)
    with make_progress() as progress:
        conduct(grid, config, out, engine="flower", resume=resume, progress=progress)
