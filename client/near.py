"""Near duplicates: what looks the same after scaling, recompression or a slight change of light.

Two numbers of 64 bits: ImageHash's of the shape (the signs of low frequencies, "pHash", Zauner
2010) and, since that sees grey alone, the mean colour of each quarter: a red light is no green one.
An image is a near duplicate if it is close in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from common.data.dataset import Pixels

TINT = 2
"""Levels of 32 by which the mean colours of one scene differ after recompression, at most."""

_BITS = 5
_PARTS = 12


@dataclass(frozen=True)
class Looks:
    """What an image looks like, as two signed 64-bit numbers (SQLite has no unsigned ones)."""

    shape: int
    colour: int


def looks_of(pixels: Pixels) -> Looks:
    """Return the hashes of an image, uint8 [H, W, 1 or 3]."""
    import imagehash  # late: a device that only trains needs none

    grey = pixels.shape[2] == 1
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    bits = np.packbits(imagehash.phash(image).hash.ravel())
    means = np.asarray(image.convert("RGB").resize((2, 2), Image.Resampling.BOX)).ravel()
    colour = 0
    for mean in means.tolist():
        colour = colour << _BITS | mean >> (8 - _BITS)
    return Looks(int.from_bytes(bits.tobytes(), "big", signed=True), colour)


def differ(a: int, b: int) -> int:
    """Return in how many of 64 bits two shapes differ."""
    return ((a ^ b) & (2**64 - 1)).bit_count()


def tinted(a: int, b: int) -> int:
    """Return by how many levels the mean colours differ, where they do most."""
    level = (1 << _BITS) - 1
    shifts = range(0, _BITS * _PARTS, _BITS)
    return max(abs((a >> shift & level) - (b >> shift & level)) for shift in shifts)
