"""FedProx: a device may not stray far from the model that its round began with."""

from __future__ import annotations

import torch
from torch import nn

from common.layout import Layout
from common.train import Objective


def proximal(objective: Objective, net: nn.Module, layout: Layout, mu: float) -> Objective:
    """Return `objective` + ``mu / 2 * ||w - w_0||^2`` over the trainable entries of `net`.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, eq. 2; w_0 is
    `net` as it is now. BN statistics follow the data and are not pulled.
    """
    parameters = dict(net.named_parameters())
    entries = [entry for entry in layout.entries if entry.tensor in parameters]
    anchors = [entry.read(parameters[entry.tensor].detach()).clone() for entry in entries]

    def pulled(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = objective(logits, x, y)
        for entry, anchor in zip(entries, anchors, strict=True):
            moved = entry.read(parameters[entry.tensor]) - anchor
            loss = loss + mu / 2 * moved.square().sum()
        return loss

    return pulled
