"""SGD over the entries that a layout names; all others cannot move."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn, no_grad, zeros_like

from common.layout import Layout


class PackedSGD:
    """SGD with momentum and weight decay on the trainable entries of a net.

    Masking gradients of a stock optimiser is not enough: its momentum and its weight decay
    move frozen entries. Here nothing but the named entries is ever read or written.

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
            positions = entry.positions
            if positions is not None:
                positions = positions.to(parameter.device)
            velocity = zeros_like(entry.read(parameter.detach()))
            rate = None if rates is None else rates[entry.tensor].to(parameter.device)
            self._items.append((parameter, positions, decay, velocity, rate))

    @no_grad()
    def step(self) -> None:
        """Apply one update from the gradients, and clear them."""
        for parameter, positions, decay, velocity, rate in self._items:
            if parameter.grad is None:
                continue
            values, gradient = parameter.view(-1), parameter.grad.reshape(-1)
            current = values if positions is None else values[positions]
            if positions is not None:
                gradient = gradient[positions]
            velocity.mul_(self._momentum).add_(gradient)
            if decay:
                velocity.add_(current, alpha=decay)
            way = velocity if rate is None else velocity * rate
            if positions is None:
                values.sub_(way, alpha=self.lr)
            else:
                values[positions] = current.sub_(way, alpha=self.lr)
            parameter.grad = None
