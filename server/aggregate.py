"""The masked weighted mean of a round's updates, BN variances included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.errors import UpdateError
from common.layout import Layout

_AT_ONCE = 2**15


def pieces(values: int) -> Iterator[slice]:
    """Return pieces of packed values that fit into a processor's cache."""
    return (slice(begin, begin + _AT_ONCE) for begin in range(0, values, _AT_ONCE))


class MaskedMean:
    """Averages packed updates one at a time; memory grows with the model alone.

    Each entry of the layout is averaged over the devices that trained it, weighted by their
    images; what no layout names keeps its value (HeteroFL, Diao et al. 2021; FedRolex, Alam et
    al. 2022). A BN variance is that of the mixture of the devices' data:
    ``v = E[v_k] + Var_k(mu_k)``.

    Parameters
    ----------
    layout : Layout
        What the updates hold.
    """

    def __init__(self, layout: Layout) -> None:
        self._means, self._variances = layout.statistics
        self._sum = np.zeros(layout.size)
        self._weight = 0.0

    def add(self, values: np.ndarray, images: int) -> None:
        """Add one device's packed values, trained on `images` images."""
        if images < 1:
            raise UpdateError(f"an update counts {images} images: at least 1 is needed")
        moments = values[self._variances].astype(np.float64)
        moments += values[self._means].astype(np.float64) ** 2
        moments = self._sum[self._variances] + images * moments
        for piece in pieces(len(values)):
            self._sum[piece] += values[piece].astype(np.float64) * images
        self._sum[self._variances] = moments
        self._weight += images

    def result(self) -> np.ndarray:
        """Return the mean as float32 [layout.size].

        Raises
        ------
        UpdateError
            If nothing was added.
        """
        if not self._weight:
            raise UpdateError("no update to average")
        mean = self._sum / self._weight
        mean[self._variances] -= mean[self._means] ** 2
        mean[self._variances] = np.maximum(mean[self._variances], 0.0)
        return mean.astype(np.float32)
