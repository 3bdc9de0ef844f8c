"""Pixels to tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from common.data import ImageSet, Normalisation
from common.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (1500, 5, 4, 3), dtype=np.uint8)


def image_set(pixels: np.ndarray) -> ImageSet:
    return ImageSet(pixels, np.zeros(len(pixels), np.int64), ("a",))


def test_mean_and_deviation_are_those_of_the_pixels() -> None:
    measured = Normalisation.from_images(image_set(PIXELS))
    scaled = PIXELS / 255
    np.testing.assert_allclose(measured.mean, scaled.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(measured.std, scaled.std((0, 1, 2)), rtol=1e-13)
    assert Normalisation.from_images(image_set(PIXELS[::-1])) == measured


def test_a_channel_that_never_changes_has_a_floor_under_its_deviation() -> None:
    measured = Normalisation.from_images(image_set(np.full((3, 2, 2, 1), 51, np.uint8)))
    assert measured == Normalisation((0.2,), (1e-3,))


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_equal_the_formula_and_lie_channels_last(channels: int) -> None:
    pixels = PIXELS[..., :channels]
    normalisation = Normalisation((0.5, 0.4, 0.3)[:channels], (0.25, 0.2, 0.3)[:channels])
    tensor = normalisation.to_tensor(pixels)
    expected = (pixels / 255 - normalisation.mean) / normalisation.std
    assert (tensor.dtype, tensor.shape) == (torch.float32, (1500, channels, 5, 4))
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(tensor.numpy(), expected.transpose(0, 3, 1, 2).astype(np.float32))


def test_the_same_bytes_after_a_trip_through_json() -> None:
    measured = Normalisation.from_images(image_set(PIXELS))
    loaded = json.loads(json.dumps(asdict(measured)))
    again = Normalisation(tuple(loaded["mean"]), tuple(loaded["std"]))
    tensors = [n.to_tensor(PIXELS).numpy().tobytes() for n in (measured, again)]
    assert tensors[0] == tensors[1]
    # Pinned: these bytes must not differ between machines or versions.
    assert hashlib.sha256(tensors[0]).hexdigest()[:16] == "88d62c534613f2d9"


def test_no_images() -> None:
    with pytest.raises(DataError, match="no images to measure"):
        Normalisation.from_images(image_set(PIXELS[:0]))
    assert Normalisation((0.5,) * 3, (1.0,) * 3).to_tensor(PIXELS[:0]).shape == (0, 3, 5, 4)


def test_another_number_of_channels() -> None:
    with pytest.raises(DataError, match=r"images have 3 channel\(s\), the model 1"):
        Normalisation((0.5,), (0.25,)).to_tensor(PIXELS)
