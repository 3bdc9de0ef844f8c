"""A twin computes and learns what the masked dense net does, and the prior beside it."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from own_nets import PreActivation
from torch import Tensor, nn

from common import twin_cache
from common.data import Augment
from common.distill import Distillation
from common.errors import NetError
from common.filters import FilterGraph, FreeSet, cut, freed_index, switch_off
from common.frozen import training_only
from common.layout import scope_layout
from common.nets import build
from common.regrow import regrow
from common.sparsify import multi_step_objective
from common.state import read_state, write_state
from common.train import Labelled, Recipe, train
from common.twin import Twin, TwinUnsupported

NETS = {
    "resnet8": 8,
    "resnet20": 4,
    "resnet18": 4,
    "resnet18-imagenet": 4,
    "vgg11": 4,
    "mobilenetv2": 0.25,
    "concatenation": 0,
    "preactivation": 0,
    "in place": 0,
}
SIDE = {"resnet18-imagenet": 32, "vgg11": 32}
Step = tuple[nn.Module, FilterGraph, FreeSet]


class Concatenation(nn.Module):
    """DenseNet: a BatchNorm over two layers' channels, and a flatten of four pixels each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(8)
        self.grow1 = nn.Conv2d(8, 6, 3, padding=1)
        self.bn_b = nn.BatchNorm2d(14)
        self.grow2 = nn.Conv2d(14, 6, 1)
        self.bn_c = nn.BatchNorm2d(20, momentum=None)
        self.fc = nn.Linear(80, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow1(F.relu(self.bn_a(x)))], 1)
        x = torch.cat((x, self.grow2(F.relu(self.bn_b(x)))), dim=1)
        x = F.adaptive_avg_pool2d(F.gelu(self.bn_c(x)), 2)
        return self.fc(torch.flatten(x, 1))


class InPlace(nn.Module):
    """Everything in place, as torchvision does, and a dropout that drops nothing."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        y = F.adaptive_max_pool2d(self.relu(y), 1)
        return self.fc(self.dropout(y.view(y.size(0), -1)))


class Shapes(nn.Module):
    """Convolutions of any kernel, stride, padding and dilation, one of them depthwise."""

    def __init__(self, width: int, *, bias: bool, depthwise: dict, last: dict) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, groups=width, bias=bias, **depthwise)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width + 3, bias=bias, **last)
        self.bn3 = nn.BatchNorm2d(width + 3)
        self.fc = nn.Linear(width + 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu6(self.bn2(self.conv2(x)))
        return self.fc(F.leaky_relu(self.bn3(self.conv3(x))).mean([-1, -2]))


USERS: dict[str, Callable[[], nn.Module]] = {
    "concatenation": Concatenation,
    "preactivation": PreActivation,
    "in place": InPlace,
}


def regrown(
    net: nn.Module, side: int, share: float, graph: FilterGraph | None = None, seed: int = 0
) -> Step:
    """Return the net after some training, a share of each layer freed and drawn anew."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    graph = graph or FilterGraph.build(net, (3, side, side))
    free = FreeSet(
        {
            layer.name: rng.permutation(layer.width)[: max(1, int(share * layer.width))]
            for layer in graph.layers
            if layer.width > 1
        }
    )
    switch_off(net, graph, free)
    write_state(net, regrow(read_state(net), graph, free, seed=1))
    return net, graph, free


@cache
def _net(name: str) -> tuple[nn.Module, FilterGraph]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = USERS[name]() if name in USERS else build(name, 5, 3, NETS[name])
    side = SIDE.get(name, 16)
    return net, FilterGraph.build(net, (3, side, side))


def step(name: str, share: float = 0.25, dtype: torch.dtype = torch.float32) -> Step:
    net, graph = _net(name)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net, graph, free = regrown(copy.deepcopy(net), 0, share, graph)
    return net.to(dtype), graph, free


def images(graph: FilterGraph, count: int, dtype: torch.dtype = torch.float32) -> Labelled:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(count, *graph.input_shape, generator=rng, dtype=torch.float64).to(dtype)
    return Labelled(x, torch.randint(5, (count,), generator=rng))


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if v.is_floating_point()}


def gradients(twin: Twin, net: nn.Module) -> dict[str, Tensor]:
    """Return the twin's gradients where they belong in the dense net, zero elsewhere."""
    carrier = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in carrier.state_dict().values():
            tensor.zero_()
        for parameter in twin.parameters():
            parameter.data = parameter.grad.clone()
    twin.merge(carrier)
    return {name: parameter.detach() for name, parameter in carrier.named_parameters()}


