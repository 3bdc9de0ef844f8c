"""Experts: one trunk that never changes, a little of its own for every world."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.experts import ExpertNet, changed_by, expert_layout
from common.features import ClosedFormNet, Scores, class_sums
from common.filters import parameter_count
from common.gate import Gate, Moments, look, stem_conv, stem_moments
from common.nets import build
from common.state import State, read_state, write_state


def trunk() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet8", 4, 3, 8).eval()


def images(shift: float = 0.0) -> torch.Tensor:
    return torch.randn(30, 3, 12, 12, generator=torch.Generator().manual_seed(1)) + shift


def an_expert(net: nn.Module, share: float = 0.1, seed: int = 3) -> State:
    rng = torch.Generator().manual_seed(seed)
    state = changed_by(expert_layout(net, "fc", share), read_state(net))
    return {n: t + 0.1 * torch.rand(t.shape, generator=rng) for n, t in state.items()}


def worlds(net: nn.Module) -> list[Moments]:
    return [stem_moments(stem_conv(net), images(shift)) for shift in (0.0, 3.0)]


def stem(net: nn.Module) -> torch.Tensor:
    return stem_conv(net).weight.detach().clone()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_an_expert_owns_all_normalisations_the_classifier_and_the_smallest_convolutions(
    share: float,
) -> None:
    net = trunk()
    layout = expert_layout(net, "fc", share)
    own = {entry.tensor for entry in layout.entries}
    weights = {n: p.numel() for n, p in net.named_parameters() if n not in own}
    assert {"fc.weight", "fc.bias", "bn1.weight", "bn1.running_var"} <= own
    convs = {n: p.numel() for n, p in net.named_parameters() if p.dim() == 4}
    mine = {n: size for n, size in convs.items() if n in own}
    assert set(mine.values()) == set() or max(mine.values()) <= min(
        [*weights.values(), max(convs.values())]
    )
    total = sum(p.numel() for p in net.parameters())
    if mine:
        assert sum(p.numel() for n, p in net.named_parameters() if n in own) <= share * total
    assert (set(convs) <= own) == (share == 1.0)


def test_the_layout_depends_on_the_net_and_the_share_alone() -> None:
    one, other = expert_layout(trunk(), "fc", 0.1), expert_layout(trunk().train(), "fc", 0.1)
    assert one.digest == other.digest != expert_layout(trunk(), "fc", 0.3).digest


def test_worlds_are_answered_by_their_experts_mixed_by_the_gate() -> None:
    net = trunk()
    expert = an_expert(net)
    seen = worlds(net)
    mixed = ExpertNet(net, [expert], seen, stem(net), "fc", (False, False), None, 0.0)
    second = trunk()
    write_state(second, {**read_state(second), **expert})
    x = torch.cat([images(0.0), images(3.0)])
    with torch.no_grad():
        gate = Gate(seen)(look(stem_conv(net)(x))).exp()
        expected = gate[:, :1] * F.softmax(net(x), 1) + gate[:, 1:] * F.softmax(second(x), 1)
        torch.testing.assert_close(mixed(x).exp(), expected, rtol=1e-3, atol=1e-5)
        assert (gate[:30, 0] > 0.99).float().mean() > 0.9
        assert (gate[30:, 1] > 0.99).float().mean() > 0.9


def test_what_an_expert_does_not_change_is_stored_once_and_the_trunk_left_alone() -> None:
    net = trunk()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expert = an_expert(net, share=0.05)
    mixed = ExpertNet(
        net, [expert, expert], worlds(net) * 2, stem(net), "fc", (False,) * 3, None, 0.0
    )
    held = sum(p.numel() for p in mixed.parameters())
    own = sum(t.numel() for n, t in expert.items() if "running" not in n)
    whole = sum(p.numel() for p in net.parameters())
    gate = sum(p.numel() for p in mixed.gate.parameters()) + sum(
        p.numel() for p in mixed.stem.parameters()
    )
    assert held == whole + 2 * own + gate
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_class_statistics_are_a_second_opinion_in_every_world() -> None:
    net = trunk()
    expert = an_expert(net)
    labels = torch.arange(30) % 4
    second = trunk()
    write_state(second, {**read_state(second), **expert})
    sums = [
        class_sums(one, "fc", images(shift), labels, 4)
        for one, shift in ((net, 0.0), (second, 3.0))
    ]
    opinion = (sums[0] + sums[1]).discriminant("lda", 10)
    mixed = ExpertNet(net, [expert], worlds(net), stem(net), "fc", (True, True), opinion, 0.5)
    assert all(isinstance(one, ClosedFormNet) for one in mixed.nets)
    assert len({id(one.scores) for one in mixed.nets}) == 1  # stored once
    partly = ExpertNet(net, [expert], worlds(net), stem(net), "fc", (False, True), opinion, 0.5)
    assert [isinstance(one, ClosedFormNet) for one in partly.nets] == [False, True]
    with torch.no_grad():
        scores = Scores(opinion.impartial(), 0.5)
        alone = ClosedFormNet(second, "fc", scores, beside=True)(images(3.0))
        torch.testing.assert_close(
            mixed(images(3.0)).exp(), F.softmax(alone, 1), rtol=1e-2, atol=1e-3
        )


def test_a_world_that_statistics_answer_for_has_no_classifier_to_store() -> None:
    net = trunk()
    sums = class_sums(net, "fc", images(0.0), torch.arange(30) % 4, 4)
    args = (net, [an_expert(net)], worlds(net), stem(net), "fc", (True, True))
    opinion = sums.discriminant("lda", 10)
    beside, closed = (ExpertNet(*args, opinion, 1.0, closed=closed) for closed in (False, True))
    classifier = sum(p.numel() for p in net.get_submodule("fc").parameters())
    assert parameter_count(beside) - parameter_count(closed) == classifier
    with torch.no_grad():
        # of another world: its expert is heard in both
        torch.testing.assert_close(beside(images(3.0)), closed(images(3.0)), rtol=1e-2, atol=1e-2)
        alone = ClosedFormNet(trunk(), "fc", Scores(opinion))(images(0.0))
        torch.testing.assert_close(
            closed(images(0.0)).exp(), F.softmax(alone, 1), rtol=1e-2, atol=1e-3
        )
    assert isinstance(net.get_submodule("fc"), nn.Linear)  # the given one is left as it is
