"""Activations of a twin's kept part, held for the next epoch.

The kept part is the prior model and does not change, so what it makes of an image is the same in
every epoch. An image is known again by the digest of its pixels as the net gets them: with
flips each image comes in two forms, and both are held; random crops hardly ever come again, so
with them a cache is of no use.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.pressure import memory_left

_LOG = logging.getLogger(__name__)
_SHARE = 0.5
"""Of the memory that is left, the most that the cache takes."""
_RESERVE = 64 * 2**20
"""Bytes: with less memory left, the cache is dropped."""


class KeptCache:
    """Holds what freed filters read of the kept part, image by image, up to a limit.

    Parameters
    ----------
    limit : int
        Bytes. Images beyond it are computed each time.

    Attributes
    ----------
    hits, asked : int
        Images found, and looked for.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._slots: dict[bytes, int] = {}
        self._held: list[Tensor] = []
        self._dropped = False
        self.hits = self.asked = 0

    def __len__(self) -> int:
        return len(self._slots)

    def fetch(self, x: Tensor, compute: Callable[[Tensor], list[Tensor]]) -> list[Tensor] | None:
        """Return what `compute` gives for images `x` [B, C, H, W], which are on the CPU.

        `compute` is asked about those alone that are not held. None if nothing is held of them
        and there is no room for more: one pass over all of the net is then cheaper.
        """
        if self._dropped or x.device.type != "cpu":
            return None
        if memory_left() < _RESERVE:
            self.drop("little memory is left")
            return None
        digests = [hashlib.blake2b(_bytes(image), digest_size=16).digest() for image in x]
        missing = [i for i, digest in enumerate(digests) if digest not in self._slots]
        self.asked += len(x)
        self.hits += len(x) - len(missing)
        if len(missing) == len(x) and self._held and len(self._slots) >= len(self._held[0]):
            return None
        found: list[Tensor] = []
        if missing:
            found = compute(x[missing])
            if not self._held and not self._allocate(found):
                return None
            self._hold([digests[i] for i in missing], found)
            if len(missing) == len(x):
                return found
        return self._joined(digests, missing, found)

    def drop(self, reason: str) -> None:
        """Give the memory back, and hold nothing any more."""
        _LOG.warning("kept activations are no longer cached: %s", reason)
        self._slots.clear()
        self._held.clear()
        self._dropped = True

    def _allocate(self, found: Sequence[Tensor]) -> bool:
        """Make room for as many images as the limit allows; the system gives it page by page."""
        each = sum(t[0].numel() * t.element_size() for t in found)
        room = int(min(self._limit, _SHARE * memory_left()) // each)
        if room < 1:
            self.drop(f"one image takes {each / 2**20:.1f} MiB")
            return False
        try:
            self._held = [t.new_empty(room, *_last(t).shape[1:]) for t in found]
        except RuntimeError:
            self.drop(f"{room * each / 2**20:.0f} MiB could not be had")
            return False
        return True

    def _hold(self, digests: Sequence[bytes], found: Sequence[Tensor]) -> None:
        room = len(self._held[0]) - len(self._slots)
        rows = list({digest: row for row, digest in enumerate(digests)}.items())[:room]
        first = len(self._slots)
        for held, tensor in zip(self._held, found, strict=True):
            held[first : first + len(rows)] = _last(tensor)[[row for _, row in rows]]
        self._slots |= {digest: first + n for n, (digest, _) in enumerate(rows)}

    def _joined(
        self, digests: Sequence[bytes], missing: Sequence[int], found: Sequence[Tensor]
    ) -> list[Tensor]:
        known = [i for i in range(len(digests)) if i not in set(missing)]
        slots = torch.tensor([self._slots[digests[i]] for i in known])
        if not missing:
            return [_first(held.index_select(0, slots)) for held in self._held]
        joined = []
        for held, tensor in zip(self._held, found, strict=True):
            whole = held.new_empty(len(digests), *held.shape[1:])
            whole[known] = held.index_select(0, slots)
            whole[list(missing)] = _last(tensor)
            joined.append(_first(whole))
        return joined


def _bytes(image: Tensor) -> memoryview:
    return image.permute(1, 2, 0).contiguous().view(torch.uint8).numpy().data


def _last(x: Tensor) -> Tensor:
    """Return a view with the channels in the last place, where they are in memory."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x
