"""The operator's command line: ``fallow``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

# One thread a process: two busy processes with two threads each wait for one another most of
# the time. Set before torch is imported, and inherited by every worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer
from rich.console import Console
from rich.table import Table

from common.command import run_command
from common.config import Config
from common.errors import ConfigError
from common.garbage import end_process, hasten_imports
from server.workers import prepare

app = typer.Typer(
    help="Improve a CNN that is in use, with new data that never leaves the devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder for everything that comes out.")],
    data: Annotated[str | None, typer.Option(help="'digits', a folder or a file.")] = None,
    net: Annotated[str | None, typer.Option(help="See `fallow nets`.")] = None,
    width: Annotated[float | None, typer.Option(help="Width of the net.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, each on new data.")] = None,
    devices: Annotated[int | None, typer.Option(help="Simulated devices.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Dirichlet; small = skewed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of growing a step.")] = None,
    scope: Annotated[str | None, typer.Option(help="rows, group or all.")] = None,
    share: Annotated[float | None, typer.Option(help="Of the filters to free.")] = None,
    prior: Annotated[str | None, typer.Option(help="Your model (safetensors).")] = None,
    prior_size: Annotated[int | None, typer.Option(help="Images for the prior.")] = None,
    part_size: Annotated[int | None, typer.Option(help="New images a step.")] = None,
    proxy: Annotated[str | None, typer.Option(help="Unlabelled images at the server.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Images that calibrate int8.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same bytes.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    engine: Annotated[str, typer.Option(help="inline, or flower (Ray).")] = "inline",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting: KEY=VALUE.")
    ] = None,
) -> None:
    """Run the whole cycle with simulated devices on this machine."""
    if engine == "inline":
        prepare()  # imports on another core while this process imports and trains the prior
    from server import simulate as engines
    from server.progress import make_progress
    from server.report import summary_table

    given = {
        "data": data,
        "net": net,
        "width": width,
        "steps": steps,
        "devices": devices,
        "alpha": alpha,
        "rounds": rounds,
        "scope": scope,
        "share": share,
        "prior": prior,
        "prior-size": prior_size,
        "part-size": part_size,
        "proxy": proxy,
        "calibration": calibration,
        "seed": seed,
        "workers": workers,
    }
    config = Config.parse(
        {**{k: v for k, v in given.items() if v is not None}, **_assignments(settings or [])}
    )
    run = {"inline": engines.simulate_inline, "flower": engines.simulate_flower}.get(engine)
    if run is None:
        raise ConfigError(f"engine is '{engine}': use inline or flower")
    command = shlex.join(["fallow", *sys.argv[1:]])
    with make_progress() as progress:
        summary = run(config, out, resume=resume, progress=progress, command=command)
    console = Console()
    console.print(summary_table(summary))
    console.print(f"report  {out / 'report.html'}")


@app.command()
def bench(
    out: Annotated[
        Path, typer.Option(help="Folder, or results.json beside such a folder; run again to go on.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="'digits', a folder or a file. Given again: the next part's world (protocol "
            "domain). PATH+PATH is one world; PATH@COLUMN=VALUE takes some rows of a Parquet file."
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="Test images, one for each --data; else its test split, else 20 % of it."
        ),
    ] = None,
    protocol: Annotated[str, typer.Option(help="instance, domain or class.")] = "instance",
    parts: Annotated[
        int | None,
        typer.Option(
            help="Of the stream, the prior's among them: 2 is the prior and one step of new data. "
            "Default: 2, or as many as there are --data.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="all, or names with commas.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="With commas. Default: 0,1,2; with --quick 0.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Simulated devices.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Dirichlet; small = skewed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds a step.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs a round.")] = None,
    net: Annotated[str | None, typer.Option(help="See `fallow nets`.")] = None,
    width: Annotated[float | None, typer.Option(help="Width of the net.")] = None,
    prior_size: Annotated[int | None, typer.Option(help="Images for the prior; 0 = all.")] = None,
    part_size: Annotated[int | None, typer.Option(help="New images a step; 0 = all.")] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="What is equal for all methods: rounds; or bytes or compute, at most what "
            "fallow spends (bytes:0.5: half of it)."
        ),
    ] = "rounds",
    validate: Annotated[
        bool,
        typer.Option(
            "--validate",
            help="For tuning: test on 20 % of every world's training images instead of its test "
            "images.",
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small: seconds a cell.")] = False,
    workers: Annotated[int, typer.Option(help="Cells at a time; 0 = one a core.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, for all methods.")
    ] = None,
) -> None:
    """Compare methods on a stream of new data, everything else equal."""
    from server.bench.plan import VALIDATE_SHARE, cells_of, data_of
    from server.bench.runner import BenchFolder, BenchInterruptedError, run_bench
    from server.bench.show import rich_tables

    given = {
        "data": data_of(data or [], test or []) or None,
        "devices": devices,
        "alpha": alpha,
        "rounds": rounds,
        "epochs": epochs,
        "net": net,
        "width": width,
        "prior_size": prior_size,
        "part_size": part_size,
    }
    if validate:
        given["validate_share"] = VALIDATE_SHARE
    asked = {**{k: v for k, v in given.items() if v is not None}, **_assignments(settings or [])}
    seeds = seeds or ("0" if quick else "0,1,2")
    cells = cells_of(protocol, parts, methods, seeds, asked, quick=quick, budget=budget)
    console = Console()
    try:
        rows = run_bench(cells, out, workers, lambda text: console.print(text, highlight=False))
    except KeyboardInterrupt:
        raise BenchInterruptedError(out, shlex.join(["fallow", *sys.argv[1:]])) from None
    asked_for = {(cell.protocol, cell.parts) for cell in cells}
    rows = [row for row in rows if (row.protocol, row.parts) in asked_for]
    for table in rich_tables(rows, console):
        console.print(table)
    place = BenchFolder(out)
    console.print(f"tables  {place.table}, {place.results}", soft_wrap=True)
    console.print(f"charts  {place.folder / '*.svg'}", soft_wrap=True)


@app.command()
def serve(
    state: Annotated[Path, typer.Argument(help="Folder of what the SuperLink keeps.")],
    certs: Annotated[
        Path | None, typer.Option(help="Server folder of deploy/certs: TLS and device keys.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Neither TLS nor keys: to try things out.")
    ] = False,
) -> None:
    """Start the SuperLink of a real fleet, on loopback (see deploy/README.md)."""
    from server.serve import serve as become_superlink

    if insecure == (certs is not None):
        raise ConfigError(
            "insecure and certs exclude one another: leave one out"
            if insecure
            else "certs is not set: name the server folder of deploy/certs, or say --insecure"
        )
    become_superlink(state, certs, port)


@app.command()
def run(
    state: Annotated[Path, typer.Argument(help="Folder of a SuperLink (`fallow serve`).")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a begun one is gone on with.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting: KEY=VALUE.")
    ] = None,
) -> None:
    """Run the whole cycle with the devices of a SuperLink, or go on with it."""
    from server.serve import start_run

    start_run(state, out, _assignments(settings or []))


@app.command()
def settings() -> None:
    """List every setting with its default."""
    table = Table("setting", "default", "meaning")
    for name, field in Config.model_fields.items():
        table.add_row(name.replace("_", "-"), repr(field.default), field.description)
    Console().print(table)


@app.command()
def nets() -> None:
    """List the nets that are built in."""
    from common.nets import WIDTHS

    for name in WIDTHS:
        typer.echo(name)
    typer.echo("module:function (a net of your own)")


def _assignments(texts: list[str]) -> dict[str, Any]:
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set is '{text}': write KEY=VALUE")
        values[key] = value
    return values


def main() -> None:
    """Entry point of ``fallow``."""
    hasten_imports()
    end_process(run_command(app))


if __name__ == "__main__":
    main()
