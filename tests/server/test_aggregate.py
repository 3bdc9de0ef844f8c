"""The server's mean: weighted, masked, right for BN variances, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_grid import freed_prior, make_plan

from common.errors import UpdateError
from common.filters import FreeSet
from common.layout import Layout, scope_layout
from common.state import State
from server.aggregate import MaskedMean
from server.plan import Plan

IMAGES = (7, 120, 1, 33)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture(scope="module")
def prior(plan: Plan) -> tuple[State, FreeSet]:
    return freed_prior(plan)


@pytest.fixture(scope="module", params=["rows", "group", "all"])
def layout(request: pytest.FixtureRequest, plan: Plan, prior: tuple[State, FreeSet]) -> Layout:
    return scope_layout(request.param, plan.graph, prior[1], prior[0])


def updates(layout: Layout, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(len(IMAGES), layout.size)).astype(np.float32)
    _, variances = layout.statistics
    drawn[:, variances] = np.abs(drawn[:, variances])
    return list(drawn)


def average(layout: Layout, values: list[np.ndarray], images: tuple[int, ...]) -> np.ndarray:
    mean = MaskedMean(layout)
    for each, count in zip(values, images, strict=True):
        mean.add(each, count)
    return mean.result()


def test_weights_and_means_are_averaged_by_the_number_of_images(layout: Layout) -> None:
    values = updates(layout)
    result = average(layout, values, IMAGES)
    _, variances = layout.statistics
    plain = np.setdiff1d(np.arange(layout.size), variances)
    expected = np.average(np.stack(values).astype(np.float64), axis=0, weights=IMAGES)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result[plain], expected[plain].astype(np.float32))


def test_a_bn_variance_is_that_of_all_devices_data_together(layout: Layout) -> None:
    means, variances = layout.statistics
    assert len(means)
    rng = np.random.default_rng(1)
    shift = 3 * rng.normal(size=(len(IMAGES), len(means)))
    data = [s + rng.normal(size=(n, len(means))) for n, s in zip(IMAGES, shift, strict=True)]
    values = []
    for own in data:
        packed = np.zeros(layout.size, np.float32)
        packed[means], packed[variances] = own.mean(0), own.var(0)
        values.append(packed)
    result = average(layout, values, IMAGES)
    pooled = np.concatenate(data)
    np.testing.assert_allclose(result[means], pooled.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result[variances], pooled.var(0), rtol=1e-5)


def test_what_the_scope_does_not_name_keeps_its_value_to_the_bit(
    plan: Plan, prior: tuple[State, FreeSet]
) -> None:
    state, free = prior
    layout = scope_layout("rows", plan.graph, free, state)
    after = layout.unpack(state, average(layout, updates(layout), IMAGES))
    named = {entry.tensor: entry.index for entry in layout.entries}
    changed = 0
    for name, tensor in after.items():
        was, now = state[name].flatten().numpy(), tensor.flatten().numpy()
        index = named.get(name, np.zeros(0, np.int64))
        rest = np.setdiff1d(np.arange(len(was)), np.arange(len(was)) if index is None else index)
        assert was[rest].tobytes() == now[rest].tobytes()
        changed += int((was != now).sum())
    assert changed == layout.size


def test_the_order_of_the_devices_matters_only_in_rounding(layout: Layout) -> None:
    values = updates(layout)
    first = average(layout, values, IMAGES)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(IMAGES))
        other = average(layout, [values[i] for i in order], tuple(IMAGES[i] for i in order))
        np.testing.assert_allclose(other, first, rtol=3e-7, atol=1e-7)


def test_a_device_alone_is_its_own_mean(layout: Layout) -> None:
    (own, *_), (_, variances) = updates(layout), layout.statistics
    result = average(layout, [own], (5,))
    plain = np.setdiff1d(np.arange(layout.size), variances)
    assert result[plain].tobytes() == own[plain].tobytes()
    np.testing.assert_allclose(result[variances], own[variances], rtol=1e-6)


def test_a_variance_never_comes_out_negative_by_rounding(layout: Layout) -> None:
    means, variances = layout.statistics
    packed = np.zeros(layout.size, np.float32)
    packed[means] = np.float32(1e8 / 3)
    result = average(layout, [packed] * 3, (3, 7, 11))
    assert (result[variances] >= 0).all()


def test_an_update_is_not_changed_by_being_averaged(layout: Layout) -> None:
    values = updates(layout)
    before = [each.tobytes() for each in values]
    average(layout, values, IMAGES)
    assert [each.tobytes() for each in values] == before


def test_an_update_without_images_is_refused(layout: Layout) -> None:
    for images in (0, -3):
        with pytest.raises(UpdateError, match=f"counts {images} images"):
            MaskedMean(layout).add(np.zeros(layout.size, np.float32), images)


def test_the_mean_of_nothing_is_refused(layout: Layout) -> None:
    with pytest.raises(UpdateError, match="no update to average"):
        MaskedMean(layout).result()


def test_the_mean_of_nothing_trainable_is_empty(plan: Plan, prior: tuple[State, FreeSet]) -> None:
    layout = scope_layout("rows", plan.graph, FreeSet({}), prior[0])
    result = average(layout, [np.zeros(0, np.float32)], (4,))
    assert result.shape == (0,)
    assert torch.from_numpy(result).dtype == torch.float32
