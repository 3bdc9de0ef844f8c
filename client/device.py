"""What the app needs of a device, whether it is simulated or has a store of its own."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from client.bases import Bases
from client.wire import Arrays
from common.accelerator import Accelerator
from common.order import Order, Report


class Device(Protocol):
    """One device."""

    @property
    def device(self) -> str:
        """Name of the device, stable over restarts."""

    def carry_out(
        self, order: Order, arrays: Arrays, bases: Bases, accelerator: Accelerator
    ) -> tuple[Report, np.ndarray | None]:
        """Do what an order asks (see `client.local.carry_out`); a FallowError declines it."""
