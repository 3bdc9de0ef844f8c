"""Open a data set by its path, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.data import digits, folder, idx, npz, parquet
from common.data.dataset import Source, reason
from common.data.location import TRAIN, Location
from common.data.options import ReadOptions
from common.errors import DataError

# The image folder last: the others are known by the names of their files.
_FORMATS: tuple[Callable[[Path], Location | None], ...] = (
    parquet.locate,
    npz.locate,
    idx.locate,
    folder.locate,
)


def open_source(
    path: str,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    labelled: bool = True,
) -> Source:
    """Open a data set; images are decoded when they are taken.

    Parameters
    ----------
    path : str
        ``"digits"``; a Parquet, IDX or npz file; or a folder of Parquet files, IDX files or
        images (see :mod:`common.data.parquet`, ``idx``, ``npz`` and ``folder``).
    split : str, optional
        "train" or "test". By default the train split; all of a location that is not divided
        counts as its train split.
    classes : sequence of str, optional
        The class names that the labels of the result index. Labels are mapped by name where the
        data names its classes, and taken as they are where it does not.
    size : int, optional
        Resize the shorter side of every image to this many pixels and crop the centre square.
    channels : int, optional
        1 (grey) or 3 (RGB); by default those of the first image.
    labelled : bool
        If false, labels are neither needed nor read; all are -1.

    Raises
    ------
    DataError
        If there is no such data or split, no image, or a label is outside the classes.
    ConfigError
        If size, channels or classes cannot be used.
    """
    options = ReadOptions(None if classes is None else tuple(classes), size, channels, labelled)
    location = _locate(path)
    chosen = split or TRAIN
    if chosen not in location.splits:
        there = " and ".join(location.splits)
        raise DataError(f"{path}: no {chosen} split, only {there}; ask for that or add it")
    return location.open(chosen, options)


def has_split(path: str, split: str) -> bool:
    """Return whether :func:`open_source` finds this split at ``path``.

    Raises
    ------
    DataError
        If there is no data at all.
    """
    return split in _locate(path).splits


def _locate(path: str) -> Location:
    if path == digits.NAME:
        return digits.locate()
    place = Path(path)
    try:
        if not place.exists():
            raise DataError(f"{path}: no such file or folder; correct the path")
        for locate in _FORMATS:
            if location := locate(place):
                return location
    except OSError as error:
        raise DataError(f"{path}: unreadable ({reason(error)}); make it readable") from error
    raise DataError(
        f"{path}: unknown format; give Parquet, IDX or npz files, a folder of images, or 'digits'"
    )
