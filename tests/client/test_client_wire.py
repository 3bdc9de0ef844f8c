"""The device's end of the wire: the values it begins with, and what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.bases import Bases
from client.local import net_and_graph
from client.privacy import Privacy
from client.wire import Arrays, packed_update, received
from common.codec import decode, encode
from common.errors import UpdateError
from common.filters import FreeSet
from common.layout import Layout, scope_layout
from common.order import NetSpec, Order
from common.state import State, read_state
from common.update import Moved, as_array, decode_update, rows_of

SPEC = NetSpec(name="resnet8", classes=10, input_shape=(1, 8, 8), width=8, mean=(0.3,), std=(0.4,))


@pytest.fixture(scope="module")
def base() -> State:
    torch.manual_seed(0)
    return read_state(net_and_graph(SPEC)[0])


@pytest.fixture(scope="module")
def layout(base: State) -> Layout:
    return scope_layout("all", net_and_graph(SPEC)[1], FreeSet({}), base)


@pytest.fixture
def bases(tmp_path: Path) -> Bases:
    return Bases(tmp_path)


def order(**changes: Any) -> Order:
    """An order of which only the wire's fields are looked at."""
    wire = {"codec_up": "int8", "codec_down": "int8", "round": 3}
    return Order.model_construct(
        **{"moved": None, "since": None, "feedback": None, **wire, **changes}
    )


def step(layout: Layout, seed: int) -> np.ndarray:
    return (0.01 * np.random.default_rng(seed).normal(size=layout.size)).astype(np.float32)


def chain(layout: Layout, length: int) -> tuple[list[Moved], list[np.ndarray]]:
    """What the server would send in so many rounds."""
    moved, deltas = [Moved.nowhere(layout.size)], []
    for number in range(length):
        deltas.append(as_array(encode(step(layout, number), rows_of(layout), "int8")))
        moved.append(moved[-1].by(decode(deltas[-1].tobytes(), rows_of(layout), "int8")))
    return moved, deltas


# down


def test_a_phase_begins_with_the_base(layout: Layout, base: State, bases: Bases) -> None:
    packed = layout.pack(base)
    assert received(order(), Arrays(), packed, layout, bases) is packed
    values = packed + 1
    assert received(order(), Arrays(values=values), packed, layout, bases) is values


def test_differences_are_followed_over_restarts(
    layout: Layout, base: State, tmp_path: Path
) -> None:
    packed = layout.pack(base)
    moved, deltas = chain(layout, 6)
    for number in range(1, 7):
        since = moved[number - 1].digest if number > 1 else None
        asked = order(moved=moved[number].digest, since=since)
        values = received(asked, Arrays(delta=deltas[number - 1]), packed, layout, Bases(tmp_path))
        assert values is not None
        assert values.tobytes() == moved[number].values(packed, layout).tobytes()
        again = received(asked, Arrays(), packed, layout, Bases(tmp_path))  # it holds them now
        assert again is not None
        assert again.tobytes() == values.tobytes()


def test_a_device_without_the_round_before_needs_the_values_whole(
    layout: Layout, base: State, bases: Bases
) -> None:
    packed = layout.pack(base)
    moved, deltas = chain(layout, 2)
    asked = order(moved=moved[2].digest, since=moved[1].digest)
    assert received(asked, Arrays(delta=deltas[1]), packed, layout, bases) is None
    assert received(asked, Arrays(), packed, layout, bases) is None
    whole = Arrays(whole=as_array(moved[2].encoded()))
    values = received(asked, whole, packed, layout, bases)
    assert values is not None
    assert values.tobytes() == moved[2].values(packed, layout).tobytes()


