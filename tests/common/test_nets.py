"""The nets: shapes, published sizes, names that stay, and nets that do not exist."""

import hashlib
import sys
import types

import pytest
import torch
from torch import nn

from common.errors import NetError
from common.filters import parameter_count
from common.nets import WIDTHS, build

SMALL = {name: 0.25 if name == "mobilenetv2" else 4 for name in WIDTHS}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", WIDTHS)
def test_maps_grey_and_colour_images_to_logits(name: str, channels: int) -> None:
    net = build(name, 7, channels, SMALL[name]).eval()
    for size in (32, 48):
        assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in WIDTHS if not name.startswith("vgg")])
def test_takes_images_as_small_as_8x8_where_nothing_collapses(name: str) -> None:
    assert build(name, 10, 1, SMALL[name]).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("resnet20", 0.27, 0.005),
        ("resnet56", 0.85, 0.01),
        ("resnet110", 1.7, 0.04),
        ("resnet18", 11.17, 0.005),
        ("vgg16", 14.72, 0.01),
        ("vgg11", 9.23, 0.01),
        ("mobilenetv2", 2.24, 0.01),
    ],
)
def test_has_the_published_number_of_parameters(
    name: str, millions: float, tolerance: float
) -> None:
    assert parameter_count(build(name, 10)) / 1e6 == pytest.approx(millions, abs=tolerance)


def test_resnet18_for_imagenet_is_torchvision_s() -> None:
    """11,689,512 parameters and these names: torchvision's weights fit as they are."""
    net = build("resnet18-imagenet", 1000)
    assert parameter_count(net) == 11_689_512
    names = set(net.state_dict())
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias"} <= names
    assert len(names) == 122


DIGESTS = {
    "resnet8": "2c574c96e7f2b82d",
    "resnet20": "d0646ea64748f691",
    "resnet56": "d1812bc89522a672",
    "resnet110": "4d517c7b29cc25bd",
    "resnet18": "a9160eaea2def71f",
    "resnet18-imagenet": "475ae55b6d26f3f5",
    "vgg11": "ded6b600355971ad",
    "vgg16": "9e1362ea6b3d5c65",
    "mobilenetv2": "9fe6f2f662b0acf5",
}


def digest(net: nn.Module) -> str:
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in net.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", WIDTHS)
def test_parameter_names_and_shapes_never_change(name: str) -> None:
    """Stored models are read by name: a change here needs a migration."""
    assert digest(build(name, 10)) == DIGESTS[name]


@pytest.mark.parametrize(("name", "width", "wide"), [("resnet8", 32, 128), ("vgg11", 8, 64)])
def test_width_is_the_channels_of_the_first_stage(name: str, width: int, wide: int) -> None:
    net = build(name, 10, width=width)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert convs[0].out_channels == width
    assert max(conv.out_channels for conv in convs) == wide


def test_width_multiplies_mobilenet_s_channels_in_steps_of_8() -> None:
    net = build("mobilenetv2", 10, width=0.35)
    widths = {module.out_channels for module in net.modules() if isinstance(module, nn.Conv2d)}
    assert all(width % 8 == 0 for width in widths)
    assert net.get_submodule("stem.conv").out_channels == 16  # 11.2, and never down by over 10 %


def test_weights_follow_torch_s_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = build("resnet8", 10, width=8).parameters()
            return torch.cat([part.detach().flatten() for part in parts])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_initialisation_keeps_the_size_of_activations() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build("vgg16", 10, width=16).eval()
        logits = net(torch.randn(4, 3, 32, 32))
    assert 0.01 < logits.std() < 10


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A user's module, importable as ``usernets``."""
    found = types.ModuleType("usernets")
    monkeypatch.setitem(sys.modules, "usernets", found)
    return found


def test_builds_a_user_s_net(module: types.ModuleType) -> None:
    calls: list[dict[str, float]] = []

    def tiny(**sizes: float) -> nn.Module:
        calls.append(sizes)
        return nn.Flatten()

    module.tiny = tiny  # type: ignore[attr-defined]
    assert isinstance(build("usernets:tiny", 10, 1), nn.Flatten)
    build("usernets:tiny", 10, 1, 16.0)
    assert calls == [
        {"classes": 10, "in_channels": 1},
        {"classes": 10, "in_channels": 1, "width": 16},
    ]
    assert isinstance(calls[1]["width"], int)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet9", "'resnet9' is unknown"),
        ("nowhere.at.all:net", "'nowhere.at.all' cannot be imported"),
        (":net", "cannot be imported"),
        ("usernets:gone", "no function 'gone'"),
        ("usernets:number", "no function 'number'"),
        ("usernets:text", "returned str, not an nn.Module"),
        ("usernets:broken", "failed: ValueError: not today"),
    ],
)
def test_says_in_one_line_why_a_net_cannot_be_built(
    module: types.ModuleType, name: str, says: str
) -> None:
    def broken(**sizes: float) -> nn.Module:
        raise ValueError("not\ntoday")

    module.number = 3  # type: ignore[attr-defined]
    module.text = lambda **sizes: "net"  # type: ignore[attr-defined]
    module.broken = broken  # type: ignore[attr-defined]
    with pytest.raises(NetError, match=says) as raised:
        build(name, 10)
    assert "resnet110" in str(raised.value)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("classes", "channels", "width", "says"),
    [
        (0, 3, None, "classes 0"),
        (10, 0, None, "in_channels 0"),
        (10, 3, -4, "width -4"),
        (10, 3, 16.5, "whole"),
    ],
)
def test_refuses_sizes_that_make_no_net(
    classes: int, channels: int, width: float | None, says: str
) -> None:
    with pytest.raises(NetError, match=says):
        build("resnet8", classes, channels, width)
