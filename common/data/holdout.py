"""Which images only decide: a held-out part fixed by the content of each image."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from common.data.dataset import ImageSet, IntArray
from common.errors import ConfigError

_SPLIT_SEED = 0


def holdout_mask(images: ImageSet, share: float, salt: str = "") -> NDArray[np.bool_]:
    """Return which images are held out, as bool [N].

    An image is held out if the first 8 bytes of SHA-256(salt + raw pixels), as a fraction of
    2**64, are below `share`. So it depends on nothing but the image: duplicates never lie on
    both sides, a restart changes nothing, and an image held out with one share is held out with
    every larger one.

    The number held out is binomial: for few images it may be zero, or all of them.

    Parameters
    ----------
    images : ImageSet
    share : float
        0 <= share < 1.
    salt : str
        Another salt is another choice.

    Raises
    ------
    ConfigError
        If the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"holdout share: {share}; it must be at least 0 and below 1")
    prefix = hashlib.sha256(salt.encode())
    mask = np.empty(len(images), dtype=np.bool_)
    for i, image in enumerate(np.ascontiguousarray(images.images)):
        digest = prefix.copy()
        digest.update(image.data)
        mask[i] = below(digest.digest(), share)
    return mask


def below(digest: bytes, share: float) -> bool:
    """Return whether a digest's first 8 bytes, as a fraction of 2**64, are below `share`."""
    return int.from_bytes(digest[:8], "big") < int(share * 2**64)


def split_holdout(images: ImageSet, share: float, salt: str = "") -> tuple[ImageSet, ImageSet]:
    """Return (train, held out); either may be empty for few images (see `holdout_mask`)."""
    mask = holdout_mask(images, share, salt)
    return images.select(~mask), images.select(mask)


def aside_mask(labels: IntArray, share: float) -> NDArray[np.bool_]:
    """Return which images are set aside for testing, as bool [N]: `share` of every class.

    For data that comes without a test split. The same labels give the same images, whatever the
    seed of the run.
    """
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: round(share * len(rows))]] = True
    return chosen
