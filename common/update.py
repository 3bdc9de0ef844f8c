"""What travels: packed values, and the checks that they pass before anything is done with them."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from common.codec import Codec, Rows, decode, decode_exact, encode, encode_exact, no_rows
from common.errors import UpdateError
from common.layout import Entry, Layout
from common.state import State, state_digest

_SHORTEST = 32
"""Values a row must have to be worth a step of its own; shorter ones of a tensor share one."""


def check_values(values: np.ndarray, size: int, what: str) -> np.ndarray:
    """Return `values` if they are finite float32 [size].

    Parameters
    ----------
    values : array
        As it came off the wire.
    size : int
        Number of values that the layout names.
    what : str
        For the message, for example ``"update of device 3"``.

    Raises
    ------
    UpdateError
        If dtype or length differ or a value is not finite.
    """
    if values.dtype != np.float32 or values.shape != (size,):
        raise UpdateError(
            f"{what} is {values.dtype}{list(values.shape)}, expected float32[{size}]: "
            "it belongs to another net, scope or free set"
        )
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UpdateError(f"{what} is not finite: value {bad} is {values[bad]}")
    return values


def read_array(data: bytes, what: str) -> np.ndarray:
    """Return the array in bytes of NumPy's file format: a view of them, which cannot be written.

    Its size is compared with the bytes that are there before anything is made of it.

    Raises
    ------
    UpdateError
        If it is none, an array of objects, or not as long as its header says.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"it has version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError("it holds objects")
    except Exception as error:  # bytes from anyone may make NumPy raise anything
        reason = " ".join(str(error).split())
        raise UpdateError(f"{what} is no NumPy array: {reason:.200}") from None
    here = len(data) - file.tell()
    if here != math.prod(shape) * dtype.itemsize:
        raise UpdateError(
            f"{what} has {here} bytes, its header says {dtype}{list(shape)}: it is truncated or "
            "too long"
        )
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def write_array(array: np.ndarray) -> bytes:
    """Return an array in NumPy's file format, for `read_array`.

    As `numpy.save` writes it, in one copy: a file in memory grows, and is copied, piece by piece.
    """
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return b"".join([header.getvalue(), array.reshape(-1).view(np.uint8).data])


def array_fields(array: np.ndarray) -> tuple[str, tuple[int, ...], str, bytes]:
    """Return what Flower's `Array` is made of: dtype, shape, kind and bytes of `array`."""
    return str(array.dtype), array.shape, "numpy.ndarray", write_array(array)


@functools.lru_cache(maxsize=8)
def rows_of(layout: Layout) -> Rows:
    """Return which of a layout's values share a step: the weights of a filter.

    BN and biases belong to no row.
    """
    edges = [np.zeros((0, 2), np.int64)]
    for entry in layout.entries:
        if len(entry.shape) > 1:
            edges.append(layout.offsets[entry.tensor] + _rows(entry))
    return Rows(layout.size, np.concatenate(edges))


