"""Layouts: what each scope may train, and how it is packed."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.errors import NetError, UpdateError
from common.filters import FilterGraph, FreeSet, cut, freed_index
from common.layout import (
    Entry,
    Layout,
    consolidation_layout,
    dense_layout,
    rates_of,
    scope_layout,
    without_scales,
)
from common.nets import build
from common.state import State, read_state, state_digest, write_state

SCOPES = ("rows", "group", "all")


class Plain(nn.Module):
    """A BatchNorm on the image, a constant buffer, a hidden linear layer with its own BN."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((3, 1, 1), 0.1))
        self.bn0 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 6)
        self.bn1 = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(self.bn0(x - self.offset))))
        return self.fc(F.relu(self.bn1(self.hidden(F.max_pool2d(x, 4).flatten(1)))))


@pytest.fixture(scope="module")
def resnet() -> tuple[FilterGraph, State]:
    net = build("resnet8", 5, 3, 4)
    return FilterGraph.build(net, (3, 16, 16)), read_state(net)


@pytest.fixture(scope="module")
def plain() -> tuple[FilterGraph, State]:
    net = Plain()
    return FilterGraph.build(net, (3, 8, 8)), read_state(net)


def some_free(graph: FilterGraph) -> FreeSet:
    return FreeSet({layer.name: (0, layer.width - 1) for layer in graph.layers})


def named(layout: Layout) -> dict[str, set[int]]:
    """Flat positions of every tensor that a layout names."""
    return {
        e.tensor: set(range(e.size)) if e.index is None else set(e.index.tolist())
        for e in layout.entries
    }


# ---------------------------------------------------------------- what a scope names


