"""Refused updates on disk, for people to look at; nothing here is ever read back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DiskError
from common.store import write_bytes

_MOST_FILES = 200


class Quarantine:
    """A folder of refused updates; the oldest go when it is full.

    Parameters
    ----------
    folder : Path
        Made when first written to.
    most : int
        Bytes that it may hold; 0 keeps nothing.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most

    def put(
        self, where: dict[str, Any], device: str, reason: str, update: np.ndarray | None
    ) -> None:
        """Keep an update with the reason why it was refused.

        A full disk is no reason to end a run that only wanted to keep evidence.

        Parameters
        ----------
        where : dict
            Step, phase, attempt and round.
        device, reason : str
            Whose, and why.
        update : array or None
            As it came.
        """
        if not self._most:
            return
        data = b"" if update is None else np.ascontiguousarray(update).tobytes()
        kept = len(data) <= self._most // 4
        about = {
            **where,
            "device": device,
            "reason": reason,
            "dtype": None if update is None else str(update.dtype),
            "shape": None if update is None else list(update.shape),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "kept": kept,
        }
        name = f"{self._next():06d}-{hashlib.sha256(device.encode()).hexdigest()[:8]}"
        try:
            if kept and data:
                write_bytes(self._folder / f"{name}.bin", data)
            write_bytes(self._folder / f"{name}.json", json.dumps(about, indent=1).encode())
        except DiskError:
            return
        self._trim()

    def _entries(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.json"))

    def _next(self) -> int:
        entries = self._entries()
        return int(entries[-1].name.split("-")[0]) + 1 if entries else 1

    def _trim(self) -> None:
        entries = self._entries()
        sizes = [
            sum(p.stat().st_size for p in (e, e.with_suffix(".bin")) if p.exists()) for e in entries
        ]
        total = sum(sizes)
        while entries and (total > self._most or len(entries) > _MOST_FILES):
            oldest = entries.pop(0)
            total -= sizes.pop(0)
            oldest.with_suffix(".bin").unlink(missing_ok=True)
            oldest.unlink(missing_ok=True)
