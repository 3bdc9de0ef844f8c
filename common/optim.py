"""SGD over the entries that a layout names; all others cannot move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn, no_grad, zeros_like

from common.layout import Layout

_DENSE = 0.15
"""Share of a tensor's entries from which on masking all costs less than picking some."""


class PackedSGD:
    """SGD with momentum and weight decay on the trainable entries of a net.

    Masking gradients of a stock optimiser is not enough: its momentum and its weight decay
    move frozen entries. Here nothing but the named entries ever moves.

    Parameters
    ----------
    net : nn.Module
        Its parameters are updated in place; they must be contiguous.
    layout : Layout
        Trainable entries; buffers among them (BN statistics) are left to the forward pass.
    lr, momentum, weight_decay : float
        As in torch.optim.SGD. Scales, shifts and biases are not decayed.
    rates : mapping of str to tensor, optional
        Factor on the learning rate of each entry, by tensor (see `common.layout.rates_of`).
    """

    def __init__(
        self,
        net: nn.Module,
        layout: Layout,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        rates: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameters = dict(net.named_parameters())
        self.lr = lr
        self._momentum = momentum
        self._items = []
        for entry in layout.entries:
            if entry.tensor not in parameters:
                continue
            parameter = parameters[entry.tensor]
            decay = weight_decay if parameter.dim() > 1 else 0.0
            positions, frozen = entry.positions, None
            if positions is not None:
                positions = positions.to(parameter.device)
                if entry.size > _DENSE * parameter.numel():
                    frozen = torch.ones_like(parameter, dtype=torch.bool)
                    frozen.view(-1)[positions] = False
            whole = positions is None or frozen is not None
            rate = None if rates is None else rates[entry.tensor].to(parameter.device)
            if rate is not None and whole:
                picked, rate = rate, torch.zeros_like(parameter.detach())
                rate.view(-1)[slice(None) if positions is None else positions] = picked.view(-1)
            start = parameter.detach() if whole else entry.read(parameter.detach())
            # Without momentum it is the gradient, and needs no memory of its own.
            velocity = zeros_like(start) if momentum else None
            self._items.append((parameter, positions, frozen, decay, velocity, rate))

    @no_grad()
    def step(self) -> None:
        """Apply one update from the gradients, and clear them."""
        for parameter, positions, frozen, decay, velocity, rate in self._items:
            if parameter.grad is None:
                continue
            if positions is None or frozen is not None:
                velocity = self._moved(velocity, parameter.grad)
                if decay:
                    velocity.add_(parameter, alpha=decay)
                if frozen is not None:
                    velocity.masked_fill_(frozen, 0.0)  # and w - lr * 0 is w to the bit
                parameter.sub_(velocity if rate is None else velocity * rate, alpha=self.lr)
            else:
                values = parameter.view(-1)
                current = values[positions]
                velocity = self._moved(velocity, parameter.grad.reshape(-1)[positions])
                if decay:
                    velocity.add_(current, alpha=decay)
                way = velocity if rate is None else velocity * rate
                values[positions] = current.sub_(way, alpha=self.lr)
            parameter.grad = None

    def _moved(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """Return the velocity after a gradient, which may be overwritten."""
        return gradient if velocity is None else velocity.mul_(self._momentum).add_(gradient)