def test_rows_are_the_freed_filters_and_their_columns_of_the_head(
    plain: tuple[FilterGraph, State],
) -> None:
    graph, state = plain
    layout = scope_layout("rows", graph, FreeSet({"conv": (1, 3)}), state)
    fan_in = 3 * 3 * 3
    rows = {r * fan_in + i for r in (1, 3) for i in range(fan_in)}
    own = ("conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    assert named(layout) == {"conv.weight": rows, **{name: {1, 3} for name in own}}


def test_rows_hold_the_columns_of_the_head_but_not_of_other_layers(
    resnet: tuple[FilterGraph, State],
) -> None:
    graph, state = resnet
    last = "layer3.0.conv2"
    free = FreeSet({last: (2,)})
    places = freed_index(graph, free)
    rows = named(scope_layout("rows", graph, free, state))
    assert rows["fc.weight"] == {16 * row + 2 for row in range(5)}
    assert "fc.bias" not in rows
    for name, positions in places.own.items():
        size = state[name][0].numel()
        assert rows[name] == {int(p) * size + i for p in positions for i in range(size)}
    inner = FreeSet({"layer1.0.conv1": (1,)})
    assert "layer1.0.conv2.weight" not in named(scope_layout("rows", graph, inner, state))


def test_group_adds_outgoing_slices_every_bn_and_the_head(
    resnet: tuple[FilterGraph, State],
) -> None:
    graph, state = resnet
    free = FreeSet({"layer1.0.conv1": (1,)})
    group = named(scope_layout("group", graph, free, state))
    assert group["layer1.0.conv2.weight"] == {
        (row * 4 + 1) * 9 + i for row in range(4) for i in range(9)
    }
    whole = [n for n in state if "bn" in n or "downsample.1" in n or n.startswith("fc.")]
    assert all(group[name] == set(range(state[name].numel())) for name in whole)
    assert set(group) == {*whole, "layer1.0.conv1.weight", "layer1.0.conv2.weight"}


def test_each_scope_contains_the_one_before(resnet: tuple[FilterGraph, State]) -> None:
    graph, state = resnet
    rows, group, everything = (
        named(scope_layout(scope, graph, some_free(graph), state)) for scope in SCOPES
    )
    assert all(rows[name] <= group[name] for name in rows)
    assert all(group[name] <= everything[name] for name in group)
    assert sum(map(len, rows.values())) < sum(map(len, group.values()))
    assert everything == {name: set(range(t.numel())) for name, t in state.items()}


def test_rows_of_a_concatenation_name_the_right_channels_behind_it() -> None:
    class Concatenation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.bn_a, self.bn_b = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = torch.cat([x, self.b(F.relu(self.bn_a(x)))], 1)
            return self.fc(F.relu(self.bn_b(x)).mean((2, 3)))

    net = Concatenation()
    graph = FilterGraph.build(net, (3, 8, 8))
    rows = named(scope_layout("rows", graph, FreeSet({"a": (1,), "b": (2,)}), read_state(net)))
    assert rows["bn_a.weight"] == {1}
    assert rows["bn_b.running_var"] == {1, 4 + 2}
    assert rows["fc.weight"] == {8 * row + c for row in range(3) for c in (1, 6)}


@pytest.mark.parametrize("scope", ["group", "all"])
def test_a_bn_that_belongs_to_no_filter_group_is_known_as_one(
    plain: tuple[FilterGraph, State], scope: str
) -> None:
    graph, state = plain
    layout = scope_layout(scope, graph, FreeSet({"conv": (0,)}), state)
    kinds = {e.tensor: e.kind for e in layout.entries}
    for bn in ("bn0", "bn", "bn1"):
        assert [kinds[f"{bn}.{leaf}"] for leaf in ("weight", "bias")] == ["scale", "shift"]
        assert kinds[f"{bn}.running_mean"] == "mean"
        assert kinds[f"{bn}.running_var"] == "var"


def test_nothing_free_leaves_rows_empty(resnet: tuple[FilterGraph, State]) -> None:
    graph, state = resnet
    layout = scope_layout("rows", graph, FreeSet({}), state)
    assert layout.size == 0
    assert layout.pack(state).shape == (0,)
    assert state_digest(layout.unpack(state, np.zeros(0, np.float32))) == state_digest(state)
    assert [len(part) for part in layout.statistics] == [0, 0]


def test_consolidation_names_all_but_the_free_scales_and_shifts(
    resnet: tuple[FilterGraph, State],
) -> None:
    graph, state = resnet
    free = some_free(graph)
    got = named(consolidation_layout(graph, free, state))
    everything = named(dense_layout(graph, state))
    missing = {n: everything[n] - got[n] for n in everything if everything[n] != got[n]}
    own = freed_index(graph, free).own
    scales = [n for n in own if own[n].size and (n.endswith(".weight") or n.endswith(".bias"))]
    expected = {n: set(own[n].tolist()) for n in scales if state[n].dim() == 1}
    assert missing == expected
    assert len(expected) == 2 * sum(n.endswith("running_mean") for n in state)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_unpacking_what_was_packed_gives_the_same_state(
    resnet: tuple[FilterGraph, State], scope: str, seed: int
) -> None:
    graph, shapes = resnet
    rng = np.random.default_rng(seed)
    free = FreeSet(
        {
            layer.name: tuple(rng.permutation(layer.width)[: rng.integers(layer.width)].tolist())
            for layer in graph.layers
        }
    )
    layout = scope_layout(scope, graph, free, shapes)
    one, other = (
        {n: torch.from_numpy(rng.standard_normal(t.shape, np.float32)) for n, t in shapes.items()}
        for _ in range(2)
    )
    packed = layout.pack(one)
    assert packed.dtype == np.float32
    assert packed.shape == (layout.size,)
    moved = layout.unpack(other, packed)
    assert layout.pack(moved).tobytes() == packed.tobytes()
    for name in shapes:
        positions = torch.zeros(shapes[name].numel(), dtype=torch.bool)
        positions[list(named(layout).get(name, ()))] = True
        expected = torch.where(positions, one[name].flatten(), other[name].flatten())
        assert torch.equal(moved[name].flatten(), expected), name


def test_unpacking_changes_neither_the_state_nor_the_values(
    resnet: tuple[FilterGraph, State],
) -> None:
    graph, state = resnet
    layout = dense_layout(graph, state)
    before, values = state_digest(state), np.ones(layout.size, np.float32)
    result = layout.unpack(state, values)
    for tensor in result.values():
        tensor.zero_()
    assert state_digest(state) == before
    assert (values == 1).all()


def test_offsets_say_where_a_tensor_begins(resnet: tuple[FilterGraph, State]) -> None:
    graph, state = resnet
    layout = scope_layout("rows", graph, some_free(graph), state)
    packed = layout.pack(state)
    for entry in layout.entries:
        start = layout.offsets[entry.tensor]
        part = packed[start : start + entry.size]
        assert np.array_equal(part, entry.read(state[entry.tensor]).numpy())


@pytest.mark.parametrize("scope", SCOPES)
def test_statistics_pair_the_mean_of_a_channel_with_its_variance(
    resnet: tuple[FilterGraph, State], scope: str
) -> None:
    graph, state = resnet
    # Every mean is numbered, and its variance gets the same number with the sign turned.
    numbered, count = {n: torch.zeros_like(t) for n, t in state.items()}, 0
    for name in state:
        if name.endswith("running_mean"):
            size = len(state[name])
            numbers = torch.arange(count + 1, count + size + 1, dtype=torch.float32)
            numbered[name] = numbers
            numbered[name.replace("running_mean", "running_var")] = -numbers
            count += size
    layout = scope_layout(scope, graph, some_free(graph), state)
    means, variances = layout.statistics
    packed = layout.pack(numbered)
    assert np.array_equal(packed[means], -packed[variances])
    assert (packed[means] > 0).all()
    assert len(means) == (packed > 0).sum()
    assert len(means) == sum(e.size for e in layout.entries if e.kind == "mean") > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n: np.zeros(n + 1, np.float32),
        lambda n: np.zeros(n - 1, np.float32),
        lambda n: np.zeros(n, np.float64),
        lambda n: np.zeros((n, 1), np.float32),
        lambda n: np.zeros(n, np.int32),
    ],
)
def test_values_of_another_size_or_type_are_refused(
    resnet: tuple[FilterGraph, State], wrong: object
) -> None:
    graph, state = resnet
    layout = scope_layout("group", graph, some_free(graph), state)
    with pytest.raises(UpdateError, match=rf"float32\[{layout.size}\] for scope 'group'"):
        layout.unpack(state, wrong(layout.size))


