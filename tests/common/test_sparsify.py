"""Selective sparsity training: exact zeros, the function kept, and no more lost than accepted."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Augment
from common.distill import Distillation
from common.filters import FilterGraph, FreeSet, cut, freed_index, is_off, switch_off
from common.importance import bn_scale, choose
from common.layout import consolidation_layout, dense_layout
from common.nets import build
from common.sparsify import (
    Anneal,
    Freeing,
    acceptable,
    free_filters,
    multi_step_objective,
    off_state,
    scale_and_shift,
    scale_factor,
    smaller,
)
from common.state import State, read_state, state_digest
from common.train import Labelled, Recipe, accuracy_of, predict, train

Choose = Callable[[float], FreeSet]


def recipe(epochs: int = 3, lr: float = 0.02, **changes: object) -> Recipe:
    fixed = {"batch": 16, "augment": Augment(0, False), "weight_decay": 0.01, "momentum": 0.9}
    return Recipe(epochs=epochs, lr=lr, **{**fixed, **changes})


def stripes(count: int, seed: int) -> Labelled:
    """Four classes of noisy images: bright at the left, right, top or bottom."""
    y = torch.arange(count) % 4
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.5
    x[y == 0, :, :, :4] += 1
    x[y == 1, :, :, 4:] += 1
    x[y == 2, :, :4] += 1
    x[y == 3, :, 4:] += 1
    return Labelled(x, y)


@cache
def _learnt() -> tuple[nn.Module, FilterGraph]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build("resnet8", 4, 3, 8)
    graph = FilterGraph.build(net, (3, 8, 8))
    train(
        net,
        dense_layout(graph, read_state(net)),
        stripes(128, seed=0),
        lambda logits, _, y: F.cross_entropy(logits, y),
        recipe(6, lr=0.1),
        torch.Generator().manual_seed(0),
    )
    return net.eval(), graph


def learnt() -> tuple[nn.Module, FilterGraph]:
    """Return a small net that knows `stripes`, and its graph."""
    net, graph = _learnt()
    return copy.deepcopy(net), graph


def third(graph: FilterGraph, seed: int = 0) -> FreeSet:
    rng = np.random.default_rng(seed)
    return FreeSet(
        {a.name: tuple(rng.permutation(a.width)[: a.width // 3].tolist()) for a in graph.layers}
    )


def freeing(net: nn.Module, graph: FilterGraph, pick: Choose, **changes: object) -> Freeing:
    fixed = {
        "data": stripes(128, seed=0),
        "heldout": stripes(100, seed=1),
        "teachers": [copy.deepcopy(net).eval()],
        "share": 0.3,
        "max_drop": 0.02,
        "recipe": recipe(),
        "distillation": Distillation(),
        "until": 0.6,
        "rng": lambda attempt: torch.Generator().manual_seed(attempt),
    }
    return free_filters(net, graph, pick, **{**fixed, **changes})


# ---------------------------------------------------------------- the schedule


def test_the_factor_falls_from_one_to_exactly_zero() -> None:
    assert scale_factor(0.0, 0.6) == 1.0
    assert scale_factor(0.3, 0.6) == pytest.approx(0.5)
    assert [scale_factor(p, 0.6) for p in (0.6, 0.600001, 0.9, 1.0)] == [0.0] * 4
    assert scale_factor(0.999, 1.0) > 0
    assert scale_factor(1.0, 1.0) == 0.0


def test_annealing_sets_scales_and_shifts_to_a_share_of_what_they_were() -> None:
    net, graph = learnt()
    free, base = third(graph), read_state(net)
    anneal = Anneal(net, graph, free, base)
    own = freed_index(graph, free).own
    wanted = scale_and_shift(graph)
    for factor in (0.5, 0.25, 0.25, 1.0):  # of the base, not of what they are by now
        anneal(factor)
        state = read_state(net)
        for name, tensor in base.items():
            expected = tensor.clone()
            if name in wanted and name in own:
                expected[own[name]] *= factor
            assert torch.equal(state[name], expected), name


def test_scales_are_exactly_on_schedule_whatever_the_optimiser_does() -> None:
    net, graph = learnt()
    free, base = third(graph), read_state(net)
    anneal, own = Anneal(net, graph, free, base), freed_index(graph, free).own
    names = sorted(own.keys() & scale_and_shift(graph))
    seen: list[tuple[float, State]] = []

    def before_step(done: float) -> None:
        anneal(scale_factor(done, 0.5))
        seen.append((done, read_state(net)))

    train(
        net,
        consolidation_layout(graph, free, base),
        stripes(64, seed=0),
        multi_step_objective([], Distillation()),
        recipe(3, lr=0.1),
        torch.Generator().manual_seed(0),
        before_step=before_step,
    )
    assert [done for done, _ in seen] == [k / 12 for k in range(13)]
    for done, state in seen:
        for name in names:
            rows = own[name]
            assert torch.equal(state[name][rows], base[name][rows] * max(0.0, 1 - done / 0.5))
    assert is_off(net, graph, free)
    assert not torch.equal(read_state(net)["bn1.weight"], base["bn1.weight"])


def test_an_off_state_is_what_switching_off_leaves() -> None:
    net, graph = learnt()
    free, state = third(graph), read_state(net)
    before = state_digest(state)
    off = off_state(state, graph, free)
    assert state_digest(state) == before
    switch_off(net, graph, free)
    assert all(torch.equal(off[name], tensor) for name, tensor in read_state(net).items())
    half = off_state(state, graph, free, 0.5)
    Anneal(net, graph, free, state)(0.5)
    assert state_digest(half) == state_digest(read_state(net))


# ---------------------------------------------------------------- freeing


def test_freeing_ends_with_filters_that_are_off_and_can_be_cut() -> None:
    net, graph = learnt()
    before = read_state(net)
    scores = bn_scale(net, graph)
    result = freeing(net, graph, lambda share: choose(graph, scores, share))
    heldout = stripes(100, seed=1)
    assert not result.free.empty
    assert is_off(net, graph, result.free)
    slim = cut(net, graph, result.free)
    torch.testing.assert_close(predict(slim, heldout.x), predict(net, heldout.x))
    assert result.attempts[-1].accepted
    assert result.before == pytest.approx(accuracy_of(_learnt()[0], heldout))
    assert result.after == accuracy_of(net, heldout)
    assert result.after_cut == accuracy_of(slim, heldout)
    assert result.attempts[-1].drop == pytest.approx(result.before - result.after_cut)
    assert result.before - result.after_cut <= 0.02 + 1e-9
    assert result.attempts[-1].share == pytest.approx(result.free.share(graph))
    moved = [n for n, t in read_state(net).items() if not torch.equal(t, before[n])]
    assert len(moved) == len(before), "the kept filters learn to do without the others"


def test_training_keeps_the_function_better_than_switching_off() -> None:
    net, graph = learnt()
    free, heldout = third(graph), stripes(100, seed=1)
    plain = copy.deepcopy(net)
    switch_off(plain, graph, free)
    result = freeing(net, graph, lambda _: free, max_drop=1.0, recipe=recipe(6))
    assert accuracy_of(plain, heldout) < result.before - 0.1
    assert result.after_cut > accuracy_of(plain, heldout) + 0.1


def test_the_same_generator_gives_the_same_bytes_and_teachers_stay_as_they_are() -> None:
    digests = set()
    for _ in range(2):
        net, graph = learnt()
        teacher = copy.deepcopy(net).eval()
        before = state_digest(read_state(teacher))
        free = third(graph)
        freeing(net, graph, lambda _, free=free: free, max_drop=1.0, teachers=[teacher, teacher])
        assert state_digest(read_state(teacher)) == before
        digests.add(state_digest(read_state(net)))
    assert len(digests) == 1


def test_progress_is_told_by_attempt_and_epoch() -> None:
    net, graph = learnt()
    told: list[tuple[int, int]] = []
    sets = iter([third(graph), FreeSet({"conv1": (0,)})])
    freeing(
        net,
        graph,
        lambda _: next(sets),
        max_drop=-2.0,
        tries=2,
        recipe=recipe(2),
        on_epoch=lambda attempt, epoch, _: told.append((attempt, epoch)),
    )
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]


# ---------------------------------------------------------------- acceptance


class Planted(nn.Module):
    """Four filters, of which only the first is read: it tells class 1 (bright) from class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4, momentum=0.0)
        self.fc = nn.Linear(4, 2)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, 0] = 1.0
            self.fc.weight.zero_()
            self.fc.weight[1, 0] = 1.0
            self.fc.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def lamps(labels: list[int], bright: list[int]) -> Labelled:
    level = torch.tensor(bright, dtype=torch.float32)[:, None, None, None]
    return Labelled(level.expand(-1, 3, 4, 4).contiguous(), torch.tensor(labels))


