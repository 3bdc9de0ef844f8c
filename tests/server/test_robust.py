"""Robust means: what a minority can do to them, and BN statistics that stay statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_grid import freed_prior, make_plan

from common.filters import FreeSet
from common.layout import Layout, scope_layout
from server import robust
from server.robust import Kind, nearest, robust_mean, robust_scores
from server.spool import Spool

KINDS: tuple[Kind, ...] = ("trimmed", "median", "krum")


@pytest.fixture(scope="module")
def layout() -> Layout:
    plan = make_plan()
    state, free = freed_prior(plan)
    return scope_layout("group", plan.graph, free, state)


def sound(layout: Layout, count: int = 10) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    around = rng.normal(size=layout.size)
    drawn = (around + 0.01 * rng.normal(size=(count, layout.size))).astype(np.float32)
    drawn[:, layout.statistics[1]] = np.abs(drawn[:, layout.statistics[1]])
    return list(drawn)


def test_trimmed_mean_and_median_are_those_of_numpy(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "_BLOCK_BYTES", 8 * 10 * 64)  # many blocks
    updates = sound(layout)
    stacked = np.stack(updates).astype(np.float64)
    means, variances = layout.statistics
    others = np.setdiff1d(np.arange(layout.size), variances)
    trimmed = np.sort(stacked, axis=0)[3:7].mean(0)
    for kind, expected in (("trimmed", trimmed), ("median", np.median(stacked, axis=0))):
        got = robust_mean(kind, updates, [5] * 10, layout, 0.3)  # type: ignore[arg-type]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got[others], expected[others].astype(np.float32))
    spread = np.median((stacked[:, means] - np.median(stacked[:, means], axis=0)) ** 2, axis=0)
    np.testing.assert_allclose(
        got[variances], np.median(stacked[:, variances], axis=0) + spread, rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", [1e3, -1.0, 0.0, "random"])
def test_three_of_ten_cannot_move_it_beyond_the_sound_ones(
    kind: Kind, harm: Any, layout: Layout
) -> None:
    updates = sound(layout)
    low, high = np.min(updates, axis=0), np.max(updates, axis=0)
    rng = np.random.default_rng(1)
    for number in (0, 4, 9):
        bent = rng.normal(size=layout.size) if harm == "random" else harm * updates[number]
        updates[number] = bent.astype(np.float32)
        updates[number][layout.statistics[1]] = np.abs(updates[number][layout.statistics[1]])
    got = robust_mean(kind, updates, [1, *[50] * 8, 10**9], layout, 0.3)
    others = np.setdiff1d(np.arange(layout.size), np.concatenate(layout.statistics))
    assert (low[others] - 1e-6 <= got[others]).all()
    assert (got[others] <= high[others] + 1e-6).all()
    assert np.isfinite(got).all()
    assert (got[layout.statistics[1]] >= 0).all()


def test_krum_takes_the_nearest_and_weighs_them(layout: Layout) -> None:
    updates = sound(layout)
    for number in (2, 5, 7):
        updates[number] = updates[number] + np.float32(1)
    assert nearest(updates, layout, 3) == {0, 1, 3, 4, 6, 8, 9}
    assert nearest(updates, layout, 0) == set(range(10))
    assert len(nearest(updates[:2], layout, 0)) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_updates_are_no_trouble(kind: Kind, count: int, layout: Layout) -> None:
    got = robust_mean(kind, sound(layout, count), [5] * count, layout, 0.3)
    assert got.shape == (layout.size,)
    if count == 1:
        np.testing.assert_allclose(got, sound(layout, 1)[0], rtol=1e-6)


def test_nothing_trainable_is_empty() -> None:
    plan = make_plan()
    state, _ = freed_prior(plan)
    empty = scope_layout("rows", plan.graph, FreeSet({}), state)
    for kind in KINDS:
        assert robust_mean(kind, [np.zeros(0, np.float32)] * 4, [1] * 4, empty, 0.3).shape == (0,)


def test_scores_are_medians() -> None:
    scores = [np.array([1.0, 5.0]), np.array([2.0, 6.0]), np.array([1e9, 0.0])]
    assert robust_scores(scores).tolist() == [2.0, 5.0]


def test_a_spool_gives_back_what_it_was_given_from_memory_and_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most in (10**6, 10):
        monkeypatch.setattr("server.spool._IN_MEMORY", most)
        arrays = {
            "a": np.arange(50, dtype=np.float32),
            "b": np.zeros((0,), np.uint8),
            "c": np.arange(7, dtype=np.uint8),
        }
        with Spool(tmp_path) as spool:
            for name, array in arrays.items():
                spool.put(name, array)
            assert not list(tmp_path.iterdir())  # nothing that a killed server leaves
            for name in ("c", "a", "b"):
                assert spool.get(name).dtype == arrays[name].dtype
                assert spool.get(name).tobytes() == arrays[name].tobytes()
