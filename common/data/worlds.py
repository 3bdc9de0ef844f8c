"""Built-in changes of the world: the same classes, seen under other conditions.

Each image is changed by itself, in a way that depends on its pixels and the world's name alone,
so that server, devices and a later run see the same image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from common.data.dataset import ImageSet
from common.errors import ConfigError

Pixels = NDArray[np.uint8]


def _dark(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Leave 35 % of the light, blur by 1/32 of a side, add noise of 10 grey levels."""
    side = min(image.shape[:2])
    blurred = np.asarray(_pil(image).filter(ImageFilter.GaussianBlur(side / 32)))
    noise = rng.normal(0.0, 10.0, image.shape)
    return _grey_levels(0.35 * blurred.reshape(image.shape) + noise)


def _invert(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Return the negative."""
    return 255 - image


def _rotate(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by 30 to 60 degrees to either side; the border is mirrored."""
    height, width = image.shape[:2]
    angle = rng.uniform(30.0, 60.0) * rng.choice([-1, 1])
    room = ((height // 2,) * 2, (width // 2,) * 2, (0, 0))
    wide = _pil(np.pad(image, room, mode="symmetric"))
    turned = np.asarray(wide.rotate(angle, Image.Resampling.BILINEAR))
    top, left = height // 2, width // 2
    return turned[top : top + height, left : left + width].reshape(image.shape)


_CHANGES: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "dark": _dark,
    "invert": _invert,
    "rotate": _rotate,
}


def transform(images: ImageSet, world: str) -> ImageSet:
    """Return `images` as they look in `world`.

    Parameters
    ----------
    images : ImageSet
        uint8 pixels, as the result's are.
    world : str
        ``dark`` (dark, blurred, noisy), ``invert`` (negative colours), ``rotate`` (30 to 60
        degrees), several of them joined by ``+``, or empty for no change.
    """
    if not world:
        return images
    pixels = np.ascontiguousarray(images.images)
    for name in world.split("+"):
        change = _CHANGES[name]
        pixels = np.stack([change(image, _rng(name, image)) for image in pixels])
    return ImageSet(pixels, images.labels, images.classes)


def worlds_of(text: str, parts: int) -> tuple[str, ...]:
    """Return the world of each part from a comma-separated setting; all empty for an empty one.

    Raises
    ------
    ConfigError
        If there are fewer worlds than parts, or one has no known name.
    """
    if not text:
        return ("",) * parts
    worlds = tuple(text.split(","))
    unknown = [name for world in worlds for name in world.split("+") if name not in _CHANGES]
    if unknown:
        raise ConfigError(f"worlds names {unknown[0]!r}: use {', '.join(_CHANGES)}, joined by '+'")
    if len(worlds) < parts:
        raise ConfigError(f"worlds is '{text}' for {parts} parts: give one for each")
    return worlds[:parts]


def _rng(name: str, image: Pixels) -> np.random.Generator:
    digest = hashlib.sha256(name.encode() + image.tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _pil(image: Pixels) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _grey_levels(values: NDArray[np.floating]) -> Pixels:
    levels: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return levels
