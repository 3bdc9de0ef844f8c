"""The gate: worlds are told apart by sums that hold no image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import NetError, UpdateError
from common.gate import (
    Gate,
    Moments,
    differing,
    likened,
    look,
    packed_size,
    separation,
    separation_by_channel,
    stem_conv,
    stem_moments,
)
from common.nets import build


def drawn(mean: float, count: int = 400, size: int = 6, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=rng) + 2 * torch.eye(size)
    return torch.randn(count, size, generator=rng) @ mix + mean


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 90), min_size=2, max_size=4), st.integers(0, 99))
def test_the_moments_of_devices_add_up_to_those_of_all_images(sizes: list[int], seed: int) -> None:
    features = drawn(1.0, sum(sizes), seed=seed)
    devices = [Moments.of(part) for part in torch.split(features, sizes)]
    total, whole = devices[0], Moments.of(features)
    for device in devices[1:]:
        total = total + device
    np.testing.assert_allclose(total.mean, features.double().mean(0).numpy(), rtol=1e-9)
    np.testing.assert_allclose(total.covariance, whole.covariance, rtol=1e-6, atol=1e-9)


def test_moments_survive_the_wire() -> None:
    moments = Moments.of(drawn(0.5))
    packed = moments.pack()
    assert (packed.dtype, packed.shape) == (np.float32, (packed_size(6),))
    back = Moments.unpack(packed.astype(np.float64), 6)
    np.testing.assert_allclose(back.covariance, moments.covariance, rtol=1e-4, atol=1e-4)
    assert back.count == moments.count


@pytest.mark.parametrize("at", [0, 1, 27])
def test_moments_that_are_not_sound_are_refused(at: int) -> None:
    packed = Moments.of(drawn(0.5)).pack().astype(np.float64)
    packed[at] = np.nan
    with pytest.raises(UpdateError, match="not finite"):
        Moments.unpack(packed, 6)
    with pytest.raises(UpdateError, match=r"\[28\] values, expected 36"):
        Moments.unpack(packed, 7)
    with pytest.raises(UpdateError, match="of no image"):
        Moments.unpack(np.zeros(28), 6)


def test_the_gate_is_the_posterior_of_gaussians() -> None:
    one, other = drawn(0.0, seed=1), drawn(3.0, seed=2)
    worlds = [Moments.of(one), Moments.of(other)]
    gate = Gate(worlds)
    x = torch.cat([one[:9], other[:9]])
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(
                torch.from_numpy(w.mean), torch.from_numpy(w.covariance)
            ).log_prob(x.double())
            for w in worlds
        ],
        1,
    )
    torch.testing.assert_close(gate(x).double(), densities.log_softmax(1), rtol=1e-3, atol=1e-3)
    right = (gate(one).argmax(1) == 0).float().mean() + (gate(other).argmax(1) == 1).float().mean()
    assert right / 2 > 0.8


def test_few_axes_tell_worlds_apart_that_differ_in_few() -> None:
    rng = torch.Generator().manual_seed(3)
    plain, moved, wide = (torch.randn(2000, 12, generator=rng) for _ in range(3))
    moved[:, 4] += 6
    wide[:, 7] *= 8
    worlds = [Moments.of(one) for one in (plain, moved, wide)]
    axes = differing(worlds, 2)
    assert axes.shape == (12, 2)
    length = np.linalg.norm(axes, axis=0)
    assert (np.linalg.norm(axes[[4, 7]], axis=0) > 0.95 * length).all()
    whole, few = Gate(worlds), Gate(worlds, 2)
    for number, one in enumerate((plain, moved, wide)):
        right = [(gate(one).argmax(1) == number).float().mean() for gate in (whole, few)]
        assert right[1] > right[0] - 0.02
    sizes = [sum(p.numel() for p in gate.parameters()) for gate in (whole, few)]
    assert sizes == [12 + 3 * (12 + 144 + 1), 12 + 24 + 3 * (2 + 4 + 1)]
    torch.testing.assert_close(Gate(worlds, 12)(plain), whole(plain), rtol=1e-3, atol=1e-3)


def test_separation_is_what_the_gate_would_achieve() -> None:
    rng = np.random.default_rng(0)
    near, far = Moments.of(drawn(0.0)), Moments.of(drawn(9.0, seed=3))
    assert separation(near, near, rng) == pytest.approx(0.5, abs=0.03)
    assert separation(near, far, rng) > 0.95


def test_dark_images_are_another_world_to_the_first_convolution_and_alike_ones_are_not() -> None:
    net = build("resnet8", 10, 3, 8)
    stem = stem_conv(net)
    images = torch.rand(200, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, alike = stem_moments(stem, images[:100]), stem_moments(stem, images[100:])
    dark = stem_moments(stem, images[100:] * 0.3 - 0.7)
    rng = np.random.default_rng(0)
    assert separation(first, alike, rng) < separation(first, dark, rng)
    assert separation(first, dark, rng) > 0.99


def test_images_that_are_all_alike_are_a_world_too() -> None:
    features = torch.full((50, 6), 40.0) + 1e-4 * drawn(0.0, 50)
    packed = Moments.of(features).pack().astype(np.float64)  # float32 leaves nothing of the spread
    alike = Moments.unpack(packed, 6)
    assert np.linalg.eigvalsh(alike.covariance).min() > 0
    rng = np.random.default_rng(0)
    assert separation(alike, Moments.of(drawn(0.0)), rng) > 0.99
    assert torch.isfinite(Gate([alike, Moments.of(drawn(0.0))])(features)).all()


def test_a_look_is_mean_and_deviation_of_every_channel() -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x.mean((2, 3)), x.flatten(2).std(2, correction=0)], 1)
    torch.testing.assert_close(look(x), expected, rtol=1e-5, atol=1e-5)


def test_a_net_without_a_convolution_has_no_gate() -> None:
    with pytest.raises(NetError, match="no convolution"):
        stem_conv(torch.nn.Sequential(torch.nn.Linear(3, 2)))


def test_a_world_known_by_its_means_is_as_spread_out_as_the_new_one() -> None:
    seen = Moments.of(drawn(2.0))
    guess = Moments.of(drawn(0.0, seed=4))
    world = likened(guess, seen)
    np.testing.assert_allclose(world.mean[:3], guess.mean[:3])
    np.testing.assert_allclose(world.mean[3:], seen.mean[3:])
    np.testing.assert_allclose(world.covariance, seen.covariance, rtol=1e-6)
    again = likened(world, seen)
    np.testing.assert_allclose(again.mean, world.mean)
    np.testing.assert_allclose(again.covariance, world.covariance, rtol=1e-6)


def test_the_best_channel_tells_a_guessed_world_from_another() -> None:
    seen = Moments.of(drawn(0.0))
    assert separation_by_channel(seen, seen) == 0.5
    moved = seen.mean.copy()
    moved[1] += 2 * np.sqrt(seen.covariance[1, 1])
    world = Moments(1.0, moved, seen.covariance + np.outer(moved, moved))
    assert separation_by_channel(world, seen) == pytest.approx(0.8413, abs=1e-3)  # Phi(1)
    moved[1] = seen.mean[1]
    moved[4] += 100  # a deviation, which a guess knows nothing about
    world = Moments(1.0, moved, seen.covariance + np.outer(moved, moved))
    assert separation_by_channel(world, seen) == 0.5
