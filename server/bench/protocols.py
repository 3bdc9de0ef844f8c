"""The streams that methods are compared on, and what each model is tested on.

A protocol of N parts is a prior and N - 1 steps of new data:

- ``instance``: every part has all classes; one test set.
- ``domain``: every new part comes from another world; a test set a world. The worlds are those
  that the setting `data` names; if it names one, the others are made of it by the built-in
  transformations of `common.data.worlds`.
- ``class``: every part has classes of its own, one classifier for all; a test set a part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.config import Config
from common.data import ImageSet
from common.data.worlds import transform, worlds_of
from common.errors import ConfigError, DataError
from common.scenario import Scenario

PROTOCOLS = ("instance", "domain", "class")
WORLDS = ("dark", "invert", "rotate", "invert+rotate")
"""Of the parts of ``domain``, in order; the setting `worlds` names others."""


def settings_of(protocol: str, parts: int, worlds: int = 1) -> dict[str, Any]:
    """Return the settings that make a stream of `parts` parts, the prior's among them.

    Parameters
    ----------
    worlds : int
        That the setting `data` names.

    Raises
    ------
    ConfigError
        If there is no such protocol, or too few or too many parts.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol is '{protocol}': use {', '.join(PROTOCOLS)}")
    if parts < 2:
        raise ConfigError(f"parts is {parts}: give at least 2, the prior's and one of new data")
    if worlds > 1 and protocol != "domain":
        raise ConfigError(
            f"data names {worlds} worlds and protocol is '{protocol}': several worlds are a "
            "'domain' stream; join locations of one world with '+'"
        )
    if protocol == "instance":
        return {"steps": parts - 1}
    if protocol == "class":
        # Not mask_absent: no device has old and new classes together, so that with it nothing
        # ever tells the net that a new image is not of an old class, whatever the method.
        return {"steps": parts - 1, "stream": "class"}
    most = worlds if worlds > 1 else len(WORLDS) + 1
    if parts > most:
        why = f"with {worlds} worlds in data" if worlds > 1 else "from one data"
        raise ConfigError(f"parts is {parts}: protocol 'domain' has at most {most} {why}")
    if worlds > 1:
        return {"steps": parts - 1}
    return {"steps": parts - 1, "worlds": ",".join(WORLDS[: parts - 1])}


def test_sets(config: Config, scenario: Scenario) -> dict[str, ImageSet]:
    """Return the test images by the name of the world or part, in the order of the stream.

    Raises
    ------
    DataError
        If the data has no test split.
    """
    tests = scenario.tests()
    for name, images in tests.items():
        if images is None:
            raise DataError(f"{name} has no test split: a benchmark needs one, name it with --test")
    known = {name: images for name, images in tests.items() if images is not None}
    if len(scenario.worlds) > 1:
        return known
    (test,) = known.values()
    if config.stream == "class":
        parts = [scenario.prior, *(scenario.part(step + 1) for step in range(config.steps))]
        return {
            f"part {number}": test.select(np.isin(test.labels, np.unique(part.labels)))
            for number, part in enumerate(parts)
        }
    if not config.worlds:
        return {"test": test}
    worlds = dict.fromkeys(("", *worlds_of(config.worlds, config.steps)))
    return {world or "original": transform(test, world) for world in worlds}
