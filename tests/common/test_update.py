"""What travels: rows of a layout, arrays that are what they say, values both ends agree on."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from common.codec import Rows, decode, encode
from common.errors import UpdateError
from common.filters import FilterGraph, FreeSet
from common.importance import bn_scale, choose
from common.layout import Layout, consolidation_layout, scope_layout
from common.nets import build
from common.state import State, read_state
from common.update import (
    Moved,
    as_array,
    check_values,
    decode_base,
    decode_scores,
    decode_update,
    encode_base,
    encode_scores,
    move,
    read_array,
    rows_of,
    write_array,
)


@pytest.fixture(scope="module", params=["resnet8", "mobilenetv2"])
def net(request: pytest.FixtureRequest) -> tuple[FilterGraph, FreeSet, State]:
    torch.manual_seed(0)
    width = {"resnet8": 8, "mobilenetv2": 0.25}[request.param]
    module = build(request.param, 10, 3, width)
    graph = FilterGraph.build(module, (3, 16, 16))
    return graph, choose(graph, bn_scale(module, graph), 0.3), read_state(module)


def layouts(net: tuple[FilterGraph, FreeSet, State]) -> list[Layout]:
    graph, free, state = net
    scopes = [scope_layout(scope, graph, free, state) for scope in ("rows", "group", "all")]
    return [*scopes, consolidation_layout(graph, free, state)]


# rows


def test_a_row_is_of_one_tensor_and_only_weights_have_any(
    net: tuple[FilterGraph, FreeSet, State],
) -> None:
    for layout in layouts(net):
        rows = rows_of(layout)
        assert rows.size == layout.size
        assert (rows.lengths > 0).all()
        assert (rows.edges[1:, 0] >= rows.edges[:-1, 1]).all()
        for entry in layout.entries:
            start = layout.offsets[entry.tensor]
            inside = rows.inside[start : start + entry.size]
            assert inside.all() if len(entry.shape) > 1 else not inside.any()
            assert len(entry.shape) == 1 or start in rows.edges[:, 0]


def test_a_filter_is_a_row_unless_it_is_short(net: tuple[FilterGraph, FreeSet, State]) -> None:
    for layout in layouts(net):
        rows = rows_of(layout)
        for entry in layout.entries:
            if len(entry.shape) == 1:
                continue
            start = layout.offsets[entry.tensor]
            begins = rows.edges[:, 0][
                (rows.edges[:, 0] >= start) & (rows.edges[:, 0] < start + entry.size)
            ]
            index = np.arange(entry.size) if entry.index is None else entry.index
            filters = index // int(np.prod(entry.shape[1:]))
            sizes = np.unique(filters, return_counts=True)[1]
            assert len(begins) <= len(sizes)
            if sizes.min() >= 32:
                assert len(begins) == len(sizes)
            # a row never begins inside a filter
            assert all(b == start or filters[b - start] != filters[b - start - 1] for b in begins)
        assert rows.lengths.min() >= min(32, min(e.size for e in layout.entries))


# arrays


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float64])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3)])
def test_an_array_is_read_as_it_was_saved(dtype: Any, shape: Any) -> None:
    array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    read = read_array(saved(array), "it")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    assert write_array(array) == saved(array)
    with pytest.raises(ValueError, match="read-only"):  # it is the message's
        read[...] = 0


def test_an_array_that_is_not_what_it_says_is_refused_before_it_is_allocated() -> None:
    whole = saved(np.zeros(9, np.float32))
    huge = whole.replace(b"(9,)", b"(9000000000000000000,)").replace(b" " * 18, b"", 1)
    for data, said in (
        (whole[:-1], "has 35 bytes, its header says float32"),
        (whole + b"\0", "truncated or too long"),
        (huge, "its header says float32"),
        (b"", "no NumPy array"),
        (whole[:40], "no NumPy array"),
        (saved(np.array([{}]), allow_pickle=True), "it holds objects"),
    ):
        with pytest.raises(UpdateError, match=said) as caught:
            read_array(data, "it")
        assert str(caught.value).startswith("it ")
        assert "\n" not in str(caught.value)


def test_values_are_checked_by_type_length_and_content() -> None:
    good = np.zeros(3, np.float32)
    assert check_values(good, 3, "it") is good
    for bad, said in (
        (good.astype(np.float64), "float64"),
        (good[:2], r"expected float32\[3\]"),
        (np.array([0, np.nan, 1], np.float32), "value 1 is nan"),
    ):
        with pytest.raises(UpdateError, match=said):
            check_values(bad, 3, "it")


# values that both ends hold


def test_what_moved_comes_whole_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    distance = (rng.normal(size=500) * np.exp(rng.normal(size=500) * 4)).astype(np.float16)
    distance[:4] = [-0.0, 6e-8, 65504, -65504]
    moved = Moved(distance)
    again = Moved.decoded(moved.encoded(), 500)
    assert again.distance.tobytes() == distance.tobytes()
    assert again.digest == moved.digest


def test_what_does_not_fit_half_precision_stays_finite() -> None:
    moved = Moved.nowhere(2).by(np.array([1e9, -1e9], np.float32))
    assert moved.distance.tolist() == [65504, -65504]
    far = encode(np.array([1e9, 1], np.float32), Rows(2, np.zeros((0, 2), np.int64)), "fp16")
    assert Moved.decoded(far, 2).digest != moved.digest


def test_rounding_makes_no_variance_negative(net: tuple[FilterGraph, FreeSet, State]) -> None:
    for layout in layouts(net):
        start = layout.pack(net[2])
        values = move(start, np.full(layout.size, -3, np.float32), layout)
        _, variances = layout.statistics
        assert (values[variances] == 0).all()
        rest = np.setdiff1d(np.arange(layout.size), variances)
        assert (values[rest] == start[rest] - 3).all()


# updates


def test_an_update_is_the_difference_to_what_the_device_began_with(
    net: tuple[FilterGraph, FreeSet, State],
) -> None:
    layout = layouts(net)[1]
    rows, start = rows_of(layout), layout.pack(net[2])
    trained = start + np.float32(1e-3) * np.random.default_rng(0).normal(size=layout.size).astype(
        np.float32
    )
    trained[layout.statistics[1]] = np.abs(trained[layout.statistics[1]])
    data = as_array(encode(trained - start, rows, "int8"))
    values = decode_update(data, "int8", start, layout, rows)
    assert np.abs(values - trained).max() < 1e-4
    assert decode_update(trained, "fp32", start, layout, rows) is trained


def test_an_update_of_another_kind_is_refused(net: tuple[FilterGraph, FreeSet, State]) -> None:
    layout = layouts(net)[0]
    rows, start = rows_of(layout), layout.pack(net[2])
    data = as_array(encode(start, rows, "int8"))
    for update, codec, said in (
        (start, "int8", "the update is float32"),
        (data, "fp32", "the update is uint8"),
        (data, "int4", "at 8 bits"),
        (data[None], "int8", "expected bytes"),
        (data[:-1], "int8", "truncated"),
    ):
        with pytest.raises(UpdateError, match=said):
            decode_update(update, codec, start, layout, rows)  # type: ignore[arg-type]


def test_an_update_that_overflows_is_refused(net: tuple[FilterGraph, FreeSet, State]) -> None:
    layout = layouts(net)[2]
    rows = rows_of(layout)
    start = np.full(layout.size, 3e38, np.float32)
    data = as_array(encode(start, rows, "int8"))
    assert np.isfinite(decode(data.tobytes(), rows, "int8")).all()
    with pytest.raises(UpdateError, match="not finite"):
        decode_update(data, "int8", start, layout, rows)


def test_scores_keep_their_order_in_half_the_bytes() -> None:
    scores = np.exp(np.random.default_rng(0).normal(size=3000) * 3 - 12).astype(np.float32)
    data = encode_scores(scores)
    assert data.nbytes < 0.52 * scores.nbytes
    read = decode_scores(data, len(scores))
    np.testing.assert_allclose(read, scores, rtol=2**-10)
    with pytest.raises(UpdateError, match="3000 values"):
        decode_scores(data, 2999)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int3"])
def test_a_base_travels_to_the_bit_whatever_the_codec(codec: Any) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    sent = encode_base(values, codec)
    assert sent.dtype == (np.float32 if codec == "fp32" else np.uint8)
    assert decode_base(sent, 1000, codec).tobytes() == values.tobytes()
    with pytest.raises(UpdateError, match="expected"):
        decode_base(sent, 999, codec)
    other: Any = "int8" if codec == "fp32" else "fp32"
    with pytest.raises(UpdateError, match="base model is"):
        decode_base(sent, 1000, other)
    values[7] = np.nan
    with pytest.raises(UpdateError, match="not finite"):
        decode_base(encode_base(values, codec), 1000, codec)
