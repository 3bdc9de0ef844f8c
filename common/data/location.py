"""What is found at a path: its splits, and how to open one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.data.dataset import Source
from common.data.options import ReadOptions

TRAIN, TEST = "train", "test"

# Data sets whose test labels are secret are tested on their validation part.
_TEST_NAMES = (TEST, "t10k", "validation", "valid", "val")
SPLIT_NAMES = (TRAIN, *_TEST_NAMES)


@dataclass(frozen=True)
class Location:
    """The splits ("train", "test") at a path, and the function that opens one of them.

    A location that is not divided has the one split "train".
    """

    splits: tuple[str, ...]
    open: Callable[[str, ReadOptions], Source]


def split_names(names: Iterable[str]) -> dict[str, str]:
    """Map "train" and "test" to what they are called among ``names``, as far as they are there."""
    there = set(names)
    test = next((name for name in _TEST_NAMES if name in there), None)
    found = {TRAIN: TRAIN} if TRAIN in there else {}
    return found | ({TEST: test} if test else {})
