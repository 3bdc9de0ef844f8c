"""NumPy archives: arrays ``images`` and ``labels`` (or ``x`` and ``y``), all in one file.

A file that holds two splits has ``x_train``, ``y_train``, ``x_test``, ``y_test`` (Keras) or
``train_images``, ``train_labels``, ... (MedMNIST). Nothing pickled is loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from common.data.arrays import ArraySource
from common.data.dataset import IntArray, Pixels, Source, reason
from common.data.location import SPLIT_NAMES, TRAIN, Location, split_names
from common.data.options import ReadOptions
from common.errors import DataError

_PAIRS = (("images", "labels"), ("x", "y"))
_FORMS = ("{split}_{name}", "{name}_{split}")


def locate(path: Path) -> Location | None:
    """Return the NumPy archive at ``path``, or None if it is no file of that kind."""
    if not path.is_file() or path.suffix != ".npz":
        return None
    keys = _keys(_names(path))
    if not keys:
        raise DataError(f"{path}: no arrays images and labels, or x and y; name them so")
    return Location(tuple(keys), lambda split, options: _open(path, keys, split, options))


def _keys(there: set[str]) -> dict[str, tuple[str, str]]:
    """Map each split to the names of its image and label arrays."""
    for image, label in _PAIRS:
        if image in there:
            return {TRAIN: (image, label)}
        for form in _FORMS:
            found = [s for s in SPLIT_NAMES if form.format(split=s, name=image) in there]
            if found:
                return {
                    split: (form.format(split=s, name=image), form.format(split=s, name=label))
                    for split, s in split_names(found).items()
                }
    return {}


def _open(path: Path, keys: dict[str, tuple[str, str]], split: str, options: ReadOptions) -> Source:
    image, label = keys[split]
    images = _images(path, image)
    if not options.labelled:
        return ArraySource(f"{path}: {image}", images, None, None, options)
    labels = _labels(path, label)
    others = (_labels(path, other) for _, other in keys.values() if other != label)
    return ArraySource(f"{path}: {image}", images, labels, None, options, others)


def _images(path: Path, key: str) -> Pixels:
    array = _array(path, key)
    colour = array.ndim == 4 and array.shape[3] in (1, 3)
    if array.dtype != np.uint8 or not (array.ndim == 3 or colour):
        raise DataError(
            f"{path}: {key} is {array.dtype} {list(array.shape)}; "
            "uint8 [N, H, W] or [N, H, W, 1 or 3] is needed"
        )
    return array


def _labels(path: Path, key: str) -> IntArray:
    array = _array(path, key)
    if not np.issubdtype(array.dtype, np.integer) or array.shape[1:] not in ((), (1,)):
        raise DataError(
            f"{path}: {key} is {array.dtype} {list(array.shape)}; integers [N] are needed"
        )
    return array.reshape(-1).astype(np.int64)


def _names(path: Path) -> set[str]:
    with _told(path), path.open("rb") as file, NpzFile(file, allow_pickle=False) as archive:
        return set(archive.files)


def _array(path: Path, key: str) -> NDArray[Any]:
    with _told(path), path.open("rb") as file, NpzFile(file, allow_pickle=False) as archive:
        if key not in archive:
            raise DataError(f"{path}: no array {key}; add it")
        return np.asarray(archive[key])


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what NumPy raises on an unreadable archive, or on pickled objects, into a DataError."""
    try:
        yield
    except (ValueError, OSError, EOFError, MemoryError, BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: unreadable NumPy archive ({reason(error)}); save plain arrays"
        ) from error
