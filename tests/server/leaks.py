"""Looks for images in bytes that travelled: as files, as pixels, as values, in every encoding.

What can be unpacked is unpacked first (base64, zlib, gzip, deflate inside zip files and inside
fallow's own codec). Then encoded files are looked for by stretches of their bytes, and pixels by
correlation: whatever was scaled, shifted, normalised or rounded to int8 still correlates with the
image, in any number format, grey or in planes or interleaved.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import oaconvolve

_STRETCH = 20
_ALIKE = 0.95
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{32,}={0,2}")
_FORMATS = ("u1", "i1", "<f2", "<f4", "<f8")
_FLW = re.compile(rb"flw1")
_PACKED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")
_ZIPPED = re.compile(rb"PK\x03\x04")


@dataclass(frozen=True)
class Secret:
    """An image that must not travel: its file and its pixels, uint8 [H, W, C]."""

    file: bytes
    pixels: np.ndarray


def views(traffic: bytes, depth: int = 3) -> Iterator[bytes]:
    """Yield `traffic` and all that can be unpacked from it."""
    yield traffic
    if not depth:
        return
    for found in _BASE64.finditer(traffic):
        text = found.group().rstrip(b"=").replace(b"-", b"+").replace(b"_", b"/")
        text = text[: len(text) // 4 * 4]
        try:
            inner = base64.b64decode(text, validate=True)
        except binascii.Error:
            continue
        # Text of four characters becomes three bytes, whatever came before: four ways to begin.
        yield from views(inner, depth - 1)
        for skip in (1, 2, 3):
            part = text[skip:]
            yield base64.b64decode(part[: len(part) // 4 * 4])
    for found in _PACKED.finditer(traffic):
        inner = _inflated(traffic[found.start() :], 47)
        if inner:
            yield from views(inner, depth - 1)
    for found in _ZIPPED.finditer(traffic):
        at = found.start()
        name, extra = traffic[at + 26 : at + 28], traffic[at + 28 : at + 30]
        begin = at + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
        inner = _inflated(traffic[begin:], -15)
        if inner:
            yield from views(inner, depth - 1)
    for found in _FLW.finditer(traffic):
        # header of common.codec: magic, bits, pad, exponent, size, rows, three lengths
        begin = found.start() + 28
        lengths = np.frombuffer(traffic[begin - 12 : begin], "<u4")
        parts = []
        for length in lengths.tolist():
            parts.append(_inflated(traffic[begin : begin + length], -15))
            begin += length
        yield from parts
        if len(parts) == 3 and len(parts[1]) == len(parts[2]):  # high and low bytes of halves
            halves = np.stack([np.frombuffer(p, np.uint8) for p in (parts[2], parts[1])], axis=1)
            yield halves.tobytes()


def _inflated(data: bytes, wbits: int) -> bytes:
    try:
        return zlib.decompressobj(wbits).decompress(data, 2**24)
    except zlib.error:
        return b""


def find_images(traffic: bytes, secrets: Sequence[Secret]) -> list[str]:
    """Return what was found, one line an image and way; empty if nothing was."""
    found: list[str] = []
    seen = list(views(traffic))
    for number, secret in enumerate(secrets):
        stretches = _stretches(secret.file)
        if any(stretch in view for view in seen for stretch in stretches):
            found.append(f"image {number}: its file")
    patterns = [(n, p) for n, secret in enumerate(secrets) for p in _patterns(secret.pixels)]
    for values in _numbers(seen):
        found += [f"image {n}: its pixels as {values[0]}" for n in _alike(values[1], patterns)]
    return found


def _stretches(file: bytes) -> list[bytes]:
    """Return stretches that are this file's own: not its header, not one byte repeated."""
    middle = range(40, len(file) - _STRETCH - 12, max((len(file) - 60) // 6, 1))
    return [s for s in (file[i : i + _STRETCH] for i in middle) if len(set(s)) > 8]


def _patterns(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the orders in which pixels may stand: interleaved, and each plane."""
    yield pixels.ravel().astype(np.float64)
    if pixels.shape[2] > 1:
        for channel in range(pixels.shape[2]):
            yield pixels[..., channel].ravel().astype(np.float64)


def _numbers(seen: list[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the bytes as numbers, in each format and alignment."""
    for name in _FORMATS:
        width = np.dtype(name).itemsize
        for skip in range(width):
            joined = [
                np.frombuffer(v[skip : skip + (len(v) - skip) // width * width], name) for v in seen
            ]
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.concatenate(joined).astype(np.float64)
            # Larger ones are no pixels in any scale; fallow's codec uses all of fp16.
            usual = np.isfinite(values) & (np.abs(values) < (1e5 if width == 2 else 1e3))
            yield name, np.where(usual, values, 0.0)


def _alike(values: np.ndarray, patterns: list[tuple[int, np.ndarray]]) -> list[int]:
    """Return the numbers of the patterns that correlate with some stretch of the values."""
    found = set()
    for length in sorted({len(pattern) for _, pattern in patterns}):
        if len(values) < length:
            continue
        ones = np.ones(length)
        sums = oaconvolve(values, ones, mode="valid")
        squares = oaconvolve(values * values, ones, mode="valid")
        spread = squares - sums * sums / length
        # Rounding of the transform makes nothing of what is almost flat.
        floor = 1e-12 * max(float(squares.max()), 1e-30)
        norm = np.sqrt(np.where(spread > floor, spread, np.inf))
        for number, pattern in patterns:
            if len(pattern) != length or pattern.std() == 0:
                continue
            wanted = (pattern - pattern.mean()) / (pattern.std() * np.sqrt(length))
            likeness = np.abs(oaconvolve(values, wanted[::-1], mode="valid")) / norm
            if float(likeness.max()) > _ALIKE:
                found.add(number)
    return sorted(found)
