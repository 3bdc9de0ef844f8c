"""Synthetic images beside a device's own: on them the net answers as an earlier model did."""

from __future__ import annotations

import torch
from torch import nn

from common.accelerator import Accelerator
from common.distill import kd
from common.train import Objective, predict


def replayed(
    objective: Objective,
    net: nn.Module,
    teacher: nn.Module,
    images: torch.Tensor,
    rng: torch.Generator,
    *,
    weight: float,
    temperature: float,
    batch: int,
    accelerator: Accelerator,
) -> Objective:
    """Return `objective` + ``weight * KD(net, teacher)`` on a draw of `images` at every step.

    Generative replay without data (TARGET, Zhang et al., ICCV 2023): own images are learnt by
    their labels, synthetic ones by what the earlier model says of them.

    Parameters
    ----------
    net : nn.Module
        That is trained.
    teacher : nn.Module
        In eval mode; asked once, the images are not augmented.
    images : tensor [N, C, H, W]
        Normalised.
    rng : torch.Generator
        Draws the images, `batch` a step.
    """
    taught = predict(teacher, images, accelerator=accelerator)

    def both(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(len(images), (batch,), generator=rng)
        student = net(images[drawn].to(logits.device)).float()
        wanted = taught[drawn].to(logits.device)
        return objective(logits, x, y) + weight * kd(student, wanted, temperature).mean()

    return both
