"""Real server and device processes for tests: started, watched, killed, ended by their ids."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = {
    "net": "resnet8",
    "width": "8",
    "devices": "2",
    "steps": "1",
    "rounds": "2",
    "prior-epochs": "3",
    "statistics-gap": "1",  # a prior so little trained falls behind its statistics
    "freeing-epochs": "2",
    "consolidate-rounds": "2",
    "max-drop": "1.0",
    "accept-drop": "1.0",
}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def simulate(engine: str, out: Path, settings: dict[str, str] = TINY) -> Path:
    run(simulate_command(engine, out, settings))
    return out


def simulate_command(engine: str, out: Path, settings: dict[str, str]) -> list[str]:
    command = [str(BIN / "fallow"), "simulate", "--data=digits", f"--engine={engine}"]
    return [*command, *assignments(settings), "--out", str(out)]


def assignments(settings: dict[str, str]) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def digests(out: Path) -> dict[str, str]:
    """Return the digest of every model that a run published."""
    files = [p for p in sorted((out / "models").rglob("*")) if p.is_file()]
    assert len(files) >= 6, f"{out} has only {files}"
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def status(out: Path) -> str:
    text: str = json.loads((out / "summary.json").read_text())["status"]
    return text


def run(command: list[str], **environment: str) -> str:
    """Run a command that has to succeed, and return what it says."""
    done = attempt(command, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def attempt(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail."""
    return subprocess.run(
        command,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


class Process:
    """A process in an empty folder of its own, and its log."""

    def __init__(self, name: str, folder: Path, command: list[str], **environment: str) -> None:
        work = folder / name
        work.mkdir(parents=True, exist_ok=True)
        executable = shutil.which(command[0], path=ENVIRONMENT["PATH"])
        assert executable is not None, command[0]
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("a") as log:
            self._started = subprocess.Popen(
                [executable, *command[1:]],
                cwd=work,
                env={**ENVIRONMENT, "FLWR_HOME": str(work / "home"), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._started.pid

    def said(self) -> str:
        return self.log.read_text()

    def code(self) -> int | None:
        return self._started.poll()

    def wait(self, seconds: float) -> int:
        try:
            return self._started.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on: {self.said()[-3000:]}") from None

    def ended_within(self, seconds: float) -> bool:
        try:
            self._started.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, number: int) -> None:
        self._started.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, this process alone."""
        self._started.kill()
        self._started.wait()

    def end(self) -> None:
        if self._started.poll() is None:
            self._started.terminate()
            try:
                self._started.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def process(name: str, folder: Path, command: list[str], **environment: str) -> Iterator[Process]:
    """Run a process for the length of a block."""
    started = Process(name, folder, command, **environment)
    try:
        yield started
    finally:
        started.end()


def device_command(
    number: int, address: str, folder: Path, flags: list[str], of: int = 2
) -> list[str]:
    """Return how simulated device `number` of so many is started."""
    config = f"partition-id={number} num-partitions={of} cache='{folder / 'cache'}-{number}'"
    command = ["flower-supernode", *flags, "--superlink", address]
    return [*command, "--port", str(free_port()), "--node-config", config]


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that `pid` has started, and theirs, with their command lines."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    found: dict[int, str] = {}
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found.update({child: lines.get(child, "") for child in new})
    return found


def server_app(superlink: Process) -> int:
    """Return the id of the process that runs the ServerApp."""

    def look() -> int | None:
        found = [p for p, line in descendants(superlink.pid).items() if "flwr-serverapp" in line]
        return found[0] if found else None

    return until(look, 300, "no ServerApp process")


def until(look: Callable[[], T | None], seconds: float, problem: str) -> T:
    """Return the first result of `look` that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(problem)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    for _ in range(1200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.25)
    raise AssertionError(f"nothing listens on {port}")
