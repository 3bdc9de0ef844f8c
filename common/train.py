"""The one training loop: prior, freeing, devices and the server's distillation all use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common.accelerator import CPU, Accelerator
from common.data import Augment, ImageSet, Normalisation
from common.errors import DataError
from common.frozen import training_only
from common.layout import Layout
from common.optim import PackedSGD
from common.rotation import Rotations

Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(student logits [B, C], inputs [B, C, H, W], labels [B]) -> loss []."""


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    Attributes
    ----------
    epochs, batch : int
        Passes over the data; images a step.
    lr, momentum, weight_decay : float
        Of SGD.
    schedule : {"constant", "cosine"}
        Learning rate over the epochs.
    augment : Augment
        What is done to each image, anew each epoch.
    """

    epochs: int
    batch: int
    lr: float
    augment: Augment
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True, eq=False)
class Labelled:
    """Normalised images [N, C, H, W] (float32, channels last) and labels [N] (int64)."""

    x: torch.Tensor
    y: torch.Tensor

    @classmethod
    def of(cls, images: ImageSet, normalisation: Normalisation) -> Labelled:
        """Normalise `images`."""
        return cls(normalisation.to_tensor(images.images), torch.from_numpy(images.labels))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Trained:
    """What a training run reports: mean loss of the last epoch, images and steps seen."""

    loss: float
    images: int
    steps: int


def train(
    net: nn.Module,
    layout: Layout,
    data: Labelled,
    objective: Objective,
    recipe: Recipe,
    rng: torch.Generator,
    *,
    accelerator: Accelerator = CPU,
    rotations: Rotations | None = None,
    rates: Mapping[str, torch.Tensor] | None = None,
    before_step: Callable[[float], None] | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train the entries of `layout`, in place; everything else stays equal to the last bit.

    Parameters
    ----------
    net : nn.Module
        Any net; contiguous parameters.
    layout : Layout
        What may be trained.
    data : Labelled
        At least two images (BN needs them).
    objective : callable
        From student logits, inputs and labels to a scalar loss.
    recipe : Recipe
        Epochs, batch size, learning rate and so on.
    rng : torch.Generator
        Of the order of the images, of their augmentation and, by its seed, of dropout.
    rotations : Rotations, optional
        A second task of `net`, learnt on turned images beside the others: twice the work.
    rates : mapping of str to tensor, optional
        Factors on the learning rate (see `common.layout.rates_of`).
    before_step : callable, optional
        Called with the share of steps done, in [0, 1), before each step; and with 1.0 at the
        end.
    after_epoch : callable, optional
        Called with the epoch (from 1) and its mean loss.

    Raises
    ------
    DataError
        If there are fewer than two images, or the loss is no longer finite.
    """
    if len(data) < 2:
        raise DataError(f"{len(data)} image(s) to train on: batch normalisation needs at least 2")
    sizes = batch_sizes(len(data), recipe.batch)
    total = max(recipe.epochs * len(sizes), 1)
    done, loss_sum = 0, 0.0
    with torch.random.fork_rng(devices=[]), training_only(net, layout):
        seed = rng.initial_seed()  # a user's net may draw too: dropout
        if accelerator.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the other formats a stack for each CUDA
        else:
            torch.manual_seed(seed)
        optimiser = PackedSGD(
            net,
            layout,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            rates=rates,
        )
        for epoch in range(recipe.epochs):
            loss_sum = 0.0
            for index in _batches(len(data), sizes, rng):
                if before_step is not None:
                    before_step(done / total)
                if recipe.schedule == "cosine":
                    optimiser.lr = recipe.lr * 0.5 * (1 + math.cos(math.pi * done / total))
                x = recipe.augment(data.x[index], rng).to(accelerator.device)
                y = data.y[index].to(accelerator.device)
                with accelerator.autocast():
                    if rotations is None:
                        loss = objective(net(x).float(), x, y)
                    else:
                        both = torch.cat([x, rotations.turned(x)])
                        loss = objective(net(both)[: len(x)].float(), x, y) + rotations.loss(y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                loss_sum += float(loss.detach()) * len(index)
                done += 1
            if not math.isfinite(loss_sum):
                raise DataError(
                    f"the training loss is {loss_sum} after epoch {epoch + 1}: lower the "
                    f"learning rate (now {recipe.lr})"
                )
            if after_epoch is not None:
                after_epoch(epoch + 1, loss_sum / len(data))
        if before_step is not None:
            before_step(1.0)
    return Trained(loss_sum / len(data), recipe.epochs * len(data), done)


def batch_sizes(images: int, batch: int) -> list[int]:
    """Return the sizes of an epoch's batches; a last batch of one joins the one before it."""
    sizes = [batch] * (images // batch) + ([images % batch] if images % batch else [])
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def _batches(images: int, sizes: list[int], rng: torch.Generator) -> Iterator[torch.Tensor]:
    order = torch.randperm(images, generator=rng)
    yield from torch.split(order, sizes)


@torch.no_grad()
def predict(
    net: nn.Module, x: torch.Tensor, *, batch: int = 128, accelerator: Accelerator = CPU
) -> torch.Tensor:
    """Return the logits [N, C] of `net` in eval mode, on the CPU."""
    was_training = net.training
    net.eval()
    parts = []
    for chunk in torch.split(x, batch):
        with accelerator.autocast():
            parts.append(net(chunk.to(accelerator.device)).float().cpu())
    net.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def accuracy_of(net: nn.Module, data: Labelled, accelerator: Accelerator = CPU) -> float:
    """Return the share of `data` that `net` gets right, in [0, 1]; NaN without data."""
    if not len(data):
        return math.nan
    right = predict(net, data.x, accelerator=accelerator).argmax(1) == data.y
    return int(right.sum()) / len(data)
