"""Labels and class names: checked once, where the file and row are still known."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from common.data.dataset import UNLABELLED, IntArray
from common.data.options import ReadOptions
from common.errors import DataError

# More are ids in a label's place; a class name would be made up for each.
MAX_CLASSES = 100_000


def resolve(
    labels: IntArray,
    names: tuple[str, ...] | None,
    options: ReadOptions,
    where: Callable[[int], str],
    *,
    others: Iterable[IntArray] = (),
) -> tuple[IntArray, tuple[str, ...]]:
    """Check labels and refer them to the classes that the caller asked for.

    Where the source names its classes and the caller does too, labels are mapped by name, so
    that two sources that order the same classes differently agree.

    Parameters
    ----------
    labels : int64 array [N]
        As the source has them.
    names : tuple of str, optional
        The source's own class names, if it has any; else "0".."K-1".
    options : ReadOptions
    where : callable
        File and row of the i-th label, for error messages.
    others : iterable of int64 arrays
        The labels of the location's other splits: they count for K as well, and are asked for
        only if nothing names the classes.

    Returns
    -------
    labels, classes

    Raises
    ------
    DataError
        If a label is negative, or outside the source's or the caller's classes.
    """
    if not options.labelled:
        return np.full(len(labels), UNLABELLED, dtype=np.int64), options.classes or ()
    _refuse(labels < 0, labels, where, "is negative; labels count from 0")
    if names is None and options.classes is None:
        _refuse(labels >= MAX_CLASSES, labels, where, "is no class index; is this an id?")
        # Ids among the others are refused when that split itself is opened.
        tops = [int(np.max(some, initial=0)) for some in (labels, *others)]
        names = tuple(str(i) for i in range(max(t for t in tops if t < MAX_CLASSES) + 1))
    own = names or options.classes or ()
    _refuse(
        labels >= len(own),
        labels,
        where,
        f"is outside the {len(own)} classes; correct it or give all classes",
    )
    classes = options.classes or own
    if own == classes:
        return labels, classes
    position = {name: i for i, name in enumerate(classes)}
    mapped = np.array([position.get(name, UNLABELLED) for name in own], dtype=np.int64)[labels]
    if (mapped < 0).any():
        row = int(np.argmax(mapped < 0))
        raise DataError(
            f"{where(row)}: label {own[labels[row]]!r} is outside the classes "
            f"{_short(classes)}; remove it or give all classes"
        )
    return mapped, classes


def _refuse(
    bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    labels: IntArray,
    where: Callable[[int], str],
    complaint: str,
) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{where(row)}: label {labels[row]} {complaint}")


def _short(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
