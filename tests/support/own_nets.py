"""Nets of a user's own, with what the built-in ones have not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dense(nn.Module):
    """Concatenation, read through a BatchNorm over both parts, as in DenseNet."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(6)
        self.grow1 = nn.Conv2d(6, 4, 3, padding=1)
        self.bn_b = nn.BatchNorm2d(10)
        self.grow2 = nn.Conv2d(10, 4, 3, padding=1)
        self.bn_c = nn.BatchNorm2d(14)
        self.fc = nn.Linear(14, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow1(F.relu(self.bn_a(x)))], 1)
        x = torch.cat([x, self.grow2(F.relu(self.bn_b(x)))], 1)
        return self.fc(F.relu(self.bn_c(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """A residual stream that is read only through BatchNorms (ResNet v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = x + self.conv1(F.relu(self.bn1(x)))
        return self.fc(F.relu(self.bn2(x)).mean((2, 3)))
