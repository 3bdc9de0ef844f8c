"""He initialisation (He et al., ICCV 2015), the same for all nets of this package."""

from __future__ import annotations

from torch import nn


def he_init(net: nn.Module) -> None:
    """Draw the weights of `net` in place from torch's global generator.

    Convolutions: N(0, 2 / fan_out); linear layers: N(0, 1 / fan_in), bias 0; BatchNorm: 1 and 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