def test_values_that_are_not_those_of_the_order_are_refused(
    layout: Layout, base: State, bases: Bases
) -> None:
    packed = layout.pack(base)
    moved, deltas = chain(layout, 2)
    asked = order(moved=moved[1].digest)
    for arrays, said in (
        (Arrays(delta=deltas[1]), f"are not {moved[1].digest[:12]}"),
        (Arrays(whole=as_array(moved[2].encoded())), f"are not {moved[1].digest[:12]}"),
        (Arrays(delta=deltas[0][:-1]), "truncated"),
        (Arrays(delta=packed), "the model is float32"),
        (Arrays(whole=deltas[0]), "at 8 bits"),
    ):
        with pytest.raises(UpdateError, match=said):
            received(asked, arrays, packed, layout, bases)
    assert bases.get_moved(moved[1].digest) is None
    with pytest.raises(UpdateError, match="the model is not finite"):
        received(order(), Arrays(values=np.full_like(packed, np.inf)), packed, layout, bases)


def test_a_damaged_file_of_values_is_as_good_as_none(
    layout: Layout, base: State, tmp_path: Path
) -> None:
    moved, _ = chain(layout, 1)
    Bases(tmp_path).put_moved(moved[1])
    (path,) = (tmp_path / "moved").iterdir()
    path.write_bytes(path.read_bytes()[:-2])
    assert Bases(tmp_path).get_moved(moved[1].digest) is None
    Bases(tmp_path).put_moved(moved[1])
    held = Bases(tmp_path).get_moved(moved[1].digest)
    assert held is not None
    assert held.distance.tobytes() == moved[1].distance.tobytes()


# up


def test_plain_values_travel_as_they_are(layout: Layout, base: State, bases: Bases) -> None:
    start = layout.pack(base)
    trained = start + step(layout, 1)
    assert packed_update(order(codec_up="fp32"), start, trained, layout, "a", bases) is trained


def test_what_coding_takes_comes_with_the_next_updates(
    layout: Layout, base: State, tmp_path: Path
) -> None:
    start, rows = layout.pack(base), rows_of(layout)
    weights = np.flatnonzero(rows.inside)
    total, came = np.zeros(layout.size), np.zeros(layout.size)
    errors = []
    for number in range(8):
        asked = order(codec_up="int3", round=number, feedback="f" * 64)
        trained = start + step(layout, number)
        update = packed_update(asked, start, trained, layout, "a", Bases(tmp_path))
        values = decode_update(update, "int3", start, layout, rows)
        total += trained.astype(np.float64) - start
        came += values.astype(np.float64) - start
        errors.append(np.linalg.norm((total - came)[weights]))
    alone = np.linalg.norm(step(layout, 0)[weights]) * 0.5
    assert errors[-1] < 2 * alone  # without feedback it grows with the root of the rounds
    assert errors[-1] / np.linalg.norm(total[weights]) < 0.35


def test_what_coding_takes_of_a_noised_update_is_noised_too(
    layout: Layout, base: State, tmp_path: Path
) -> None:
    start, rows = layout.pack(base), rows_of(layout)
    weights = np.flatnonzero(rows.inside)
    privacy = Privacy(0.5, 0.02, "secret")
    noised, came, exact = np.zeros(layout.size), np.zeros(layout.size), np.zeros(layout.size)
    for number in range(6):
        asked = order(codec_up="int4", round=number, feedback="f" * 64)
        trained = start + step(layout, number)
        update = packed_update(asked, start, trained, layout, "a", Bases(tmp_path), privacy)
        came += decode_update(update, "int4", start, layout, rows).astype(np.float64) - start
        noised += privacy.apply(trained - start)
        exact += trained.astype(np.float64) - start
    missed = np.linalg.norm((noised - came)[weights])
    assert missed < 0.3 * np.linalg.norm(noised[weights])
    assert missed < 0.3 * np.linalg.norm((exact - came)[weights])


def test_the_same_round_gives_the_same_bytes_and_devices_round_apart(
    layout: Layout, base: State, tmp_path: Path
) -> None:
    start = layout.pack(base)
    trained = start + step(layout, 1)
    asked = order(feedback="f" * 64)
    first, again, other = (
        packed_update(asked, start, trained, layout, device, Bases(tmp_path))
        for device in ("a", "a", "b")
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()
