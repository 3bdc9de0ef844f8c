"""What a net's channels see in an image, and classifiers of it that no gradient touches.

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
from common.update import check_values

_SHRINKAGE = 0.01
Head = Literal["lda", "ridge", "ncm"]
Layers = Literal["all", "last", "deviations"]


class FeatureNet(nn.Module):
    """Maps images to features [B, D] and logits [B, classes].

    Parameters
    ----------
    net : nn.Module
        Its tensors are shared, not copied.
    head : str
        Name of the classifier, whose input is a feature too.
    layers : {"all", "last", "deviations"}
        Mean and deviation of every layer's channels (batch normalisations behind their ReLU) and
        the classifier's input; that input alone; or it and the deviations, which say nearly as
        much as all, in a quarter of the products.
    """

    def __init__(self, net: nn.Module, head: str, layers: Layers = "all") -> None:
        super().__init__()
        self.net = net
        self._seen: list[torch.Tensor] = []
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | ScaleShift) and layers != "last":
                collect = _collect if layers == "all" else _collect_deviations
                module.register_forward_hook(partial(collect, self._seen))
        net.get_submodule(head).register_forward_pre_hook(partial(_collect_input, self._seen))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features and the logits of images [B, C, H, W]."""
        self._seen.clear()
        logits = self.net(x)
        features = torch.cat(list(self._seen), 1)
        self._seen.clear()
        return features, logits


class ScaleShift(nn.Module):
    """A batch normalisation in inference, which no exporter folds into weights that nets share."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        shift = bn.bias.detach() - bn.running_mean * scale
        self.scale = nn.Parameter(scale[:, None, None], requires_grad=False)
        self.shift = nn.Parameter(shift[:, None, None], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [B, C, H, W]."""
        return x * self.scale + self.shift


def _collect(
    seen: list[torch.Tensor], module: nn.Module, inputs: object, out: torch.Tensor
) -> None:
    seen.append(look(F.relu(out)))


def _collect_deviations(
    seen: list[torch.Tensor], module: nn.Module, inputs: object, out: torch.Tensor
) -> None:
    seen.append(look(F.relu(out))[:, out.shape[1] :])


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

    def of_features(self, chosen: np.ndarray) -> ClassSums:
        """Return those of some features alone."""
        return ClassSums(self.counts, self.sums[:, chosen], self.second[np.ix_(chosen, chosen)])

    def discriminant(self, kind: Head = "lda", most: int = 0) -> Discriminant:
        """Return the classifier with at most `most` features; 0 is all of them.

        If there is a limit, half as many features as there were images is one too.

        Features whose weights move the scores least, within classes, are left out by fifths, the
        others weighed again each time (recursive elimination, Guyon et al., Machine Learning
        2002): a phone has fewer weights to store, and few images are overfitted less.
        """
        chosen = np.arange(self.sums.shape[1])
        sums = self
        most = most and max(2, min(most, int(self.counts.sum() / 2)))
        while most and len(chosen) > most:
            weight, _ = sums.classifier(kind)
            weight = weight - weight.mean(0)
            moved = (weight**2).sum(0) * np.diag(sums.within())
            left = max(most, int(len(chosen) * _KEPT))
            chosen = chosen[np.sort(np.argsort(-moved, kind="stable")[:left])]
            sums = self.of_features(chosen)
        weight, bias = sums.classifier(kind)
        # Features are taken from their mean, or the scores would be small differences of large
        # numbers.
        centre = sums.sums.sum(0) / sums.counts.sum()
        return Discriminant(chosen, centre, weight, bias + weight @ centre, self.counts > 0)

    def within(self) -> np.ndarray:
        """Covariance [D, D] around the class means."""
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        between = (means * self.counts[:, None]).T @ means
        return np.asarray((self.second - between) / self.counts.sum())

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
        covariance = self.within()
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
_KEPT = 0.8


