"""What the server remembers of each device from round to round, and keeps in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_JUMP = 2
"""A step's images are frozen on the device: its count may shrink (consent withdrawn), not grow."""


@dataclass
class Standing:
    """Of one device.

    Attributes
    ----------
    failures : int
        Rounds in a row in which it did not answer, its node failed or its update was refused.
    until : int
        It rests in exchanges up to this number.
    step, images, heldout : int
        What it last counted, and in which step.
    last : str
        Names the last update of it that was used.
    """

    failures: int = 0
    until: int = 0
    step: int = -1
    images: int = 0
    heldout: int = 0
    last: str = ""


class Ledger:
    """Standings of all devices.

    Parameters
    ----------
    known : mapping, optional
        What `as_json` returned.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        known = known or {}
        self.exchanges = int(known.get("exchanges", 0))
        self._devices = {
            name: Standing(**standing) for name, standing in known.get("devices", {}).items()
        }

    def as_json(self) -> dict[str, Any]:
        """Return all as JSON data."""
        devices = {name: asdict(standing) for name, standing in sorted(self._devices.items())}
        return {"exchanges": self.exchanges, "devices": devices}

    def of(self, device: str) -> Standing:
        """Return what is known of a device; it may be changed in place."""
        return self._devices.setdefault(device, Standing())

    def rests(self, device: str) -> bool:
        """Return whether a device rests in the exchange that is due."""
        return device in self._devices and self._devices[device].until > self.exchanges

    def answered(self, device: str) -> None:
        """Note that a device did its part, or said why not."""
        self.of(device).failures = 0

    def failed(self, device: str, after: int, rounds: int) -> bool:
        """Note a failure; return whether the device rests from here on.

        Parameters
        ----------
        after : int
            Failures in a row after which it does; 0 is never.
        rounds : int
            How long, in exchanges.
        """
        standing = self.of(device)
        standing.failures += 1
        if not after or standing.failures < after:
            return False
        standing.failures, standing.until = 0, self.exchanges + 1 + rounds
        return True

    def jump(self, device: str, step: int, images: int, heldout: int) -> str | None:
        """Return what is wrong with a device's counts, against those that it gave before."""
        known = self._devices.get(device)
        if known is None or known.step != step:
            return None
        for name, now, was in (
            ("training", images, known.images),
            ("held-out", heldout, known.heldout),
        ):
            if now > _JUMP * max(was, 1):
                return f"it counts {now} {name} images in a step in which it had {was}"
        return None

    def counted(self, device: str, step: int, images: int, heldout: int) -> None:
        """Remember the counts of an answer that was used."""
        standing = self.of(device)
        standing.step, standing.images, standing.heldout = step, images, heldout
