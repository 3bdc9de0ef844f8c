"""A run as Prometheus metrics, at ``http://metrics-host:metrics-port/metrics``.

Devices are counted, not named: a label a device would grow without end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from common.config import Config
from common.errors import ConfigError
from server.progress import Progress

_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics(Progress):
    """Counts what it is told.

    Parameters
    ----------
    config : Config
        Of the run.

    Attributes
    ----------
    registry : CollectorRegistry
        Of this run alone.
    """

    def __init__(self, config: Config) -> None:
        self.registry = registry = CollectorRegistry()
        info = Gauge("fallow_run_info", "Always 1", ["run", "seed"], registry=registry)
        info.labels(config.digest[:12], str(config.seed)).set(1)
        self._step = Gauge("fallow_step", "Step that the run is in", registry=registry)
        self._round = Gauge("fallow_round", "Round of the phase", ["phase"], registry=registry)
        self._rounds = Counter("fallow_rounds", "Finished rounds", ["phase"], registry=registry)
        self._abandoned = Counter(
            "fallow_rounds_abandoned", "Tries at rounds with too few answers", registry=registry
        )
        self._devices = Counter(
            "fallow_device_outcomes",
            "What became of devices: used, declined, refused, failed, silent, late, rests",
            ["outcome", "phase"],
            registry=registry,
        )
        self._resting = Gauge("fallow_devices_resting", "Devices that rest", registry=registry)
        self._bytes = Counter(
            "fallow_bytes", "Of packed messages; up is to the server", ["way"], registry=registry
        )
        self._seconds = Histogram(
            "fallow_round_seconds", "Of a round", ["phase"], buckets=_SECONDS, registry=registry
        )
        self._accuracy = Gauge(
            "fallow_heldout_accuracy",
            "Of the model that the last round began with, on the devices' held-out images",
            registry=registry,
        )
        self._phase = ""

    @contextmanager
    def served(self, host: str, port: int) -> Iterator[None]:
        """Serve them while the context lasts.

        Raises
        ------
        ConfigError
            If the port is taken or the address is not of this machine.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics-port is {port}: cannot listen on {host}: {error.strerror or error}"
            ) from None
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def phase(self, step: int, steps: int, phase: str, rounds: int, done: int = 0) -> None:  # noqa: D102
        self._phase = phase
        self._step.set(step)
        self._round.labels(phase).set(done)

    def device(self, name: str, event: str, reason: str | None = None) -> None:  # noqa: D102
        self._devices.labels(event, self._phase).inc()

    def abandoned(self, reason: str) -> None:  # noqa: D102
        self._abandoned.inc()

    def round_done(self, record: dict[str, Any]) -> None:  # noqa: D102
        phase = record["phase"]
        self._round.labels(phase).set(record["round"])
        self._rounds.labels(phase).inc()
        self._seconds.labels(phase).observe(record["seconds"])
        self._accuracy.set(record["heldout_accuracy"])
        self._resting.set(record["resting"])
        for way in ("up", "down"):
            self._bytes.labels(way).inc(record[f"bytes_{way}"])
