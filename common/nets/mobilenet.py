"""MobileNetV2 (Sandler et al., CVPR 2018) with strides for small images."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.init import he_init

#: Expansion, channels, blocks and first stride of each stage: table 2 of the paper, but for the
#: second stage's stride, 1 instead of 2, and the stem's, likewise: 32 x 32 images end at 4 x 4.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def divisible(channels: float, by: int = 8) -> int:
    """Round to the nearest multiple of `by`, at least one, and never down by more than 10 %."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded if rounded >= 0.9 * channels else rounded + by


def _conv_bn(
    inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1, *, relu: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs))
    if relu:
        parts["relu"] = nn.ReLU6()
    return nn.Sequential(parts)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = _conv_bn(inputs, hidden, 1)
        self.depthwise = _conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = _conv_bn(hidden, outputs, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, 1x1 convolution to 1280 channels or more, classifier.

    Parameters
    ----------
    classes, in_channels : int
        Logits, image channels.
    width : float
        Multiplier of all channel counts; the last convolution never shrinks below 1280.
    """

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        inputs = divisible(32 * width)
        self.stem = _conv_bn(in_channels, inputs, 3)
        blocks: list[nn.Module] = []
        for expansion, channels, count, stride in STAGES:
            outputs = divisible(channels * width)
            for number in range(count):
                first = stride if number == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, first, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        last = divisible(1280 * max(1.0, width))
        self.last = _conv_bn(inputs, last, 1)
        self.fc = nn.Linear(last, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, classes]``."""
        x = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
