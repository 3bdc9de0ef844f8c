"""Near duplicates: what looks the same after scaling, recompression or a slight change of light.

Two hashes of 64 bits, both ImageHash's: one of the shape (the signs of low frequencies, "pHash",
Zauner 2010) and, since that sees grey alone, one of the colours. An image is a near duplicate if
it is close in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from common.data.dataset import Pixels

COLOUR_BITS = 6
"""Bits in which the colours of one scene differ after recompression, at most."""


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
    return Looks(_number(imagehash.phash(image)), _number(imagehash.colorhash(image)))


def differ(a: int, b: int) -> int:
    """Return in how many of 64 bits two hashes differ."""
    return ((a ^ b) & (2**64 - 1)).bit_count()


def _number(found: Any) -> int:
    packed = np.packbits(found.hash.ravel())
    return int.from_bytes(packed.tobytes().rjust(8, b"\0"), "big", signed=True)
