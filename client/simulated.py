"""A simulated device: its images are one share of a scenario's part."""

from __future__ import annotations

from common.config import Config
from common.data import ImageSet
from common.scenario import scenario_of


class SimulatedDevice:
    """Device `index` of a simulation.

    Parameters
    ----------
    config : Config
        Settings of the run.
    index : int
        From 0.
    """

    def __init__(self, config: Config, index: int) -> None:
        self._config = config
        self._index = index

    @property
    def device(self) -> str:
        """Name of the device; sorts like its number."""
        return f"device-{self._index:05d}"

    def batch(self, step: int) -> ImageSet:
        """Return the device's images of a step."""
        return scenario_of(self._config).device(step, self._index)