def _rows(entry: Entry) -> np.ndarray:
    """Return begin and end of an entry's rows; short ones are put together."""
    width = int(np.prod(entry.shape[1:]))
    if entry.index is None:
        ends = np.arange(1, entry.shape[0] + 1) * width
    else:
        ends = np.append(np.flatnonzero(np.diff(entry.index // width)) + 1, entry.size)
    cuts = [0]
    for end in ends.tolist():
        if end - cuts[-1] >= _SHORTEST:
            cuts.append(end)
    cuts[1:] = [*cuts[1:-1], entry.size]
    return np.stack([cuts[:-1], cuts[1:]], axis=1).astype(np.int64)


def encode_base(values: np.ndarray, codec: Codec) -> np.ndarray:
    """Return a whole base as it travels: to the bit, and shorter unless the codec is ``fp32``."""
    return values if codec == "fp32" else as_array(encode_exact(values))


def decode_base(array: np.ndarray, size: int, codec: Codec) -> np.ndarray:
    """Return the float32 [size] that `encode_base` was given.

    Raises
    ------
    UpdateError
        If it is malformed, of another size or not finite.
    """
    what = "the base model"
    values = array if codec == "fp32" else decode_exact(as_bytes(array, what), size)
    return check_values(values, size, what)


def encode_scores(scores: np.ndarray) -> np.ndarray:
    """Return importances as an array of bytes, fp16 each."""
    return as_array(encode(scores, no_rows(len(scores)), "fp16"))


def decode_scores(data: np.ndarray, size: int) -> np.ndarray:
    """Return what `encode_scores` was given, up to rounding.

    Raises
    ------
    UpdateError
        See `common.codec.decode`.
    """
    return decode(as_bytes(data, "the scores"), no_rows(size), "fp16")


def as_array(data: bytes) -> np.ndarray:
    """Return bytes as the uint8 array that travels."""
    return np.frombuffer(data, np.uint8)


def as_bytes(array: np.ndarray, what: str) -> bytes:
    """Return the bytes in an array that travelled.

    Raises
    ------
    UpdateError
        If it is no vector of bytes.
    """
    if array.dtype != np.uint8 or array.ndim != 1:
        raise UpdateError(f"{what} is {array.dtype}{list(array.shape)}, expected bytes")
    return array.tobytes()


@dataclass(frozen=True, eq=False)
class Moved:
    """How far a phase's values are from the base's, as server and devices hold it to the bit.

    In fp16, so that a device which lacks it gets it exactly for half of what values cost.

    Attributes
    ----------
    distance : float16 array [size]
        Added to the base's packed values.
    """

    distance: np.ndarray

    @classmethod
    def nowhere(cls, size: int) -> Moved:
        """Return what a phase begins with."""
        return cls(np.zeros(size, np.float16))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) by which it is named on the wire."""
        return state_digest(self.as_state())

    def as_state(self) -> State:
        """Return it as a bundle (see `common.store`)."""
        return {"distance": torch.from_numpy(self.distance)}

    def by(self, difference: np.ndarray) -> Moved:
        """Return where a decoded difference leads from here."""
        largest = np.finfo(np.float16).max
        there = self.distance.astype(np.float32) + difference
        return Moved(np.clip(there, -largest, largest).astype(np.float16))

    def values(self, base: np.ndarray, layout: Layout) -> np.ndarray:
        """Return the packed values, float32 [size], from those of the base."""
        return move(base, self.distance.astype(np.float32), layout)

    def encoded(self) -> bytes:
        """Return it whole."""
        size = len(self.distance)
        return encode(self.distance.astype(np.float32), no_rows(size), "fp16")

    @classmethod
    def decoded(cls, data: bytes, size: int) -> Moved:
        """Return what was encoded, exactly.

        Raises
        ------
        UpdateError
            See `common.codec.decode`.
        """
        with np.errstate(over="ignore"):  # what does not fit is not what the digest names
            return cls(decode(data, no_rows(size), "fp16").astype(np.float16))


def move(start: np.ndarray, difference: np.ndarray, layout: Layout) -> np.ndarray:
    """Return `start` + `difference`; what rounding makes of a variance is never negative."""
    values: np.ndarray = start + difference
    variances = layout.statistics[1]
    values[variances] = np.maximum(values[variances], 0)
    return values


def decode_update(
    update: np.ndarray, codec: Codec, start: np.ndarray, layout: Layout, rows: Rows
) -> np.ndarray:
    """Return a device's packed values after training, checked.

    Parameters
    ----------
    update : array
        ``fp32``: the values. Other codecs: their encoded difference to `start`.
    start : float32 array [layout.size]
        What the device began with.
    rows : Rows
        Of the layout.

    Raises
    ------
    UpdateError
        If it is malformed, of another layout, or not finite.
    """
    if codec == "fp32":
        return check_values(update, layout.size, "the update")
    with np.errstate(over="ignore"):
        values = move(start, decode(as_bytes(update, "the update"), rows, codec), layout)
    return check_values(values, layout.size, "the update")
