"""Everyone who is told how a run goes: people, a log, metrics; as the settings say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from common.config import Config
from server.log import Log
from server.metrics import Metrics
from server.progress import Progress


class Several(Progress):
    """Tells all of `listeners` what it is told."""

    def __init__(self, listeners: Sequence[Progress]) -> None:
        self._listeners = listeners

    def plan(self, total_rounds: int, done: int = 0) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.plan(total_rounds, done)

    def phase(self, step: int, steps: int, phase: str, rounds: int, done: int = 0) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.phase(step, steps, phase, rounds, done)

    def device_done(self, done: int, asked: int) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.device_done(done, asked)

    def device(self, name: str, event: str, reason: str | None = None) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.device(name, event, reason)

    def abandoned(self, reason: str) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.abandoned(reason)

    def round_done(self, record: dict[str, Any]) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.round_done(record)

    def stage(self, name: str, total: int | None = None) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.stage(name, total)

    def advance(self, pieces: int = 1) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.advance(pieces)

    def message(self, text: str) -> None:  # noqa: D102
        for listener in self._listeners:
            listener.message(text)


@contextmanager
def listening(config: Config, progress: Progress) -> Iterator[Progress]:
    """Yield who is to be told of a run: `progress`, and what the settings ask for.

    Raises
    ------
    ConfigError
        If the metrics cannot be served.
    """
    with ExitStack() as stack:
        listeners = [progress]
        if config.log != "off":
            listeners.append(stack.enter_context(Log(config)))
        if config.metrics_port:
            metrics = Metrics(config)
            stack.enter_context(metrics.served(config.metrics_host, config.metrics_port))
            listeners.append(metrics)
        yield Several(listeners) if len(listeners) > 1 else progress
