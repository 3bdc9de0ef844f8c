"""The models that a device holds, so that only what changed since has to be sent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from client.feedback import Feedback
from common.errors import StoreError
from common.state import State, state_digest
from common.store import BundleStore
from common.update import Moved

T = TypeVar("T")


class Bases:
    """Models by digest: the newest in memory, a few on disk.

    A device's process may end between two rounds (Flower starts one per message), and in a
    simulation many devices share one machine; a digest names the same bytes for all of them.

    Parameters
    ----------
    folder : Path
        Where they are kept.
    keep : int
        Most on disk; older ones are sent again if they are ever asked for.
    durable : bool
        Whether they outlast a power cut; simulated devices need no more than outlast a process.

    Attributes
    ----------
    feedback : Feedback
        What coding took from the device's updates.
    """

    def __init__(self, folder: Path, keep: int = 8, *, durable: bool = True) -> None:
        self._disk = BundleStore(folder, keep, durable=durable)
        self._memory: OrderedDict[str, State] = OrderedDict()
        self._moved = BundleStore(folder / "moved", keep=4, durable=durable)
        self._moved_memory: OrderedDict[str, Moved] = OrderedDict()
        self.feedback = Feedback(folder / "feedback", durable=durable)

    def get(self, digest: str) -> State | None:
        """Return the model called `digest`, or None."""
        if digest not in self._memory:
            try:
                _remember(self._memory, digest, self._disk.get(digest))
            except StoreError:  # absent, torn or just evicted: the server sends it again
                self._disk.path(digest).unlink(missing_ok=True)
                return None
        self._memory.move_to_end(digest)
        return self._memory[digest]

    def put(self, state: Mapping[str, torch.Tensor]) -> str:
        """Keep a model; returns its digest."""
        digest = state_digest(state)
        if digest not in self._memory:
            self._disk.put(state)
            _remember(self._memory, digest, dict(state))
        return digest

    def get_moved(self, digest: str) -> Moved | None:
        """Return how far a round's values are from their base, or None."""
        if digest not in self._moved_memory:
            try:
                moved = Moved(self._moved.get(digest)["distance"].numpy())
            except StoreError:
                self._moved.discard(digest)
                return None
            _remember(self._moved_memory, digest, moved)
        return self._moved_memory[digest]

    def put_moved(self, moved: Moved) -> None:
        """Keep how far a round's values are from their base."""
        if moved.digest not in self._moved_memory:
            self._moved.put(moved.as_state())
            _remember(self._moved_memory, moved.digest, moved)


def _remember(memory: OrderedDict[str, T], digest: str, value: T) -> None:
    memory[digest] = value
    while len(memory) > 3:
        memory.popitem(last=False)