@dataclass(frozen=True, eq=False)
class Discriminant:
    """A linear classifier of some features.

    Attributes
    ----------
    chosen : int array [n]
        Which features.
    centre : float array [n]
        Taken from them first.
    weight, bias : float array [C, n], [C]
        Of the scores.
    there : bool array [C]
        Classes that had an image; the bias of others is so low that no image overcomes it.
    """

    chosen: np.ndarray
    centre: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    there: np.ndarray

    def impartial(self) -> Discriminant:
        """Return the same with scores around their mean, which is that of absent classes."""
        there = self.there[:, None]
        weight = np.where(there, self.weight - self.weight[self.there].mean(0), 0.0)
        bias = np.where(self.there, self.bias - self.bias[self.there].mean(), 0.0)
        return Discriminant(self.chosen, self.centre, weight, bias, self.there)

    def absent(self) -> torch.Tensor:
        """Return what makes scores of absent classes hopeless, float32 [C]."""
        return torch.from_numpy(np.where(self.there, 0.0, _NEVER)).float()

    def pack(self, size: int) -> np.ndarray:
        """Return what travels of a classifier of some of `size` features, float32.

        Centre, weights and biases; those of features that are not chosen are zero.
        """
        centre, weight = np.zeros(size), np.zeros((len(self.bias), size))
        centre[self.chosen], weight[:, self.chosen] = self.centre, self.weight
        return np.concatenate([centre, weight.ravel(), self.bias]).astype(np.float32)

    @classmethod
    def unpack(cls, packed: np.ndarray, classes: int, size: int) -> Self:
        """Read what `pack` wrote for `size` features.

        Raises
        ------
        UpdateError
            If the length is another or a value is not finite.
        """
        check_values(packed, size + classes * (size + 1), "the rival classifier")
        centre, weight, bias = np.split(packed.astype(np.float64), [size, size * (classes + 1)])
        there = bias > _NEVER / 2
        return cls(np.arange(size), centre, weight.reshape(classes, size), bias, there)


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
    layers: Layers = "all",
    mirror: bool = False,
    accelerator: Accelerator = CPU,
) -> ClassSums:
    """Return the class statistics of images [N, C, H, W]; `net` is left as it is.

    With `mirror` an image counts half as it is and half mirrored: more is known of a class from
    as many images.
    """
    features = FeatureNet(copy.deepcopy(net).eval(), head, layers)

    def sums(images: torch.Tensor) -> ClassSums:
        chunks = torch.split(images, 256)
        parts = [features(chunk.to(accelerator.device))[0].cpu() for chunk in chunks]
        return ClassSums.of(torch.cat(parts), labels, classes)

    if not mirror:
        return sums(x)
    both = sums(x) + sums(x.flip(3))
    return ClassSums(both.counts / 2, both.sums / 2, both.second / 2)


@torch.no_grad()
def feature_size(
    net: nn.Module, head: str, input_shape: tuple[int, int, int], layers: Layers = "all"
) -> int:
    """Return the number of features of `net`."""
    features = FeatureNet(copy.deepcopy(net).eval(), head, layers)
    return int(features(torch.zeros(1, *input_shape))[0].shape[1])


class Scores(nn.Module):
    """A discriminant as a layer: features [B, D] in, scores [B, classes] out, times `weight`."""

    def __init__(self, discriminant: Discriminant, weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.from_numpy(discriminant.chosen))
        self.centre = nn.Parameter(torch.from_numpy(discriminant.centre).float(), False)
        self.classifier = nn.Linear(discriminant.weight.shape[1], len(discriminant.bias))
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(discriminant.weight * weight))
            self.classifier.bias.copy_(torch.from_numpy(discriminant.bias * weight))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features to scores."""
        chosen: torch.Tensor = self.get_buffer("chosen")
        scores: torch.Tensor = self.classifier(features.index_select(1, chosen) - self.centre)
        return scores


class ClosedFormNet(nn.Module):
    """A net whose classifier is made of class statistics, alone or beside its own; for inference.

    Parameters
    ----------
    net : nn.Module
        Its tensors are shared, not copied.
    head : str
        Name of its classifier.
    scores : Scores
        Made of statistics of the net's features; may be shared with other nets.
    layers : {"all", "last"}
        Which features (see `FeatureNet`).
    beside : bool
        Whether the net's own logits count as well.
    """

    def __init__(
        self,
        net: nn.Module,
        head: str,
        scores: Scores,
        layers: Layers = "all",
        *,
        beside: bool = False,
    ) -> None:
        super().__init__()
        self.features = FeatureNet(net, head, layers)
        self.scores = scores
        self.beside = beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to scores [B, classes]."""
        features, logits = self.features(x)
        scores: torch.Tensor = self.scores(features)
        return logits + scores if self.beside else scores
