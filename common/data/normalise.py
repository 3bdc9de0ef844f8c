"""Pixels to standardised tensors, the same bytes on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from common.data.dataset import ImageSet, Pixels
from common.errors import DataError

_STD_FLOOR = 1e-3

# Bounds the index arrays that NumPy makes on the way, 8 bytes a pixel.
_CHUNK = 1024


@dataclass(frozen=True)
class Normalisation:
    """(pixel / 255 - mean) / std, for each channel.

    Parameters
    ----------
    mean, std : tuple of float, one a channel
        On the scale 0..1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_images(cls, images: ImageSet) -> Normalisation:
        """Measure mean and standard deviation (at least 1e-3) of every channel.

        Sums are of integers, so that the result does not depend on their order.

        Raises
        ------
        DataError
            If there are no images.
        """
        if not len(images):
            raise DataError("normalisation: no images to measure; give at least one")
        value = np.arange(256)
        mean, std = [], []
        for channel in range(images.shape[0]):
            counts = np.bincount(images.images[..., channel].ravel(), minlength=256)
            n, total, squares = (int(np.dot(counts, value**p)) for p in range(3))
            mean.append(total / n / 255)
            variance = (n * squares - total * total) / (n * n)
            std.append(max(variance**0.5 / 255, _STD_FLOOR))
        return cls(tuple(mean), tuple(std))

    def to_tensor(self, images: Pixels) -> torch.Tensor:
        """Normalise images.

        Parameters
        ----------
        images : uint8 array [N, H, W, C]

        Returns
        -------
        float32 tensor [N, C, H, W], channels_last in memory

        Raises
        ------
        DataError
            If the images have another number of channels.
        """
        if images.shape[3] != len(self.mean):
            raise DataError(
                f"images have {images.shape[3]} channel(s), the model {len(self.mean)}; "
                "set channels to convert them"
            )
        out = np.empty(images.shape, dtype=np.float32)
        for start in range(0, len(images), _CHUNK):
            rows = slice(start, start + _CHUNK)
            for channel, table in enumerate(self._tables):
                out[rows, ..., channel] = table[images[rows, ..., channel]]
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    @cached_property
    def _tables(self) -> list[NDArray[np.float32]]:
        value = np.arange(256, dtype=np.float64) / 255
        pairs = zip(self.mean, self.std, strict=True)
        return [((value - mean) / std).astype(np.float32) for mean, std in pairs]
