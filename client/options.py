"""Options that several commands of ``fallow-device`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _default_store() -> Path:
    return Path(typer.get_app_dir("fallow"))


Store = Annotated[
    Path,
    typer.Option(
        default_factory=_default_store,
        envvar="FALLOW_STORE",
        show_default=False,
        help="The device's folder: images, index, settings (device.toml).",
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
