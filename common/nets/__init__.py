"""The CNNs that fallow knows by name, and any other by ``module:function``.

All end in one ``nn.Linear`` on pooled features and initialise from torch's global generator, so
that ``torch.random.fork_rng`` and ``torch.manual_seed`` around `build` decide the weights.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from common.errors import NetError
from common.nets import custom, mobilenet, resnet, vgg

#: Default width of each net by name: channels of the first stage (ResNet, VGG) or the paper's
#: width multiplier (MobileNetV2).
WIDTHS: dict[str, float] = {
    "resnet8": 16,
    "resnet20": 16,
    "resnet56": 16,
    "resnet110": 16,
    "resnet18": 64,
    "resnet18-imagenet": 64,
    "vgg11": 64,
    "vgg16": 64,
    "mobilenetv2": 1.0,
}


def build(name: str, classes: int, in_channels: int = 3, width: float | None = None) -> nn.Module:
    """Build a freshly initialised net.

    Parameters
    ----------
    name : str
        One of `WIDTHS`, or ``module:function`` for a net of the user's own, called as
        ``function(classes=..., in_channels=...)``, and ``width=...`` too where one is given.
    classes : int
        Number of logits.
    in_channels : int
        1 for grey, 3 for colour images.
    width : float, optional
        Channels of the first stage (ResNet, VGG; a whole number; later stages in proportion) or
        the width multiplier (MobileNetV2). Default: the published net's, see `WIDTHS`.

    Returns
    -------
    nn.Module
        Maps images ``[B, in_channels, H, W]`` to logits ``[B, classes]``; in training mode.

    Raises
    ------
    NetError
        An unknown name, a size that is not positive, or a user's function that cannot be used.
    """
    if classes < 1 or in_channels < 1:
        raise NetError(
            f"net {name!r}: classes {classes} and in_channels {in_channels} must be at least 1"
        )
    if width is not None and not width > 0:
        raise NetError(f"net {name!r}: width {width} must be positive")
    if ":" in name:
        return custom.build(name, classes, in_channels, width, known=tuple(WIDTHS))
    if name not in WIDTHS:
        raise NetError(
            f"net {name!r} is unknown: use one of {', '.join(WIDTHS)}, or module:function"
        )
    width = WIDTHS[name] if width is None else width
    if name == "mobilenetv2":
        return mobilenet.MobileNetV2(classes, in_channels, width)
    if width != int(width):
        raise NetError(f"net {name!r}: width {width} must be a whole number of channels")
    make: Callable[[str, int, int, int], nn.Module]
    make = resnet.build if name.startswith("resnet") else vgg.build
    return make(name, classes, in_channels, int(width))