def planted(pick: Choose, heldout: Labelled, **changes: object) -> tuple[Freeing, nn.Module]:
    net = Planted()
    graph = FilterGraph.build(net, (3, 4, 4))
    data = lamps([0, 1] * 8, [0, 1] * 8)
    settings = {"recipe": recipe(1, lr=0.0), "share": 0.5, "shrink": 0.5, **changes}
    return freeing(net, graph, pick, data=data, heldout=heldout, **settings), net


def greedy(share: float) -> FreeSet:
    """Take the filter that matters too, if much is to be freed."""
    return FreeSet({"conv": (0, 1) if share > 0.3 else (1,)})


def test_the_share_shrinks_until_what_matters_is_kept() -> None:
    result, net = planted(greedy, lamps([0, 1] * 10, [0, 1] * 10))
    assert result.free.channels == {"conv": (1,)}
    assert [(a.share, a.drop, a.accepted) for a in result.attempts] == [
        (0.5, 0.5, False),
        (0.25, 0.0, True),
    ]
    assert (result.before, result.after, result.after_cut) == (1.0, 1.0, 1.0)
    # The refused attempt left nothing behind: only the second filter is off.
    assert read_state(net)["bn.weight"].tolist() == [1.0, 0.0, 1.0, 1.0]


def test_a_net_is_restored_to_the_last_bit_if_every_attempt_fails() -> None:
    asked: list[float] = []

    def pick(share: float) -> FreeSet:
        asked.append(share)
        return FreeSet({"conv": tuple(range(4 - len(asked)))})

    result, net = planted(
        pick, lamps([0, 1] * 10, [0, 1] * 10), recipe=recipe(1, lr=1e-3), tries=3, shrink=0.8
    )
    assert asked == pytest.approx([0.5, 0.4, 0.32])
    assert [attempt.accepted for attempt in result.attempts] == [False] * 3
    assert all(attempt.drop == 0.5 for attempt in result.attempts)
    assert result.free.empty
    assert (result.before, result.after, result.after_cut) == (1.0, 1.0, 1.0)
    assert state_digest(read_state(net)) == state_digest(read_state(Planted()))


