"""Sources whose images are arrays already: the base of IDX, NumPy archives and digits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from common.data.dataset import IntArray, Pixels, Source
from common.data.decode import fit_image
from common.data.labels import resolve
from common.data.options import ReadOptions
from common.errors import DataError


class ArraySource(Source):
    """Images in one array, converted as they are taken.

    Parameters
    ----------
    name : str
        The location, for error messages.
    images : uint8 array [N, H, W] or [N, H, W, C]
    labels : int64 array [N], or None if the source is opened without labels
    names : tuple of str, optional
        Class names, if known.
    options : ReadOptions
    others : iterable of int64 arrays
        Labels of the location's other splits.
    """

    def __init__(
        self,
        name: str,
        images: Pixels,
        labels: IntArray | None,
        names: tuple[str, ...] | None,
        options: ReadOptions,
        others: Iterable[IntArray] = (),
    ) -> None:
        if not len(images):
            raise DataError(f"{name}: no images; give a file that has some")
        if labels is None:
            labels = np.zeros(len(images), dtype=np.int64)
        if len(labels) != len(images):
            raise DataError(f"{name}: {len(images)} images but {len(labels)} labels; both must fit")
        labels, classes = resolve(
            labels, names, options, lambda i: f"{name}: row {i}", others=others
        )
        self._images = images[..., None] if images.ndim == 3 else images
        self._options = options
        height, width, channels = self._fit(0).shape
        super().__init__(name, labels, classes, (channels, height, width))

    def _fit(self, row: int) -> Pixels:
        pixels = self._images[row]
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return fit_image(image, size=self._options.size, channels=self._options.channels)

    def _decode(self, index: IntArray) -> Pixels:
        channels, height, width = self.shape
        if self._images.shape[1:] == (height, width, channels):
            return self._images[index]
        images = np.empty((len(index), height, width, channels), dtype=np.uint8)
        for i, row in enumerate(index):
            images[i] = self._fit(row)
        return images
