"""A simulated device: its images are one share of a scenario's part."""

from __future__ import annotations

import numpy as np

from client.bases import Bases
from client.local import carry_out
from client.privacy import chosen
from client.wire import Arrays
from common.accelerator import Accelerator
from common.config import Config
from common.data import ImageSet, split_holdout
from common.order import Order, Report
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

    def split(self, order: Order) -> tuple[ImageSet, ImageSet]:
        """Return the images that an order trains on, and those that it measures with."""
        return split_holdout(self.batch(order.step), order.heldout)

    def carry_out(
        self, order: Order, arrays: Arrays, bases: Bases, accelerator: Accelerator
    ) -> tuple[Report, np.ndarray | None]:
        """Do what an order asks.

        A simulated device has no secret: its noise can be drawn again by anyone.
        """
        config = self._config
        privacy = chosen(config.dp_clip, config.dp_noise, 0.0, 0.0, self.device)
        return carry_out(order, arrays, self, bases, accelerator, privacy=privacy)
