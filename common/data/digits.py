"""scikit-learn's handwritten digits, built in: 1,797 grey images of 8x8 pixels, ten classes.

A smoke test only: any small CNN solves it. Source: the test part of UCI's optdigits.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

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


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels 0..16, float64 [1797, 64], and labels, int64 [1797]."""
    # The file that load_digits reads: importing scikit-learn takes every worker a second.
    package = importlib.util.find_spec("sklearn")
    path = Path(str(package.origin if package else "")).parent / "datasets/data/digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.asarray(bunch.data), np.asarray(bunch.target, dtype=np.int64)


def _open(split: str, options: ReadOptions) -> Source:
    values, labels = _table()
    images = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    in_test = aside_mask(labels, _TEST_SHARE)
    rows = np.flatnonzero(in_test if split == TEST else ~in_test)
    names = tuple(str(i) for i in range(10))
    return ArraySource(f"{NAME} ({split})", images[rows], labels[rows], names, options)
