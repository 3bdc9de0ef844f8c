"""Readers, partitions over devices, streams of steps."""

from common.data.augment import Augment
from common.data.dataset import ImageSet, IntArray, Pixels, Source, TextArray
from common.data.decode import read_image
from common.data.holdout import holdout_mask, split_holdout
from common.data.normalise import Normalisation
from common.data.partition import (
    Partition,
    PartitionKind,
    classes_per_device,
    dirichlet,
    iid,
    natural,
    partition,
)
from common.data.readers import has_split, open_source
from common.data.stream import Stream, by_class, by_share

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
    "by_class",
    "by_share",
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
