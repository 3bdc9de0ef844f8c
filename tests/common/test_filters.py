"""Filter groups: what belongs together, what can be freed, and what is refused."""

import copy
import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from own_nets import Dense, PreActivation
from torch import Tensor, nn

from common.errors import ConfigError, DataError, NetError, StoreError
from common.filters import (
    FilterGraph,
    FreeSet,
    Slot,
    common_part,
    cut,
    freed_index,
    is_off,
    parameter_count,
    portion,
    switch_off,
    union,
)
from common.importance import bn_scale, choose, combine_ranks, sensitivity, taylor
from common.nets import WIDTHS, build

# ---------------------------------------------------------------- nets of a user's own


class Chain(nn.Module):
    """Three Conv+BN+activation in a row; `between` stands after the first."""

    def __init__(self, between: nn.Module | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.between = between or nn.ReLU()
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Flat(nn.Module):
    """A flatten of 4 x 4 pixels a channel, and a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 4)
        return self.fc(F.relu(self.hidden(torch.flatten(x, 1))))


class Squeeze(nn.Module):
    """Channel attention by linear layers (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 4)
        self.up = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return F.relu(x) * weight[:, :, None, None]


class JoinedSum(nn.Module):
    """A concatenation added to one convolution: two layers, one of them two convolutions' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.c = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
        return self.fc(F.relu(x).mean((2, 3)))


class Remembering(Chain):
    """Keeps its last features, which a deep copy would choke on."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "chain": (Chain, (3, 16, 16)),
    "chain with biases": (lambda: Chain(bias=True), (3, 16, 16)),
    "concatenation": (Dense, (3, 16, 16)),
    "flatten": (Flat, (3, 16, 16)),
    "pre-activation": (PreActivation, (3, 16, 16)),
    "squeeze and excitation": (lambda: Chain(Squeeze()), (3, 16, 16)),
    "sum of concatenation": (JoinedSum, (3, 16, 16)),
    "one-parameter PReLU": (lambda: Chain(nn.PReLU()), (3, 16, 16)),
    "remembering": (Remembering, (3, 16, 16)),
}
SMALL = {name: 0.25 if name == "mobilenetv2" else 8 for name in WIDTHS}
ALL = [*WIDTHS, *OWN]


