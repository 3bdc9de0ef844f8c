"""Training moves what a layout names, and nothing else by a single bit."""

import copy
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_nets import Dense
from torch import Tensor, nn

from common.data import Augment
from common.errors import DataError
from common.filters import FilterGraph, FreeSet, cut, switch_off
from common.frozen import training_only
from common.layout import Entry, Layout, consolidation_layout, dense_layout, scope_layout
from common.nets import build
from common.optim import PackedSGD
from common.regrow import regrow
from common.state import read_state, state_digest, write_state
from common.train import Labelled, Recipe, Trained, accuracy_of, batch_sizes, predict, train

CLASSES = 4
NO_AUGMENT = Augment(0, False)


class Classic(nn.Module):
    """A BN on the image, a constant buffer, a flatten, a hidden layer with BN and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((3, 1, 1), 0.1))
        self.bn0 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 16, 8)
        self.bn1 = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(self.bn0(x - self.offset))))
        x = self.hidden(F.max_pool2d(x, 4).flatten(1))
        return self.fc(self.dropout(F.relu(self.bn1(x))))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet8": (lambda: build("resnet8", CLASSES, 3, 4), 16),
    "vgg11": (lambda: build("vgg11", CLASSES, 3, 4), 32),
    "mobilenetv2": (lambda: build("mobilenetv2", CLASSES, 3, 0.25), 16),
    "concatenation": (lambda: Dense(CLASSES), 16),
    "classic": (Classic, 16),
}
# A hidden layer between the filters and the head is not in scope "rows", so there freed filters
# get no gradient: only what must not move can be tested.
LEARNING = [name for name in NETS if name != "classic"]


@cache
def _made(name: str) -> tuple[nn.Module, FilterGraph, FreeSet]:
    function, side = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = function()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                module.num_batches_tracked.fill_(7)
    graph = FilterGraph.build(net, (3, side, side))
    rng = np.random.default_rng(1)
    free = FreeSet(
        {
            layer.name: tuple(rng.permutation(layer.width)[: layer.width // 3 + 1].tolist())
            for layer in graph.layers
        }
    )
    switch_off(net, graph, free)
    return net, graph, free


def prior(name: str) -> tuple[nn.Module, FilterGraph, FreeSet]:
    """Return a prior model with random weights whose free filters are off."""
    net, graph, free = _made(name)
    return copy.deepcopy(net), graph, free


def regrown(name: str) -> tuple[nn.Module, FilterGraph, FreeSet]:
    net, graph, free = prior(name)
    write_state(net, regrow(read_state(net), graph, free, seed=3))
    return net, graph, free


def images(count: int = 24, side: int = 16, seed: int = 0) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = torch.randn(count, 3, side, side, generator=generator) + y[:, None, None, None] * 0.3
    return Labelled(x.contiguous(memory_format=torch.channels_last), y)


def cross_entropy(logits: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def recipe(epochs: int = 3, **changes: object) -> Recipe:
    settings = {
        "batch": 8,
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "augment": NO_AUGMENT,
    }
    return Recipe(epochs=epochs, **{**settings, **changes})


def run(
    net: nn.Module, layout: Layout, data: Labelled, *, seed: int = 0, epochs: int = 3
) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    return train(net, layout, data, cross_entropy, recipe(epochs), generator)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, counters too."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def named_mask(layout: Layout, name: str, tensor: Tensor) -> Tensor:
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    for entry in layout.entries:
        if entry.tensor == name:
            mask[:] = True
            if entry.index is not None:
                mask[:] = False
                mask[torch.from_numpy(entry.index)] = True
    return mask


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.numpy().tobytes() == other.numpy().tobytes()


# ---------------------------------------------------------------- frozen is bit-identical


@pytest.mark.parametrize("scope", ["rows", "group"])
@pytest.mark.parametrize("name", NETS)
def test_what_a_scope_does_not_name_keeps_every_bit(name: str, scope: str) -> None:
    net, graph, free = regrown(name)
    layout = scope_layout(scope, graph, free, read_state(net))
    before = tensors(net)
    run(net, layout, images(side=NETS[name][1]))
    after = tensors(net)
    assert before.keys() == after.keys()
    for key, old in before.items():
        if key.endswith("num_batches_tracked"):
            assert scope == "group" or torch.equal(after[key], old), key
            continue
        kept = ~named_mask(layout, key, old)
        assert same_bytes(after[key].flatten()[kept], old.flatten()[kept]), key


@pytest.mark.parametrize("scope", ["rows", "group", "all"])
@pytest.mark.parametrize("name", LEARNING)
def test_what_a_scope_names_does_move(name: str, scope: str) -> None:
    net, graph, free = regrown(name)
    layout = scope_layout(scope, graph, free, read_state(net))
    before = tensors(net)
    run(net, layout, images(side=NETS[name][1]))
    after = tensors(net)
    for entry in layout.entries:
        old, new = entry.read(before[entry.tensor]), entry.read(after[entry.tensor])
        moved = old != new
        assert torch.isfinite(new).all(), entry.tensor
        if entry.kind in ("mean", "var"):
            assert moved.all(), f"{entry.tensor}: statistics of channels stand still"
        elif old.numel() and before[entry.tensor].dim() > 1:
            # Not all: behind a dead ReLU there is no gradient, and zero does not decay.
            assert moved.float().mean() > 0.5, entry.tensor
        elif entry.kind == "scale":
            assert moved.any(), entry.tensor


@pytest.mark.parametrize("name", LEARNING)
def test_rows_learn(name: str) -> None:
    net, graph, free = regrown(name)
    data = images(side=NETS[name][1])
    layout = scope_layout("rows", graph, free, read_state(net))
    first = run(net, layout, data, epochs=1)
    assert run(net, layout, data, epochs=8).loss < first.loss


@pytest.mark.parametrize("name", NETS)
def test_the_prior_is_recovered_to_the_last_bit_by_taking_the_kept_part(name: str) -> None:
    before, graph, free = prior(name)
    grown = copy.deepcopy(before)
    write_state(grown, regrow(read_state(before), graph, free, seed=3))
    data = images(side=NETS[name][1])
    run(grown, scope_layout("rows", graph, free, read_state(grown)), data)
    kept, expected = cut(grown.eval(), graph, free), cut(before.eval(), graph, free)
    assert state_digest(read_state(kept)) == state_digest(read_state(expected))
    assert same_bytes(predict(kept, data.x), predict(expected, data.x))
    assert not torch.equal(predict(grown, data.x), predict(before, data.x)) or name == "classic"


@pytest.mark.parametrize("name", LEARNING)
def test_a_consolidation_moves_everything_but_the_free_scales(name: str) -> None:
    net, graph, free = prior(name)
    layout = consolidation_layout(graph, free, read_state(net))
    before = tensors(net)
    run(net, layout, images(side=NETS[name][1]), epochs=1)
    after = tensors(net)
    for entry in layout.entries:
        kept = ~named_mask(layout, entry.tensor, before[entry.tensor])
        old, new = before[entry.tensor].flatten(), after[entry.tensor].flatten()
        assert same_bytes(old[kept], new[kept]), entry.tensor
        # A shift that another BN subtracts again gets no gradient.
        if entry.size and entry.kind != "shift":
            assert not same_bytes(old[~kept], new[~kept]), entry.tensor


def test_scope_all_trains_every_bn_and_leaves_constants_alone() -> None:
    net, graph, _ = prior("classic")
    before = tensors(net)
    run(net, dense_layout(graph, read_state(net)), images())
    after = tensors(net)
    unmoved = {key for key in before if torch.equal(before[key], after[key])}
    assert unmoved == {"offset"}


# ---------------------------------------------------------------- batch normalisation in part


def bn_layout(channels: list[int], width: int) -> Layout:
    index = np.array(channels)
    leaves = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}
    return Layout(
        "rows", tuple(Entry(f"0.{leaf}", (width,), kind, index) for leaf, kind in leaves.items())
    )


@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("shape", [(8, 5, 4, 4), (3, 5, 1, 1), (2, 5, 7, 3)])
def test_a_bn_in_part_is_a_training_bn_for_some_channels_and_a_fixed_one_for_others(
    shape: tuple[int, ...], momentum: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, width = [0, 3], shape[1]
    others = [1, 2, 4]
    bn = nn.BatchNorm2d(width, momentum=momentum)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.copy_(torch.randn(width, generator=generator))
        bn.running_var.copy_(torch.rand(width, generator=generator) + 0.5)
    training, fixed = copy.deepcopy(bn).train(), copy.deepcopy(bn).eval()
    x = (torch.randn(shape, generator=generator) * 3 + 1).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    pull = torch.randn(shape, generator=generator)

    dense = torch.empty(shape)
    dense[:, chosen] = training(reference)[:, chosen]
    dense[:, others] = fixed(reference)[:, others]
    (dense * pull).sum().backward()

    net = nn.Sequential(bn)
    before = tensors(bn)
    with training_only(net, bn_layout(chosen, width)):
        out = net(x)
        (out * pull).sum().backward()
        gradients = bn.weight.grad.clone(), bn.bias.grad.clone()
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-4)
    for found, one, other in zip(
        gradients,
        (training.weight.grad, training.bias.grad),
        (fixed.weight.grad, fixed.bias.grad),
        strict=True,
    ):
        torch.testing.assert_close(found[chosen], one[chosen], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[others], other[others], rtol=1e-4, atol=1e-4)
    for key in ("running_mean", "running_var"):
        found = getattr(bn, key)
        torch.testing.assert_close(found[chosen], getattr(training, key)[chosen])
        assert same_bytes(found[others], before[key][others])
    assert bn.num_batches_tracked == before["num_batches_tracked"]


def test_a_net_is_put_back_as_it_was_also_after_an_error() -> None:
    net, graph, free = regrown("resnet8")
    net.train()
    net.layer2.eval()
    net.fc.bias.requires_grad_(False)
    modes = {name: module.training for name, module in net.named_modules()}
    layout = scope_layout("rows", graph, free, read_state(net))

    def fail() -> None:
        with training_only(net, layout):
            assert net.layer1[0].conv1.weight.requires_grad
            net(images(4).x).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"fc.bias"}
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not [name for name, module in net.named_modules() if "forward" in vars(module)]


def test_parameters_without_a_trainable_entry_get_no_gradient() -> None:
    net, graph, _ = regrown("resnet8")
    layout = scope_layout("rows", graph, FreeSet({"layer3.0.conv2": (0,)}), read_state(net))
    with training_only(net, layout):
        net(images(4).x).sum().backward()
        graded = {name for name, p in net.named_parameters() if p.grad is not None}
    assert graded == {e.tensor for e in layout.entries if e.kind not in ("mean", "var")}
    assert "conv1.weight" not in graded


# ---------------------------------------------------------------- the optimiser


def test_on_scope_all_training_equals_stock_sgd() -> None:
    net, graph, _ = prior("resnet8")
    stock = copy.deepcopy(net)
    decayed = [p for p in stock.parameters() if p.dim() > 1]
    plain = [p for p in stock.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    data = images(32)
    layout = dense_layout(graph, read_state(net))
    own = recipe(2, lr=0.02)
    train(net, layout, data, cross_entropy, own, torch.Generator().manual_seed(5))

    order = torch.Generator().manual_seed(5)
    stock.train()
    for _ in range(2):
        for index in torch.randperm(32, generator=order).split(8):
            optimiser.zero_grad()
            F.cross_entropy(stock(data.x[index]), data.y[index]).backward()
            optimiser.step()
    expected = read_state(stock)
    for key, found in read_state(net).items():
        torch.testing.assert_close(found, expected[key], rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_on_some_entries_it_equals_stock_sgd_on_those_alone(momentum: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    index = np.array([0, 5, 6, 11])
    layout = Layout("rows", (Entry("0.weight", (3, 4), "weight", index),))
    before = net[0].weight.detach().clone()
    alone = nn.Parameter(before.flatten()[index].clone())
    stock = torch.optim.SGD([alone], lr=0.1, momentum=momentum, weight_decay=decay)
    packed = PackedSGD(net, layout, lr=0.1, momentum=momentum, weight_decay=decay)
    for lr in (0.1, 0.1, 0.03):
        packed.lr = stock.param_groups[0]["lr"] = lr
        gradient = torch.randn(3, 4, generator=generator)
        net[0].weight.grad, alone.grad = gradient.clone(), gradient.flatten()[index].clone()
        packed.step()
        stock.step()
        assert net[0].weight.grad is None
    after = net[0].weight.detach().flatten()
    torch.testing.assert_close(after[index], alone.detach(), rtol=0, atol=1e-6)
    rest = np.setdiff1d(np.arange(12), index)
    assert same_bytes(after[rest], before.flatten()[rest])


def test_a_rate_scales_what_its_entry_moves_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    index = np.array([0, 5, 6, 11])
    layout = Layout("rows", (Entry("0.weight", (3, 4), "weight", index),))
    before = net[0].weight.detach().flatten()[index].clone()
    rates = {"0.weight": torch.tensor([1.0, 0.5, 0.0, 0.1])}
    optimiser = PackedSGD(net, layout, lr=0.1, momentum=0.9, weight_decay=0.0, rates=rates)
    for _ in range(2):
        net[0].weight.grad = torch.ones(3, 4)
        optimiser.step()
    moved = net[0].weight.detach().flatten()[index] - before
    torch.testing.assert_close(moved, -0.1 * (1 + 1.9) * rates["0.weight"])


def test_scales_shifts_and_biases_do_not_decay() -> None:
    net, graph, free = regrown("concatenation")
    layout = scope_layout("all", graph, free, read_state(net))
    optimiser = PackedSGD(net, layout, lr=0.1, momentum=0.0, weight_decay=0.5)
    before = tensors(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in net.named_parameters():
        factor = 0.95 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


# ---------------------------------------------------------------- the loop


def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before() -> None:
    digests = []
    for seed, drawn in ((0, 0), (0, 3), (1, 0)):
        net, graph, _ = prior("classic")  # dropout draws from torch's global generator
        layout = dense_layout(graph, read_state(net))
        with torch.random.fork_rng(devices=[]):
            torch.rand(drawn)
            run(net, layout, images(), seed=seed)
        digests.append(state_digest(read_state(net)))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_training_leaves_the_global_generator_alone() -> None:
    net, graph, _ = prior("classic")
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        run(net, dense_layout(graph, read_state(net)), images())
        assert torch.equal(torch.get_rng_state(), before)


def test_the_schedule_is_told_of_every_step_and_of_the_end() -> None:
    net, graph, _ = prior("concatenation")
    told: list[float] = []
    epochs: list[tuple[int, float]] = []
    trained = train(
        net,
        dense_layout(graph, read_state(net)),
        images(16),
        cross_entropy,
        recipe(2),
        torch.Generator().manual_seed(0),
        before_step=told.append,
        after_epoch=lambda epoch, loss: epochs.append((epoch, loss)),
    )
    assert told == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [epoch for epoch, _ in epochs] == [1, 2]
    assert trained == Trained(epochs[-1][1], 32, 4)


def test_the_cosine_schedule_falls_from_the_given_rate_towards_zero() -> None:
    class Slope(nn.Module):
        """The gradient of its loss is 1, so a step is as long as the learning rate."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight.expand(len(x), 1)

    net = Slope()
    layout = Layout("all", (Entry("weight", (1,), "weight", None),))
    seen: list[float] = []
    train(
        net,
        layout,
        Labelled(torch.zeros(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64)),
        lambda logits, _, __: logits.mean(),
        recipe(4, batch=8, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="cosine"),
        torch.Generator().manual_seed(0),
        before_step=lambda _: seen.append(net.weight.item()),
    )
    steps = -np.diff(seen)
    expected = [0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert np.allclose(steps, expected, atol=1e-7)


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    assert batch_sizes(9, 4) == [4, 5]
    assert batch_sizes(10, 4) == [4, 4, 2]
    assert batch_sizes(8, 4) == [4, 4]
    assert batch_sizes(3, 4) == [3]
    assert batch_sizes(5, 4) == [5]
    assert all(sum(batch_sizes(n, 4)) == n for n in range(1, 30))
    assert min(min(batch_sizes(n, b)) for n in range(2, 30) for b in range(2, 9)) >= 2


def test_every_image_is_seen_once_an_epoch_with_its_own_label() -> None:
    net, graph, _ = prior("concatenation")
    data, seen = images(9), []

    def objective(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        for image, label in zip(x, y, strict=True):
            (row,) = torch.nonzero((data.x == image).flatten(1).all(1)).flatten().tolist()
            assert data.y[row] == label
            seen.append(row)
        return F.cross_entropy(logits, y)

    layout = dense_layout(graph, read_state(net))
    train(net, layout, data, objective, recipe(2), torch.Generator().manual_seed(0))
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9))
    assert seen[:9] != seen[9:]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count: int) -> None:
    net, graph, _ = prior("concatenation")
    with pytest.raises(DataError, match=rf"^{count} image\(s\).*at least 2$"):
        run(net, dense_layout(graph, read_state(net)), images(count))


def test_a_loss_that_is_not_finite_names_the_learning_rate() -> None:
    net, graph, _ = prior("concatenation")
    with pytest.raises(DataError, match=r"loss is (nan|inf) after epoch 1: .*\(now 0\.5\)"):
        train(
            net,
            dense_layout(graph, read_state(net)),
            images(),
            lambda logits, _, y: F.cross_entropy(logits, y) * math.inf,
            recipe(lr=0.5),
            torch.Generator(),
        )


def test_predicting_is_done_in_eval_mode_and_in_the_order_of_the_images() -> None:
    net, _, _ = prior("classic")
    net.train()
    before, data = tensors(net), images(10)
    logits = predict(net, data.x, batch=4)
    assert net.training
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(net).items())
    with torch.no_grad():
        torch.testing.assert_close(logits, net.eval()(data.x))
    right = (logits.argmax(1) == data.y).double().mean()
    assert accuracy_of(net, data) == pytest.approx(float(right))
    assert math.isnan(accuracy_of(net, images(0)))