def assert_same_step(
    net: nn.Module, graph: FilterGraph, free: FreeSet, tolerance: float, *, lean: bool = False
) -> None:
    """Logits of both, all gradients and running statistics of one training step agree."""
    twin = Twin(net, graph, free, lean=lean)
    data = images(graph, 6, next(net.parameters()).dtype)
    rows = scope_layout("rows", graph, free, read_state(net))
    prior = cut(net, graph, free).eval()
    close = {"rtol": tolerance, "atol": tolerance}
    with training_only(net, rows), training_only(twin, twin.layout):
        expected, logits = net(data.x), twin(data.x)
        torch.testing.assert_close(logits, expected, **close)
        with torch.no_grad():
            torch.testing.assert_close(twin.teacher(data.x), prior(data.x), **close)
        F.cross_entropy(expected, data.y).backward()
        F.cross_entropy(logits, data.y).backward()
        merged = copy.deepcopy(net)
        twin.merge(merged)
        for name, tensor in tensors(merged).items():
            torch.testing.assert_close(tensor, net.state_dict()[name], **close)
        found, parameters = gradients(twin, net), dict(net.named_parameters())
        compared = 0
        for entry in rows.entries:
            if entry.kind not in ("mean", "var"):
                mine, its = entry.read(found[entry.tensor]), parameters[entry.tensor].grad
                torch.testing.assert_close(mine, entry.read(its), **close)
                compared += int(mine.count_nonzero())
        assert compared > 0