# ---------------------------------------------------------------- the digest


def test_the_digest_tells_scopes_and_free_sets_apart(resnet: tuple[FilterGraph, State]) -> None:
    graph, state = resnet
    sets = [
        FreeSet({}),
        FreeSet({"conv1": (0,)}),
        FreeSet({"conv1": (1,)}),
        FreeSet({"conv1": (0, 1)}),
        FreeSet({"layer1.0.conv1": (0,)}),
    ]
    digests = [scope_layout(s, graph, f, state).digest for s in ("rows", "group") for f in sets]
    digests += [scope_layout("all", graph, sets[1], state).digest]
    digests += [consolidation_layout(graph, f, state).digest for f in sets]
    assert len(set(digests)) == len(digests)


def test_the_digest_depends_on_names_and_shapes_not_on_values(
    resnet: tuple[FilterGraph, State],
) -> None:
    graph, state = resnet
    other = {name: torch.rand_like(tensor) for name, tensor in reversed(state.items())}
    free = some_free(graph)
    assert (
        scope_layout("rows", graph, free, state).digest
        == scope_layout("rows", copy.deepcopy(graph), free, other).digest
    )


def test_the_digest_tells_a_whole_tensor_from_a_part_of_it() -> None:
    whole, part = (
        Layout("rows", (Entry("a", (2,), "weight", index),)) for index in (None, np.array([0, 1]))
    )
    assert whole.digest != part.digest


# ---------------------------------------------------------------- states


def test_a_state_is_a_copy_without_counters() -> None:
    net = build("resnet8", 5, 3, 4)
    state = read_state(net)
    assert not [name for name in state if "num_batches_tracked" in name]
    before = state_digest(state)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.add_(1)
    assert state_digest(state) == before
    write_state(net, state)
    assert state_digest(read_state(net)) == before


def test_a_state_of_another_net_is_refused_by_name() -> None:
    net = build("resnet8", 5, 3, 4)
    state = read_state(net)
    with pytest.raises(NetError, match=r"lacks tensor 'fc\.bias'"):
        write_state(net, {k: v for k, v in state.items() if k != "fc.bias"})
    with pytest.raises(NetError, match=r"unknown tensor 'extra'"):
        write_state(net, {**state, "extra": torch.zeros(1)})
    with pytest.raises(NetError, match=r"'fc\.bias' has shape \(7,\), the net expects \(5,\)"):
        write_state(net, {**state, "fc.bias": torch.zeros(7)})


def test_a_state_digest_sees_every_bit_name_and_shape() -> None:
    state = {"a": torch.zeros(4), "b": torch.ones(2)}
    variants = [
        state,
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"c": torch.zeros(4), "b": torch.ones(2)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0]), "b": torch.ones(2)},
        {"a": torch.zeros(4)},
    ]
    assert len({state_digest(v) for v in variants}) == len(variants)
    assert state_digest(dict(reversed(state.items()))) == state_digest(state)


def test_the_layout_of_a_whole_model_carries_it_to_another_net(
    plain: tuple[FilterGraph, State],
) -> None:
    graph, state = plain
    layout = dense_layout(graph, state)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert state_digest(layout.unpack(zeros, layout.pack(state))) == state_digest(state)
    net = Plain()
    write_state(net, layout.unpack(zeros, layout.pack(state)))
    slim = cut(net, graph, FreeSet({"conv": (0,)}))
    assert slim(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


# ---------------------------------------------------------------- parts of a layout


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_off_loses_its_scales_and_nothing_else(
    resnet: tuple[FilterGraph, State], scope: str
) -> None:
    graph, state = resnet
    off = FreeSet({layer.name: (1,) for layer in graph.layers})
    layout = scope_layout(scope, graph, some_free(graph), state)
    before, after = named(layout), named(without_scales(layout, graph, off))
    own = freed_index(graph, off).own
    for entry in layout.entries:
        gone = before[entry.tensor] - after[entry.tensor]
        scale = entry.kind in ("scale", "shift")
        assert gone == (set(own[entry.tensor]) & before[entry.tensor] if scale else set())


def test_without_statistics_only_those_are_left_out(resnet: tuple[FilterGraph, State]) -> None:
    graph, state = resnet
    layout = dense_layout(graph, state)
    kinds = {entry.kind for entry in layout.without_statistics().entries}
    assert {entry.kind for entry in layout.entries} - kinds == {"mean", "var"}


def test_rates_are_one_inside_and_the_factor_outside(resnet: tuple[FilterGraph, State]) -> None:
    graph, state = resnet
    inner = scope_layout("group", graph, some_free(graph), state)
    layout = dense_layout(graph, state)
    rates = rates_of(layout, inner, 0.25)
    within = named(inner)
    for entry in layout.entries:
        expected = torch.full((entry.size,), 0.25)
        expected[sorted(within.get(entry.tensor, set()))] = 1.0
        assert torch.equal(rates[entry.tensor], expected)
