"""What a net's channels see in an image, and classifiers of it that no gradient touches.

Means and deviations of every layer's channels describe an image well enough to tell classes apart
that the net was never trained on. Class counts, sums and one matrix of products over all classes
add up exactly over devices and steps, so a classifier made from them (linear discriminant
analysis, LDA) is the same as if all images had been at one place: it forgets nothing. In the manner
of FeCAM (Goswami et al., NeurIPS 2023) and Fed3R (Fani et al., ICML 2024).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
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
        Name of the classifier.
    layers : {"all", "last", "deviations"}
        Deviation of every layer's channels (batch normalisations behind their ReLU), and of the
        last map of every resolution deviations and the means of its four quadrants: where in an
        image something is tells classes apart, and pooling over all of it forgets that (Coates,
        Ng & Lee, AISTATS 2011). Or the classifier's input alone; or it and the layers' deviations,
        which say nearly as much as all, in a fifth of the products.
    """

    def __init__(self, net: nn.Module, head: str, layers: Layers = "all") -> None:
        super().__init__()
        self.net = net
        self._seen: list[torch.Tensor] = []
        self._maps: dict[torch.Size, torch.Tensor] = {}
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | ScaleShift) and layers != "last":
                module.register_forward_hook(partial(_collect_deviations, self._seen))
            if module is not net and layers == "all":
                module.register_forward_hook(partial(_keep_last, self._maps))
        if layers != "all":
            classifier = net.get_submodule(head)
            classifier.register_forward_pre_hook(partial(_collect_input, self._seen))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features and the logits of images [B, C, H, W]."""
        self._seen.clear()
        self._maps.clear()
        logits = self.net(x)
        ends = [part for end in self._maps.values() for part in _by_quadrant(F.relu(end))]
        features = torch.cat([*self._seen, *ends], 1)
        self._seen.clear()
        self._maps.clear()
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


def _collect_deviations(
    seen: list[torch.Tensor], module: nn.Module, inputs: object, out: torch.Tensor
) -> None:
    seen.append(_deviations(F.relu(out)))


def _deviations(feature_map: torch.Tensor) -> torch.Tensor:
    return look(feature_map)[:, feature_map.shape[1] :]


def _keep_last(
    maps: dict[torch.Size, torch.Tensor], module: nn.Module, inputs: object, out: object
) -> None:
    if isinstance(out, torch.Tensor) and out.dim() == 4 and min(out.shape[2:]) > 1:
        maps[out.shape[2:]] = out


def _by_quadrant(feature_map: torch.Tensor) -> list[torch.Tensor]:
    """Return deviations, and means of the quadrants, [B, C] each, of a map [B, C, H, W]."""
    # By slices: exporters know no adaptive pooling of a size that its windows do not divide.
    top, left = (size // 2 for size in feature_map.shape[2:])
    upper, lower = feature_map[:, :, :top], feature_map[:, :, top:]
    quadrants = (upper[..., :left], upper[..., left:], lower[..., :left], lower[..., left:])
    return [_deviations(feature_map), *(quadrant.mean((2, 3)) for quadrant in quadrants)]


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

    def discriminant(self, kind: Head = "lda", most: int = 0, limit: int = 0) -> Discriminant:
        """Return the classifier with at most `most` features, and at most `limit`.

        0 is no limit; if there is `most`, half as many features as there were images is one too.

        Features without which the classes would be told apart nearly as well are left out by
        tenths: leaving one out costs its weight's square over its diagonal element of the inverse
        covariance (Hassibi & Stork, "Optimal brain surgeon", NIPS 1992). A phone has fewer weights
        to store, and few images are overfitted less.
        """
        size = self.sums.shape[1]
        few = min(most, int(self.counts.sum() / 2)) if most else size
        chosen = self._telling(kind, max(2, min(few, limit or size)))
        weight, bias = self.of_features(chosen).classifier(kind)
        there = self.counts > 0
        # What all classes' scores have in common tells none from another, and is so large that
        # float32 would lose what does.
        bias = np.where(there, bias - bias[there].mean(), _NEVER)
        return Discriminant(chosen, self._around_mean(weight), bias, there)

    def _around_mean(self, rows: np.ndarray) -> np.ndarray:
        """Return rows [C, D] less their mean; zero for classes without an image."""
        there = self.counts > 0
        return np.where(there[:, None], rows - rows[there].mean(0), 0.0)

    def _telling(self, kind: Head, most: int) -> np.ndarray:
        chosen = np.arange(self.sums.shape[1])
        if len(chosen) <= most:
            return chosen
        targets, covariance = self._problem(kind)
        targets = self._around_mean(targets)
        precision = np.linalg.inv(covariance)
        while len(chosen) > most:
            cost = ((targets[:, chosen] @ precision) ** 2).sum(0) / np.diag(precision)
            order = np.argsort(-cost, kind="stable")
            left = max(most, int(len(chosen) * _KEPT))
            keep, go = np.sort(order[:left]), np.sort(order[left:])
            # the inverse of what is left of the covariance
            lost = np.linalg.solve(precision[np.ix_(go, go)], precision[np.ix_(go, keep)])
            precision = precision[np.ix_(keep, keep)] - precision[np.ix_(keep, go)] @ lost
            chosen = chosen[keep]
        return chosen

    def within(self) -> np.ndarray:
        """Covariance [D, D] around the class means."""
        means = self._means()
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
        targets, covariance = self._problem(kind)
        weight = np.linalg.solve(covariance, targets.T).T
        if kind == "ridge":
            centre, share = self._means()[there].mean(0), 1.0 / there.sum()
            return weight, np.where(there, share - weight @ centre, _NEVER)
        return weight, np.where(there, -0.5 * (weight * targets).sum(1), _NEVER)

    def _means(self) -> np.ndarray:
        return np.asarray(self.sums / np.maximum(self.counts, 1)[:, None])

    def _problem(self, kind: Head) -> tuple[np.ndarray, np.ndarray]:
        """Return targets [C, D] and covariance [D, D], whose quotient is the weight."""
        there, targets = self.counts > 0, self._means()
        if kind == "ridge":
            # every class weighs as much as another, however many images it has
            mean = self.sums.sum(0) / self.counts.sum()
            targets = self._around_mean(targets) / there.sum()
            covariance = self.second / self.counts.sum() - np.outer(mean, mean)
        else:
            covariance = self.within()
        spread = np.clip(np.diag(covariance), 1e-10, None)
        covariance = covariance + np.diag(_SHRINKAGE * spread + 1e-10)
        return targets, np.diag(np.diag(covariance)) if kind == "ncm" else covariance


_NEVER = -1e6
_KEPT = 0.9


@dataclass(frozen=True, eq=False)
class Discriminant:
    """A linear classifier of some features.

    Attributes
    ----------
    chosen : int array [n]
        Which features.
    weight, bias : float array [C, n], [C]
        Of the scores, which are around their mean over the classes that had an image.
    there : bool array [C]
        Classes that had an image; the bias of others is so low that no image overcomes it.
    """

    chosen: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    there: np.ndarray

    def impartial(self) -> Discriminant:
        """Return the same with scores of absent classes that are the mean of the others'."""
        return replace(self, bias=np.where(self.there, self.bias, 0.0))

    def absent(self) -> torch.Tensor:
        """Return what makes scores of absent classes hopeless, float32 [C]."""
        return torch.from_numpy(np.where(self.there, 0.0, _NEVER)).float()

    def pack(self, size: int) -> np.ndarray:
        """Return what travels of a classifier of some of `size` features, float32.

        Weights and biases; those of features that are not chosen are zero.
        """
        weight = np.zeros((len(self.bias), size))
        weight[:, self.chosen] = self.weight
        return np.concatenate([weight.ravel(), self.bias]).astype(np.float32)

    @classmethod
    def unpack(cls, packed: np.ndarray, classes: int, size: int) -> Self:
        """Read what `pack` wrote for `size` features.

        Raises
        ------
        UpdateError
            If the length is another or a value is not finite.
        """
        check_values(packed, classes * (size + 1), "the rival classifier")
        weight, bias = np.split(packed.astype(np.float64), [size * classes])
        return cls(np.arange(size), weight.reshape(classes, size), bias, bias > _NEVER / 2)


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


def without_head(net: nn.Module, head: str) -> nn.Module:
    """Return `net` itself, its classifier replaced by nothing: class statistics answer for it."""
    net.set_submodule(head, nn.Identity())
    return net


class Scores(nn.Module):
    """A discriminant as a layer: features [B, D] in, scores [B, classes] out, times `weight`."""

    def __init__(self, discriminant: Discriminant, weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.from_numpy(discriminant.chosen))
        self.classifier = nn.Linear(discriminant.weight.shape[1], len(discriminant.bias))
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(discriminant.weight * weight))
            self.classifier.bias.copy_(torch.from_numpy(discriminant.bias * weight))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features to scores."""
        chosen: torch.Tensor = self.get_buffer("chosen")
        scores: torch.Tensor = self.classifier(features.index_select(1, chosen))
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
