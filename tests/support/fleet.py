"""A fleet of real processes on loopback: a SuperLink, devices, runs, and what goes wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from processes import (
    BIN,
    TINY,
    Process,
    assignments,
    descendants,
    device_command,
    free_port,
    kill,
    until,
    wait_for,
)

# Fewer rounds than TINY: grow, weigh, consolidate, judge. Nobody is left behind: a round
# counts only if both devices took part, so that what comes out can be compared to the byte.
FAST = {
    **TINY,
    "shift": "never",
    "rounds": "1",
    "consolidate-rounds": "1",
    "quorum": "1.0",
    "repeats": "20",
    "node-timeout": "600",
}


class Fleet:
    """Everything that runs in one folder; `end` ends all of it."""

    def __init__(self, folder: Path, certs: Path | None = None) -> None:
        self.folder, self.certs = folder, certs
        self.state, self.out, self.port = folder / "state", folder / "out", free_port()
        self._processes: list[Process] = []

    def start(self, name: str, command: list[str], **environment: str) -> Process:
        started = Process(name, self.folder, command, **environment)
        self._processes.append(started)
        return started

    def serve(self) -> Process:
        """Start the SuperLink, or start it again on what it has kept."""
        superlink = self.start("superlink", self.serve_command())
        wait_for(self.port)
        return superlink

    def serve_command(self) -> list[str]:
        how = ["--insecure"] if self.certs is None else ["--certs", str(self.certs / "server")]
        return [str(BIN / "fallow"), "serve", str(self.state), "--port", str(self.port), *how]

    def run(self, settings: dict[str, str]) -> Process:
        return self.start("run", self.run_command(settings))

    def run_command(self, settings: dict[str, str]) -> list[str]:
        command = [str(BIN / "fallow"), "run", str(self.state), "--out", str(self.out)]
        return [*command, *assignments({"data": "digits", **settings})]

    def device(
        self,
        number: int,
        address: str | None = None,
        flags: list[str] | None = None,
        of: int = 2,
    ) -> Process:
        """Start device `number` of so many."""
        address = address or f"127.0.0.1:{self.port}"
        command = device_command(number, address, self.folder, flags or ["--insecure"], of)
        return self.start(f"device-{number}", command)

    def secure_device(self, number: int, name: str, port: int) -> Process:
        """Start a device with the keys that deploy/certs made for `name`."""
        return self.device(number, f"localhost:{port}", self.device_flags(name))

    def device_flags(self, name: str) -> list[str]:
        assert self.certs is not None
        mine = self.certs / "devices" / name
        flags = ["--root-certificates", str(mine / "ca.crt")]
        return [*flags, "--auth-supernode-private-key", str(mine / "device.key")]

    def rounds(self) -> int:
        path = self.out / "rounds.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_round(self, number: int, run: Process, seconds: float = 1200) -> None:
        """Wait until so many rounds are on disk; fail at once if the run has ended."""

        def look() -> bool:
            assert run.code() is None or self.rounds() >= number, self.told()
            return self.rounds() >= number

        until(look, seconds, f"round {number} did not come: {self.told()}")

    def wait_for_work(self, device: Process, seconds: float = 600) -> None:
        """Wait until a device's process works on a message."""

        def look() -> bool:
            return any("flwr-clientapp" in line for line in descendants(device.pid).values())

        until(look, seconds, f"{device.name} gets nothing to do: {device.said()[-2000:]}")

    def running(self) -> list[Process]:
        return [p for p in self._processes if p.code() is None]

    def told(self) -> str:
        return "\n".join(f"== {p.name}\n{p.said()[-1500:]}" for p in self._processes)

    def end(self) -> None:
        for started in reversed(self._processes):
            children = descendants(started.pid)
            started.end()
            for child in children:
                with suppress(ProcessLookupError):
                    kill(child)


@contextmanager
def fleet(folder: Path, certs: Path | None = None) -> Iterator[Fleet]:
    """Yield a fleet, and end all of it."""
    made = Fleet(folder, certs)
    try:
        yield made
    finally:
        made.end()


def cut_power(device: Process) -> None:
    """Kill a device with everything that it has started, at once."""
    children = descendants(device.pid)
    device.kill()
    for child in children:
        with suppress(ProcessLookupError):
            kill(child)


class Wire:
    """A TCP connection between a device and the server that can go half-open.

    While it is cut, connections stay established and new ones are accepted, but no byte arrives
    at the other end: what a device sees behind a router that has lost its line.
    """

    def __init__(self, to: int) -> None:
        self._to = to
        self._through = threading.Event()
        self._through.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def cut(self) -> None:
        self._through.clear()

    def mend(self) -> None:
        self._through.set()

    def close(self) -> None:
        self._through.set()
        for one in self._open:  # who waits for bytes of it is woken
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._open:
            one.close()

    def _run(self, call: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=call, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                self._run(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        self._through.wait()
        with suppress(OSError):
            far = socket.create_connection(("127.0.0.1", self._to))
            self._open.append(far)
            self._run(self._copy, near, far)
            self._copy(far, near)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._through.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
