"""Encodings: few bytes, bounded error, and never more work than the layout allows."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import common.codec
from common.codec import (
    _HEADER,
    Codec,
    Rows,
    coarse,
    decode,
    decode_exact,
    encode,
    encode_exact,
    no_rows,
)
from common.errors import UpdateError

INTS: list[Codec] = ["int8", "int7", "int6", "int5", "int4", "int3", "int2"]
ALL: list[Codec] = ["fp16", *INTS]


def bits_of(codec: str) -> int:
    return int(codec.removeprefix("int"))


def rows_like(rng: np.random.Generator, size: int) -> Rows:
    """Some rows, with gaps."""
    cuts = np.sort(rng.choice(size + 1, min(size + 1, 2 * int(rng.integers(1, 6))), replace=False))
    edges = cuts[: len(cuts) // 2 * 2].reshape(-1, 2).astype(np.int64)
    return Rows(size, edges)


def filters(rows: int = 400, width: int = 288) -> Rows:
    starts = np.arange(rows) * width
    return Rows(rows * width, np.stack([starts, starts + width], 1))


def drawn(kind: str, rows: Rows, seed: int = 0) -> np.ndarray:
    """Values whose scale differs from row to row, as filters' does."""
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=rows.size) if kind == "normal" else rng.laplace(size=rows.size) / 2**0.5
    scale = np.repeat(np.exp(rng.normal(size=len(rows.edges))), rows.lengths)
    return (0.01 * scale * unit).astype(np.float32)


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    arrays(np.float32, st.integers(1, 80), elements=floats),
    st.sampled_from(ALL),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_an_error_is_at_most_a_step_of_the_values_own_row(
    values: np.ndarray, codec: Codec, seed: int, stochastic: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rows_like(rng, len(values))
    decoded = decode(encode(values, rows, codec, rng if stochastic else None), rows, codec)
    assert decoded.dtype == np.float32
    outside = ~rows.inside if codec != "fp16" else np.ones(len(values), bool)
    most = np.abs(values[outside]).max(initial=0.0)
    error = np.abs(decoded.astype(np.float64) - values)
    assert (error[outside] <= np.abs(values[outside]) / 2**11 + most * 2.0**-38).all()
    if codec == "fp16":
        return
    for start, stop in rows.edges:
        row = values[start:stop].astype(np.float64)
        rms = np.sqrt(np.mean(row**2))
        step = max(min(3.5 / (2 ** (bits_of(codec) - 1) - 1), 1.5) * rms, np.abs(row).max() / 127)
        # a step is rounded up to eight bits
        assert error[start:stop].max() <= step * (1 + 2**-7) * (1 if stochastic else 0.5) + 1e-37


@pytest.mark.parametrize("codec", ALL)
def test_the_same_values_give_the_same_bytes_and_zeros_stay_zeros(codec: Codec) -> None:
    rows = filters(20)
    values = drawn("normal", rows)
    values[:288] = 0
    first, second = (encode(values, rows, codec, np.random.default_rng(1)) for _ in range(2))
    assert first == second
    assert not decode(first, rows, codec)[:288].any()
    empty = Rows(0, np.zeros((0, 2), np.int64))
    assert decode(encode(values[:0], empty, codec), empty, codec).shape == (0,)


@pytest.mark.parametrize("codec", INTS)
def test_an_encoding_that_was_kept_is_still_read_alike(codec: Codec) -> None:
    """What two machines decode may not hang on how they compute."""
    rows = Rows(8, np.array([[0, 6]]))
    symbols = np.array([-127, -3, -1, 0, 2, 127], np.int8).tobytes()
    words = np.array([0x3D4D, 0x3C00, 0xB800], np.uint16)  # 0.05005 as a step; 1 and -0.5 in fp16
    parts = [symbols, (words >> 8).astype(np.uint8).tobytes(), words.astype(np.uint8).tobytes()]
    packed = [common.codec._deflate(part) for part in parts]
    head = _HEADER.pack(b"flw1", bits_of(codec), -3, 8, 1, *map(len, packed))
    decoded = decode(head + b"".join(packed), rows, codec)
    step = np.float32(0x4D / 0x80 / 16 + 1 / 16) / 2  # 1.6015625 / 32
    assert decoded.tolist() == [step * s for s in (-127, -3, -1, 0, 2, 127)] + [0.125, -0.0625]


@pytest.mark.parametrize("codec", INTS)
def test_stochastic_rounding_keeps_the_mean(codec: Codec) -> None:
    rows = filters(4, 64)
    values = drawn("normal", rows)
    rng = np.random.default_rng(0)
    tries = 600
    decoded = [decode(encode(values, rows, codec, rng), rows, codec) for _ in range(tries)]
    far = np.abs(np.mean(decoded, axis=0) - values).reshape(4, 64).max(1)
    step = np.ptp(decoded, axis=0).reshape(4, 64).max(1)
    assert (far < 5 * 0.5 * step / tries**0.5).all()
    nearest = np.abs(decode(encode(values, rows, codec), rows, codec) - values)
    assert (far < 0.3 * nearest.reshape(4, 64).max(1)).all()


@pytest.mark.parametrize(
    ("codec", "normal", "laplace", "error"),
    [
        ("int8", 0.230, 0.220, 0.0125),
        ("int6", 0.168, 0.165, 0.035),
        ("int5", 0.136, 0.133, 0.07),
        ("int4", 0.102, 0.100, 0.15),
        ("int3", 0.070, 0.069, 0.35),
        ("int2", 0.062, 0.062, 0.50),
        ("fp16", 0.450, 0.455, 0.0003),
    ],
)
def test_the_bytes_are_near_the_entropy(
    codec: Codec, normal: float, laplace: float, error: float
) -> None:
    rows = filters()
    for kind, share in (("normal", normal), ("laplace", laplace)):
        values = drawn(kind, rows)
        data = encode(values, rows, codec)
        assert len(data) / values.nbytes < share
        left = np.linalg.norm(decode(data, rows, codec) - values) / np.linalg.norm(values)
        assert left < error
        again = encode(values, rows, codec, np.random.default_rng(0))
        assert len(again) / values.nbytes < share + 0.003
        # error feedback needs an error below what is sent
        rough = np.linalg.norm(decode(again, rows, codec) - values) / np.linalg.norm(values)
        assert rough < 0.9


def test_one_outlier_does_not_widen_its_rows_step_much() -> None:
    rows = filters(1)
    values = drawn("normal", rows)
    plain = np.abs(decode(encode(values, rows, "int4"), rows, "int4") - values)
    values[7] = 20 * values.std()
    shifted = np.abs(decode(encode(values, rows, "int4"), rows, "int4") - values)
    assert shifted[np.arange(rows.size) != 7].max() < 2.5 * plain.max()


def test_a_row_of_small_values_beside_large_ones_keeps_its_precision() -> None:
    rows = filters(2, 64)
    values = np.r_[np.full(64, 1e-6), np.full(64, 1e4)].astype(np.float32)
    decoded = decode(encode(values, rows, "int4"), rows, "int4")
    np.testing.assert_allclose(decoded, values, rtol=0.3)


def test_fp16_takes_any_scale() -> None:
    for scale in (1e-30, 1e-9, 1.0, 1e9, 1e30):
        values = (scale * np.array([1.0, 0.5, -0.3, 1e-3])).astype(np.float32)
        np.testing.assert_allclose(decode(encode(values, no_rows(4), "fp16"), no_rows(4), "fp16"),
                                   values, rtol=2**-10)  # fmt: skip


# what is refused

ROWS = Rows(200, np.array([[10, 100], [120, 180]]))


@pytest.fixture(scope="module")
def sound() -> bytes:
    return encode(np.random.default_rng(0).normal(size=200).astype(np.float32), ROWS, "int5")


def test_values_that_are_not_finite_are_not_sent() -> None:
    for bad in (np.nan, np.inf):
        values = np.zeros(200, np.float32)
        values[31] = bad
        with pytest.raises(UpdateError, match=f"value 31 to send is {bad}"):
            encode(values, ROWS, "int8")


def test_plain_values_are_no_encoding() -> None:
    with pytest.raises(UpdateError, match="codec is 'fp32'"):
        encode(np.zeros(200, np.float32), ROWS, "fp32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: b"", "0 bytes is truncated"),
        (lambda d: d[: _HEADER.size - 1], "is truncated"),
        (lambda d: d[:-1], "truncated or too long"),
        (lambda d: d + b"\0", "truncated or too long"),
        (lambda d: b"PK\3\4" + d[4:], "begins with"),
        (lambda d: d[:4] + b"\x04" + d[5:], "at 4 bits"),
        (lambda d: d[:8] + b"\xff\xff\xff\xff" + d[12:], "4294967295 values"),
        (lambda d: d[: _HEADER.size] + b"\xff" * (len(d) - _HEADER.size), "damaged"),
    ],
)
def test_a_damaged_encoding_is_refused_with_its_reason(
    sound: bytes, change: Any, said: str
) -> None:
    with pytest.raises(UpdateError, match=said):
        decode(change(sound), ROWS, "int5")


