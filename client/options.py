"""Options that several commands of ``fallow-device`` share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def _default_store() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "fallow"


Store = Annotated[
    Path,
    typer.Option(
        default_factory=_default_store,
        envvar="FALLOW_STORE",
        show_default=False,
        help="The device's folder: images, index, device.toml; else ~/.local/share/fallow.",
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
