"""What faulty and hostile devices send; used by the robust bench and its quick test."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

import client.local
from common.codec import _HEADER
from common.seeds import numpy_rng

ATTACKS = ("nan", "inf", "x1000", "sign", "zero", "random")
_WORDS = {"nan": 0x7FC0, "inf": 0x7F80}


@contextmanager
def attack(kind: str, devices: set[str]) -> Iterator[None]:
    """Let `devices`, simulated in this process, send what `kind` names while this lasts.

    ``nan``, ``inf``: in the steps of the encoding. ``x1000``, ``sign``, ``zero``: what the device
    has learnt times 1000, -1, 0. ``random``: noise, three times as long as what it has learnt, so
    that no limit of lengths finds it.
    """
    honest = client.local.packed_update

    def bent(order, start, trained, layout, device, *rest):  # type: ignore[no-untyped-def]
        if device not in devices:
            return honest(order, start, trained, layout, device, *rest)
        moved = trained - start
        if kind in _WORDS:
            return poisoned(honest(order, start, trained, layout, device, *rest), _WORDS[kind])
        rng = numpy_rng("attack", order.step, order.phase, order.attempt, order.round, device)
        made: Callable[[], np.ndarray] = {
            "x1000": lambda: 1000 * moved,
            "sign": lambda: -moved,
            "zero": lambda: 0 * moved,
            "random": lambda: _noise(rng, moved),
        }[kind]
        values = start + made().astype(np.float32)
        variances = layout.statistics[1]
        values[variances] = np.maximum(values[variances], 0)
        return honest(order, start, values, layout, device, *rest)

    client.local.packed_update = bent
    try:
        yield
    finally:
        client.local.packed_update = honest


def _noise(rng: np.random.Generator, moved: np.ndarray) -> np.ndarray:
    drawn = rng.normal(size=len(moved))
    length = float(np.linalg.norm(moved.astype(np.float64)))
    noise: np.ndarray = 3 * length * drawn / np.linalg.norm(drawn)
    return noise


def poisoned(update: np.ndarray, word: int) -> np.ndarray:
    """Return an encoding whose first step has the upper half of NaN or infinity."""
    data = update.tobytes()
    magic, bits, exponent, size, rows, *sizes = _HEADER.unpack_from(data)
    parts, begin = [], _HEADER.size
    for length in sizes:
        parts.append(bytearray(zlib.decompress(data[begin : begin + length], -15)))
        begin += length
    parts[1][0], parts[2][0] = word >> 8, word & 255
    packed = []
    for part in parts:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed.append(packer.compress(bytes(part)) + packer.flush())
    head = struct.pack(_HEADER.format, magic, bits, exponent, size, rows, *map(len, packed))
    return np.frombuffer(b"".join([head, *packed]), np.uint8)
