"""What data looks like: images in memory, and a source that is decoded as far as it is taken."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]
IntArray: TypeAlias = NDArray[np.int64]
TextArray: TypeAlias = NDArray[np.str_]

UNLABELLED = -1


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size in memory, with their labels.

    Parameters
    ----------
    images : uint8 array [N, H, W, C]
        C is 1 (grey) or 3 (RGB), values 0..255.
    labels : int64 array [N]
        Index into ``classes``; -1 throughout if the images are unlabelled.
    classes : tuple of str
        Class names in the order of the labels.

    Raises
    ------
    DataError
        If the arrays have another type or do not fit one another.
    """

    images: Pixels
    labels: IntArray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise DataError(
                f"images: {images.dtype} {list(images.shape)}; uint8 [N, H, W, 1 or 3] is needed"
            )
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise DataError(
                f"labels: {labels.dtype} {list(labels.shape)}; int64 [{len(images)}] is needed"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape, class names, pixels and labels, in hexadecimal."""
        head = json.dumps([self.images.shape, self.classes])
        digest = hashlib.sha256(head.encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        return digest.hexdigest()

    def select(self, index: IntArray | NDArray[np.bool_]) -> ImageSet:
        """Return the images at ``index`` (positions or a mask), in that order."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    @staticmethod
    def concat(sets: Sequence[ImageSet]) -> ImageSet:
        """Join sets of the same shape and classes, in the order given.

        Raises
        ------
        DataError
            If there is no set, or if shape or classes differ.
        """
        if not sets:
            raise DataError("image sets: none given; there is nothing to join")
        first = sets[0]
        for number, other in enumerate(sets):
            if (other.shape, other.classes) != (first.shape, first.classes):
                raise DataError(
                    f"image set {number}: shape {other.shape} and {len(other.classes)} classes "
                    f"do not fit {first.shape} and {len(first.classes)} classes of the first; "
                    "open all with the same size, channels and classes"
                )
        return ImageSet(
            np.concatenate([s.images for s in sets]),
            np.concatenate([s.labels for s in sets]),
            first.classes,
        )


class Source(ABC):
    """A data set at some location, whose images are decoded only when taken.

    Attributes
    ----------
    name : str
        The location, for error messages.
    labels : int64 array [N]
        All labels; -1 throughout if the source was opened without them.
    classes : tuple of str
        Class names in the order of the labels.
    shape : (C, H, W)
        Of every image that is taken.
    columns : tuple of str
        Names that :meth:`column` knows.
    """

    def __init__(
        self,
        name: str,
        labels: IntArray,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        columns: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.labels = labels
        self.classes = classes
        self.shape = shape
        self.columns = columns

    def __len__(self) -> int:
        return len(self.labels)

    def column(self, name: str) -> TextArray:
        """Return a column beside image and label, such as the writer or the vendor, as text [N].

        Raises
        ------
        DataError
            If there is no such column; the message names those there are.
        """
        if name not in self.columns:
            there = f"there are: {', '.join(self.columns)}" if self.columns else "there are none"
            raise DataError(f"{self.name}: no column {name!r}; {there}")
        return self._column(name)

    def take(self, index: IntArray) -> ImageSet:
        """Decode the images at the positions ``index``, in that order.

        Raises
        ------
        DataError
            If an image is broken or of another size; the message names the file and row.
        """
        index = np.asarray(index, dtype=np.int64)
        return ImageSet(self._decode(index), self.labels[index], self.classes)

    @abstractmethod
    def _decode(self, index: IntArray) -> Pixels:
        """Return the images at ``index`` as uint8 [n, H, W, C]."""

    def _column(self, name: str) -> TextArray:
        raise NotImplementedError(name)


def reason(error: Exception) -> str:
    """Return what a library's error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