def test_an_encoding_of_another_layout_or_codec_is_refused(sound: bytes) -> None:
    for rows, codec in (
        (Rows(201, ROWS.edges), "int5"),
        (Rows(200, ROWS.edges[:1]), "int5"),
        (Rows(200, np.array([[10, 100], [120, 181]])), "int5"),
        (ROWS, "int4"),
        (ROWS, "fp16"),
    ):
        with pytest.raises(UpdateError):
            decode(sound, rows, codec)  # type: ignore[arg-type]


def made_of(*raw: bytes, exponent: int = 0) -> bytes:
    packed = [common.codec._deflate(part) for part in raw]
    head = _HEADER.pack(b"flw1", 8, exponent, 4, 1, *map(len, packed))
    return head + b"".join(packed)


TINY = Rows(4, np.array([[0, 3]]))


def test_a_bomb_is_never_unpacked() -> None:
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = zeros.compress(bytes(50_000_000)) + zeros.flush()
    head = _HEADER.pack(b"flw1", 8, 0, 4, 1, len(bomb), 0, 0)
    with pytest.raises(UpdateError, match="unpacks to more, expected are 3"):
        decode(head + bomb, TINY, "int8")


@pytest.mark.parametrize("high", [0x7F, 0xFF])
def test_infinite_steps_and_values_are_refused(high: int) -> None:
    with pytest.raises(UpdateError, match="not finite"):
        decode(made_of(b"\1\1\1", bytes([high, 0]), b"\x80\0"), TINY, "int8")
    with pytest.raises(UpdateError, match="not finite"):
        decode(made_of(b"\1\1\1", bytes([0x3F, high]), b"\x80\0"), TINY, "int8")
    with pytest.raises(UpdateError, match="not finite"):
        decode(made_of(b"\1\1\1", b"\x3f\x3c", b"\x80\0", exponent=2**14), TINY, "int8")


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_altered_bytes_are_refused_or_give_finite_values(data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    whole = bytearray(encode(rng.normal(size=200).astype(np.float32), ROWS, "int5", rng))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for text in (bytes(whole), cut):
        # anything but these two would be an error of ours
        with contextlib.suppress(UpdateError):
            values = decode(text, ROWS, "int5")
            assert values.shape == (200,)
            assert np.isfinite(values).all()


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=100)
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UpdateError):
        decode(data, ROWS, "int5")
    with pytest.raises(UpdateError):
        decode(b"flw1" + data, ROWS, "int5")