def make(name: str) -> tuple[nn.Module, FilterGraph]:
    """Return a net with random weights and BatchNorm statistics, in eval mode, and its graph."""
    torch.manual_seed(0)
    if name in OWN:
        function, shape = OWN[name]
        net = function()
    else:
        net, shape = build(name, 10, 3, SMALL[name]), (3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval(), FilterGraph.build(net, shape)


@pytest.fixture(autouse=True)
def _own_generator() -> object:
    with torch.random.fork_rng(devices=[]):
        yield


def slots(graph: FilterGraph, name: str) -> set[tuple[str, int, str]]:
    return {(slot.tensor, slot.axis, slot.role) for slot in graph.layer(name).slots}


def random_free(graph: FilterGraph, seed: int, most: float = 0.6) -> FreeSet:
    rng = np.random.default_rng(seed)
    channels = {}
    for layer in graph.layers:
        count = rng.integers(0, max(1, int(most * layer.width)) + 1)
        drawn = rng.permutation(layer.width)[: min(count, layer.width - 1)]
        channels[layer.name] = tuple(int(channel) for channel in drawn)
    return FreeSet(channels)


# ---------------------------------------------------------------- the property that counts


@pytest.mark.parametrize("name", ALL)
def test_switching_off_equals_cutting_out(name: str) -> None:
    net, graph = make(name)
    with torch.no_grad():
        for seed in range(3):
            free = random_free(graph, seed)
            assert not is_off(net, graph, free)
            off = copy.deepcopy(net)
            switch_off(off, graph, free)
            assert is_off(off, graph, free)
            slim = cut(net, graph, free)
            images = torch.randn(2, *graph.input_shape)
            expected = off(images)
            assert torch.allclose(
                slim(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
            )
            assert not torch.allclose(net(images), expected, rtol=1e-3)
            assert parameter_count(slim) < parameter_count(net)


def test_a_cut_net_agrees_with_its_own_tensors() -> None:
    """Its attributes are those of a net built at that size: it can be traced and cut again."""
    net, graph = make("mobilenetv2")
    free = choose(graph, bn_scale(net, graph), 0.3)
    slim = cut(net, graph, free)
    for module in slim.modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == shape
            assert module.groups in (1, module.out_channels)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_var.shape == (module.num_features,)
    again = FilterGraph.build(slim, graph.input_shape)
    assert again.count == graph.count - free.count


def test_cutting_leaves_the_net_and_what_is_frozen_alone() -> None:
    net, graph = make("resnet8")
    net.get_parameter("conv1.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    slim = cut(net, graph, random_free(graph, 1))
    assert not slim.get_parameter("conv1.weight").requires_grad
    assert slim.get_parameter("fc.weight").requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_no_layer_can_be_cut_to_nothing() -> None:
    net, graph = make("chain")
    with pytest.raises(NetError, match="'conv1' would be cut to zero"):
        cut(net, graph, FreeSet({"conv1": tuple(range(8))}))


@pytest.mark.parametrize(
    ("channels", "says"),
    [({"gone": (0,)}, "layer 'gone'"), ({"conv1": (8,)}, "channel 8"), ({"conv1": (-1,)}, "-1")],
)
def test_a_free_set_of_another_net_is_refused(channels: dict[str, tuple[int]], says: str) -> None:
    net, graph = make("chain")
    for act in (cut, switch_off, is_off):
        with pytest.raises(NetError, match=says):
            act(net, graph, FreeSet(channels))


# ---------------------------------------------------------------- what belongs together


def test_residual_additions_couple_a_whole_stage() -> None:
    _, graph = make("resnet20")
    names = [layer.name for layer in graph.layers]
    assert len(names) == 3 + 9  # a stream a stage, and the inside of every block
    assert slots(graph, "conv1") >= {
        ("conv1.weight", 0, "own"),
        ("bn1.weight", 0, "own"),
        ("layer1.0.conv2.weight", 0, "own"),
        ("layer1.2.bn2.running_var", 0, "own"),
        ("layer1.1.conv1.weight", 1, "out"),
        ("layer2.0.downsample.0.weight", 1, "out"),
    }
    assert ("layer2.0.downsample.0.weight", 0, "own") in slots(graph, "layer2.0.conv2")
    assert slots(graph, "layer2.1.conv1") == {
        ("layer2.1.conv1.weight", 0, "own"),
        *((f"layer2.1.bn1.{leaf}", 0, "own") for leaf in ("weight", "bias")),
        *((f"layer2.1.bn1.running_{leaf}", 0, "own") for leaf in ("mean", "var")),
        ("layer2.1.conv2.weight", 1, "out"),
    }


def test_a_depthwise_convolution_belongs_to_its_input_s_layer() -> None:
    _, graph = make("mobilenetv2")
    assert not any("depthwise" in layer.name for layer in graph.layers)
    found = slots(graph, "blocks.1.expand.conv")
    assert ("blocks.1.depthwise.conv.weight", 0, "own") in found
    assert ("blocks.1.depthwise.bn.weight", 0, "own") in found
    assert ("blocks.1.project.conv.weight", 1, "out") in found
    assert ("blocks.0.depthwise.conv.weight", 0, "own") in slots(graph, "stem.conv")


def test_a_concatenation_shifts_positions() -> None:
    _, graph = make("concatenation")
    assert [layer.name for layer in graph.layers] == ["stem", "grow1", "grow2"]
    by_tensor = {slot.tensor: slot for slot in graph.layer("grow1").slots if slot.axis == 0}
    assert by_tensor["bn_c.weight"].channels == (0, 1, 2, 3)
    assert by_tensor["bn_c.weight"].index == (6, 7, 8, 9)
    freed = freed_index(graph, FreeSet({"stem": (5,), "grow1": (1,), "grow2": (0, 3)}))
    assert freed.out["fc.weight"].tolist() == [5, 7, 10, 13]
    assert freed.own["bn_b.bias"].tolist() == [5, 7]


def test_a_flatten_gives_a_filter_all_its_pixels() -> None:
    _, graph = make("flatten")
    freed = freed_index(graph, FreeSet({"conv": (0, 7)}))
    assert freed.out["hidden.weight"].tolist() == [*range(16), *range(112, 128)]
    assert freed.own["conv.bias"].tolist() == [0, 7]
    assert "hidden.weight" not in freed.own
    assert graph.head == "fc"


def test_positions_are_apart_by_role() -> None:
    """A convolution inside a layer's stream has freed rows and freed columns."""
    _, graph = make("resnet8")
    freed = freed_index(graph, FreeSet({"conv1": (1, 3), "layer1.0.conv1": (0,)}))
    assert freed.own["layer1.0.conv1.weight"].tolist() == [0]
    assert freed.out["layer1.0.conv1.weight"].tolist() == [1, 3]
    assert "fc.weight" not in freed.own
    assert "fc.weight" not in freed.out  # nothing of the last stage is free


@pytest.mark.parametrize("name", ALL)
def test_every_convolution_row_belongs_to_exactly_one_filter_group(name: str) -> None:
    net, graph = make(name)
    rows: dict[str, list[int]] = {}
    for layer in graph.layers:
        for slot in layer.slots:
            assert slot.axis == (0 if slot.role == "own" else 1)
            if slot.kind == "weight" and slot.role == "own":
                rows.setdefault(slot.tensor, []).extend(slot.index)
    for module_name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            owned = sorted(rows[f"{module_name}.weight"])
            assert owned == list(range(module.out_channels))
    tensors = {slot.tensor for layer in graph.layers for slot in layer.slots}
    assert not any("num_batches_tracked" in tensor for tensor in tensors)
    assert f"{graph.head}.bias" not in tensors


def test_building_leaves_the_net_and_the_generator_alone() -> None:
    net = build("resnet8", 10, width=8)
    net.get_parameter("conv1.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    filters = list(warnings.filters)
    with torch.no_grad():  # tracing needs gradients: it must switch them on by itself
        FilterGraph.build(net, (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), random)
    assert warnings.filters == filters
    assert net.training
    assert not net.get_parameter("conv1.weight").requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_the_weights_do_not_matter() -> None:
    """All zeros would hide a wrong connection from a check on the net's own weights."""
    net = build("resnet8", 10, width=8)
    expected = FilterGraph.build(net, (3, 32, 32))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert FilterGraph.build(net, (3, 32, 32)) == expected
    shuffled = Chain(Shuffle())
    with torch.no_grad():
        for parameter in shuffled.parameters():
            parameter.zero_()
    with pytest.raises(NetError, match="shuffle"):
        FilterGraph.build(shuffled, (3, 16, 16))


def test_resnet110_takes_a_few_seconds() -> None:
    net = build("resnet110", 10)
    began = time.process_time()
    graph = FilterGraph.build(net, (3, 32, 32))
    assert time.process_time() - began < 8
    assert len(graph.to_json()) < 100_000


# ---------------------------------------------------------------- digests and JSON


@pytest.mark.parametrize("name", ALL)
def test_json_brings_the_graph_back(name: str) -> None:
    _, graph = make(name)
    again = FilterGraph.from_json(graph.to_json())
    assert again == graph
    assert again.digest == graph.digest


def test_digest_changes_if_and_only_if_the_groups_do() -> None:
    def digest(name: str, classes: int = 10, width: float = 8) -> str:
        return FilterGraph.build(build(name, classes, width=width), (3, 32, 32)).digest

    same = {digest("resnet8"), digest("resnet8"), digest("resnet8", classes=7)}
    other = {digest("resnet8", width=12), digest("resnet20"), digest("vgg11")}
    assert len(same) == 1
    assert len(same | other) == 4


def test_digest_sees_every_part_of_a_slot() -> None:
    graph = make("concatenation")[1]
    data = json.loads(graph.to_json())
    seen = {graph.digest}
    slot = data["layers"][1]["slots"][-1]
    for field, value in [("tensor", "x"), ("kind", "bias"), ("index", [0, 1, 2, 4])]:
        kept, slot[field] = slot[field], value
        seen.add(FilterGraph.from_json(json.dumps(data)).digest)
        slot[field] = kept
    assert len(seen) == 4


def test_digests_are_those_of_every_process() -> None:
    """Python's hashes differ from process to process; the digests must not."""
    code = (
        "from common.filters import FilterGraph, FreeSet; from common.nets import build;"
        "print(FilterGraph.build(build('resnet8', 10), (3, 32, 32)).digest,"
        "FreeSet({'b': (2, 1), 'a': (0,)}).digest)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    graph = FilterGraph.build(build("resnet8", 10), (3, 32, 32))
    assert ran.stdout.split() == [graph.digest, FreeSet({"a": (0,), "b": (1, 2)}).digest]
    assert ran.stderr == ""
    assert graph.digest.startswith("0b724b86a5e7")


channels = st.dictionaries(
    st.sampled_from("abcd"), st.sets(st.integers(0, 20), min_size=1).map(tuple)
)


@given(channels, channels)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_free_sets_are_equal_where_their_digests_are(
    one: dict[str, tuple[int, ...]], two: dict[str, tuple[int, ...]]
) -> None:
    first, second = FreeSet(one), FreeSet(two)
    assert (first == second) == (first.digest == second.digest)
    assert FreeSet.from_json(first.to_json()) == first
    assert first.count == sum(len(part) for part in one.values())
    assert first == FreeSet({name: part[::-1] for name, part in reversed(one.items())})


def test_a_free_set_counts_its_groups() -> None:
    _, graph = make("chain")
    assert graph.count == 20
    assert FreeSet({"conv1": (0, 1), "conv2": (3,)}).share(graph) == pytest.approx(3 / 20)
    assert FreeSet({"conv1": ()}) == FreeSet({})
    assert FreeSet({}).empty
    assert not FreeSet({"conv1": (0,)}).empty


@given(channels, channels, st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_free_sets_are_joined_compared_and_dealt_out(
    one: dict[str, tuple[int, ...]], two: dict[str, tuple[int, ...]], parts: int
) -> None:
    first, second = FreeSet(one), FreeSet(two)
    both = union(first, second)
    shared = common_part(first, second)
    assert both.count == first.count + second.count - shared.count
    assert common_part(both, first) == first
    assert union(shared, second) == second
    left, dealt = first, []
    for number in range(parts):
        part, left = portion(left, parts - number)
        dealt.append(part)
    assert left.empty
    assert union(*dealt) == first
    assert sum(part.count for part in dealt) == first.count
    for name, some in first.channels.items():
        sizes = [len(part.channels.get(name, ())) for part in dealt]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == len(some)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 3}', '{"a": [2, 1]}', '{"a": ["1"]}'])
def test_a_malformed_free_set_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="free set is malformed"):
        FreeSet.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", '{"layers": [{}]}', '{"layers": 3}'])
def test_a_malformed_graph_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="filter graph is malformed"):
        FilterGraph.from_json(text)


# ---------------------------------------------------------------- what is refused


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pairs = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return F.relu(pairs.reshape(x.shape))


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return F.relu(torch.cat([second, first], 1))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - x.mean(1, keepdim=True))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x * self.gain)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        return x


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.aside(x).detach())


