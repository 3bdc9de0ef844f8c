"""``fallow-device collect``: how images come into the store."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.options import AsJson, Store
from common.garbage import settle_imports

if TYPE_CHECKING:
    from client.collect import Collector, Taken

collect = typer.Typer(
    help="Bring images in, label them, list them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Option(help="Where the images come from; consent is by source.")]
Model = Annotated[
    Path | None,
    typer.Option(help="A model.onnx that labels what has no label; else collect.model."),
]


@collect.command()
def init(store: Store) -> None:
    """Make the store, and a device.toml that shows all settings."""
    from client.index import Index
    from client.settings import FILE, read_settings, template
    from common.disk import write_bytes

    with Index.create(store) as index:
        if not (store / FILE).exists():
            write_bytes(store / FILE, template().encode())
        read_settings(store)
        typer.echo(f"{store}: {index.name}")


@collect.command()
def consent(
    store: Store,
    source: Annotated[str, typer.Argument(help="Name of a source of images.")],
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="End it, and remove all that came from there.")
    ] = False,
) -> None:
    """Note that images of a source may be kept and learnt from."""
    with _collector(store) as collector:
        if withdraw:
            removed = collector.withdraw(source)
            typer.echo(f"no consent for {source} any more; {removed} images removed")
        else:
            collector.consent(source)
            typer.echo(f"consent for {source}")


@collect.command()
def add(
    store: Store,
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    label: Annotated[str | None, typer.Option(help="What they all show.")] = None,
    source: Source = "hand",
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a file.")] = False,
) -> None:
    """Take image files."""
    from common.errors import DataError

    failed: DataError | None = None
    with _collector(store, model, labelling=label is None) as collector:
        for path in files:
            try:
                taken = collector.add(_read(path), str(path), source, label)
            except DataError as error:  # the others are still good
                failed = error
                typer.echo(
                    json.dumps({"file": str(path), "error": str(error)})
                    if as_json
                    else f"{path}: refused",
                    err=not as_json,
                )
                continue
            typer.echo(_told(path, taken, as_json))
    if failed is not None:
        raise failed


@collect.command()
def watch(
    store: Store,
    folder: Annotated[Path, typer.Argument(help="FOLDER/LABEL/file, or FOLDER/file unlabelled.")],
    source: Source = "folder",
    model: Model = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, then end.")] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove a file once it was taken or is known.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a file.")] = False,
) -> None:
    """Take what appears in a folder, until interrupted."""
    from client.watch import SETTLED_SECONDS, Watch
    from client.watch import watch as watch_for_ever
    from common.errors import FallowError

    def tell(path: Path, result: Taken | FallowError) -> None:
        if not isinstance(result, FallowError):
            typer.echo(_told(path, result, as_json))
        elif as_json:
            typer.echo(json.dumps({"file": str(path), "error": str(result)}))
        else:
            typer.echo(f"refused: {result}", err=True)

    with _collector(store, model, labelling=True) as collector:
        settled = 0.0 if once else SETTLED_SECONDS
        watched = Watch(collector, folder, source, remove, settled)
        if not once:
            settle_imports()
            watch_for_ever(watched, tell, interval)
        for path, result in watched.poll():
            tell(path, result)


@collect.command()
def serve(
    store: Store,
    socket: Annotated[
        Path | None, typer.Option(help="Of the Unix socket; else STORE/collect.sock.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Listen on this port of loopback instead.")
    ] = None,
    model: Model = None,
) -> None:
    """Take what a camera process brings through the local gRPC service, until interrupted."""
    from client.service import serve as serve_for_ever
    from common.errors import ConfigError

    if socket is not None and port is not None:
        raise ConfigError("--socket and --port: give one of them")
    if port is None:
        socket = socket or store / "collect.sock"
    with _collector(store, model, labelling=True) as collector:
        settle_imports()
        serve_for_ever(collector, socket, port, typer.echo, time.sleep)


@collect.command("list")
def list_images(
    store: Store,
    label: Annotated[str | None, typer.Option(help="Of this label; '' = unlabelled.")] = None,
    source: Annotated[str | None, typer.Option(help="Of this source.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an image.")] = False,
) -> None:
    """List the images, newest first."""
    from client.index import Index

    with Index.open(store) as index:
        images = sorted(index.images(), key=lambda image: (-image.added, image.digest))
    for image in images:
        if label is not None and (image.label or "") != label:
            continue
        if source is not None and image.source != source:
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.added))
        row: dict[str, Any] = {
            "id": image.digest,
            "label": image.label,
            "origin": image.origin,
            "confidence": image.confidence,
            "source": image.source,
            "added": image.added,
            "bytes": image.bytes,
        }
        typer.echo(
            json.dumps(row)
            if as_json
            else f"{image.digest[:12]}  {when}  {image.source}  {image.label or '-'} "
            f"({image.origin})"
        )


@collect.command()
def label(
    store: Store,
    image: Annotated[str, typer.Argument(help="The image's id, or how it begins.")],
    name: Annotated[str, typer.Argument(help="What it shows.")],
) -> None:
    """Correct the label of an image."""
    with _collector(store) as collector:
        corrected = collector.label(image, name)
        typer.echo(f"{corrected.digest[:12]}: {corrected.label}")


@collect.command()
def guess(store: Store, model: Model = None, as_json: AsJson = False) -> None:
    """Let the current model label what nobody has labelled, where it is sure."""
    from client.pseudo import labeller_of
    from client.settings import read_settings
    from common.errors import ConfigError

    labeller = labeller_of(read_settings(store), model)
    if labeller is None:
        raise ConfigError("no model: give --model, or set collect.model in device.toml")
    with _collector(store) as collector:
        named, unsure = collector.label_rest(labeller)
    told = {"labelled": named, "unsure": unsure}
    typer.echo(json.dumps(told) if as_json else f"{named} labelled, {unsure} left without")


@contextlib.contextmanager
def _collector(
    store: Path, model: Path | None = None, labelling: bool = False
) -> Iterator[Collector]:
    from client.collect import Collector
    from client.index import Index
    from client.settings import read_settings

    with Index.open(store) as index:
        settings = read_settings(store)
        labeller = None
        if labelling:
            from client.pseudo import labeller_of

            labeller = labeller_of(settings, model)
        yield Collector(index, settings, labeller)


def _read(path: Path) -> bytes:
    from common.errors import DataError

    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _told(path: Path, taken: Taken, as_json: bool) -> str:
    if as_json:
        row = {
            "file": str(path),
            "outcome": taken.outcome,
            "id": taken.digest,
            "label": taken.label,
            "origin": taken.origin,
        }
        return json.dumps(row)
    named = f" as {taken.label} ({taken.origin})" if taken.label else ""
    return f"{path}: {taken.outcome}{named}, {taken.digest[:12]}"
