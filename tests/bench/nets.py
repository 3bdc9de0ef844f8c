"""The nets of the simulation benchmark, for both sides: needs torch alone."""

from __future__ import annotations

from torch import nn


def cnn2(classes: int, in_channels: int, width: int = 32, *, norm: bool = True) -> nn.Module:
    """Two 3x3 convolutions without padding, a hidden layer of 128, dropout: pfl's `simple_cnn`.

    That has no batch norm (`norm=False`), without which fallow can free no filter; with it, both
    sides of the benchmark run this very net. The adaptive pooling is a 2x2 one on 32x32 images.
    """
    bn = nn.BatchNorm2d if norm else lambda _: nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3),
        bn(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        bn(2 * width),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(14) if norm else nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(2 * width * 14 * 14, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, classes),
    )


def tiny(classes: int, in_channels: int) -> nn.Module:
    """Two convolutions with batch norm, pooled: a few thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )
