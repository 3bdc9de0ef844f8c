"""A convolution trained in slices learns what the masked one does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import common.frozen as frozen
from common.filters import FilterGraph, FreeSet
from common.layout import Entry, Layout, scope_layout
from common.nets import build
from common.sliced import slices
from common.state import read_state


def entry(shape: tuple[int, ...], rows: list[int], columns: list[int]) -> Entry:
    mask = np.zeros(shape, bool)
    mask[rows] = True
    mask[:, columns] = True
    return Entry("weight", shape, "weight", np.flatnonzero(mask))


def test_slices_are_told_from_the_entries() -> None:
    found = slices(entry((5, 4, 3, 3), [1, 4], [2]))
    assert found is not None
    assert found.rows.tolist() == [1, 4]
    assert found.columns.tolist() == [2]
    some = entry((5, 4, 3, 3), [1], [2])
    odd = Entry("weight", some.shape, "weight", some.index[1:])
    assert slices(odd) is None
    assert slices(Entry("weight", (5, 4, 3, 3), "weight", None)) is None


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_gradients_are_those_of_the_whole_convolution_where_it_trains(data: st.DataObject) -> None:
    draw = data.draw
    inputs, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rows = draw(st.lists(st.integers(0, outputs - 1), unique=True))
    columns = draw(st.lists(st.integers(0, inputs - 1), unique=True, min_size=not rows))
    side = draw(st.sampled_from([1, 2, 3, 5]))
    torch.manual_seed(0)
    conv = nn.Conv2d(
        inputs,
        outputs,
        side,
        stride=draw(st.sampled_from([1, 2])),
        padding=draw(st.integers(0, side)),
        dilation=draw(st.sampled_from([1, 2])),
        bias=draw(st.booleans()),
    ).double()
    named = entry(tuple(conv.weight.shape), sorted(rows), sorted(columns))
    x = torch.randn(3, inputs, 11, 11, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    g = torch.randn_like(y)
    y.backward(g)
    expected, dx = conv.weight.grad.clone(), x.grad.clone()
    db = None if conv.bias is None else conv.bias.grad.clone()
    conv.zero_grad()
    x.grad = None
    trained = slices(named)
    assert trained is not None
    frozen.sliced_forward(conv, trained, x).backward(g)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(named.read(conv.weight.grad), named.read(expected), **close)
    torch.testing.assert_close(x.grad, dx, **close)
    if db is not None:
        torch.testing.assert_close(conv.bias.grad, db, **close)
    still = torch.ones(conv.weight.numel(), dtype=torch.bool)
    still[named.positions] = False
    assert not conv.weight.grad.view(-1)[still].any()


def _group(share: float) -> tuple[nn.Module, Layout]:
    torch.manual_seed(1)
    net = build("resnet8", 4, 3, 32)
    graph = FilterGraph.build(net, (3, 16, 16))
    free = FreeSet({x.name: range(max(1, int(share * x.width))) for x in graph.layers})
    return net, scope_layout("group", graph, free, read_state(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_convolutions_are_sliced_and_the_step_is_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, layout = _group(0.25)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    found = []
    for least in (64, 10**9):
        monkeypatch.setattr(frozen, "_LEAST", least)
        one = copy.deepcopy(net)
        with frozen.training_only(one, layout):
            sliced = {name for name, m in one.named_modules() if "forward" in vars(m)}
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                F.cross_entropy(one(x).float(), y).backward()
            gradients = {name: p.grad.clone() for name, p in one.named_parameters()}
        assert not any("forward" in vars(m) for m in one.modules())
        found.append((sliced, gradients))
    (wide, mine), (none, whole) = found
    assert wide == {f"layer{n}.0.conv{m}" for n, m in [(2, 2), (3, 1), (3, 2)]} | {
        "layer3.0.downsample.0"
    }
    assert not none
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for e in layout.entries:
        if e.kind not in ("mean", "var"):
            torch.testing.assert_close(
                e.read(mine[e.tensor]), e.read(whole[e.tensor]), rtol=tolerance, atol=tolerance
            )


def test_more_than_most_of_a_convolution_is_not_sliced() -> None:
    net, layout = _group(0.5)
    with frozen.training_only(net, layout):
        assert not any("forward" in vars(m) for m in net.modules())
