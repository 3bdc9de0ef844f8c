"""Which inputs belong to the prior's world and which to a newer one.

Every world leaves a summary of what its images look like to the kept filters of the first layer:
mean and second moment of each channel's mean and deviation over the image. Such sums add up
exactly over devices, hold no image and are a few kilobytes. From them, the posterior that an
image is from a world is that of a Gaussian for each (quadratic discriminant analysis); a net of
several experts is mixed by it (`common.worlds`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn

from common.accelerator import CPU, Accelerator
from common.errors import NetError, UpdateError

_SHRINKAGE = 0.01
"""Added to the covariance's diagonal, as a share of itself: channels that are almost copies of
one another would else decide everything."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, sum [d] and sum of products [d, d] of features, in float64: they add up exactly."""

    count: float
    total: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> Self:
        """Return those of `features` [N, d]."""
        values = features.double().numpy()
        return cls(float(len(values)), values.sum(0), values.T @ values)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.second + other.second
        )

    @property
    def mean(self) -> np.ndarray:
        """Mean [d]."""
        return np.asarray(self.total / self.count)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance [d, d] with a little more on its diagonal (see `_SHRINKAGE`).

        Positive definite also where float32 sums on the wire have left little of it, as of images
        that are all alike.
        """
        mean = self.mean
        raw = self.second / self.count - np.outer(mean, mean)
        variance = np.clip(np.diag(raw), 1e-10, None)
        spread, axes = np.linalg.eigh(raw + np.diag(_SHRINKAGE * variance + 1e-10))
        least = 1e-7 * np.square(mean).max() + 1e-10
        return np.asarray((axes * np.clip(spread, least, None)) @ axes.T)

    def pack(self) -> np.ndarray:
        """Return what travels: count, sum and the upper triangle of the products, float32."""
        upper = self.second[np.triu_indices(len(self.total))]
        return np.concatenate([[self.count], self.total, upper]).astype(np.float32)

    @classmethod
    def unpack(cls, packed: np.ndarray, size: int) -> Self:
        """Read what `pack` wrote for features of `size` dimensions.

        Raises
        ------
        UpdateError
            If the length is another, a value is not finite, or the count is not positive.
        """
        if packed.shape != (packed_size(size),):
            raise UpdateError(
                f"the statistics have {list(packed.shape)} values, expected {packed_size(size)}"
            )
        values = packed.astype(np.float64)
        if not np.isfinite(values).all() or values[0] <= 0:
            raise UpdateError("the statistics are not finite, or of no image")
        second = np.zeros((size, size))
        second[np.triu_indices(size)] = values[1 + size :]
        second = second + np.triu(second, 1).T
        return cls(float(values[0]), values[1 : 1 + size], second)


def packed_size(size: int) -> int:
    """Return how many values the packed moments of `size` features have."""
    return 1 + size + size * (size + 1) // 2


def stem_conv(net: nn.Module, weight: torch.Tensor | None = None) -> nn.Conv2d:
    """Return a copy of the net's first convolution, with other weights if they are given.

    Raises
    ------
    NetError
        If it has none.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            stem = copy.deepcopy(module)
            if weight is not None:
                stem.weight = nn.Parameter(weight.clone().to(module.weight.device))
            return stem
    raise NetError("the net has no convolution: there is nothing to tell worlds apart by")


def look(feature_map: torch.Tensor) -> torch.Tensor:
    """Return mean and deviation over space of every channel, [B, 2 C], of [B, C, H, W]."""
    mean = feature_map.mean((2, 3))
    spread = (feature_map - mean[:, :, None, None]).square().mean((2, 3))
    # Not "+ 1e-8": the ONNX exporter takes so little for zero and leaves it out.
    return torch.cat([mean, torch.sqrt(spread.clamp_min(1e-8))], 1)


@torch.no_grad()
def stem_moments(stem: nn.Conv2d, x: torch.Tensor, *, accelerator: Accelerator = CPU) -> Moments:
    """Return the moments of images [N, C, H, W] as a net's first convolution sees them."""
    stem = stem.to(accelerator.device)
    parts = [look(stem(chunk.to(accelerator.device))).cpu() for chunk in torch.split(x, 256)]
    return Moments.of(torch.cat(parts))


