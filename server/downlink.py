"""What a round's order comes with: only what the device does not hold yet."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from common.filters import FilterGraph
from common.layout import dense_layout
from common.order import NEEDS_BASE, Order
from common.update import as_array, encode_base, encode_scores
from server.fleet import EXTRA, Fleet
from server.plan import RunState

_MOVED = "moved "
"""In the ledger, before the digest of the values that a device holds; the last ones only."""


class Downlink:
    """The arrays that go with one round's order.

    Parameters
    ----------
    graph : FilterGraph
        Of the net.
    state, order
        Of the round.
    fleet : Fleet
        Its ledger says who holds what, and is kept up to date here.
    """

    def __init__(self, graph: FilterGraph, state: RunState, order: Order, fleet: Fleet) -> None:
        self._graph, self._state, self._order, self._fleet = graph, state, order, fleet

    def arrays(self, device: str) -> dict[str, np.ndarray]:
        """Return what `device` lacks, as far as the ledger knows."""
        return {**self._beside(device), **self._model(device)}

    def _model(self, device: str) -> dict[str, np.ndarray]:
        if not self._can_make_base(device):
            return {"base": self._base, **self._whole_values}
        shared = self._state.shared
        if shared is None:
            return self._whole_values
        if self._fleet.holds(device, _MOVED + shared.moved.digest):
            return {}  # of a try at this round that was abandoned
        if shared.since is None or self._fleet.holds(device, _MOVED + shared.since):
            return {"delta": shared.delta}
        return self._whole_values

    def _beside(self, device: str) -> dict[str, np.ndarray]:
        """Return what the order names beside the base, as far as `device` lacks it."""
        return {
            name: array
            for name, (digest, array) in self._extras.items()
            if not self._fleet.holds(device, EXTRA + digest)
        }

    def missing(self, device: str, what: str) -> dict[str, np.ndarray]:
        """Return what `device` says it lacks after all."""
        if what != NEEDS_BASE:
            return self._whole_values
        self._fleet.forget(device, self._order.base)
        beside = {name: array for name, (_, array) in self._extras.items()}
        return {"base": self._base, **self._whole_values, **beside}

    def note(self, device: str) -> None:
        """Note what `device` holds now that it has answered."""
        held, shared = self._fleet.held, self._state.shared
        held[device] = [d for d in held.get(device, []) if not d.startswith(_MOVED)]
        # after growing or consolidating, the next values refer to another base
        more = shared is not None and self._order.phase in ("grow", "consolidate")
        moved = _MOVED + shared.moved.digest if shared is not None and more else None
        extras = [EXTRA + digest for digest, _ in self._extras.values()]
        self._fleet.note(device, self._order.base, moved, self._order.keep, *extras)

    def _can_make_base(self, device: str) -> bool:
        base, regrown = self._order.base, self._order.regrown
        source = regrown.source if regrown is not None else self._order.trunk or base
        return self._fleet.holds(device, base) or self._fleet.holds(device, source)

    @cached_property
    def _extras(self) -> dict[str, tuple[str, np.ndarray]]:
        found = {}
        for name, (digest, array) in self._state.extras.items():
            if getattr(self._order, name) == digest:
                coded = name == "anchor" and self._order.codec_down != "fp32"
                found[name] = digest, encode_scores(array) if coded else array
        return found

    @cached_property
    def _base(self) -> np.ndarray:
        base = self._state.base
        return encode_base(dense_layout(self._graph, base).pack(base), self._order.codec_down)

    @cached_property
    def _whole_values(self) -> dict[str, np.ndarray]:
        values, shared = self._state.values, self._state.shared
        if shared is None:
            return {} if values is None else {"values": values}
        if shared.since is None:
            return {"delta": shared.delta}
        return {"whole": as_array(shared.moved.encoded())}
