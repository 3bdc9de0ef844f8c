"""Peers: several nets as one, and what they learn from one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.filters import FilterGraph
from common.importance import bn_scale, choose
from common.layout import scope_layout
from common.nets import build
from common.peers import Once, Peers, joined, joined_layout, mutual, peer
from common.regrow import regrow
from common.state import read_state, write_state


@pytest.fixture(scope="module")
def pair() -> tuple[Peers, FilterGraph]:
    torch.manual_seed(0)
    net = build("resnet8", 3, 1, 8).eval()
    graph = FilterGraph.build(net, (1, 8, 8))
    free = choose(graph, bn_scale(net, graph), 0.3)
    drawn = [regrow(read_state(net), graph, free, seed=seed) for seed in (1, 2)]
    both = Peers(net, 2).eval()
    write_state(both, joined(drawn))
    return both, graph


def test_peers_are_nets_of_their_own_side_by_side(pair: tuple[Peers, FilterGraph]) -> None:
    both, _ = pair
    x = torch.randn(4, 1, 8, 8)
    logits = both(x)
    assert logits.shape == (2, 4, 3)
    for number, net in enumerate(both.nets):
        assert torch.equal(logits[number], net(x))
    # what others read from drawn filters is zero: both are the prior still
    torch.testing.assert_close(logits[0], logits[1])
    states = [read_state(net) for net in both.nets]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    whole = joined(states)
    assert whole.keys() == read_state(both).keys()
    assert all(torch.equal(peer(whole, 1)[name], states[1][name]) for name in states[1])


def test_their_layout_is_one_net_s_as_often_as_there_are_peers(
    pair: tuple[Peers, FilterGraph],
) -> None:
    both, graph = pair
    states = [read_state(net) for net in both.nets]
    free = choose(graph, bn_scale(both.nets[0], graph), 0.3)
    one = scope_layout("group", graph, free, states[0])
    layout = joined_layout(one, 2)
    packed = layout.pack(read_state(both))
    assert np.array_equal(packed, np.concatenate([one.pack(state) for state in states]))
    means, variances = layout.statistics
    assert len(means) == len(variances) == 2 * len(one.statistics[0])


def test_each_learns_from_what_the_other_says(pair: tuple[Peers, FilterGraph]) -> None:
    y = torch.tensor([0, 2])
    x = torch.zeros(2, 1, 8, 8)
    z = torch.tensor([[[2.0, 0, 0], [0, 0, 1]], [[0, 1.0, 0], [0, 0, 3]]], requires_grad=True)

    def plain(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y)

    loss = mutual(plain, 0.5)(z, x, y)
    p = z.detach().softmax(2)
    first = (p[1] * (p[1] / p[0]).log()).sum(1).mean()
    second = (p[0] * (p[0] / p[1]).log()).sum(1).mean()
    expected = plain(z[0], x, y) + plain(z[1], x, y) + 0.5 * (first + second)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, z)
    own = torch.autograd.grad(plain(z[0], x, y), z)[0][0]
    torch.testing.assert_close(gradient[0], own + 0.5 * (p[0] - p[1]) / 2)  # the teacher is fixed


def test_a_teacher_is_asked_once_a_batch() -> None:
    class Counting(nn.Module):
        asked = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.asked += 1
            return x + self.asked

    counting = Counting()
    once = Once(counting)
    one, other = torch.zeros(1), torch.zeros(1)
    assert [float(once(x)) for x in (one, one, other, other, one)] == [1, 1, 2, 2, 3]
