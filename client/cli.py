"""The device's command line: ``fallow-device``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

# Set before torch is imported: `evaluate` and `infer` do without it, `train` starts others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer

from client.collect_cli import collect
from client.options import AsJson, Store
from common.command import run_command
from common.garbage import end_process, hasten_imports

app = typer.Typer(
    help="The device's side of fallow: collect images, train on them, use the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(collect, name="collect")


@app.callback()
def device() -> None:
    """Everything of a device is in its store: --store, or FALLOW_STORE."""


@app.command()
def status(store: Store, as_json: AsJson = False) -> None:
    """Tell what the store holds and what has been given away."""
    from client.index import Index
    from client.status import status as told_by
    from client.status import status_lines

    with Index.open(store) as index:
        told = told_by(index)
    typer.echo(json.dumps(told) if as_json else "\n".join(status_lines(told)))


@app.command()
def train(
    store: Store,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the fleet's SuperLink.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="CA of the server's certificate; else the system's.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="This device's private key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS and key; on loopback only.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of the SuperNode on loopback; 0 = any.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the command that would be started.")
    ] = False,
) -> None:
    """Join the fleet: start Flower's SuperNode, which trains whenever the server asks."""
    import shlex

    from client.node import Connection, become_supernode, supernode_command

    connection = Connection(superlink, root_certificates, key, insecure, port)
    if dry_run:
        command, environment = supernode_command(store, connection)
        shown = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        typer.echo(" ".join([*shown, shlex.join(command)]))
        return
    become_supernode(store, connection)


@app.command()
def infer(
    model: Annotated[Path, typer.Argument(help="model.onnx or model.int8.onnx of a step.")],
    images: Annotated[list[Path], typer.Argument(help="Plain image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name an image.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an image.")] = False,
) -> None:
    """Name the class of each image, with ONNX Runtime alone."""
    from client.infer import infer_lines

    for line in infer_lines(model, images, top=top, as_json=as_json):
        typer.echo(line)


@app.command()
def evaluate(
    store: Store,
    model: Annotated[
        Path | None, typer.Argument(help="A model.onnx; else collect.model of device.toml.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on the held-out images whose label a person gave."""
    from client.evaluate import evaluate as measured
    from client.index import Index
    from client.settings import read_settings
    from common.errors import ConfigError

    with Index.open(store) as index:
        path = model or Path(read_settings(store).collect.model)
        if path == Path():
            raise ConfigError("no model: give a model.onnx, or set collect.model in device.toml")
        told = measured(index, path)
    if as_json:
        typer.echo(json.dumps(told))
    elif not told["images"]:
        typer.echo("no held-out image has a label that a person gave: nothing to measure with")
    else:
        typer.echo(
            f"{told['accuracy']:.1%} +- {told['error']:.1%} right ({told['right']} of "
            f"{told['images']} held-out images)"
        )
        for label, counts in told["classes"].items():
            typer.echo(f"  {label}: {counts['right']} of {counts['images']}")


@app.command()
def forget(
    store: Store,
    source: Annotated[str | None, typer.Option(help="Images of this source.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Images of this label; '' = unlabelled.")
    ] = None,
    image: Annotated[str | None, typer.Option("--id", help="One image, by its digest.")] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Images older than so many days.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All images.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove images, their files and all that is known of them. All conditions must fit."""
    from client.collect import Collector
    from client.index import Index

    with Index.open(store) as index:
        removed = Collector(index).forget(
            source=source, label=label, digest=image, older_days=older_than, everything=everything
        )
    typer.echo(json.dumps({"removed": removed}) if as_json else f"{removed} images removed")


@app.command()
def doctor(
    store: Store,
    superlink: Annotated[str | None, typer.Option(help="HOST:PORT of the SuperLink.")] = None,
    root_certificates: Annotated[Path | None, typer.Option(help="CA of the server.")] = None,
    key: Annotated[Path | None, typer.Option(help="This device's private key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="As for `train`.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged or left over.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check environment, store, disk, limits, keys and server, and say what to do."""
    from client.doctor import examine
    from client.node import Connection

    connection = None
    if superlink is not None:
        connection = Connection(superlink, root_certificates, key, insecure)
    findings = examine(store, connection, repair=repair)
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings]))
    else:
        for finding in findings:
            typer.echo(str(finding))
    bad = [finding for finding in findings if finding.level == "bad"]
    if bad:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of ``fallow-device``."""
    hasten_imports()
    end_process(run_command(app, "interrupted: nothing that was kept is lost"))


if __name__ == "__main__":
    main()
