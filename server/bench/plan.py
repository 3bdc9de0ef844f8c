"""From what was asked for to the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.data.worlds import worlds_of
from common.errors import ConfigError
from server.bench.cell import Cell
from server.bench.methods import methods_of

FULL: Mapping[str, Any] = {
    "net": "resnet8",
    "width": 32,
    "devices": 8,
    "alpha": 0.5,
    "rounds": 12,
    "epochs": 2,
    "prior_size": 5000,
    "part_size": 5000,
}
"""Common settings where nothing else is asked for."""
QUICK: Mapping[str, Any] = {
    "data": "digits",
    "net": "resnet8",
    "width": 8,
    "devices": 3,
    "alpha": 1.0,
    "rounds": 3,
    "epochs": 2,
    "prior_size": 300,
    "part_size": 300,
    "prior_epochs": 8,
    "freeing_epochs": 4,
    "max_drop": 0.1,
    "consolidate_rounds": 2,
    "consolidate_epochs": 1,
}
"""Those of ``--quick``: every part of the machinery in seconds; its figures mean little."""
QUICK_METHODS = "prior,fedavg,fallow,joint"


def cells_of(
    protocol: str,
    parts: int,
    methods: str | None,
    seeds: str,
    settings: Mapping[str, Any],
    *,
    quick: bool = False,
) -> list[Cell]:
    """Return every method with every seed, seed by seed, all settings checked.

    Raises
    ------
    ConfigError
        If protocol, parts, a method, a seed or a setting is wrong.
    """
    if not seeds.replace(",", "").isdecimal():
        raise ConfigError(f"seeds is '{seeds}': give whole numbers with commas")
    names = methods_of(methods or (QUICK_METHODS if quick else "all"))
    common = {k.replace("-", "_"): v for k, v in settings.items()}
    common = {**(QUICK if quick else FULL), **common}
    numbers = dict.fromkeys(int(seed) for seed in seeds.split(",") if seed)
    cells = [Cell(protocol, parts, name, seed, common) for seed in numbers for name in names]
    for cell in cells:
        # checked now: the last cell may be hours away
        worlds_of(cell.config.worlds, cell.config.steps)
    return cells