class Bypass(nn.Module):
    """A convolution without BatchNorm, added to one that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.raw = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.raw(x))


def grouped(groups: int, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, outputs, 1, groups=groups), nn.BatchNorm2d(outputs))


def chain_with(**changes: nn.Module) -> nn.Module:
    net = Chain()
    for name, module in changes.items():
        setattr(net, name, module)
    return net


def on_the_image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), Chain())


def added_to_the_image() -> nn.Module:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.rest = Chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x + self.first(x))

    return Added()


def shared() -> nn.Module:
    net = Chain(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    net.bn1 = net.between[1]
    return net


def scored_by_a_convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def added_to_the_logits() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = Chain()
            self.side = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x) + self.side(x).mean((2, 3))

    return Net()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no BatchNorm": (lambda: chain_with(bn1=nn.Identity()), "'conv1'.*scaled by no BatchNorm2d"),
    "grouped": (lambda: Chain(grouped(2)), "'between.0' is grouped \\(2 groups"),
    "depthwise multiplier": (
        lambda: Chain(nn.Sequential(grouped(8, 16), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))),
        "'between.0.0' is grouped \\(8 groups over 8 -> 16",
    ),
    "affine": (lambda: chain_with(bn2=nn.BatchNorm2d(12, affine=False)), "'bn2' has affine=False"),
    "statistics": (
        lambda: chain_with(bn2=nn.BatchNorm2d(12, track_running_stats=False)),
        "'bn2' has track_running_stats=False",
    ),
    "shuffle": (lambda: Chain(Shuffle()), "layer 'conv1'.*shuffle"),
    "swapped halves": (lambda: Chain(Halves()), "cannot be traced to one filter of.*'conv1'"),
    "mean over channels": (lambda: Chain(Centred()), "layer 'conv1'.*mean over channels"),
    "sigmoid": (lambda: Chain(nn.Sigmoid()), "layer 'conv1'.*f\\(0\\) != 0"),
    "sum with a raw convolution": (lambda: Chain(Bypass()), "layer 'between.conv.0'"),
    "GroupNorm": (lambda: Chain(nn.GroupNorm(2, 8)), "GroupNorm 'between'.*'conv1'"),
    "PReLU a channel": (lambda: Chain(nn.PReLU(8)), "PReLU 'between'.*'conv1'"),
    "transposed": (lambda: Chain(nn.ConvTranspose2d(8, 8, 1)), "ConvTranspose2d 'between'"),
    "bare parameter": (lambda: Chain(Bare()), "bare parameter.*'conv1'"),
    "weight norm": (
        lambda: chain_with(
            conv2=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 12, 3, padding=1))
        ),
        "'conv2.weight' of layer 'conv1' is computed",
    ),
    "run twice": (lambda: Chain(Twice()), "Conv2d 'between.conv' is run 2 times"),
    "never run": (lambda: Chain(Idle()), "'between.aside' is run 0 times"),
    "detached": (lambda: Chain(Detached()), "'between.aside' has no part in the logits"),
    "shared": (shared, "'bn1.weight' and 'between.1.weight' are one shared tensor"),
    "depthwise on the image": (on_the_image, "'0' reads the image itself"),
    "added to the image": (added_to_the_image, "layer 'first.0'"),
    "added to the logits": (added_to_the_logits, "not that of an nn.Linear"),
    "no classifier": (scored_by_a_convolution, "linear classifier"),
    "no convolution": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), "no convolution"),
    "wrong image": (lambda: Chain(nn.Conv2d(9, 8, 1)), "cannot compute an image of shape"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_net_that_cannot_be_freed_is_refused_by_name_and_reason(why: str) -> None:
    torch.manual_seed(0)
    function, says = REFUSED[why]
    with pytest.raises(NetError, match=says) as raised:
        FilterGraph.build(function(), (3, 16, 16))
    assert "\n" not in str(raised.value)


def test_an_image_too_small_for_the_net_is_refused() -> None:
    with pytest.raises(NetError, match=r"shape \(3, 8, 8\)"):
        FilterGraph.build(build("vgg11", 10, width=8), (3, 8, 8))


# ---------------------------------------------------------------- importance


def batches(shape: tuple[int, int, int], count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(6, *shape, generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def test_planted_unimportant_filters_score_lowest() -> None:
    """A scale near zero and outgoing slices near zero are both found by the gradients."""
    net, graph = make("chain")
    planted = FreeSet({"conv1": (2, 5), "conv2": (0, 7, 9)})
    with torch.no_grad():
        for name in ("bn1.bias", "bn2.bias"):
            net.get_parameter(name).fill_(1.0)  # no other filter is dead by chance
        for layer, bn, reader in [("conv1", "bn1", "conv2"), ("conv2", "bn2", "fc")]:
            at = list(planted.channels[layer])
            net.get_parameter(f"{bn}.weight")[at] *= 1e-3
            net.get_parameter(f"{bn}.bias")[at] *= 1e-3
            net.get_parameter(f"{reader}.weight")[:, at] *= 1e-3
    data = batches(graph.input_shape)
    scores = [bn_scale(net, graph), sensitivity(net, graph, data), taylor(net, graph, data)]
    for each in [*scores, combine_ranks(scores)]:
        found = choose(graph, each, 0.25, floor=1, multiple=1)
        assert found == planted


def test_sensitivity_sees_outgoing_slices_that_scales_do_not() -> None:
    net, graph = make("chain")
    with torch.no_grad():
        net.get_parameter("fc.weight")[:, 4] = 0
    assert bn_scale(net, graph)["conv2"].argmin() != 4
    assert sensitivity(net, graph, batches(graph.input_shape))["conv2"][4] == 0


def test_bn_scale_is_the_mean_over_a_layer_s_batchnorms() -> None:
    net, graph = make("resnet8")
    scales = [net.get_parameter(f"{name}.weight") for name in ("bn1", "layer1.0.bn2")]
    expected = torch.stack(scales).abs().mean(0).detach().numpy()
    assert np.allclose(bn_scale(net, graph)["conv1"], expected)


def test_taylor_is_the_gradient_of_the_cross_entropy_at_the_scales() -> None:
    net, graph = make("resnet8")
    x, y = batches(graph.input_shape, 1)[0]
    F.cross_entropy(net(x), y).backward()
    gain = net.get_parameter("layer1.0.bn1.weight")
    expected = (gain * gain.grad).abs().detach().numpy()
    assert np.allclose(taylor(net, graph, [(x, y)])["layer1.0.conv1"], expected, rtol=1e-4)


@pytest.mark.parametrize("score", [sensitivity, taylor])
def test_measuring_changes_nothing(score: Callable[..., dict[str, np.ndarray]]) -> None:
    net, graph = make("resnet8")
    net.train()
    net.get_submodule("bn1").eval()
    net.get_parameter("bn1.weight").requires_grad_(False)
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        scores = score(net, graph, batches(graph.input_shape))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert {name: each.shape for name, each in scores.items()} == {
        layer.name: (layer.width,) for layer in graph.layers
    }
    assert all(each.dtype == np.float64 for each in scores.values())


def test_measuring_without_images_is_an_error() -> None:
    net, graph = make("chain")
    with pytest.raises(DataError, match="no images"):
        sensitivity(net, graph, [])


def test_ranks_are_combined_inside_each_layer() -> None:
    one = {"a": np.array([5.0, 1.0, 3.0]), "b": np.array([7.0])}
    two = {"a": np.array([0.0, 0.0, 0.0]), "b": np.array([9.0])}
    combined = combine_ranks([one, two])
    assert combined["a"].tolist() == [0.5, 0.25, 0.75]  # ties rank by channel number
    assert combined["b"].tolist() == [0.0]
    assert combine_ranks([one])["a"].tolist() == [1.0, 0.0, 0.5]
    with pytest.raises(ConfigError, match="no scores"):
        combine_ranks([])


# ---------------------------------------------------------------- choosing


def layer_of(width: int) -> FilterGraph:
    every = tuple(range(width))
    slot = Slot("bn.weight", 0, "own", "scale", every, every)
    data = {"name": "conv", "width": width, "slots": [vars(slot)]}
    data["slots"][0] |= {"channels": width, "index": width}
    graph = {"head": "fc", "input_shape": [3, 8, 8], "layers": [data]}
    return FilterGraph.from_json(json.dumps(graph))


def kept(width: int, share: float, **how: float) -> int:
    graph = layer_of(width)
    return width - choose(graph, {"conv": np.arange(float(width))}, share, **how).count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "share", "expected"),
    [
        (32, 0.3, 24),
        (64, 0.3, 48),
        (128, 0.3, 88),
        (512, 0.3, 360),
        (64, 0.5, 32),
        (16, 0.5, 8),
        (16, 0.3, 8),
        (16, 0.25, 16),  # 12 is as near to 8 as to 16: keep more
        (16, 0.1, 16),
        (40, 0.5, 24),  # 16 would be nearer the floor but above the cap
        (20, 0.5, 16),
        (12, 0.3, 8),  # no rounding below 16
        (12, 0.5, 8),  # the floor
        (8, 0.3, 7),  # at least one goes
        (4, 0.3, 3),
        (3, 0.3, 3),
        (1, 0.5, 1),
        (64, 0.0, 64),
        (4, 0.0, 4),
    ],
)
def test_kept_widths(width: int, share: float, expected: int) -> None:
    assert kept(width, share) == expected


def test_floor_and_rounding_can_be_set() -> None:
    assert kept(64, 0.3, multiple=1) == 45
    assert kept(10, 0.3, multiple=1, floor=1) == 7
    assert kept(10, 0.5, multiple=1, floor=6) == 6
    assert kept(64, 0.3, multiple=16) == 48
    assert kept(100, 0.29, multiple=1, cap=0.29) == 71


@given(
    width=st.integers(1, 300),
    share=st.floats(0, 0.5),
    floor=st.integers(1, 40),
    multiple=st.sampled_from([1, 4, 8, 16]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_cap_and_floor_hold_for_any_width(
    width: int, share: float, floor: int, multiple: int
) -> None:
    found = kept(width, share, floor=floor, multiple=multiple)
    assert found >= min(width, floor) or (found == width - 1 and 4 <= width < 2 * multiple)
    assert width - found <= math.floor(0.5 * width)
    if 2 * multiple <= width and found != width and width % multiple == 0:
        assert found % multiple == 0


def test_the_lowest_scored_go_and_ties_go_by_channel_number() -> None:
    graph = layer_of(8)
    scores = {"conv": np.array([3.0, 1.0, 2.0, 1.0, 9.0, 1.0, 9.0, 9.0])}
    for count, expected in [(2, (1, 3)), (4, (1, 2, 3, 5))]:
        free = choose(graph, scores, count / 8, floor=1, multiple=1)
        assert free.channels["conv"] == expected


def test_a_larger_share_frees_what_a_smaller_one_does_and_more() -> None:
    net, graph = make("resnet20")
    scores = bn_scale(net, graph)
    sets = [choose(graph, scores, share) for share in (0.1, 0.2, 0.3, 0.4, 0.5)]
    for less, more in itertools.pairwise(sets):
        for name, part in less.channels.items():
            assert set(part) <= set(more.channels[name])


def test_excluded_layers_stay_whole() -> None:
    net, graph = make("resnet8")
    free = choose(graph, bn_scale(net, graph), 0.5, exclude=["conv1"])
    assert set(free.channels) == {layer.name for layer in graph.layers} - {"conv1"}


@pytest.mark.parametrize(
    ("share", "how", "says"),
    [
        (0.6, {}, "share 0.6"),
        (-0.1, {}, "share -0.1"),
        (float("nan"), {}, "share nan"),
        (0.1, {"cap": 1.0}, "cap 1.0"),
        (0.1, {"floor": 0}, "floor 0"),
        (0.1, {"multiple": 0}, "multiple 0"),
        (0.1, {"exclude": ["stem"]}, "'stem', which is no layer; known: conv"),
    ],
)
def test_settings_out_of_range_are_refused(share: float, how: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kept(16, share, **how)


@pytest.mark.parametrize("scores", [{}, {"conv": np.ones(3)}, {"conv": np.full(16, np.nan)}])
def test_scores_of_another_net_are_refused(scores: dict[str, np.ndarray]) -> None:
    with pytest.raises(ConfigError, match=r"'conv'.*16 finite numbers"):
        choose(layer_of(16), scores, 0.3)
