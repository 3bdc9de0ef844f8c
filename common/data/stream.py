"""The training data cut in time: what the prior model is trained on, and the parts after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.dataset import IntArray
from common.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Stream:
    """Disjoint, sorted index arrays: the prior's images, and those of each step."""

    prior: IntArray
    parts: tuple[IntArray, ...]


def by_share(
    labels: IntArray,
    prior_size: int | float,
    part_sizes: Sequence[int | float],
    rng: np.random.Generator,
) -> Stream:
    """Cut by size, every part with the class balance of the whole (instance-incremental).

    Parameters
    ----------
    labels : int64 array [N]
    prior_size, part_sizes : int or float
        A number of images (int), or a share of all images (float between 0 and 1).
    rng : numpy Generator

    Raises
    ------
    ConfigError
        If a size cannot be used, or if together they exceed the data.
    """
    sizes = [_count("prior_size", prior_size, len(labels))]
    sizes += [_count("part_size", size, len(labels)) for size in part_sizes]
    if sum(sizes) > len(labels):
        raise ConfigError(
            f"prior_size and part sizes: {' + '.join(map(str, sizes))} = {sum(sizes)} images, "
            f"but the data has {len(labels)}; make them smaller"
        )
    order = balanced_order(labels, rng)
    prior, *parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return Stream(np.sort(prior), tuple(np.sort(part) for part in parts))


def by_class(
    labels: IntArray,
    class_order: Sequence[int] | None,
    prior_classes: int,
    parts: int,
    rng: np.random.Generator,
    prior_size: int | None = None,
    part_size: int | None = None,
) -> Stream:
    """Cut by class: the first classes are the prior's, the others come later (class-incremental).

    Parameters
    ----------
    labels : int64 array [N]
    class_order : sequence of int, optional
        All labels that occur, in their order of appearance; by default shuffled.
    prior_classes : int
        Classes of the prior. The rest are divided over the parts, as evenly as possible.
    parts : int
    rng : numpy Generator
    prior_size, part_size : int, optional
        Images of the prior and of each part, with the balance of their classes; by default all.

    Raises
    ------
    ConfigError
        If the classes do not suffice, or a part has fewer images than asked for.
    """
    present = np.unique(labels)
    if class_order is None:
        order = rng.permutation(present)
    else:
        order = np.asarray(class_order, dtype=np.int64)
        if not np.array_equal(np.sort(order), present):
            raise ConfigError(
                f"class_order: {list(class_order)}; it must name each of the {len(present)} "
                "labels that occur once"
            )
    if prior_classes < 1 or parts < 0 or prior_classes + parts > len(present):
        raise ConfigError(
            f"prior_classes {prior_classes} and {parts} parts; there are {len(present)} classes, "
            "one at least for the prior and each part"
        )
    later = np.array_split(order[prior_classes:], parts) if parts else []
    return Stream(
        _of_classes(labels, order[:prior_classes], prior_size, "prior_size", rng),
        tuple(_of_classes(labels, some, part_size, "part_size", rng) for some in later),
    )


def by_world(
    labels: IntArray,
    edges: Sequence[int],
    parts: int,
    rng: np.random.Generator,
    prior_size: int | None = None,
    part_size: int | None = None,
) -> Stream:
    """Make a part of every world: the prior's is the first (domain-incremental).

    Parameters
    ----------
    labels : int64 array [N]
        Of all worlds, one after the other.
    edges : sequence of int
        World w has the rows from ``edges[w]`` to ``edges[w + 1]``.
    parts : int
    rng : numpy Generator
    prior_size, part_size : int, optional
        At most so many images of a world, with the balance of its classes; by default all.

    Raises
    ------
    ConfigError
        If there are fewer worlds than the prior and the parts.
    """
    if parts > len(edges) - 2:
        raise ConfigError(
            f"{parts} steps, but data names {len(edges) - 1} worlds, the prior's among them: give "
            "a world more than there are steps"
        )
    worlds = []
    for world in range(parts + 1):
        first, end = edges[world], edges[world + 1]
        order = first + balanced_order(labels[first:end], rng)
        worlds.append(np.sort(order[: part_size if world else prior_size]))
    return Stream(worlds[0], tuple(worlds[1:]))


def balanced_order(labels: IntArray, rng: np.random.Generator) -> IntArray:
    """Order all images so that every stretch has about the class balance of the whole.

    The j-th of n images of a class, shuffled, comes at (j + 1/2) / n of the way; ties at random.
    """
    place = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.lexsort((rng.random(len(labels)), place))


def _of_classes(
    labels: IntArray, classes: IntArray, size: int | None, name: str, rng: np.random.Generator
) -> IntArray:
    rows = np.flatnonzero(np.isin(labels, classes))
    if size is None:
        return rows
    if not 1 <= size <= len(rows):
        raise ConfigError(
            f"{name}: {size} images; classes {classes.tolist()} have {len(rows)}, use 1 to that"
        )
    return np.sort(rows[balanced_order(labels[rows], rng)[:size]])


def _count(name: str, size: int | float, images: int) -> int:
    if isinstance(size, float):
        if not 0 < size < 1:
            raise ConfigError(f"{name}: {size}; give a whole number, or a share between 0 and 1")
        count = int(size * images + 1e-9)  # 0.29 * 100 is 28.999...
    else:
        count = size
    if count < 1:
        raise ConfigError(f"{name}: {size} is no image out of {images}; make it larger")
    return count
