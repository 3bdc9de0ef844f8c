"""The device's command line: ``fallow-device``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.command import run_command

app = typer.Typer(
    help="The device's side of fallow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def device() -> None:
    """Work with the model that the server published."""


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


def main() -> None:
    """Entry point of ``fallow-device``."""
    sys.exit(run_command(app))


if __name__ == "__main__":
    main()
