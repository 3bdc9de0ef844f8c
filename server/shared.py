"""The values that server and devices share after a round, coded and the same to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.codec import Codec, decode, encode
from common.layout import Layout
from common.update import Moved, as_array, rows_of


@dataclass(frozen=True, eq=False)
class Shared:
    """How a phase's values come to the devices.

    Attributes
    ----------
    moved : Moved
        How far the values are from the base's; what a device holds that took part in the round.
    residue : float32 array [size]
        What coding took from the server's values; it is added to the next round's mean, so that
        nothing is lost for good (error feedback, Karimireddy et al., ICML 2019).
    delta : uint8 array
        The encoded difference to the round before.
    since : str or None
        Digest of that round's `moved`; None where it was the base.
    """

    moved: Moved
    residue: np.ndarray
    delta: np.ndarray
    since: str | None


def share(
    target: np.ndarray, base: np.ndarray, last: Shared | None, layout: Layout, codec: Codec
) -> tuple[np.ndarray, Shared]:
    """Encode a round's values against those of the round before.

    Parameters
    ----------
    target : float32 array [layout.size]
        What the server would have the devices begin with.
    base : float32 array [layout.size]
        Packed values of the phase's base.
    last : Shared or None
        Of the round before; None in a phase's first.

    Returns
    -------
    values : float32 array [layout.size]
        What they do begin with, and the server goes on from.
    shared : Shared
    """
    was = Moved.nowhere(layout.size) if last is None else last.moved
    rows = rows_of(layout)
    # To the nearest: the server never loses its residue, so that no mean has to be kept.
    data = encode(target - base - was.distance.astype(np.float32), rows, codec)
    moved = was.by(decode(data, rows, codec))
    values = moved.values(base, layout)
    since = None if last is None else was.digest
    return values, Shared(moved, target - values, as_array(data).copy(), since)