# ---------------------------------------------------------------- the same step


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_that_of_the_masked_net(name: str, share: float) -> None:
    assert_same_step(*step(name, share, torch.float64), tolerance=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_a_step_in_float32_is_that_of_the_masked_net(name: str) -> None:
    assert_same_step(*step(name), tolerance=2e-5)


convolutions = st.builds(
    lambda side, stride, padding, dilation: {
        "kernel_size": side,
        "stride": stride,
        "padding": min(padding, side - 1),
        "dilation": dilation,
    },
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 2]),
    st.integers(0, 3),
    st.sampled_from([1, 2]),
)


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(2, 24),
    share=st.floats(0.05, 0.9),
    bias=st.booleans(),
    depthwise=convolutions,
    last=convolutions,
)
def test_any_kernel_stride_padding_and_dilation_is_followed(
    width: int, share: float, bias: bool, depthwise: dict, last: dict
) -> None:
    torch.manual_seed(0)
    net = Shapes(width, bias=bias, depthwise=depthwise, last=last)
    net, graph, free = regrown(net, 26, share)
    assert_same_step(net.double(), graph, free, tolerance=1e-9)


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(sorted(NETS)),
    share=st.floats(0.02, 0.9),
    seed=st.integers(0, 2**16),
    lean=st.booleans(),
)
def test_any_free_set_of_any_net_gives_the_step_of_the_masked_net(
    name: str, share: float, seed: int, lean: bool
) -> None:
    net, graph = _net(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, graph, free = regrown(copy.deepcopy(net), 0, share, graph, seed)
    assert_same_step(net.double(), graph, free, tolerance=1e-9, lean=lean)


@pytest.mark.parametrize("name", NETS)
def test_training_ends_where_that_of_the_masked_net_does(name: str) -> None:
    net, graph, free = step(name, 0.25, torch.float64)
    base, masked = tensors(net), copy.deepcopy(net)
    twin, data = Twin(net, graph, free), images(graph, 12, torch.float64)
    recipe = Recipe(
        epochs=2, batch=6, lr=0.02, momentum=0.9, weight_decay=5e-4, augment=Augment(2, True)
    )
    for student, layout, teacher in (
        (masked, scope_layout("rows", graph, free, base), cut(net, graph, free).eval()),
        (twin, twin.layout, twin.teacher),
    ):
        objective = multi_step_objective([teacher], Distillation())
        train(student, layout, data, objective, recipe, torch.Generator().manual_seed(0))
    twin.merge(net)
    after = tensors(net)
    moved = max(float((after[key] - base[key]).abs().max()) for key in base)
    assert moved > 0.01
    for key, expected in tensors(masked).items():
        torch.testing.assert_close(after[key], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logits = twin.eval().both(data.x)[1]
        torch.testing.assert_close(logits, net.eval()(data.x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- kept and merged


@pytest.mark.parametrize("name", ["mobilenetv2", "concatenation"])
def test_merging_moves_freed_rows_alone_and_loses_no_bit(name: str) -> None:
    net, graph, free = step(name)
    base, twin = tensors(net), Twin(net, graph, free)
    assert all(torch.equal(base[key], tensor) for key, tensor in tensors(net).items())
    recipe = Recipe(epochs=1, batch=4, lr=0.1, augment=Augment(0, False))
    objective = multi_step_objective([twin.teacher], Distillation())
    train(twin, twin.layout, images(graph, 8), objective, recipe, torch.Generator())
    twin.merge(net)

    rows = scope_layout("rows", graph, free, base)
    trained = {entry.tensor: entry.index for entry in rows.entries}
    for key, tensor in tensors(net).items():
        kept = torch.ones(tensor.numel(), dtype=torch.bool)
        kept[trained.get(key, [])] = False
        assert torch.equal(tensor.view(-1)[kept], base[key].view(-1)[kept])
    assert any(not torch.equal(base[key], tensor) for key, tensor in tensors(net).items())

    again = Twin(net, graph, free)
    for key, tensor in again.state_dict().items():
        if "joint" not in key:  # scratch space for the freed rows
            assert torch.equal(tensor, twin.state_dict()[key]), key


def test_its_parameters_are_the_scope_rows() -> None:
    net, graph, free = step("resnet20")
    twin = Twin(net, graph, free)
    assert twin.layout.size == scope_layout("rows", graph, free, read_state(net)).size
    assert {name for name, _ in twin.named_parameters()} <= {e.tensor for e in twin.layout.entries}
    assert all(p.is_leaf and p.is_contiguous() and p.requires_grad for p in twin.parameters())


def test_layers_without_freed_filters_run_as_they_are() -> None:
    net, graph, free = step("resnet20", 0.25, torch.float64)
    last = next(x.name for x in graph.layers if any(s.tensor == "fc.weight" for s in x.slots))
    some = FreeSet({name: c for name, c in free.channels.items() if name in (last, "conv1")})
    switch_off(net, graph, free)
    write_state(net, regrow(read_state(net), graph, some, seed=2))
    assert_same_step(net, graph, some, tolerance=1e-9)


def saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    held = []  # lest an address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(x)
    assert logits.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("lean", [False, True])
def test_it_runs_in_bfloat16_under_autocast(lean: bool) -> None:
    net, graph, free = step("mobilenetv2")
    twin, data = Twin(net, graph, free, lean=lean), images(graph, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = twin(data.x)
    F.cross_entropy(logits.float(), data.y).backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in twin.parameters())


# ---------------------------------------------------------------- computed again, or held


def trained(twin: Twin, data: Labelled, augment: Augment, epochs: int = 2) -> dict[str, Tensor]:
    # Batches of few images and fast learning would blow rounding up a millionfold.
    recipe = Recipe(epochs=epochs, batch=6, lr=0.01, momentum=0.9, augment=augment)
    objective = multi_step_objective([twin.teacher], Distillation())
    train(twin, twin.layout, data, objective, recipe, torch.Generator().manual_seed(0))
    return {key: t for key, t in tensors(twin).items() if "joint" not in key}


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "in place"])
def test_a_lean_twin_learns_the_same_to_the_bit(name: str) -> None:
    net, graph, free = step(name)
    data, augment = images(graph, 12), Augment(1, True)
    expected = trained(Twin(net, graph, free), data, augment)
    found = trained(Twin(net, graph, free, lean=True), data, augment)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def test_a_twin_holds_less_for_the_backward_pass_and_a_lean_one_half_of_that_or_less() -> None:
    net, graph, free = step("resnet18")
    data, twin = images(graph, 8), Twin(net, graph, free, lean=True)
    plain = saved(net.train(), data.x)
    assert saved(twin, data.x) < 0.3 * plain
    assert saved(Twin(net, graph, free), data.x) < 0.7 * plain


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "concatenation", "in place"])
def test_with_a_cache_a_twin_learns_the_same(name: str) -> None:
    net, graph, free = step(name, 0.25, torch.float64)
    data, augment = images(graph, 12, torch.float64), Augment(0, True)
    expected = trained(Twin(net, graph, free), data, augment, 3)
    twin = Twin(net, graph, free, cache_bytes=2**30)
    found = trained(twin, data, augment, 3)
    assert twin.cache is not None
    assert 12 < len(twin.cache) <= 24
    assert twin.cache.asked == 36
    assert twin.cache.hits == 36 - len(twin.cache)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-7, atol=1e-7)


