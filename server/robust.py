"""Means that a share of faulty or hostile updates cannot move far.

``trimmed``: every entry's mean without its smallest and largest values; ``median``: every
entry's median (both: Yin et al., ICML 2018). ``krum``: the weighted mean of those updates that
are nearest to most others (Multi-Krum, Blanchard et al., NeurIPS 2017). The first two give all
devices one weight: a count of images is a device's word alone.

A BN mean and variance are those of the mixture of the devices' data, ``v = m(v_k) + m((mu_k -
mu)^2)`` with ``mu = m(mu_k)`` and m the robust mean, so that no variance comes out negative.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from common.layout import Layout
from common.store import disk_errors
from server.aggregate import MaskedMean
from server.taken import Updates

Kind = Literal["trimmed", "median", "krum"]
_BLOCK_BYTES = 32 * 2**20


def robust_mean(
    kind: Kind,
    updates: Updates,
    images: Sequence[int],
    layout: Layout,
    faulty: float,
    folder: Path | None = None,
) -> np.ndarray:
    """Return the robust mean of packed updates, float32 [layout.size].

    Parameters
    ----------
    kind : {"trimmed", "median", "krum"}
        See the module.
    updates : iterable of float32 arrays [layout.size]
        At least one. They are read entry by entry from a file of four bytes an entry and update.
    images : sequence of int
        That each was trained on; only ``krum`` weighs by it.
    layout : Layout
        What the updates hold.
    faulty : float
        Share that may be faulty, below one half; ``median`` does without.
    folder : Path, optional
        Of that file.
    """
    if kind == "krum":
        chosen = nearest(updates, layout, math.floor(faulty * len(updates)), folder)
        mean = MaskedMean(layout)
        for number, values in enumerate(updates):
            if number in chosen:
                mean.add(values, images[number])
        return mean.result()
    middle = _middle(kind, faulty)
    with _Columns(updates, layout, folder) as columns:
        packed = [middle(block) for block in columns.plain()]
        means, variances = [], []
        for mu, var in columns.statistics():
            means.append(middle(mu))
            variances.append(middle(var) + middle((mu - means[-1]) ** 2))
        result = np.empty(layout.size)
        result[columns.others] = np.concatenate([*packed, np.zeros(0)])
        where_mean, where_variance = layout.statistics
        result[where_mean] = np.concatenate([*means, np.zeros(0)])
        result[where_variance] = np.concatenate([*variances, np.zeros(0)])
    return result.astype(np.float32)


def robust_scores(updates: Updates) -> np.ndarray:
    """Return every importance's median over the devices, float64."""
    median: np.ndarray = np.median(np.stack(list(updates)).astype(np.float64), axis=0)
    return median


def nearest(updates: Updates, layout: Layout, faulty: int, folder: Path | None = None) -> set[int]:
    """Return the numbers of all but `faulty` updates: those nearest to most others (Multi-Krum).

    BN statistics do not count: they show whose data it is, not whether it is sound.
    """
    count = len(updates)
    if not faulty:
        return set(range(count))
    gram = np.zeros((count, count))
    with _Columns(updates, layout, folder) as columns:
        for block in columns.plain():
            around = block - np.median(block, axis=0)
            gram += around @ around.T
    squares = np.diag(gram)
    distances = squares[:, None] + squares[None, :] - 2 * gram
    np.fill_diagonal(distances, np.inf)
    near = max(1, count - faulty - 2)
    scores = np.sort(distances, axis=1)[:, :near].sum(1)
    return set(np.argsort(scores, kind="stable")[: count - faulty].tolist())


def _middle(kind: Kind, faulty: float) -> Callable[[np.ndarray], np.ndarray]:
    def middle(values: np.ndarray) -> np.ndarray:
        """Return the middle of each column of float64 [updates, n]."""
        if kind == "median":
            median: np.ndarray = np.median(values, axis=0)
            return median
        cut = math.floor(faulty * len(values))
        kept = np.sort(values, axis=0)[cut : len(values) - cut]
        mean: np.ndarray = kept.mean(axis=0)
        return mean

    return middle


class _Columns:
    """All updates entry by entry, in blocks: on disk they lie update by update."""

    def __init__(self, updates: Updates, layout: Layout, folder: Path | None) -> None:
        means, variances = layout.statistics
        self.others = np.setdiff1d(np.arange(layout.size), np.concatenate([means, variances]))
        pairs = np.stack([means, variances], axis=1).ravel()
        self._order = np.concatenate([self.others, pairs])
        self._updates, self._folder = updates, folder
        self._count = len(updates)
        self._width = max(2, _BLOCK_BYTES // (8 * max(self._count, 1)) // 2 * 2)

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile(dir=self._folder)
        try:
            with disk_errors(self._folder or Path(tempfile.gettempdir())):
                for values in self._updates:
                    self._file.write(values[self._order].tobytes())
                self._file.flush()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def plain(self) -> Iterator[np.ndarray]:
        """Yield all but BN statistics, float64 [updates, n]."""
        yield from self._blocks(0, len(self.others))

    def statistics(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield BN means and variances, float64 [updates, n] each."""
        for block in self._blocks(len(self.others), len(self._order)):
            yield block[:, ::2], block[:, 1::2]

    def _blocks(self, begin: int, end: int) -> Iterator[np.ndarray]:
        for start in range(begin, end, self._width):
            stop = min(start + self._width, end)
            block = np.empty((self._count, stop - start))
            for number in range(self._count):
                self._file.seek(4 * (number * len(self._order) + start))
                block[number] = np.frombuffer(self._file.read(4 * (stop - start)), np.float32)
            yield block
