"""What a net's channels see in an image, and class statistics of it that no gradient touches.

Means and deviations of every layer's channels describe an image well enough to tell classes apart
that the net was never trained on. Class counts, sums and one matrix of products over all classes
add up exactly over devices and steps, so a classifier made from them (linear discriminant
analysis, LDA) is the same as if all images had been at one place: it forgets nothing. In the manner
of FeCAM (Goswami et al., NeurIPS 2023) and Fed3R (Fani et al., ICML 2024).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.accelerator import CPU, Accelerator
from common.errors import UpdateError
from common.gate import look

_SHRINKAGE = 0.01
Head = Literal["lda", "ridge", "ncm"]


class FeatureNet(nn.Module):
    """Maps images to features [B, D]: mean and deviation of every layer's channels.

    Layers are the batch normalisations behind their ReLU, and what each residual block puts out.

    Parameters
    ----------
    net : nn.Module
        Its tensors are shared, not copied; the classifier's output is not used.
    head : str
        Name of the classifier, whose input is a feature too.
    """

    def __init__(self, net: nn.Module, head: str) -> None:
        super().__init__()
        self.net = net
        self._seen: list[torch.Tensor] = []
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(partial(_collect, self._seen))
        net.get_submodule(head).register_forward_pre_hook(partial(_collect_input, self._seen))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of images [B, C, H, W]."""
        self._seen.clear()
        self.net(x)
        features = torch.cat(list(self._seen), 1)
        self._seen.clear()
        return features


def _collect(
    seen: list[torch.Tensor], module: nn.Module, inputs: object, out: torch.Tensor
) -> None:
    seen.append(look(F.relu(out)))


def _collect_input(
    seen: list[torch.Tensor], module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    seen.append(inputs[0])


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Counts [C], sums [C, D] and all classes' products [D, D] of features, in float64."""

    counts: np.ndarray
    sums: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor, labels: torch.Tensor, classes: int) -> Self:
        """Return those of `features` [N, D] with `labels` [N]."""
        values = features.double().numpy()
        one_hot = F.one_hot(labels, classes).double().numpy()
        return cls(one_hot.sum(0), one_hot.T @ values, values.T @ values)

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.counts + other.counts, self.sums + other.sums, self.second + other.second
        )

    def pack(self) -> np.ndarray:
        """Return what travels: counts, sums and the upper triangle of the products, float32."""
        upper = self.second[np.triu_indices(len(self.second))]
        return np.concatenate([self.counts, self.sums.ravel(), upper]).astype(np.float32)

    @classmethod
    def unpack(cls, packed: np.ndarray, classes: int, size: int) -> Self:
        """Read what `pack` wrote, or a sum of such, for `size` features.

        Raises
        ------
        UpdateError
            If the length is another, a value is not finite, or a count is negative.
        """
        if packed.shape != (packed_size(classes, size),):
            raise UpdateError(
                f"the class statistics have {list(packed.shape)} values, expected "
                f"{packed_size(classes, size)}"
            )
        values = packed.astype(np.float64)
        if not np.isfinite(values).all() or values[:classes].min() < 0:
            raise UpdateError("the class statistics are not finite, or have negative counts")
        counts, sums, upper = np.split(values, [classes, classes * (1 + size)])
        second = np.zeros((size, size))
        second[np.triu_indices(size)] = upper
        return cls(counts, sums.reshape(classes, size), second + np.triu(second, 1).T)

    def classifier(self, kind: Head = "lda") -> tuple[np.ndarray, np.ndarray]:
        """Return weight [C, D] and bias [C] of a linear classifier, all classes as likely.

        A class without an image gets a bias that no image overcomes.

        Parameters
        ----------
        kind : {"lda", "ridge", "ncm"}
            Linear discriminant analysis; ridge regression of one-hot labels; nearest class mean in
            features scaled to unit variance.
        """
        there = self.counts > 0
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        within = self.second - (means * self.counts[:, None]).T @ means
        covariance = within / self.counts.sum()
        spread = np.clip(np.diag(covariance), 1e-10, None)
        covariance = covariance + np.diag(_SHRINKAGE * spread + 1e-10)
        if kind == "ridge":
            return self._ridge()
        if kind == "ncm":
            covariance = np.diag(np.diag(covariance))
        weight = np.linalg.solve(covariance, means.T).T
        bias = -0.5 * (weight * means).sum(1)
        return weight, np.where(there, bias, _NEVER)

    def _ridge(self) -> tuple[np.ndarray, np.ndarray]:
        there = self.counts > 0
        # every class weighs as much as another, however many images it has
        share = np.where(there, 1.0 / np.maximum(self.counts, 1), 0.0) / there.sum()
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        centre = means[there].mean(0)
        total = self.second / self.counts.sum()
        mean = self.sums.sum(0) / self.counts.sum()
        covariance = total - np.outer(mean, mean)
        spread = np.clip(np.diag(covariance), 1e-10, None)
        covariance = covariance + np.diag(_SHRINKAGE * spread + 1e-10)
        between = (means - centre) * (share * self.counts)[:, None]
        weight = np.linalg.solve(covariance, between.T).T
        return weight, np.where(there, share * self.counts - weight @ centre, _NEVER)


_NEVER = -1e6


def packed_size(classes: int, size: int) -> int:
    """Return how many values packed class statistics have."""
    return classes * (1 + size) + size * (size + 1) // 2


@torch.no_grad()
def class_sums(
    net: nn.Module,
    head: str,
    x: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    *,
    accelerator: Accelerator = CPU,
) -> ClassSums:
    """Return the class statistics of images [N, C, H, W]; `net` is left as it is."""
    features = FeatureNet(copy.deepcopy(net).eval(), head)
    parts = [features(chunk.to(accelerator.device)).cpu() for chunk in torch.split(x, 256)]
    return ClassSums.of(torch.cat(parts), labels, classes)


@torch.no_grad()
def feature_size(net: nn.Module, head: str, input_shape: tuple[int, int, int]) -> int:
    """Return the number of features of `net`."""
    return int(FeatureNet(copy.deepcopy(net).eval(), head)(torch.zeros(1, *input_shape)).shape[1])


class ClosedFormNet(nn.Module):
    """A net whose classifier is made of class statistics, for inference."""

    def __init__(
        self, net: nn.Module, head: str, statistics: ClassSums, kind: Head = "lda"
    ) -> None:
        super().__init__()
        self.features = FeatureNet(copy.deepcopy(net).eval(), head)
        weight, bias = statistics.classifier(kind)
        # Features are taken from their mean, or the scores would be small differences of large
        # numbers.
        centre = statistics.sums.sum(0) / statistics.counts.sum()
        bias = bias + weight @ centre
        self.classifier = nn.Linear(weight.shape[1], len(bias))
        self.centre = nn.Parameter(torch.from_numpy(centre).float(), requires_grad=False)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(weight))
            self.classifier.bias.copy_(torch.from_numpy(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to discriminant scores [B, classes]."""
        scores: torch.Tensor = self.classifier(self.features(x) - self.centre)
        return scores
