"""The device's end of the wire: the values a round begins with, and the update it answers with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.bases import Bases
from client.privacy import Privacy
from common.codec import decode, encode
from common.errors import UpdateError
from common.layout import Layout
from common.order import Order
from common.seeds import numpy_rng
from common.update import Moved, as_array, as_bytes, check_values, move, rows_of


@dataclass(frozen=True)
class Arrays:
    """Packed arrays that came with an order.

    Attributes
    ----------
    base : float32 array, optional
        The whole base.
    values : float32 array, optional
        The values that the round begins with, as they are.
    delta, whole : uint8 array, optional
        How far these are from the base, encoded: against the round before, or by itself.
    anchor : float32 or uint8 array, optional
        Importances of weights, as they are or encoded.
    replay : uint8 array, optional
        Synthetic images.
    rival : float32 array, optional
        A classifier (see `common.features.Discriminant.pack`).
    """

    base: np.ndarray | None = None
    values: np.ndarray | None = None
    delta: np.ndarray | None = None
    whole: np.ndarray | None = None
    anchor: np.ndarray | None = None
    replay: np.ndarray | None = None
    rival: np.ndarray | None = None


def received(
    order: Order, arrays: Arrays, packed_base: np.ndarray, layout: Layout, bases: Bases
) -> np.ndarray | None:
    """Return the values that the round begins with, or None if the device cannot make them.

    Parameters
    ----------
    packed_base : float32 array [layout.size]
        The base's.

    Raises
    ------
    UpdateError
        If what came does not fit the order.
    """
    if order.moved is None:
        if arrays.values is None:
            return packed_base
        return check_values(arrays.values, layout.size, "the model")
    moved = bases.get_moved(order.moved)
    if moved is None:
        moved = _made(order, arrays, layout, bases)
        if moved is None:
            return None
        if moved.digest != order.moved:
            raise UpdateError(f"the values that were sent are not {order.moved[:12]}")
        bases.put_moved(moved)
    return moved.values(packed_base, layout)


def _made(order: Order, arrays: Arrays, layout: Layout, bases: Bases) -> Moved | None:
    if arrays.whole is not None:
        return Moved.decoded(as_bytes(arrays.whole, "the model"), layout.size)
    if arrays.delta is None:
        return None
    was = Moved.nowhere(layout.size) if order.since is None else bases.get_moved(order.since)
    if was is None:
        return None
    data = as_bytes(arrays.delta, "the model")
    return was.by(decode(data, rows_of(layout), order.codec_down))


def packed_update(
    order: Order,
    start: np.ndarray,
    trained: np.ndarray,
    layout: Layout,
    device: str,
    bases: Bases,
    privacy: Privacy | None = None,
) -> np.ndarray:
    """Return what travels of a round's training: the values, or their encoded difference.

    What the encoding takes is kept and added to the next round's difference (error feedback,
    Seide et al., Interspeech 2014).

    Parameters
    ----------
    start, trained : float32 array [layout.size]
        Values before and after.
    device : str
        The device's name.
    privacy : Privacy, optional
        Clips and noises the difference. What is kept of an encoding is then noised too, so that
        adding it to the next discloses nothing.
    """
    if order.feedback is None and privacy is None:
        return trained
    moved = trained - start
    if privacy is not None:
        moved = privacy.apply(moved)
    if order.feedback is None:
        return move(start, moved, layout)
    kept = bases.feedback
    wanted = moved + kept.get(device, order.feedback, order.round, layout.size)
    rng = numpy_rng("encode", order.feedback, order.round, device)
    rows = rows_of(layout)
    data = encode(wanted, rows, order.codec_up, rng)
    left = wanted - decode(data, rows, order.codec_up)
    kept.put(device, order.feedback, order.round, left)
    return as_array(data)
