"""Weights that mattered to earlier data are held back: each is pulled to where it was.

Elastic weight consolidation (EWC, Kirkpatrick et al., PNAS 2017). How much a weight mattered is
measured where the data is: at the server when the prior was trained, on the devices after each
step. The measures of all steps are added up and refer to the newest model (online EWC, Schwarz et
al., ICML 2018), so that one array serves however many steps there were.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.filters import FilterGraph, FreeSet, freed_index
from common.layout import Layout, dense_layout
from common.state import State, read_state
from common.train import Labelled, Objective

Importance = Literal["fisher", "mas"]

_IMAGES = 256
"""The mean over images settles early; each costs a backward pass of its own."""


def importances(
    net: nn.Module,
    graph: FilterGraph,
    data: Labelled,
    kind: Importance,
    rng: torch.Generator,
    *,
    most: int = _IMAGES,
) -> np.ndarray:
    """Return how much each weight of a net matters to images, float32 in the dense layout.

    ``fisher`` is the diagonal of the Fisher information, the mean of ``(d log p(y | x) / d w)^2``
    with y drawn from the net's own answer (not the label: a net that knows its training data by
    heart has no gradient there). ``mas`` is the mean of ``|d ||f(x)||^2 / d w|`` (Aljundi et al.,
    ECCV 2018). BN statistics do not matter: they follow the data.

    Parameters
    ----------
    net : nn.Module
        Evaluated in eval mode; left as it is.
    rng : torch.Generator
        Draws y.
    most : int
        Images that are looked at.
    """
    layout = dense_layout(graph, read_state(net))
    modes = [(module, module.training) for module in net.modules()]
    parameters = dict(net.named_parameters())
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    net.eval()
    device = next(iter(parameters.values())).device
    images = data.x[:most]
    try:
        for image in images:
            logits = net(image[None].to(device)).float()
            if kind == "fisher":
                answer = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=rng)
                loss = F.cross_entropy(logits, answer[:, 0].to(device))
            else:
                loss = logits.square().sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += (gradient.square() if kind == "fisher" else gradient.abs()).double()
    finally:
        for module, training in modes:
            module.training = training
    state = {entry.tensor: torch.zeros(entry.shape) for entry in layout.entries}
    state |= {name: (t / max(len(images), 1)).float().cpu() for name, t in totals.items()}
    return layout.pack(state)


def without(packed: np.ndarray, graph: FilterGraph, free: FreeSet, state: State) -> np.ndarray:
    """Return dense importances with zeros at free filters: they are drawn anew and owe nothing."""
    layout = dense_layout(graph, state)
    tensors = layout.unpack(state, packed)
    for name, rows in freed_index(graph, free).own.items():
        tensors[name][torch.from_numpy(rows)] = 0.0
    return layout.pack(tensors)


def anchored(
    objective: Objective,
    net: nn.Module,
    layout: Layout,
    importance: State,
    target: State,
    weight: float,
    lr: float,
) -> Objective:
    """Return `objective` + ``weight / 2 * sum_i importance_i (w_i - target_i)^2``.

    Kirkpatrick et al., PNAS 2017, eq. 3, over the trainable entries of `net`.

    Parameters
    ----------
    importance, target : State
        Of the net; what each weight is worth and where it was.
    lr : float
        Learning rate of the training. ``weight * importance`` is cut at 1 / lr: beyond, a step
        would jump over the target and the training would diverge.
    """
    parameters = dict(net.named_parameters())
    items = []
    for entry in layout.entries:
        if entry.tensor in parameters:
            device = parameters[entry.tensor].device
            strength = (weight * entry.read(importance[entry.tensor])).clamp(max=1 / max(lr, 1e-12))
            there = entry.read(target[entry.tensor]).clone()
            items.append((entry, strength.to(device), there.to(device)))

    def pulled(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = objective(logits, x, y)
        for entry, strength, there in items:
            moved = entry.read(parameters[entry.tensor]) - there
            loss = loss + 0.5 * (strength * moved.square()).sum()
        return loss

    return pulled
