"""Partitions over devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data import Partition, classes_per_device, dirichlet, iid, natural, partition
from common.errors import ConfigError

LABELS = np.random.default_rng(7).integers(0, 10, 1000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_covers_once(parts: Partition, images: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(images))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def skew(parts: Partition) -> float:
    """Mean over devices of the share of a device's commonest class."""
    return float(np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts]))


labelled = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array)


@given(labelled, st.integers(1, 12), st.integers(0, 99))
def test_iid_covers_every_image_once_in_equal_numbers(
    labels: np.ndarray, devices: int, seed: int
) -> None:
    if devices > len(labels):
        with pytest.raises(ConfigError, match="devices"):
            iid(labels, devices, rng(seed))
        return
    parts = iid(labels, devices, rng(seed))
    assert_covers_once(parts, len(labels))
    sizes = [len(part) for part in parts]
    assert (len(sizes), max(sizes) - min(sizes) <= 1) == (devices, True)


@given(
    labelled,
    st.integers(1, 12),
    st.floats(1e-3, 1e3),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_dirichlet_covers_every_image_once_and_leaves_no_device_short(
    labels: np.ndarray, devices: int, alpha: float, least: int, seed: int
) -> None:
    if devices * least > len(labels):
        with pytest.raises(ConfigError, match="devices"):
            dirichlet(labels, devices, alpha, rng(seed), min_images=least)
        return
    parts = dirichlet(labels, devices, alpha, rng(seed), min_images=least)
    assert_covers_once(parts, len(labels))
    assert len(parts) == devices
    assert min(len(part) for part in parts) >= least


def test_dirichlet_levels_when_drawing_again_does_not_help() -> None:
    parts = dirichlet(LABELS, 200, 1e-3, rng(), min_images=3)
    assert_covers_once(parts, 1000)
    assert min(len(part) for part in parts) == 3


def test_a_small_alpha_skews_and_a_large_one_does_not() -> None:
    def mean_skew(alpha: float) -> float:
        return float(np.mean([skew(dirichlet(LABELS, 8, alpha, rng(s))) for s in range(20)]))

    assert mean_skew(0.05) > 0.6 > mean_skew(0.5) > 0.3 > 0.2 > mean_skew(100.0)
    assert skew(iid(LABELS, 8, rng())) < 0.2


@given(labelled, st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_classes_per_device_keeps_to_k_classes(
    labels: np.ndarray, devices: int, k: int, seed: int
) -> None:
    try:
        parts = classes_per_device(labels, devices, k, rng(seed))
    except ConfigError:
        counts = np.bincount(labels)[np.unique(labels)]
        enough = counts.min() >= devices  # then every holder of a class gets an image of it
        assert not (k <= len(counts) <= devices * k and enough)
        return
    assert_covers_once(parts, len(labels))
    assert all(1 <= len(set(labels[part])) <= k for part in parts)


def test_classes_per_device_holds_every_class_equally_often() -> None:
    parts = classes_per_device(LABELS, 15, 2, rng())
    held = [set(LABELS[part]) for part in parts]
    assert [len(some) for some in held] == [2] * 15
    assert [sum(c in some for some in held) for c in range(10)] == [3] * 10


def test_natural_makes_every_value_a_device() -> None:
    column = np.array(["noto", "apple", "noto", "blob", "apple", "noto"])
    parts = natural(column)
    assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2, 5]]
    dealt = natural(column, devices=2)  # noto 3, apple 2, blob 1, dealt in turn
    assert [part.tolist() for part in dealt] == [[0, 2, 3, 5], [1, 4]]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.integers(1, 8))
def test_natural_never_divides_a_value(values: list[str], devices: int) -> None:
    column = np.array(values)
    if devices > len(set(values)):
        with pytest.raises(ConfigError, match="values"):
            natural(column, devices)
        return
    parts = natural(column, devices)
    assert_covers_once(parts, len(values))
    assert sum(len(set(column[part])) for part in parts) == len(set(values))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes", "natural"])
def test_the_same_generator_gives_the_same_partition(kind: Any) -> None:
    column = LABELS.astype(str)

    def draw(seed: int) -> list[list[int]]:
        parts = partition(kind, LABELS, 6, rng(seed), alpha=0.3, k=4, column=column)
        assert_covers_once(parts, 1000)
        return [part.tolist() for part in parts]

    assert draw(1) == draw(1)
    assert (draw(1) != draw(2)) or kind == "natural"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("iid", {"devices": 0}, "devices: 0; it must be at least 1"),
        ("iid", {"devices": 1001}, "devices: 1001 .* only 1000 images"),
        ("iid", {"devices": None}, "devices: none given"),
        ("dirichlet", {"alpha": 0.0}, "alpha: 0.0; it must be positive"),
        ("dirichlet", {"alpha": float("nan")}, "alpha: nan"),
        ("dirichlet", {"alpha": float("inf")}, "alpha: inf"),
        ("dirichlet", {"devices": 501}, "devices: 501 with at least 2 image"),
        ("classes", {"k": 0}, "classes a device: 0; the data allows 1 to 10"),
        ("classes", {"k": 11}, "classes a device: 11; the data allows 1 to 10"),
        ("classes", {"devices": 4, "k": 2}, "devices 4 with 2 classes each cannot hold 10"),
        ("natural", {}, "natural without a column"),
        ("natural", {"column": LABELS.astype(str), "devices": 11}, "has only 10 values"),
        ("random", {}, "partition: random; it must be iid"),
    ],
)
def test_what_cannot_be_partitioned_is_refused(
    kind: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(kind, LABELS, arguments.pop("devices", 5), rng(), **arguments)


def test_a_device_that_would_stay_empty_is_named() -> None:
    with pytest.raises(ConfigError, match=r"device \d would have no image"):
        classes_per_device(np.array([0, 0, 0, 0, 0, 0, 1, 1]), 6, 1, rng())
