"""Images made of a net alone, for want of the data that it was trained on.

DeepInversion (Yin et al., CVPR 2020): pixels are optimised until the net names the wanted class
and every batch normalisation sees the mean and variance that it saw in training. What comes out
is no image of anybody; to the net it is much like those that it knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.accelerator import CPU, Accelerator
from common.data import Normalisation


@dataclass(frozen=True)
class Inversion:
    """How images are made; variation and size weigh what they do in the authors' code.

    Attributes
    ----------
    steps : int
        Of Adam, for each batch.
    batch : int
        Images that are made together: their mean and variance are what is matched.
    lr : float
        On normalised pixels.
    statistics, variation, size : float
        Weights of the batch normalisations' statistics, of the total variation and of the squared
        norm, beside the cross-entropy. The authors sum plain distances, of which the deep layers'
        drown the classes when the running statistics lag behind a briefly trained net; here each
        channel's is in units of its own deviation.
    shift : int
        Pixels by which a batch is moved to and fro, so that nothing depends on a single pixel.
    """

    steps: int = 100
    batch: int = 125
    lr: float = 0.1
    statistics: float = 1.0
    variation: float = 2.5e-5
    size: float = 3e-8
    shift: int = 2


def synthesise(
    net: nn.Module,
    classes: Sequence[int],
    count: int,
    shape: tuple[int, int, int],
    normalisation: Normalisation,
    rng: torch.Generator,
    inversion: Inversion | None = None,
    *,
    mirror: bool = True,
    accelerator: Accelerator = CPU,
) -> np.ndarray:
    """Return images that `net` takes for its own training data, uint8 [count, H, W, C].

    Parameters
    ----------
    net : nn.Module
        With batch normalisations; evaluated in eval mode, left as it is.
    classes : sequence of int
        That it has seen; the images are of all of them, in turn.
    count : int
        How many images.
    shape : (int, int, int)
        Channels, height, width of an image.
    normalisation : Normalisation
        Of the net's inputs.
    rng : torch.Generator
        Draws where the pixels begin, and how they are moved.
    inversion : Inversion, optional
        How they are made.
    mirror : bool
        Mirror at random: not where a mirrored image is another one.
    """
    how = inversion or Inversion()
    targets = torch.tensor([classes[i % len(classes)] for i in range(count)], dtype=torch.int64)
    asked = [(p, p.requires_grad) for p in net.parameters()]
    modes = [(module, module.training) for module in net.modules()]
    net.eval().requires_grad_(False)
    try:
        made = [
            _batch(net, part, shape, normalisation, rng, how, mirror, accelerator)
            for part in torch.split(targets, how.batch)
        ]
    finally:
        for parameter, flag in asked:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
    return np.concatenate(made)


def _batch(
    net: nn.Module,
    targets: torch.Tensor,
    shape: tuple[int, int, int],
    normalisation: Normalisation,
    rng: torch.Generator,
    how: Inversion,
    mirror: bool,
    accelerator: Accelerator,
) -> np.ndarray:
    device = accelerator.device
    mean = torch.tensor(normalisation.mean).view(-1, 1, 1)
    std = torch.tensor(normalisation.std).view(-1, 1, 1)
    low, high = (-mean / std).to(device), ((1 - mean) / std).to(device)
    x = torch.randn(len(targets), *shape, generator=rng).to(device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    targets = targets.to(device)
    optimiser = torch.optim.Adam([x], how.lr)
    with _statistics(net) as gaps:
        for _ in range(how.steps):
            right, down, turned = torch.randint(0, 2 * how.shift + 1, (3,), generator=rng).tolist()
            seen = torch.roll(x, (down - how.shift, right - how.shift), (2, 3))
            if mirror and turned % 2:
                seen = seen.flip(3)
            gaps.clear()
            loss = F.cross_entropy(net(seen), targets)
            loss = loss + how.statistics * torch.stack(gaps).sum()
            loss = loss + how.variation * _variation(seen) + how.size * x.square().sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, low), high))
    pixels = (x.detach().cpu() * std + mean).clamp(0, 1) * 255
    images: np.ndarray = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return images


def _variation(x: torch.Tensor) -> torch.Tensor:
    """Return the norms of the differences of neighbours in four directions."""
    pairs = (
        (x[..., 1:], x[..., :-1]),
        (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    )
    return torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs]).sum()


@contextlib.contextmanager
def _statistics(net: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Give a list to which each forward pass adds how far each BN's input is from what it saw."""
    gaps: list[torch.Tensor] = []

    def note(bn: nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        var, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
        wide = bn.running_var + bn.eps
        gaps.append(((mean - bn.running_mean).square() / wide + (var / wide - 1).square()).mean())

    hooks = [
        module.register_forward_pre_hook(note)
        for module in net.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()