def test_images_beyond_the_limit_are_computed_each_time() -> None:
    net, graph, free = step("resnet8", 0.25, torch.float64)
    data, augment = images(graph, 12, torch.float64), Augment(0, False)
    expected = trained(Twin(net, graph, free), data, augment, 3)
    each = sum(t[0].numel() * 8 for t in Twin(net, graph, free)._kept(data.x))
    twin = Twin(net, graph, free, cache_bytes=7 * each + each // 2)
    found = trained(twin, data, augment, 3)
    assert twin.cache is not None
    assert len(twin.cache) == 7
    assert twin.cache.hits == 14
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-7, atol=1e-7)


def test_the_cache_is_dropped_when_memory_runs_low(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, graph, free = step("resnet8", 0.25, torch.float64)
    data, augment = images(graph, 12, torch.float64), Augment(0, False)
    expected = trained(Twin(net, graph, free), data, augment, 3)
    left = iter([2**30] * 6 + [2**20] * 9)
    monkeypatch.setattr(twin_cache, "memory_left", lambda: next(left))
    twin = Twin(net, graph, free, cache_bytes=2**30)
    found = trained(twin, data, augment, 3)
    assert twin.cache is not None
    assert len(twin.cache) == 0
    assert "no longer cached: little memory is left" in caplog.text
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-7, atol=1e-7)


def test_a_limit_below_one_image_caches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    net, graph, free = step("resnet8")
    twin = Twin(net, graph, free, cache_bytes=1000)
    assert twin(images(graph, 4).x).requires_grad
    assert "one image takes" in caplog.text
    assert len(twin.cache or ()) == 0


# ---------------------------------------------------------------- refusals


def test_kept_filters_that_read_freed_ones_are_refused_by_name() -> None:
    net, graph, free = step("resnet8")
    weight = net.get_parameter("layer2.0.conv2.weight")
    rows, columns = freed_index(graph, free), freed_index(graph, free).out
    kept = np.setdiff1d(np.arange(len(weight)), rows.own["layer2.0.conv2.weight"])
    with torch.no_grad():
        weight[kept[0], columns["layer2.0.conv2.weight"][0]] = 1e-3
    with pytest.raises(NetError, match=r"freed ones in 'layer2\.0\.conv2\.weight': .*scope rows"):
        Twin(net, graph, free)


def test_a_layer_without_kept_filters_is_refused_by_name() -> None:
    net, graph, _ = step("resnet8")
    with pytest.raises(NetError, match="layer 'conv1' has no kept filter"):
        Twin(net, graph, FreeSet({"conv1": range(8)}))


def test_a_classifier_that_reads_no_freed_filter_is_left_to_masks() -> None:
    net, graph, _ = step("resnet8")
    with pytest.raises(TwinUnsupported, match="classifier 'fc' reads no freed filter"):
        Twin(net, graph, FreeSet({}))


class Branching(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else x * 1)


class Mixing(InPlace):
    """Subtracts the mean over channels, switched off by a factor of zero."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = y - 0 * y.mean(1, keepdim=True)
        return self.fc(F.relu(self.bn2(self.conv2(y))).mean((2, 3)))


class Corner(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))[:, :, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InPlace(dropout=0.5), "'dropout' drops kept channels"),
        (Branching, "cannot be traced: .*control flow"),
        (Corner, "'getitem' does to freed filters what is not known"),
        (Mixing, "'mean' does to freed filters what is not known"),
    ],
)
def test_nets_that_cannot_be_followed_are_left_to_masks(
    make: Callable[[], nn.Module], message: str
) -> None:
    torch.manual_seed(0)
    net, graph, free = regrown(make(), 16, 0.25)
    with pytest.raises(TwinUnsupported, match=message) as caught:
        Twin(net, graph, free)
    assert "\n" not in str(caught.value)
    assert net.training


def test_the_teacher_answers_for_the_images_just_seen_alone() -> None:
    net, graph, free = step("resnet8")
    twin, data = Twin(net, graph, free), images(graph, 4)
    assert twin(data.x).requires_grad
    assert not twin.teacher(data.x).requires_grad
    with pytest.raises(NetError, match="images that the twin has not seen"):
        twin.teacher(data.x.clone())
