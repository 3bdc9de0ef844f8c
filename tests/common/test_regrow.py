"""Re-initialisation: diverse, the same for all who share the seed, and without effect at first."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_nets import Dense
from torch import Tensor, nn

from common.errors import ConfigError
from common.filters import FilterGraph, FreeSet, freed_index, switch_off
from common.nets import WIDTHS, build
from common.regrow import RULES, Diversity, regrow
from common.state import State, read_state, state_digest, write_state
from common.train import predict

PURE = {rule: Diversity(**{r: float(r == rule) for r in RULES}) for rule in RULES}


class Hidden(nn.Module):
    """A flatten and a hidden linear layer between the filters and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 16, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), x.shape[-1] // 4)
        return self.fc(F.relu(self.hidden(x.flatten(1))))


OWN: dict[str, Callable[[], nn.Module]] = {"concatenation": Dense, "hidden layer": Hidden}
SMALL = {name: 0.25 if name == "mobilenetv2" else 8 for name in WIDTHS}


@cache
def prior(name: str) -> tuple[nn.Module, FilterGraph, FreeSet]:
    """Return a net whose free filters are off, with random weights and BN statistics."""
    side = 16 if name in OWN else 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = OWN[name]() if name in OWN else build(name, 10, 3, SMALL[name])
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    graph = FilterGraph.build(net, (3, side, side))
    rng = np.random.default_rng(1)
    free = FreeSet(
        {
            layer.name: tuple(rng.permutation(layer.width)[: layer.width * 3 // 8 + 1].tolist())
            for layer in graph.layers
        }
    )
    switch_off(net, graph, free)
    return net.eval(), graph, free


def wide(out: int = 32, count: int = 20) -> tuple[State, FilterGraph, FreeSet]:
    """Return a chain whose second layer has fan-in 72, with `count` of `out` filters free."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, out, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(out)
            self.fc = nn.Linear(out, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = Chain()
    graph = FilterGraph.build(net, (3, 8, 8))
    return read_state(net), graph, FreeSet({"conv2": tuple(range(count))})


def rows(state: State, name: str, index: object) -> Tensor:
    return state[f"{name}.weight"].flatten(1)[index].double()


# ---------------------------------------------------------------- the function is kept


@pytest.mark.parametrize("name", [*WIDTHS, *OWN])
def test_a_regrown_net_computes_the_prior_model(name: str) -> None:
    net, graph, free = prior(name)
    state = read_state(net)
    x = torch.randn(3, *graph.input_shape, generator=torch.Generator().manual_seed(0))
    expected = predict(net, x)
    try:
        write_state(net, regrow(state, graph, free, seed=5))
        found = predict(net, x)
    finally:
        write_state(net, state)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "concatenation"])
def test_only_free_filters_and_what_reads_them_change(name: str) -> None:
    net, graph, free = prior(name)
    state = read_state(net)
    before = state_digest(state)
    grown = regrow(state, graph, free, seed=5)
    assert state_digest(state) == before
    places = freed_index(graph, free)
    for key, old in state.items():
        kept = torch.ones(old.shape, dtype=torch.bool)
        kept[places.own.get(key, [])] = False
        if key in places.out:
            kept[:, places.out[key]] = False
        assert torch.equal(grown[key][kept], old[kept]), key


@pytest.mark.parametrize("name", ["resnet8", "vgg11", "mobilenetv2", *OWN])
def test_bn_is_reset_and_nobody_kept_reads_a_free_filter(name: str) -> None:
    net, graph, free = prior(name)
    grown = regrow(read_state(net), graph, free, seed=5)
    fresh = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "var": 1.0, "bias": 0.0}
    places = freed_index(graph, free)
    seen = set()
    for slot in (slot for layer in graph.layers for slot in layer.slots if slot.role == "own"):
        values = grown[slot.tensor][places.own[slot.tensor]]
        if slot.kind in fresh:
            seen.add(slot.kind)
            assert (values == fresh[slot.kind]).all(), slot.tensor
        else:
            assert values.flatten(1).norm(dim=1).min() > 0, slot.tensor
    assert {"scale", "shift", "mean", "var"} <= seen
    for key, columns in places.out.items():
        kept = np.setdiff1d(np.arange(len(grown[key])), places.own.get(key, []))
        assert not grown[key][kept][:, columns].any(), key
    assert not grown[f"{graph.head}.weight"][:, places.out.get(f"{graph.head}.weight", [])].any()


def test_nothing_free_changes_nothing() -> None:
    net, graph, _ = prior("resnet8")
    state = read_state(net)
    assert state_digest(regrow(state, graph, FreeSet({}), seed=5)) == state_digest(state)


# ---------------------------------------------------------------- the seed


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_one_seed_gives_the_same_bytes_and_another_gives_others(name: str) -> None:
    net, graph, free = prior(name)
    state = read_state(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = regrow(state, graph, free, seed=5)
        torch.manual_seed(2)
        same = regrow(state, graph, free, seed=5)
    other = regrow(state, graph, free, seed=6)
    assert state_digest(one) == state_digest(same)
    own = freed_index(graph, free).own
    for key in (k for k in own if state[k].dim() == 4):
        assert not torch.equal(one[key][own[key]], other[key][own[key]]), key


def test_layers_of_the_same_shape_are_drawn_independently() -> None:
    net, graph, _ = prior("resnet20")
    names = ["layer1.1.conv1", "layer1.2.conv1"]
    free = FreeSet(dict.fromkeys(names, (0, 1)))
    grown = regrow(read_state(net), graph, free, seed=5, diversity=PURE["kaiming"])
    one, other = (F.normalize(rows(grown, name, [0, 1])) for name in names)
    assert (one @ other.T).abs().max() < 0.5


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize("rule", RULES)
def test_every_new_filter_is_as_long_as_the_kept_ones_are_on_average(rule: str) -> None:
    state, graph, free = wide()
    grown = regrow(state, graph, free, seed=1, diversity=PURE[rule])
    mean = rows(state, "conv2", slice(20, 32)).norm(dim=1).mean()
    torch.testing.assert_close(
        rows(grown, "conv2", slice(20)).norm(dim=1), mean.expand(20), rtol=1e-6, atol=0
    )


def test_orthogonal_filters_are_orthogonal_to_the_kept_ones_and_to_one_another() -> None:
    state, graph, free = wide()
    grown = regrow(state, graph, free, seed=1, diversity=PURE["orthogonal"])
    unit = F.normalize(rows(grown, "conv2", slice(None)))
    new, kept = unit[:20], unit[20:]
    assert (new @ kept.T).abs().max() < 1e-6
    assert (new @ new.T - torch.eye(20)).abs().max() < 1e-6


def test_orthogonal_filters_stay_so_if_kept_filters_repeat_one_another() -> None:
    state, graph, free = wide()
    state["conv2.weight"][21:25] = state["conv2.weight"][20]
    grown = regrow(state, graph, free, seed=1, diversity=PURE["orthogonal"])
    unit = F.normalize(rows(grown, "conv2", slice(None)))
    assert (unit[:20] @ unit[20:].T).abs().max() < 1e-6


def test_as_many_are_orthogonal_as_the_fan_in_leaves_room_for() -> None:
    state, graph, free = wide(out=80, count=20)  # 60 kept filters, fan-in 72: room for 12
    grown = regrow(state, graph, free, seed=1, diversity=PURE["orthogonal"])
    unit = F.normalize(rows(grown, "conv2", slice(None)))
    overlap = (unit[:20] @ unit[20:].T).abs().amax(1)
    assert (overlap < 1e-6).sum() == 12
    assert (overlap > 1e-2).sum() == 8


def test_a_depthwise_convolution_falls_back_for_want_of_room() -> None:
    net, graph, free = prior("mobilenetv2")
    grown = regrow(read_state(net), graph, free, seed=1, diversity=PURE["orthogonal"])
    key = "blocks.16.depthwise.conv.weight"
    own = freed_index(graph, free).own[key]
    weight = grown[key].flatten(1).double()
    kept = np.setdiff1d(np.arange(len(weight)), own)
    assert weight.shape[1] == 9 < len(kept)
    new = weight[own]
    torch.testing.assert_close(
        new.norm(dim=1), weight[kept].norm(dim=1).mean().expand(len(own)), rtol=1e-5, atol=0
    )
    assert torch.linalg.matrix_rank(new) == 9  # they are no copies of one another
    assert (F.normalize(new) @ F.normalize(weight[kept]).T).abs().amax(1).min() > 1e-2


def test_resampled_filters_resemble_a_kept_one_without_being_it() -> None:
    state, graph, free = wide()
    grown = regrow(state, graph, free, seed=1, diversity=PURE["resample"])
    unit = F.normalize(rows(grown, "conv2", slice(None)))
    nearest = (unit[:20] @ unit[20:].T).amax(1)
    assert nearest.min() > 0.7
    assert nearest.max() < 0.99
    assert len({int(i) for i in (unit[:20] @ unit[20:].T).argmax(1)}) > 4


def test_xavier_draws_are_uniform_and_kaiming_draws_normal() -> None:
    state, graph, free = wide(out=64, count=48)
    peaks = {}
    for rule in ("xavier", "kaiming"):
        drawn = rows(regrow(state, graph, free, seed=1, diversity=PURE[rule]), "conv2", slice(48))
        # Fourth moment over squared variance: 1.8 for a uniform, 3 for a normal distribution.
        peaks[rule] = float((drawn**4).mean() / (drawn**2).mean() ** 2)
    assert peaks["xavier"] == pytest.approx(1.8, abs=0.15)
    assert peaks["kaiming"] == pytest.approx(3.0, abs=0.3)


def kind_of(new: Tensor, kept: Tensor) -> str:
    """Tell by which rule a filter was drawn: by its overlap with the kept, and by its tails."""
    overlap = float((F.normalize(kept) @ F.normalize(new, dim=0)).abs().max())
    if overlap < 1e-6:
        return "orthogonal"
    if overlap > 0.6:
        return "resample"
    # A uniform draw is bounded at sqrt(3) of its deviation; 288 normal ones never are.
    return "xavier" if new.abs().max() / new.square().mean().sqrt() < 1.95 else "kaiming"


@pytest.mark.parametrize(
    ("diversity", "expected"),
    [
        (Diversity(), (8, 4, 4, 4)),
        (Diversity(1, 1, 1, 1), (5, 5, 5, 5)),
        (Diversity(0, 3, 0, 1), (0, 15, 0, 5)),
        (Diversity(0.4, 0, 0.1, 0), (16, 0, 4, 0)),
    ],
)
def test_filters_are_drawn_in_the_shares_asked_for(
    diversity: Diversity, expected: tuple[int, ...]
) -> None:
    class Broad(nn.Module):
        """Fan-in 288, lest the statistics of one filter be a matter of luck."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
            self.conv2, self.bn2 = nn.Conv2d(32, 40, 3), nn.BatchNorm2d(40)
            self.fc = nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Broad()
    graph = FilterGraph.build(net, (3, 8, 8))
    free = FreeSet({"conv2": tuple(range(20))})
    grown = regrow(read_state(net), graph, free, seed=4, diversity=diversity)
    weight = rows(grown, "conv2", slice(None))
    kinds = [kind_of(filter_, weight[20:]) for filter_ in weight[:20]]
    assert tuple(kinds.count(rule) for rule in RULES) == expected
    assert kinds != sorted(kinds, key=RULES.index), "the rules are dealt out in random order"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13])
def test_shares_that_do_not_divide_evenly_still_draw_every_filter(count: int) -> None:
    state, graph, _ = wide()
    free = FreeSet({"conv2": tuple(range(count))})
    grown = regrow(state, graph, free, seed=1, diversity=Diversity(1, 1, 1, 0))
    new = rows(grown, "conv2", slice(count))
    assert torch.isfinite(new).all()
    assert not (new == rows(state, "conv2", slice(count))).all(1).any()


@pytest.mark.parametrize(
    "shares",
    [(0, 0, 0, 0), (-0.1, 1, 1, 1), (math.nan, 1, 1, 1), (1, 1, math.nan, 1), (1, math.inf, 1, 1)],
)
def test_shares_that_cannot_be_used_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"regrow shares are \("):
        Diversity(*shares)