def test_a_smaller_share_that_names_the_same_set_is_passed_over() -> None:
    sets = {0.5: (0, 1, 2), 0.4: (0, 1, 2), 0.32: (0, 1)}
    share, free = smaller(
        lambda share: FreeSet({"conv": sets[round(share, 2)]}),
        0.5,
        0.8,
        FreeSet({"conv": sets[0.5]}),
    )
    assert (round(share, 2), free.count) == (0.32, 2)


def test_no_set_is_smaller_than_one_that_every_share_names() -> None:
    refused = FreeSet({"conv": (0,)})
    assert smaller(lambda _: refused, 0.5, 0.7, refused)[1].empty


def test_freeing_ends_when_the_share_frees_no_filter() -> None:
    result, net = planted(
        lambda share: greedy(share) if share > 0.3 else FreeSet({}),
        lamps([0, 1] * 10, [0, 1] * 10),
        tries=9,
    )
    assert len(result.attempts) == 1
    assert result.free.empty
    assert state_digest(read_state(net)) == state_digest(read_state(Planted()))


@pytest.mark.parametrize("right", range(20, 200, 9))
def test_a_loss_of_exactly_what_is_accepted_is_accepted(right: int) -> None:
    # One bright image of class 1 is lost with the first filter: 1 of 200 is half a point.
    labels = [1] + [0] * (right - 1) + [1] * (200 - right)
    heldout = lamps(labels, [1] + [0] * 199)
    result, _ = planted(lambda _: FreeSet({"conv": (0,)}), heldout, max_drop=0.005, tries=1)
    assert result.before == right / 200
    assert result.after_cut == (right - 1) / 200
    assert result.attempts[0].accepted
    part, _ = planted(lambda _: FreeSet({"conv": (0,)}), heldout, max_drop=0.004, tries=1)
    assert part.attempts[0].accepted  # 0.8 of an image is one
    refused, _ = planted(lambda _: FreeSet({"conv": (0,)}), heldout, max_drop=0.0, tries=1)
    assert refused.free.empty


def test_what_may_be_lost_is_rounded_up_to_whole_images() -> None:
    assert [acceptable(0.005, n) for n in (0, 1, 200, 201, 796, 800)] == [0, 1, 1, 2, 4, 4]
    assert acceptable(0.05, 60) == 3
    assert acceptable(0.0, 10**6) == 0
