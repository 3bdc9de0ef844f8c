"""Worlds: other conditions for the same classes, the same for everyone who looks."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import Config
from common.data import ImageSet
from common.data.worlds import transform, worlds_of
from common.errors import ConfigError
from common.scenario import Scenario

WORLDS = ("dark", "invert", "rotate", "invert+rotate")


def photos(channels: int, count: int = 12, height: int = 20, width: int = 28) -> ImageSet:
    """Smooth images: gradients with a bright square somewhere."""
    rng = np.random.default_rng(channels)
    ramp = np.linspace(40, 200, width)[None, None, :, None] + rng.uniform(-40, 40, (count, 1, 1, 1))
    images = np.broadcast_to(ramp, (count, height, width, channels)).copy()
    for image in images:
        top, left = rng.integers(height - 6), rng.integers(width - 6)
        image[top : top + 6, left : left + 6] = 250
    labels = np.arange(count, dtype=np.int64) % 3
    return ImageSet(np.clip(images, 0, 255).astype(np.uint8), labels, ("a", "b", "c"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_a_world_keeps_shape_type_and_labels_and_changes_every_image(
    world: str, channels: int
) -> None:
    before = photos(channels)
    after = transform(before, world)
    assert after.images.dtype == np.uint8
    assert after.images.shape == before.images.shape
    assert np.array_equal(after.labels, before.labels)
    distance = np.abs(after.images.astype(int) - before.images.astype(int)).mean((1, 2, 3))
    assert distance.min() > 10


@pytest.mark.parametrize("world", WORLDS)
def test_an_image_looks_the_same_whatever_stands_beside_it(world: str) -> None:
    images = photos(3)
    everything = transform(images, world).images
    order = np.array([7, 2, 5])
    assert np.array_equal(transform(images.select(order), world).images, everything[order])
    assert np.array_equal(transform(images, world).images, everything)


def test_worlds_differ_from_one_another() -> None:
    seen = [transform(photos(3), world).images for world in WORLDS]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one.astype(int) - other.astype(int)).mean() > 10


def test_dark_is_darker_and_noisy_and_invert_is_its_own_inverse() -> None:
    images = photos(1)
    dark = transform(images, "dark").images
    assert dark.mean() == pytest.approx(0.35 * images.images.mean(), rel=0.1)
    rough = np.abs(np.diff(dark.astype(int), axis=1)).mean()
    assert rough > np.abs(np.diff(images.images.astype(int), axis=1)).mean()
    again = transform(transform(images, "invert"), "invert")
    assert np.array_equal(again.images, images.images)


def test_no_world_is_no_change() -> None:
    images = photos(3)
    assert transform(images, "") is images
    assert worlds_of("", 3) == ("", "", "")
    assert worlds_of("dark,invert+rotate,rotate", 2) == ("dark", "invert+rotate")


@pytest.mark.parametrize(
    ("text", "parts", "message"),
    [
        ("dark,foggy", 2, "worlds names 'foggy': use dark, invert, rotate"),
        ("dark", 2, "worlds is 'dark' for 2 parts: give one for each"),
    ],
)
def test_wrong_worlds_are_told(text: str, parts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worlds_of(text, parts)


# ---------------------------------------------------------------- in a scenario


def scenario(**settings: object) -> Scenario:
    sizes = {"prior_size": 100, "part_size": 90, "devices": 3, "steps": 2, "alpha": 5.0}
    return Scenario(Config.parse({**sizes, **settings}))


def test_parts_are_of_their_world_and_prior_and_test_are_not() -> None:
    plain, other = scenario(), scenario(worlds="dark,rotate")
    assert other.prior.digest == plain.prior.digest
    for step, world in ((1, "dark"), (2, "rotate")):
        expected = transform(plain.part(step), world)
        assert other.part(step).digest == expected.digest
        own = transform(plain.device(step, 1), world)
        assert other.device(step, 1).digest == own.digest
    mine, theirs = plain.test(), other.test()
    assert mine is not None
    assert theirs is not None
    assert mine.digest == theirs.digest


def test_joint_devices_hold_their_new_images_and_a_share_of_all_earlier_ones() -> None:
    plain, joint = scenario(), scenario(joint=True)
    for step, total in ((1, 190), (2, 280)):
        held = [joint.device(step, d) for d in range(3)]
        assert sum(map(len, held)) == total
        for d, images in enumerate(held):
            new = plain.device(step, d)
            assert np.array_equal(images.images[-len(new) :], new.images)
    together = np.concatenate([images.labels for images in held])
    parts = [plain.prior, plain.part(1), plain.part(2)]
    expected = sum(np.bincount(part.labels, minlength=10) for part in parts)
    assert np.array_equal(np.bincount(together, minlength=10), expected)
