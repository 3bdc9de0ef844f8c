"""Where a net is trained: found by name, and with or without mixed precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.accelerator import CPU, Accelerator
from common.data import Augment
from common.errors import ConfigError
from common.filters import FilterGraph, FreeSet, switch_off
from common.layout import scope_layout
from common.nets import build
from common.regrow import regrow
from common.state import read_state, write_state
from common.train import Labelled, Recipe, predict, train


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


def test_the_cpu_is_always_there() -> None:
    assert Accelerator.pick("cpu") == CPU == Accelerator(torch.device("cpu"), amp=False)
    assert Accelerator.pick("cpu", amp=True).amp


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    assert Accelerator.pick().device == torch.device("cpu")
    pretend_cuda(monkeypatch, 2)
    assert Accelerator.pick().device.type == "cuda"
    assert Accelerator.pick("cuda:1").device == torch.device("cuda", 1)
    assert Accelerator.pick("cpu").device == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_cuda(monkeypatch, 0)
    with pytest.raises(ConfigError, match=f"^accelerator is '{name}', but torch sees .*use cpu$"):
        Accelerator.pick(name)


def test_a_number_beyond_the_last_cuda_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"^accelerator is 'cuda:2', but torch sees 2 CUDA"):
        Accelerator.pick("cuda:2")


@pytest.mark.parametrize("devices", [0, 2])
@pytest.mark.parametrize(
    "name", ["gpu", "", "CPU", "mps", "cudax", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "cpu:0"]
)
def test_an_unknown_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, devices: int
) -> None:
    pretend_cuda(monkeypatch, devices)
    with pytest.raises(ConfigError, match=f"^accelerator is '{name}': use auto, cpu, cuda or"):
        Accelerator.pick(name)


def test_mixed_precision_computes_in_bfloat16_and_only_if_asked() -> None:
    layer, x = nn.Linear(4, 2), torch.ones(1, 4)
    with Accelerator.pick("cpu", amp=True).autocast():
        assert layer(x).dtype == torch.bfloat16
    with CPU.autocast():
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("net_name", ["resnet8", "mobilenetv2"])
@pytest.mark.parametrize("scope", ["rows", "group", "all"])
def test_mixed_precision_trains_every_scope(net_name: str, scope: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(net_name, 4, 3, {"resnet8": 4, "mobilenetv2": 0.25}[net_name])
    graph = FilterGraph.build(net, (3, 16, 16))
    free = FreeSet({layer.name: (0, 1) for layer in graph.layers})
    switch_off(net, graph, free)
    write_state(net, regrow(read_state(net), graph, free, seed=0))
    layout = scope_layout(scope, graph, free, read_state(net))
    before = layout.pack(read_state(net))
    exact = predict(net, torch.ones(2, 3, 16, 16))
    mixed = Accelerator.pick("cpu", amp=True)
    rounded = predict(net, torch.ones(2, 3, 16, 16), accelerator=mixed)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    y = torch.arange(16) % 4
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(epochs=2, batch=8, lr=0.05, augment=Augment(1, True))
    losses: list[float] = []
    train(
        net,
        layout,
        Labelled(x, y),
        lambda logits, _, labels: F.cross_entropy(logits, labels),
        recipe,
        torch.Generator().manual_seed(0),
        accelerator=mixed,
        after_epoch=lambda _, loss: losses.append(loss),
    )
    assert all(tensor.dtype == torch.float32 for tensor in read_state(net).values())
    after = layout.pack(read_state(net))
    assert np.isfinite(after).all()
    assert (after != before).mean() > 0.5
    assert losses[1] == losses[1] > 0
