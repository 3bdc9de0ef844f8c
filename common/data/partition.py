"""Partitions of a data set over devices.

A partition is one sorted index array per device; together they cover every image once.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.data.dataset import IntArray, TextArray
from common.errors import ConfigError

Partition: TypeAlias = list[IntArray]
PartitionKind: TypeAlias = Literal["iid", "dirichlet", "classes", "natural"]

_TRIES = 100


def iid(labels: IntArray, devices: int, rng: np.random.Generator) -> Partition:
    """Deal the images out at random, in equal numbers (+-1).

    Raises
    ------
    ConfigError
        If there are fewer images than devices.
    """
    _check_devices(devices, len(labels))
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), devices)]


def dirichlet(
    labels: IntArray,
    devices: int,
    alpha: float,
    rng: np.random.Generator,
    min_images: int = 2,
) -> Partition:
    """Share every class out over the devices in proportions drawn from Dir(alpha).

    The skew of Hsu et al. (arXiv 1909.06335), in the form of Yurochkin et al. (ICML 2019), which
    draws for each class over the devices and so uses every image once. It is drawn anew until
    every device has `min_images`, 100 times at most; then the largest devices give up what is
    missing.

    Parameters
    ----------
    labels : int64 array [N]
    devices : int
    alpha : float
        Concentration: small values leave a device with few classes, large ones approach IID.
    rng : numpy Generator
    min_images : int
        What the smallest device holds at least.

    Raises
    ------
    ConfigError
        If alpha is not positive and finite, or there are fewer than devices * min_images images.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha: {alpha}; it must be positive and finite")
    _check_devices(devices, len(labels), min_images)
    for _ in range(_TRIES):
        owner = _dirichlet_owners(labels, devices, alpha, rng)
        if np.bincount(owner, minlength=devices).min() >= min_images:
            break
    else:
        _level(owner, devices, min_images)
    return _by_owner(owner, devices)


def _dirichlet_owners(
    labels: IntArray, devices: int, alpha: float, rng: np.random.Generator
) -> IntArray:
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1]
        cuts = np.rint(ends * len(rows)).astype(np.int64)
        for device, part in enumerate(np.split(rows, cuts)):
            owner[part] = device
    return owner


def _level(owner: IntArray, devices: int, min_images: int) -> None:
    """Move the last images of the largest device to the smallest until all have enough."""
    sizes = np.bincount(owner, minlength=devices)
    while sizes.min() < min_images:
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        owner[np.flatnonzero(owner == rich)[-1]] = poor
        sizes[poor] += 1
        sizes[rich] -= 1


def classes_per_device(
    labels: IntArray, devices: int, k: int, rng: np.random.Generator
) -> Partition:
    """Give every device images of k classes, drawn so that all classes are held equally often.

    The pathological split of McMahan et al. (AISTATS 2017, arXiv 1602.05629), dealt by class and
    not by shards of the sorted data, so that k is exact.

    Raises
    ------
    ConfigError
        If k is not between 1 and the number of classes, or if some class would belong to no
        device or some device would get no image.
    """
    _check_devices(devices, len(labels))
    classes = np.unique(labels)
    if not 1 <= k <= len(classes):
        raise ConfigError(f"classes a device: {k}; the data allows 1 to {len(classes)}")
    if devices * k < len(classes):
        raise ConfigError(
            f"devices {devices} with {k} classes each cannot hold {len(classes)} classes; raise one"
        )
    holders: list[list[int]] = [[] for _ in classes]
    for device in range(devices):
        # The least held classes first, ties at random.
        held = np.array([len(some) for some in holders])
        for c in np.lexsort((rng.random(len(classes)), held))[:k]:
            holders[c].append(device)
    owner = np.empty(len(labels), dtype=np.int64)
    for label, some in zip(classes, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for device, part in zip(some, np.array_split(rows, len(some)), strict=True):
            owner[part] = device
    sizes = np.bincount(owner, minlength=devices)
    if not sizes.all():
        raise ConfigError(
            f"devices {devices} with {k} classes each: device {sizes.argmin()} would have no "
            "image; use fewer devices"
        )
    return _by_owner(owner, devices)


def natural(column: TextArray, devices: int | None = None) -> Partition:
    """Make every value of a column a device, in sorted order.

    Parameters
    ----------
    column : str array [N]
        Such as the writer or the vendor of each image.
    devices : int, optional
        Deal the values out to this many devices instead, the largest value first, in turn.

    Raises
    ------
    ConfigError
        If there are fewer values than devices.
    """
    values, value_of = np.unique(column, return_inverse=True)
    if devices is None:
        return _by_owner(value_of.astype(np.int64), len(values))
    if devices > len(values):
        raise ConfigError(
            f"devices: {devices}; the column has only {len(values)} values, use at most that many"
        )
    _check_devices(devices, len(column))
    largest_first = np.argsort(-np.bincount(value_of), kind="stable")
    device_of = np.empty(len(values), dtype=np.int64)
    device_of[largest_first] = np.arange(len(values)) % devices
    return _by_owner(device_of[value_of], devices)


def partition(
    kind: PartitionKind,
    source_labels: IntArray,
    devices: int | None,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    k: int = 2,
    column: TextArray | None = None,
) -> Partition:
    """Partition by `kind`: "iid", "dirichlet" (alpha), "classes" (k) or "natural" (column).

    `devices` may be None for "natural" alone: one device a value.

    Raises
    ------
    ConfigError
        If the kind is unknown, lacks its argument, or cannot be made of this data.
    """
    if kind == "natural":
        if column is None:
            raise ConfigError("partition: natural without a column; name the column")
        return natural(column, devices)
    if devices is None:
        raise ConfigError(f"devices: none given; partition {kind} needs their number")
    if kind == "iid":
        return iid(source_labels, devices, rng)
    if kind == "dirichlet":
        return dirichlet(source_labels, devices, alpha, rng)
    if kind == "classes":
        return classes_per_device(source_labels, devices, k, rng)
    raise ConfigError(f"partition: {kind}; it must be iid, dirichlet, classes or natural")


def _by_owner(owner: NDArray[np.int64], devices: int) -> Partition:
    return [np.flatnonzero(owner == device) for device in range(devices)]


def _check_devices(devices: int, images: int, each: int = 1) -> None:
    if devices < 1:
        raise ConfigError(f"devices: {devices}; it must be at least 1")
    if devices * each > images:
        raise ConfigError(
            f"devices: {devices} with at least {each} image(s) each; there are only {images} images"
        )
