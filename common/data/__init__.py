"""Readers, partitions over devices, streams of steps.

What needs torch or pyarrow is imported when first asked for: a phone-like device classifies with
:mod:`common.data.decode` and has neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from common.data.dataset import ImageSet, IntArray, Pixels, Source, TextArray
from common.data.decode import read_image
from common.data.holdout import holdout_mask, split_holdout
from common.data.partition import (
    Partition,
    PartitionKind,
    classes_per_device,
    dirichlet,
    iid,
    natural,
    partition,
)
from common.data.stream import Stream, by_class, by_share, by_world

if TYPE_CHECKING:
    from common.data.augment import Augment
    from common.data.joined import Worlds
    from common.data.normalise import Normalisation
    from common.data.readers import has_split, open_source

_LATE = {
    "Augment": "augment",
    "Worlds": "joined",
    "Normalisation": "normalise",
    "has_split": "readers",
    "open_source": "readers",
}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)


__all__ = [
    "Augment",
    "ImageSet",
    "IntArray",
    "Normalisation",
    "Partition",
    "PartitionKind",
    "Pixels",
    "Source",
    "Stream",
    "TextArray",
    "Worlds",
    "by_class",
    "by_share",
    "by_world",
    "classes_per_device",
    "dirichlet",
    "has_split",
    "holdout_mask",
    "iid",
    "natural",
    "open_source",
    "partition",
    "read_image",
    "split_holdout",
]