class Gate(nn.Module):
    """Log posterior [B, K] of K worlds from features [B, d], all worlds as likely beforehand.

    Parameters
    ----------
    worlds : sequence of Moments
        One a world.
    most : int, optional
        Look along so many axes at most, those on which the worlds differ the most: a phone then
        has K small matrices to store, and not K of d x d.
    """

    def __init__(self, worlds: Sequence[Moments], most: int | None = None) -> None:
        super().__init__()
        centre = np.mean([world.mean for world in worlds], 0)
        axes = np.eye(len(centre)) if most is None else differing(worlds, most)
        means, whitenings, constants = [], [], []
        for world in worlds:
            factor = np.linalg.cholesky(axes.T @ world.covariance @ axes)
            means.append((world.mean - centre) @ axes)
            whitenings.append(np.linalg.inv(factor).T)
            constants.append(-np.log(np.diag(factor)).sum())
        # Parameters, so that they count as part of the model's size.
        self.centre = _fixed(centre)
        self.axes = None if most is None else _fixed(axes)
        self.means = _fixed(np.stack(means))
        self.whitenings = _fixed(np.stack(whitenings))
        self.constants = _fixed(np.array(constants))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features [B, d] to log posteriors [B, K]."""
        features = features - self.centre
        if self.axes is not None:
            features = features @ self.axes
        distances = []
        for world in range(len(self.constants)):
            white = (features - self.means[world]) @ self.whitenings[world]
            distances.append(self.constants[world] - 0.5 * white.square().sum(1))
        return torch.log_softmax(torch.stack(distances, 1), 1)


def differing(worlds: Sequence[Moments], most: int) -> np.ndarray:
    """Return at most `most` axes [d, q] on which means and covariances of worlds differ the most.

    Sliced average variance estimation with a slice a world, in features whitened by the worlds'
    mean covariance (Cook & Weisberg, JASA 86, 1991).
    """
    factor = np.linalg.cholesky(np.mean([world.covariance for world in worlds], 0))
    white = np.linalg.inv(factor).T
    centre = np.mean([world.mean for world in worlds], 0)
    spread = np.zeros_like(factor)
    for world in worlds:
        mean = (world.mean - centre) @ white
        apart = np.eye(len(mean)) - white.T @ world.covariance @ white
        spread += np.outer(mean, mean) + apart @ apart
    return np.asarray(white @ np.linalg.eigh(spread)[1][:, ::-1][:, :most])


def separation(a: Moments, b: Moments, rng: np.random.Generator, draws: int = 2000) -> float:
    """Return how often a gate between two worlds would be right, in [0, 1]; chance is a half.

    Measured on draws of the two Gaussians: no image is needed.
    """
    gate = Gate([a, b])
    right = 0.0
    for number, world in enumerate((a, b)):
        normal = rng.standard_normal((draws, len(world.total)))
        drawn = world.mean + normal @ np.linalg.cholesky(world.covariance).T
        posterior = gate(torch.from_numpy(drawn).float())
        right += float((posterior.argmax(1) == number).float().mean()) / 2
    return right


def likened(guess: Moments, seen: Moments) -> Moments:
    """Return a world of which only the channels' means are known, as spread out as another one.

    Parameters
    ----------
    guess : Moments
        Its mean of the first half of the features [d / 2], the channels' means, is taken.
    seen : Moments
        Of real images, whose deviations and covariance are taken.
    """
    mean = seen.mean.copy()
    channels = len(mean) // 2
    mean[:channels] = guess.mean[:channels]
    raw = seen.second / seen.count - np.outer(seen.mean, seen.mean)
    count = guess.count
    return Moments(count, count * mean, count * (raw + np.outer(mean, mean)))


def separation_by_channel(a: Moments, b: Moments) -> float:
    """Return how often the best single channel's mean would tell two worlds apart, in [0, 1].

    For worlds of which no covariance is known: what correlated channels add up to would be a
    guess about the guess.
    """
    channels = len(a.total) // 2
    spread = np.sqrt(np.diag(b.covariance))
    gap = np.abs(a.mean - b.mean)[:channels] / spread[:channels]
    return 0.5 * (1 + math.erf(float(gap.max()) / 2 / math.sqrt(2)))


def _fixed(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values).float(), requires_grad=False)
