"""Images in memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.data import ImageSet
from common.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def image_set() -> ImageSet:
    return ImageSet(PIXELS.copy(), np.arange(6) % 2, ("cat", "dog"))


def test_shape_is_channels_first() -> None:
    assert (len(image_set()), image_set().shape) == (6, (3, 4, 5))


def test_select_takes_positions_or_a_mask() -> None:
    images = image_set()
    assert images.select(np.array([5, 0])).labels.tolist() == [1, 0]
    assert np.array_equal(images.select(images.labels == 1).images, PIXELS[1::2])


def test_concat_joins_in_order_and_refuses_what_does_not_fit() -> None:
    images = image_set()
    parts = [images.select(np.arange(4)), images.select(np.arange(4, 6))]
    assert ImageSet.concat(parts).digest == images.digest
    with pytest.raises(DataError, match=r"image set 1: shape \(1, 4, 5\)"):
        ImageSet.concat([images, replace(images, images=PIXELS[..., :1])])
    with pytest.raises(DataError, match=r"image set 1: .* 1 classes do not fit"):
        ImageSet.concat([images, replace(images, classes=("cat",))])
    with pytest.raises(DataError, match="none given"):
        ImageSet.concat([])


def test_the_digest_changes_with_whatever_changes_and_with_nothing_else() -> None:
    images = image_set()
    pixels = PIXELS.copy()
    pixels[3, 2, 1, 0] ^= 1
    others = [
        replace(images, images=pixels),
        replace(images, images=PIXELS.reshape(6, 5, 4, 3)),
        replace(images, labels=images.labels[::-1]),
        replace(images, classes=("cat", "eel")),
        images.select(np.arange(5)),
    ]
    assert image_set().digest == images.digest
    assert len({images.digest, *(other.digest for other in others)}) == 6
    assert replace(images, images=np.asfortranarray(PIXELS)).digest == images.digest


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS / 255, np.arange(6), "images: float64"),
        (PIXELS[..., 0], np.arange(6), "images: uint8"),
        (PIXELS[..., :2], np.arange(6), "images: uint8"),
        (PIXELS, np.arange(6, dtype=np.int32), "labels: int32"),
        (PIXELS, np.arange(5), r"labels: int64 \[5\]; int64 \[6\]"),
    ],
)
def test_arrays_of_another_kind_are_refused(
    images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, ("a",))
