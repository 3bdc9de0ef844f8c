"""The training data cut in time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data import Stream, by_class, by_share
from common.errors import ConfigError

LABELS = np.random.default_rng(3).permutation(np.repeat(np.arange(10), 100))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pieces(stream: Stream) -> list[np.ndarray]:
    return [stream.prior, *stream.parts]


def assert_disjoint_and_sorted(stream: Stream, images: int) -> None:
    everything = np.concatenate(pieces(stream))
    assert len(set(everything.tolist())) == len(everything)
    assert set(everything.tolist()) <= set(range(images))
    for piece in pieces(stream):
        assert (np.diff(piece) > 0).all()


labelled = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(np.array)


@given(labelled, st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99))
def test_by_share_gives_the_sizes_asked_for_with_the_class_balance(
    labels: np.ndarray, sizes: list[int], seed: int
) -> None:
    if sum(sizes) > len(labels):
        with pytest.raises(ConfigError, match="but the data has"):
            by_share(labels, sizes[0], sizes[1:], rng(seed))
        return
    stream = by_share(labels, sizes[0], sizes[1:], rng(seed))
    assert_disjoint_and_sorted(stream, len(labels))
    assert [len(piece) for piece in pieces(stream)] == sizes
    classes = len(np.unique(labels))
    for piece in pieces(stream):
        expected = np.bincount(labels) * len(piece) / len(labels)
        found = np.bincount(labels[piece], minlength=len(expected))
        assert np.abs(found - expected).max() <= 1 + classes


def test_equal_classes_stay_equal() -> None:
    stream = by_share(LABELS, 500, [250, 0.25], rng())
    assert np.bincount(LABELS[stream.prior]).tolist() == [50] * 10
    assert [len(part) for part in stream.parts] == [250, 250]
    for part in stream.parts:
        assert np.bincount(LABELS[part]).tolist() == [25] * 10


def test_shares_are_of_the_whole_and_never_add_up_to_more() -> None:
    stream = by_share(LABELS[:7], 1 / 3, [1 / 3, 1 / 3], rng())
    assert [len(piece) for piece in pieces(stream)] == [2, 2, 2]
    assert len(by_share(LABELS[:100], 0.29, [], rng()).prior) == 29


@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(1, 100)),
)
def test_by_class_divides_classes_evenly(
    prior_classes: int, parts: int, seed: int, part_size: int | None
) -> None:
    if prior_classes + parts > 10:
        with pytest.raises(ConfigError, match="there are 10 classes"):
            by_class(LABELS, None, prior_classes, parts, rng(seed))
        return
    stream = by_class(LABELS, None, prior_classes, parts, rng(seed), part_size=part_size)
    assert_disjoint_and_sorted(stream, 1000)
    held = [set(LABELS[piece].tolist()) for piece in pieces(stream)]
    assert len(held[0]) == prior_classes
    assert len(stream.prior) == 100 * prior_classes
    later = held[1:]
    if part_size is None and parts:
        assert sum(map(len, held)) == len(set.union(*held)) == 10
        assert max(map(len, later)) - min(map(len, later)) <= 1
    if part_size is not None:
        assert [len(part) for part in stream.parts] == [part_size] * parts


def test_by_class_follows_the_order_given() -> None:
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    stream = by_class(LABELS, order, 4, 3, rng(), prior_size=80, part_size=50)
    held = [sorted(set(LABELS[piece].tolist())) for piece in pieces(stream)]
    assert held == [[0, 1, 3, 4], [5, 9], [2, 6], [7, 8]]
    assert np.bincount(LABELS[stream.prior])[[0, 1, 3, 4]].tolist() == [20] * 4
    assert np.bincount(LABELS[stream.parts[0]])[[5, 9]].tolist() == [25] * 2


def test_the_same_generator_gives_the_same_stream() -> None:
    def draw(seed: int) -> list[list[int]]:
        cut = by_share(LABELS, 100, [100], rng(seed))
        classes = by_class(LABELS, None, 5, 2, rng(seed), prior_size=50)
        return [piece.tolist() for piece in pieces(cut) + pieces(classes)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prior", "parts", "message"),
    [
        (800, [150, 51], r"800 \+ 150 \+ 51 = 1001 images, but the data has 1000"),
        (0, [10], "prior_size: 0 is no image"),
        (-3, [10], "prior_size: -3 is no image"),
        (10, [0.0001], "part_size: 0.0001 is no image"),
        (1.5, [10], "prior_size: 1.5; give a whole number"),
        (float("nan"), [10], "prior_size: nan; give a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_named(prior: Any, parts: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_share(LABELS, prior, parts, rng())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior_classes": 0}, "prior_classes 0 and 2 parts; there are 10 classes"),
        ({"class_order": [0, 1, 2]}, r"class_order: \[0, 1, 2\]; it must name each of the 10"),
        ({"class_order": [0] * 10}, "class_order"),
        ({"prior_size": 501}, r"prior_size: 501 images; classes \[[\d, ]+\] have 500"),
        ({"part_size": 301}, r"part_size: 301 images; classes \[[\d, ]+\] have 300"),
    ],
)
def test_classes_that_do_not_suffice_are_named(arguments: dict[str, Any], message: str) -> None:
    arguments = {"class_order": None, "prior_classes": 5, "parts": 2, **arguments}
    with pytest.raises(ConfigError, match=message):
        by_class(LABELS, rng=rng(), **arguments)
