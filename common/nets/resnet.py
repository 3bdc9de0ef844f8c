"""Residual nets of basic blocks (He et al., CVPR 2016), with torchvision's parameter names.

A ResNet-18 state dict of torchvision's fits ``resnet18-imagenet`` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.init import he_init

#: Basic blocks of each stage. Three stages: the CIFAR nets of depth 6n + 2.
BLOCKS: dict[str, tuple[int, ...]] = {
    "resnet8": (1, 1, 1),
    "resnet20": (3, 3, 3),
    "resnet56": (9, 9, 9),
    "resnet110": (18, 18, 18),
    "resnet18": (2, 2, 2, 2),
    "resnet18-imagenet": (2, 2, 2, 2),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by 1x1 + BN where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """Stem, stages of basic blocks (each doubles the channels and halves the sides), classifier.

    Parameters
    ----------
    blocks : sequence of int
        Basic blocks of each stage.
    classes, in_channels, width : int
        Logits, image channels, channels of the first stage.
    imagenet : bool
        7x7 stem with stride 2 and max pooling; otherwise 3x3 with stride 1 (CIFAR).
    """

    def __init__(
        self, blocks: Sequence[int], classes: int, in_channels: int, width: int, *, imagenet: bool
    ) -> None:
        super().__init__()
        side, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, side, stride, padding=side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        self.stages = len(blocks)
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            first = BasicBlock(inputs, outputs, stride=1 if stage == 0 else 2)
            rest = [BasicBlock(outputs, outputs, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, classes]``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def build(name: str, classes: int, in_channels: int, width: int) -> ResNet:
    """Build one of `BLOCKS` by name."""
    imagenet = name.endswith("-imagenet")
    return ResNet(BLOCKS[name], classes, in_channels, width, imagenet=imagenet)
