"""Peers: nets that differ in their re-initialised filters alone and teach one another.

Deep mutual learning (DML, Zhang et al., CVPR 2018): each net learns from the labels and from what
the others say at the same time. All are trained on the same device, step by step, so a round costs
as many times the work and the bytes as there are peers. Their freed filters have nothing in common
that could be averaged: one of them becomes the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from common.distill import kd
from common.layout import Layout
from common.state import State
from common.train import Objective


class Peers(nn.Module):
    """Several nets that see the same images.

    Parameters
    ----------
    net : nn.Module
        Of which each is a copy.
    count : int
        How many.
    """

    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(copy.deepcopy(net) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[B, C, H, W]`` to the logits of each, ``[peers, B, classes]``."""
        return torch.stack([net(x) for net in self.nets])


def joined(states: Sequence[Mapping[str, torch.Tensor]]) -> State:
    """Return the state of `Peers` from those of its nets."""
    return {_name(k, name): tensor for k, own in enumerate(states) for name, tensor in own.items()}


def peer(state: Mapping[str, torch.Tensor], number: int) -> State:
    """Return the state of one net from that of `Peers`."""
    prefix = _name(number, "")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def joined_layout(layout: Layout, count: int) -> Layout:
    """Return the layout of `Peers` from that of one net: each one's entries in turn."""
    entries = (
        replace(entry, tensor=_name(number, entry.tensor))
        for number in range(count)
        for entry in layout.entries
    )
    return Layout(layout.scope, tuple(entries))


def _name(number: int, name: str) -> str:
    return f"nets.{number}.{name}"


class Once(nn.Module):
    """A net that is asked for the same batch several times in a row, and answers once."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the net's answer to `x`."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self.net(x)
        return self._last[1]


def mutual(objective: Objective, weight: float) -> Objective:
    """Return the loss of `Peers`: each one's own, and KL to what every other one says.

    DML, eq. 6: ``L_k = L(z_k) + weight / (K - 1) * sum_j KL(p_j || p_k)``; the sum over k.

    Parameters
    ----------
    objective : callable
        Of one net.
    """

    def loss(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.stack([objective(own, x, y) for own in logits]).sum()
        for number, own in enumerate(logits):
            others = [z for other, z in enumerate(logits) if other != number]
            taught = torch.stack([kd(own, z, 1.0).mean() for z in others]).mean()
            total = total + weight * taught
        return total

    return loss
