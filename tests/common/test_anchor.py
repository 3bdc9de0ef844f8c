"""Importances of weights, and the pull that follows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.anchor import anchored, importances, without
from common.filters import FilterGraph, FreeSet, freed_index
from common.importance import bn_scale, choose
from common.layout import Entry, Layout, dense_layout
from common.nets import build
from common.seeds import torch_rng
from common.state import State, read_state
from common.train import Labelled


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet8", 4, 1, 8).eval()


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> FilterGraph:
    return FilterGraph.build(net, (1, 8, 8))


def some(count: int) -> Labelled:
    rng = torch_rng("test", count)
    x = torch.randn(count, 1, 8, 8, generator=rng)
    return Labelled(x, torch.zeros(count, dtype=torch.int64))


def by_name(net: nn.Module, graph: FilterGraph, packed: np.ndarray) -> State:
    state = read_state(net)
    return dense_layout(graph, state).unpack(state, packed)


def test_of_a_bias_the_measures_are_known_in_closed_form(
    net: nn.Module, graph: FilterGraph
) -> None:
    data = some(400)
    with torch.no_grad():
        logits = net(data.x)
    bias = f"{graph.head}.bias"
    mas = by_name(net, graph, importances(net, graph, data, "mas", torch_rng("t"), most=400))
    torch.testing.assert_close(mas[bias], 2 * logits.abs().mean(0), rtol=1e-4, atol=1e-6)
    # d log p(y) / d b_c = [y = c] - p_c, whose square has the mean p_c (1 - p_c)
    fisher = by_name(net, graph, importances(net, graph, data, "fisher", torch_rng("t"), most=400))
    p = logits.softmax(1)
    torch.testing.assert_close(fisher[bias], (p * (1 - p)).mean(0), rtol=0.15, atol=0.01)


def test_statistics_of_the_data_matter_nothing_and_the_net_is_left_as_it_is(
    net: nn.Module, graph: FilterGraph
) -> None:
    net.train()
    before = read_state(net)
    tensors = by_name(net, graph, importances(net, graph, some(3), "fisher", torch_rng("t")))
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in read_state(net).items())
    assert all(p.grad is None for p in net.parameters())
    for name, tensor in tensors.items():
        assert float(tensor.min()) >= 0
        assert bool(tensor.any()) == ("running" not in name)
    net.eval()


def test_few_images_are_enough_and_no_more_are_looked_at(
    net: nn.Module, graph: FilterGraph
) -> None:
    data = some(8)
    first = Labelled(data.x[:3], data.y[:3])
    one = importances(net, graph, data, "mas", torch_rng("t"), most=3)
    assert np.array_equal(one, importances(net, graph, first, "mas", torch_rng("t")))


def test_free_filters_owe_nothing(net: nn.Module, graph: FilterGraph) -> None:
    free = choose(graph, bn_scale(net, graph), 0.3)
    state = read_state(net)
    packed = np.ones(dense_layout(graph, state).size, np.float32)
    tensors = by_name(net, graph, without(packed, graph, free, state))
    rows = freed_index(graph, free).own
    for name, tensor in tensors.items():
        freed = torch.zeros(len(tensor), dtype=torch.bool)
        freed[torch.from_numpy(rows.get(name, np.zeros(0, np.int64)))] = True
        assert not tensor[freed].any()
        assert bool((tensor[~freed] == 1).all())
    assert np.array_equal(without(packed, graph, FreeSet({}), state), packed)


def test_each_weight_is_pulled_by_what_it_matters_and_never_beyond_its_place() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    rows = np.array([0, 1, 2])  # the first output's weights
    layout = Layout("rows", (Entry("weight", (2, 3), "weight", rows),))
    target = {name: p.detach().clone() for name, p in net.named_parameters()}
    importance = {"weight": torch.tensor([[0.0, 1.0, 1000.0], [5.0, 5.0, 5.0]])}

    def plain(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y)

    pulled = anchored(plain, net, layout, importance, target, weight=0.5, lr=0.1)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    assert pulled(net(x), x, y) == plain(net(x), x, y)
    with torch.no_grad():
        net.weight += 2.0
    free = torch.autograd.grad(plain(net(x), x, y), net.weight)[0]
    held = torch.autograd.grad(pulled(net(x), x, y), net.weight)[0]
    # 0.5 * 1000 is cut at 1 / 0.1: a step of 0.1 leads back to the target
    torch.testing.assert_close(held - free, torch.tensor([[0.0, 1.0, 20.0], [0.0] * 3]))
