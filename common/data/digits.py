"""scikit-learn's handwritten digits, built in: 1,797 grey images of 8x8 pixels, ten classes.

A smoke test only: any small CNN solves it. Source: the test part of UCI's optdigits.
"""

from __future__ import annotations

import numpy as np

from common.data.arrays import ArraySource
from common.data.dataset import Source
from common.data.holdout import aside_mask
from common.data.location import TEST, TRAIN, Location
from common.data.options import ReadOptions

NAME = "digits"

_TEST_SHARE = 0.2


def locate() -> Location:
    """Return the digits, with a test split of 20 % of every class, always the same."""
    return Location((TRAIN, TEST), _open)


def _open(split: str, options: ReadOptions) -> Source:
    from sklearn.datasets import load_digits  # a second to import, needed for this alone

    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)
    in_test = aside_mask(labels, _TEST_SHARE)
    rows = np.flatnonzero(in_test if split == TEST else ~in_test)
    names = tuple(str(i) for i in range(10))
    return ArraySource(f"{NAME} ({split})", images[rows], labels[rows], names, options)
