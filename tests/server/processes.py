"""Real processes for slow tests: a SuperLink, devices, and what goes over the wire between them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(command: list[str], **environment: str) -> str:
    """Run a command to its end; returns what it printed."""
    done = subprocess.run(
        command,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@contextmanager
def process(
    name: str, folder: Path, command: list[str], **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in an empty folder of its own, and end it by its id."""
    work = folder / name
    work.mkdir()
    executable = shutil.which(command[0], path=ENVIRONMENT["PATH"])
    assert executable is not None
    with (folder / f"{name}.log").open("w") as log:
        started = subprocess.Popen(
            [executable, *command[1:]],
            cwd=work,
            env={**ENVIRONMENT, "FLWR_HOME": str(work / "home"), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    for _ in range(120):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"nothing listens on {port}")


@contextmanager
def recorded(port: int) -> Iterator[tuple[int, list[bytearray]]]:
    """Pass connections on to `port`; yields another port and all bytes that went through it.

    A connection and direction is an entry of its own, in the order in which the bytes came.
    """
    streams: list[bytearray] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket, seen: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                seen += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def connect(near: socket.socket, up: bytearray, down: bytearray) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=pass_on, args=(far, near, down), daemon=True)
            back.start()
            pass_on(near, far, up)
            back.join()

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # closed below
                return
            streams.extend((bytearray(), bytearray()))
            threading.Thread(target=connect, args=(near, *streams[-2:]), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], streams
    finally:
        listener.close()
