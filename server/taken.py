"""The answers of a round that are used, in an order that does not hang on who was first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from common.order import Report
from server.admission import Admission, Lengths
from server.spool import Spool
from server.wire import Reply


class Updates(Protocol):
    """Decoded updates, one at a time, as often as they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


class Taken:
    """Reports in memory, updates as they came in a spool.

    Updates are decoded when they come, to be checked, and again when they are averaged: that
    costs less than keeping them decoded, and memory does not grow with the devices.

    Parameters
    ----------
    admission : Admission
        Checks and decodes.
    folder : Path, optional
        Of the spool's file.
    """

    def __init__(self, admission: Admission, folder: Path | None = None) -> None:
        self._admission = admission
        self._spool = Spool(folder)
        self._reports: dict[str, Report] = {}
        self._lengths: dict[str, Lengths] = {}
        self._marks: dict[str, str] = {}
        self._with_update: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spool.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._reports)

    def __contains__(self, device: object) -> bool:
        return device in self._reports

    @property
    def reports(self) -> dict[str, Report]:
        """Reports by device, in the order of the names."""
        return dict(sorted(self._reports.items()))

    def add(self, device: str, reply: Reply) -> None:
        """Take an answer, or refuse it.

        Raises
        ------
        UpdateError
            If it is refused.
        DiskError
            If the spool's disk is full.
        """
        lengths = self._admission.admit(reply, device)
        if reply.update is not None:
            self._spool.put(device, reply.update)
            self._with_update.add(device)
        self._marks[device] = self._admission.mark(reply)
        self._reports[device], self._lengths[device] = reply.report, lengths

    def refuse_outliers(self) -> dict[str, tuple[str, np.ndarray | None]]:
        """Drop answers out of all proportion; return whose, why, and their updates as they came."""
        found = self._admission.outliers(self._lengths, self._reports)
        refused = {}
        for device, reason in found.items():
            update = self._spool.get(device) if device in self._with_update else None
            refused[device] = (reason, update)
            del self._reports[device], self._lengths[device]
        return refused

    def mark(self, device: str) -> str:
        """Return what names the update of `device` (see `Admission.mark`)."""
        return self._marks[device]

    def __iter__(self) -> Iterator[np.ndarray]:
        for device, report in self.reports.items():
            yield self._admission.decoded(self._spool.get(device), report)
