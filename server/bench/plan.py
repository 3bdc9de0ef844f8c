"""From what was asked for to the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.data import digits, has_split
from common.data.location import TEST
from common.data.places import places_of
from common.data.worlds import worlds_of
from common.errors import ConfigError
from server.bench.budget import Budget
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
VALIDATE_SHARE = 0.2
"""Of every world's training images, with ``--validate``: its test images decide nothing."""
_TEST_SHARE = "20%"


def cells_of(
    protocol: str,
    parts: int | None,
    methods: str | None,
    seeds: str,
    settings: Mapping[str, Any],
    *,
    quick: bool = False,
    budget: str = "rounds",
) -> list[Cell]:
    """Return every method with every seed, seed by seed, all settings checked.

    Parameters
    ----------
    parts : int or None
        The prior's among them; None is one for every world that `data` names, at least two.
    methods : str or None
        See `server.bench.methods.methods_of`; None is all, or a few with `quick`.
    settings : mapping
        Common to all methods; they go before those of ``FULL`` or ``QUICK``. A world without a
        test split gets one: 20 % of its images are set aside.
    budget : str
        See `server.bench.budget`.

    Raises
    ------
    ConfigError
        If protocol, parts, a method, a seed or a setting is wrong.
    """
    wanted = Budget.parse(budget)
    if not seeds.replace(",", "").isdecimal():
        raise ConfigError(f"seeds is '{seeds}': give whole numbers with commas")
    names = methods_of(methods or (QUICK_METHODS if quick else "all"))
    common = {k.replace("-", "_"): v for k, v in settings.items()}
    common = {**(QUICK if quick else FULL), **common}
    common["data"] = _tested(str(common.get("data", digits.NAME)))
    if parts is None:
        parts = max(2, len(places_of(common["data"])))
    numbers = dict.fromkeys(int(seed) for seed in seeds.split(",") if seed)
    cells = [
        Cell(protocol, parts, name, seed, common, wanted.of(name))
        for seed in numbers
        for name in names
    ]
    for cell in cells:
        # checked now: the last cell may be hours away
        worlds_of(cell.config.worlds, cell.config.steps)
    return cells


def data_of(data: Sequence[str], test: Sequence[str]) -> str:
    """Return the setting `data` of the worlds that were asked for, each with its test images.

    Raises
    ------
    ConfigError
        If there are some test images, but not for every world.
    """
    if test and len(test) != len(data):
        raise ConfigError(
            f"--test is given {len(test)} time(s) for {len(data)} --data: give one for each, in "
            "the same order, or none"
        )
    return ",".join(f"{d}|{t}" for d, t in zip(data, test, strict=True)) if test else ",".join(data)


def _tested(data: str) -> str:
    """Return `data` with a share set aside for testing wherever there is no test split."""
    places = places_of(data)
    lacking = [
        place.test is None and not all(has_split(path, TEST) for path in place.locations)
        for place in places
    ]
    texts = [data] if len(places) == 1 else data.split(",")
    return ",".join(
        f"{text}|{_TEST_SHARE}" if lacks else text
        for text, lacks in zip(texts, lacking, strict=True)
    )
