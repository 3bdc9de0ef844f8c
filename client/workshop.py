"""What a process makes once and uses for device after device: nets, layouts, packed models.

On a real device that is one device's rounds; in a simulation a worker trains hundreds of devices
with the same few nets. Building a net, copying it and deriving a layout cost more than the few
training steps of a small device do.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

from common.accelerator import Accelerator
from common.state import State, write_state

T = TypeVar("T")


class Workshop:
    """A few things by key, the least recently used are dropped.

    Parameters
    ----------
    most : int
        How many are kept.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._things: OrderedDict[Hashable, Any] = OrderedDict()
        self._written: dict[nn.Module, str] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the thing called `key`, made now if it is not here."""
        if key not in self._things:
            self._things[key] = make()
            while len(self._things) > self._most:
                _, dropped = self._things.popitem(last=False)
                if isinstance(dropped, nn.Module):
                    self._written.pop(dropped, None)
        self._things.move_to_end(key)
        thing: T = self._things[key]
        return thing

    def net(
        self,
        role: str,
        template: nn.Module,
        state: State,
        accelerator: Accelerator,
        digest: str | None = None,
    ) -> nn.Module:
        """Return a net like `template` that holds `state`, in eval mode.

        Parameters
        ----------
        role : str
            A net is used by one role at a time.
        template : nn.Module
            Kept by the caller: the net is found again by it.
        digest : str, optional
            Of `state`, if the role never changes its net: it is then written only where it
            differs from the last one.
        """
        key = (role, template, str(accelerator.device))
        net = self.once(key, lambda: copy.deepcopy(template).to(accelerator.device))
        if digest is None or self._written.get(net) != digest:
            write_state(net, state)
            _restart_counters(net)
            if digest is not None:
                self._written[net] = digest
        return net.eval()


def _restart_counters(net: nn.Module) -> None:
    """Begin a BN's count of batches anew: with momentum None it weighs what comes next."""
    for module in net.modules():
        counter = getattr(module, "num_batches_tracked", None)
        if isinstance(counter, torch.Tensor):
            counter.zero_()


WORKSHOP = Workshop()
"""Of this process."""
