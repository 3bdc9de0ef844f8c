"""Values as few bytes, and back: the same values on every machine.

``int2`` to ``int8`` code each row (a filter's weights in one tensor) as whole multiples of a step
of its own; what belongs to no row (BN, biases) stays fp16, since an error in a small variance is
multiplied by the net. A symbol takes one byte, and deflate's Huffman code brings that close to
the entropy: for Gaussian values 3.1 bits at ``int4``, within 0.06 of it.

The step follows a row's root mean square and not its largest value: with an entropy code, rare
large symbols cost little, and a step that one outlier widens costs accuracy everywhere
(uniform-threshold quantisation with an entropy code is within 0.25 bit of the rate-distortion
bound: Gish & Pierce 1968). With a generator the rounding is stochastic, which keeps every value's
mean (QSGD, Alistarh et al., NeurIPS 2017); without, to the nearest, half the squared error.

`encode_exact` keeps float32 to the bit, for a base that has to have its digest: the four bytes of
a value lie in planes, of which deflate shortens those that say little (the exponents always; the
low ones of a model that was rounded with `coarse`).

An encoding is a header, the steps and fp16 values (their high and low bytes apart, since only the
high ones compress) and the symbols, each deflated. Its decoded size is known from the layout
alone, so that nothing is allocated on a sender's word.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from common.errors import UpdateError

Codec = Literal["fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"]
"""How values travel; ``fp32`` is the plain array, which is not encoded at all."""

_HEADER = struct.Struct("<4sBxhIIIII")
_MAGIC = b"flw1"
_MOST = 127
_REACH = 3.5
"""Root mean squares that half the nominal symbols reach; Gaussian rows rarely go beyond."""
_WIDEST = 1.5
"""Widest step in root mean squares: with more, stochastic rounding errs by more than all there is,
and error feedback would grow without end."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which of `size` packed values share a step.

    Attributes
    ----------
    size : int
        Number of values.
    edges : int64 array [rows, 2]
        First and one past the last value of each row; ascending, none empty, no overlap.
    """

    size: int
    edges: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """Values in each row, int64 [rows]."""
        lengths: np.ndarray = self.edges[:, 1] - self.edges[:, 0]
        return lengths

    @cached_property
    def inside(self) -> np.ndarray:
        """Whether a value belongs to a row, bool [size]."""
        change = np.zeros(self.size + 1, np.int8)
        np.add.at(change, self.edges[:, 0], 1)
        np.add.at(change, self.edges[:, 1], -1)
        inside: np.ndarray = np.cumsum(change[:-1], dtype=np.int8).astype(bool)
        return inside


def no_rows(size: int) -> Rows:
    """Return `size` values that belong to no row."""
    return Rows(size, np.zeros((0, 2), np.int64))


def encode(
    values: np.ndarray, rows: Rows, codec: Codec, rng: np.random.Generator | None = None
) -> bytes:
    """Return `values` encoded.

    Parameters
    ----------
    values : float32 array [rows.size]
        Finite.
    rows : Rows
        Which values share a step; not used by ``fp16``.
    codec : str
        Any but ``fp32``.
    rng : Generator, optional
        Rounds stochastically; without it, to the nearest.

    Raises
    ------
    UpdateError
        If a value is not finite.
    """
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UpdateError(f"value {bad} to send is {values[bad]}: lower the learning rate")
    bits = _bits(codec)
    if bits == 16:
        rows = no_rows(rows.size)
    inside = rows.inside
    symbols, steps = _quantise(values[inside], rows.lengths, bits, rng)
    rest = values[~inside]
    exponent = _exponent(rest)
    # scaled by a power of two, which is exact, fp16 neither overflows nor loses what is small
    halves = np.ldexp(rest, -exponent).astype("<f2")
    words = np.concatenate([steps, halves.view("<u2")])
    parts = [
        _deflate(symbols.tobytes()),
        _deflate((words >> 8).astype(np.uint8).tobytes()),
        _deflate((words & 255).astype(np.uint8).tobytes()),
    ]
    sizes = [len(part) for part in parts]
    head = _HEADER.pack(_MAGIC, bits, exponent, rows.size, len(rows.edges), *sizes)
    return b"".join([head, *parts])


def decode(data: bytes, rows: Rows, codec: Codec) -> np.ndarray:
    """Return the values that `encode` made `data` of, up to rounding.

    Parameters
    ----------
    data : bytes
        From anyone.
    rows, codec
        As they were for `encode`.

    Returns
    -------
    float32 array [rows.size]

    Raises
    ------
    UpdateError
        If `data` is truncated, too long, of another codec or layout, or not finite.
    """
    bits = _bits(codec)
    if bits == 16:
        rows = no_rows(rows.size)
    if len(data) < _HEADER.size:
        raise UpdateError(f"an encoding of {len(data)} bytes is truncated")
    magic, coded, exponent, size, count, *sizes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise UpdateError(f"an encoding begins with {magic!r}, expected {_MAGIC!r}")
    if (coded, size, count) != (bits, rows.size, len(rows.edges)):
        raise UpdateError(
            f"an encoding has {size} values in {count} rows at {coded} bits, expected are "
            f"{rows.size} in {len(rows.edges)} at {bits}: codec, scope or free set differ"
        )
    if len(data) != _HEADER.size + sum(sizes):
        raise UpdateError(
            f"an encoding has {len(data)} bytes, its header says {_HEADER.size + sum(sizes)}: "
            "it is truncated or too long"
        )
    covered = int(rows.lengths.sum())
    wide = len(rows.edges) + rows.size - covered
    raw, start = [], _HEADER.size
    for length, decoded in zip(sizes, (covered, wide, wide), strict=True):
        raw.append(_inflate(data[start : start + length], decoded))
        start += length
    words = np.frombuffer(raw[1], np.uint8).astype(np.uint32) << 8
    words |= np.frombuffer(raw[2], np.uint8)
    steps = _wide(words[: len(rows.edges)])
    values = np.empty(rows.size, np.float32)
    inside = rows.inside
    with np.errstate(over="ignore", invalid="ignore"):
        symbols = np.frombuffer(raw[0], np.int8).astype(np.float32)
        values[inside] = symbols * np.repeat(steps, rows.lengths)
        halves = words[len(rows.edges) :].astype("<u2").view("<f2")
        values[~inside] = np.ldexp(halves.astype(np.float32), exponent)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UpdateError(f"an encoding is not finite: value {bad} is {values[bad]}")
    return values


_EXACT = struct.Struct("<4sIIIII")
_EXACT_MAGIC = b"flwx"


def encode_exact(values: np.ndarray) -> bytes:
    """Return float32 values encoded without loss."""
    planes = np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1, 4)
    parts = [_deflate(planes[:, byte].tobytes()) for byte in range(4)]
    head = _EXACT.pack(_EXACT_MAGIC, len(values), *(len(part) for part in parts))
    return b"".join([head, *parts])


def decode_exact(data: bytes, size: int) -> np.ndarray:
    """Return the float32 [size] that `encode_exact` made `data` of; they may not be finite.

    Raises
    ------
    UpdateError
        If `data` is truncated, too long, or holds another number of values.
    """
    if len(data) < _EXACT.size:
        raise UpdateError(f"an encoding of {len(data)} bytes is truncated")
    magic, count, *sizes = _EXACT.unpack_from(data)
    if magic != _EXACT_MAGIC:
        raise UpdateError(f"an encoding begins with {magic!r}, expected {_EXACT_MAGIC!r}")
    if count != size:
        raise UpdateError(f"an encoding has {count} values, expected are {size}: net differs")
    if len(data) != _EXACT.size + sum(sizes):
        raise UpdateError(
            f"an encoding has {len(data)} bytes, its header says {_EXACT.size + sum(sizes)}: "
            "it is truncated or too long"
        )
    planes, start = np.empty((size, 4), np.uint8), _EXACT.size
    for byte, length in enumerate(sizes):
        planes[:, byte] = np.frombuffer(_inflate(data[start : start + length], size), np.uint8)
        start += length
    values: np.ndarray = planes.view("<f4").reshape(size).astype(np.float32, copy=False)
    return values


def coarse(values: np.ndarray) -> np.ndarray:
    """Return finite float32 values rounded to 8 significant bits, which `encode_exact` shortens.

    The error is at most 2**-8 of a value; what would become infinite is rounded down.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = (bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    down = bits & np.uint32(0xFFFF0000)
    infinite = (up & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    rounded: np.ndarray = np.where(infinite, down, up).view(np.float32)
    return rounded


def _bits(codec: Codec) -> int:
    if codec not in get_args(Codec) or codec == "fp32":
        raise UpdateError(f"codec is '{codec}': {', '.join(get_args(Codec)[1:])} encode")
    return int(codec.removeprefix("fp").removeprefix("int"))


def _quantise(
    values: np.ndarray, lengths: np.ndarray, bits: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return symbols int8 [n] and steps [rows], the upper half of a float32 each."""
    if not len(lengths):
        return np.zeros(0, np.int8), np.zeros(0, "<u2")
    starts = np.cumsum(lengths) - lengths
    exact = values.astype(np.float64)
    rms = np.sqrt(np.add.reduceat(exact * exact, starts) / lengths)
    most = np.maximum.reduceat(np.abs(values), starts)
    share = min(_REACH / (2 ** (bits - 1) - 1), _WIDEST)
    step = np.maximum(share * rms, most / np.float64(_MOST))
    words = _narrow(step.astype(np.float32))
    scale = np.repeat(_wide(words), lengths)
    ratio = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    if rng is None:
        symbols = np.rint(ratio)
    else:
        symbols = np.floor(ratio + rng.random(len(ratio), np.float32))
    return np.clip(symbols, -_MOST, _MOST).astype(np.int8), words


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of positive float32, rounded up so that no symbol is clipped."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype("<u2")


def _wide(words: np.ndarray) -> np.ndarray:
    """Return the float32 whose upper halves `words` are."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _exponent(values: np.ndarray) -> int:
    """Return the power of two that makes the most of fp16; values that are fp16 come exactly."""
    most = np.abs(values).max(initial=np.float32(0))
    if not most:
        return 0
    exponent = int(np.frexp(most)[1]) - 16
    return exponent + int(np.ldexp(most, -exponent) > np.finfo(np.float16).max)


def _deflate(data: bytes) -> bytes:
    # Matches of chance alone: looking for longer ones than runs costs time and bytes.
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


def _inflate(data: bytes, size: int) -> bytes:
    """Return exactly `size` bytes; no more is ever allocated."""
    unpacker = zlib.decompressobj(-15)
    try:
        raw = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise UpdateError(f"an encoding is damaged: {error}") from None
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        much = f"{len(raw)} bytes" if len(raw) <= size else "more"
        raise UpdateError(f"an encoding unpacks to {much}, expected are {size} and no rest")
    return raw
