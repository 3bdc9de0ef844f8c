"""VGG nets with BatchNorm (Simonyan and Zisserman, ICLR 2015), one linear layer at the end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.init import he_init

#: Convolutions of each block; a max pooling halves the sides after each.
CONVS: dict[str, tuple[int, ...]] = {"vgg11": (1, 1, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3)}
#: Channels of each block, in units of the first block's.
CHANNELS = (1, 2, 4, 8, 8)


def _block(convs: int, inputs: int, outputs: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, convs + 1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU()
        inputs = outputs
    layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, average pooling to 1x1, classifier.

    The five poolings need images of at least 32 x 32 pixels.
    """

    def __init__(self, convs: Sequence[int], classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = in_channels
        for number, (count, factor) in enumerate(zip(convs, CHANNELS, strict=True), start=1):
            blocks[f"block{number}"] = _block(count, inputs, width * factor)
            inputs = width * factor
        self.features = nn.Sequential(blocks)
        self.fc = nn.Linear(inputs, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, classes]``."""
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits


def build(name: str, classes: int, in_channels: int, width: int) -> VGG:
    """Build one of `CONVS` by name."""
    return VGG(CONVS[name], classes, in_channels, width)
