"""Random crops and flips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data import Augment
from common.errors import ConfigError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 64, channels: int = 3, height: int = 7, width: int = 6) -> torch.Tensor:
    x = torch.randn(count, channels, height, width, generator=rng(9))
    return x.to(memory_format=torch.channels_last)


def candidates(image: torch.Tensor, padding: int, flip: bool) -> list[bytes]:
    """Every image that one image may become, by padding and slicing."""
    found = []
    for source in (image, image.flip(2)) if flip else (image,):
        padded = F.pad(source[None], (padding,) * 4, mode="reflect")[0]
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
                found.append(crop.numpy().tobytes())
    return found


@pytest.mark.parametrize(("padding", "flip"), [(2, False), (0, True), (3, True), (5, True)])
def test_every_result_is_a_crop_of_the_padded_image_and_all_kinds_occur(
    padding: int, flip: bool
) -> None:
    image = batch(1)
    many = image.expand(4000, -1, -1, -1)
    seen = {x.numpy().tobytes() for x in Augment(padding, flip)(many, rng())}
    assert seen == set(candidates(image[0], padding, flip))


def test_images_are_not_mixed_up() -> None:
    x = batch(16)
    for before, after in zip(x, Augment(2, True)(x, rng()), strict=True):
        assert after.contiguous().numpy().tobytes() in candidates(before, 2, True)


def test_half_of_the_images_are_flipped() -> None:
    x = batch(1000)
    flipped = Augment(0, True)(x, rng())
    is_mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    is_same = (flipped == x).flatten(1).all(1)
    assert (is_mirrored ^ is_same).all()
    assert 430 < is_mirrored.sum() < 570


def test_the_generator_decides() -> None:
    x, augment = batch(), Augment(2, True)
    assert torch.equal(augment(x, rng(1)), augment(x, rng(1)))
    assert not torch.equal(augment(x, rng(1)), augment(x, rng(2)))
    generator = rng(1)
    assert not torch.equal(augment(x, generator), augment(x, generator))


def test_off_is_the_batch_itself_and_draws_nothing() -> None:
    x, generator = batch(), rng()
    state = generator.get_state()
    assert Augment(0, False)(x, generator) is x
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_normalised_images_are_cut_alike_and_stay_channels_last(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 5, 5, channels), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    small, large = (Augment(2, True)(y, rng()) for y in (x, x.float()))
    assert small.dtype == torch.uint8
    assert torch.equal(small.float(), large)
    assert small.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_and_a_single_image() -> None:
    assert Augment(2, True)(batch(0), rng()).shape == (0, 3, 7, 6)
    assert Augment(2, True)(batch(1), rng()).shape == (1, 3, 7, 6)


def test_padding_that_the_images_do_not_allow() -> None:
    with pytest.raises(ConfigError, match="crop padding: -1"):
        Augment(-1, False)
    with pytest.raises(ConfigError, match="crop padding: 6; images of 6x7 pixels allow at most 5"):
        Augment(6, False)(batch(), rng())