# without loss


@given(arrays(np.uint32, st.integers(0, 90)))
@settings(deadline=None, max_examples=60)
def test_the_exact_encoding_gives_every_bit_back(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    assert decode_exact(encode_exact(values), len(values)).tobytes() == values.tobytes()


def test_a_rounded_model_takes_a_third_of_its_bytes() -> None:
    values = drawn("normal", filters())
    assert len(encode_exact(values)) < 0.9 * values.nbytes
    assert len(encode_exact(coarse(values))) < 0.36 * values.nbytes


@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False)))
@settings(deadline=None, max_examples=60)
def test_rounding_errs_by_at_most_two_to_the_minus_eight(values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    rounded = coarse(values)
    assert np.isfinite(rounded).all()
    normal = np.abs(values) >= np.finfo(np.float32).tiny
    error = np.abs(rounded.astype(np.float64) - values)[normal]
    assert (error <= np.abs(values.astype(np.float64))[normal] * 2.0**-7).all()
    inside = normal & (np.abs(values) < 3e38)
    error = np.abs(rounded.astype(np.float64) - values)[inside]
    assert (error <= np.abs(values.astype(np.float64))[inside] * 2.0**-8).all()
    assert coarse(rounded).tobytes() == rounded.tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_an_exact_encoding_that_is_not_what_it_says_is_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = encode_exact(rng.normal(size=40).astype(np.float32))
    for wrong in (data[:-1], data + b"\0", data[:10], b"", b"flw1" + data[4:]):
        with pytest.raises(UpdateError, match=r"encoding (has|of|begins)"):
            decode_exact(wrong, 40)
    for size in (39, 41, 10**9):
        with pytest.raises(UpdateError, match="expected are"):
            decode_exact(data, size)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(UpdateError):
            assert len(decode_exact(bytes(damaged), 40)) == 40


def test_an_exact_encoding_that_would_unpack_to_gigabytes_is_refused_before() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bomb.compress(bytes(50_000_000)) + bomb.flush()
    rest = [common.codec._deflate(bytes(40))] * 3
    parts = [packed, *rest]
    head = common.codec._EXACT.pack(b"flwx", 40, *(len(part) for part in parts))
    with pytest.raises(UpdateError, match="unpacks to more"):
        decode_exact(head + b"".join(parts), 40)
