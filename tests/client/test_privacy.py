"""Clipped and noised updates, and what they disclose together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_client_app import SETTINGS, context, identity, judged, message, report_in
from test_own import CLASSES, fill

from client.app import app
from client.index import Index
from client.local import net_and_graph
from client.privacy import Privacy, chosen, epsilon_of
from client.status import status
from common.config import Config
from common.delta import DELTA
from common.errors import ConfigError
from common.filters import FreeSet
from common.layout import dense_layout, scope_layout
from common.order import Order
from common.state import read_state

__all__ = ["identity", "judged"]
RNG = np.random.default_rng(0)


def exact_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism with sensitivity mu (Balle & Wang 2018, theorem 8)."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def disclosed(epsilon: float) -> float:
        a = normal(mu / 2 - epsilon / mu)
        return a - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if disclosed(middle) > delta else (low, middle)
    return high


def test_a_long_update_is_scaled_and_a_short_one_left() -> None:
    moved = RNG.normal(size=1000).astype(np.float32)
    clipped = Privacy(2.0, 0.0, "s").apply(moved)
    assert np.linalg.norm(clipped) == pytest.approx(2.0, rel=1e-5)
    np.testing.assert_allclose(clipped / clipped[0], moved / moved[0], rtol=1e-4)
    np.testing.assert_array_equal(Privacy(1e4, 0.0, "s").apply(moved), moved)
    np.testing.assert_array_equal(Privacy(2.0, 0.0, "s").apply(moved * 0), moved * 0)


def test_the_noise_has_the_deviation_that_is_asked_for() -> None:
    noised = Privacy(0.5, 1.6, "s").apply(np.zeros(200_000, np.float32))
    assert noised.std() == pytest.approx(0.8, rel=0.01)
    assert abs(noised.mean()) < 0.01
    assert noised.dtype == np.float32


def test_only_the_device_can_draw_its_noise_again() -> None:
    moved = RNG.normal(size=100).astype(np.float32)
    one = Privacy(1.0, 1.0, "secret").apply(moved)
    np.testing.assert_array_equal(one, Privacy(1.0, 1.0, "secret").apply(moved))
    assert abs(np.corrcoef(one, Privacy(1.0, 1.0, "other").apply(moved))[0, 1]) < 0.9
    nudged = moved.copy()
    nudged[0] += 1e-3
    # another difference gets fresh noise: subtracting the two discloses nothing
    assert (Privacy(1.0, 1.0, "secret").apply(nudged) - one)[1:].std() > 1


def test_the_stricter_of_run_and_device_counts() -> None:
    assert chosen(0, 0, 0, 0, "s") is None
    assert chosen(3.0, 0.5, 1.0, 0.0, "s") == Privacy(1.0, 0.5, "s")
    assert chosen(1.0, 0.5, 2.0, 0.7, "s") == Privacy(1.0, 0.7, "s")
    assert chosen(0.0, 0.0, 2.0, 0.0, "s") == Privacy(2.0, 0.0, "s")
    with pytest.raises(ConfigError, match="nothing is clipped"):
        chosen(0.0, 0.0, 0.0, 0.5, "s")
    with pytest.raises(ConfigError, match="dp-clip is 0"):
        Config.parse({"dp-noise": 1.0, "shift": "never"})
    with pytest.raises(ConfigError, match="statistics of images without noise"):
        Config.parse({"dp-noise": 1.0, "dp-clip": 1.0})


def test_the_accountant_bounds_what_is_exact_from_above_and_closely() -> None:
    assert epsilon_of([]) == 0
    assert epsilon_of([1.0, 0.0]) == math.inf
    for noise, rounds in ((1.0, 1), (4.0, 10), (2.0, 40)):
        exact = exact_epsilon(math.sqrt(rounds) / noise, DELTA)
        told = epsilon_of([noise] * rounds)
        assert exact < told < 1.15 * exact
    mixed = epsilon_of([2.0] * 4 + [3.0] * 9)
    assert mixed == pytest.approx(epsilon_of([math.sqrt(0.5)]), rel=1e-6)


def test_a_device_enters_what_it_sent_and_reports_epsilon(
    judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    order, base = judged
    net = order.net.model_copy(update={"class_names": CLASSES})
    built, graph = net_and_graph(order.net)
    layout = scope_layout("group", graph, FreeSet({"conv1": (0,)}), read_state(built))
    changes: dict[str, Any] = {"net": net, "phase": "grow", "layout": layout.digest, "lr": 0.01}
    grow = order.model_copy(update=changes)
    with Index.create(tmp_path / "store") as index:
        fill(index, 30)
        node = {"partition-id": None, "store": str(index.folder)}
        plain = app(message(grow, base=base), context(None, **node))
        assert report_in(plain).epsilon is None
        assert status(index)["privacy"] is None
        (index.folder / "device.toml").write_text("[privacy]\nclip = 0.5\nnoise = 2.0\n")
        told = []
        for number in (1, 1, 2):
            asked = grow.model_copy(update={"round": number})
            reply = app(message(asked, base=base), context(None, **node))
            report = report_in(reply)
            assert report.declined is None
            told.append(report.epsilon)
            update = reply.content.array_records["arrays"]["update"].numpy()
            there = plain.content.array_records["arrays"]["update"].numpy()
            assert np.isfinite(update).all()
            assert np.abs(update - there).max() > 1  # the noise is on it
            assert (update[layout.statistics[1]] >= 0).all()
        # the round that was repeated is the same update and counts once
        assert told == [epsilon_of([2.0]), epsilon_of([2.0]), epsilon_of([2.0, 2.0])]
        assert status(index)["privacy"]["updates"] == 2
        look = order.model_copy(update={"net": net, "phase": "look"})
        declined = report_in(app(message(look, base=base), context(None, **node))).declined
        assert "run with shift=never" in str(declined)


def test_a_simulated_device_clips_and_noises_too(
    judged: tuple[Order, np.ndarray], tmp_path: Path
) -> None:
    order, base = judged
    built, graph = net_and_graph(order.net)
    layout = scope_layout("group", graph, FreeSet({"conv1": (0,)}), read_state(built))
    asked = order.model_copy(update={"phase": "grow", "layout": layout.digest, "lr": 0.01})
    start = layout.pack(dense_layout(graph, read_state(built)).unpack(read_state(built), base))
    private = {**SETTINGS, "shift": "never", "dp-clip": 0.01}
    sent = []
    for settings in (SETTINGS, private, {**private, "dp-noise": 1.0}):
        reply = app(message(asked, base=base), context(tmp_path, settings))
        assert report_in(reply).declined is None
        sent.append(reply.content.array_records["arrays"]["update"].numpy() - start)
    lengths = [float(np.linalg.norm(moved)) for moved in sent]
    assert lengths[0] > 0.02
    assert lengths[1] == pytest.approx(0.01, rel=1e-3)
    assert lengths[2] > 0.2  # about the root of the number of values, in clips
