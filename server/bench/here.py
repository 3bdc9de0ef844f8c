"""A grid whose devices are computed in this very process, one after the other.

The benchmark fills the cores with cells, so that no core waits for a round's slowest device;
and what a device costs can be told in seconds of CPU, which other load does not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from server.bench.memory import SavedBytes
from server.inline import InlineGrid, _identify


class HereGrid(InlineGrid):
    """An `InlineGrid` without workers.

    Attributes
    ----------
    cpu_seconds : float
        That the devices took so far.
    memory : SavedBytes
        Of the first device's training steps.
    """

    def __init__(self, settings: dict[str, Any], devices: int, cache: str) -> None:
        super().__init__(settings, devices, 1, cache)
        self.cpu_seconds = 0.0
        self.memory = SavedBytes()

    def __enter__(self) -> HereGrid:
        _identify()
        self._pool = _Here(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from client.app import _BASES

        _BASES.pop(Path(self._cache), None)  # this process outlives the devices


class _Here(Executor):
    """Calls at once."""

    def __init__(self, grid: HereGrid) -> None:
        self._grid = grid

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        _, node, _ = args
        measured = self._grid.memory if node["partition-id"] == 0 else nullcontext()
        began = time.process_time()
        with measured:
            future.set_result(fn(*args, **kwargs))
        self._grid.cpu_seconds += time.process_time() - began
        return future
