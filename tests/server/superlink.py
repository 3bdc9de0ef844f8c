"""Real server and device processes on loopback: a SuperLink and its SuperNodes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Done:
    """A run: its folder, and the bytes that Flower counted from and to the devices."""

    out: Path
    up: int
    down: int

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl."""
        return [json.loads(line) for line in (self.out / "rounds.jsonl").read_text().splitlines()]

    def counted(self, way: str) -> int:
        """Return the bytes that we counted, ``up`` or ``down``."""
        return sum(record[f"bytes_{way}"] for record in self.rounds)


def superlink_run(settings: Mapping[str, Any], folder: Path, limit: float = 600) -> Done:
    """Run on a SuperLink and as many SuperNodes as `settings` has devices, in `folder`."""
    port, out, home = free_port(), folder / "out", folder / "operator"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n'
        f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    given = {"data": "digits", **settings, "out": str(out)}
    overrides = " ".join(f"{key}={toml(value)}" for key, value in given.items())
    command = ["flwr", "run", str(ROOT), "local", "--stream", "--run-config", overrides]
    with ExitStack() as stack:
        link = ["flower-superlink", "--insecure", "--port", str(port)]
        stack.enter_context(process("superlink", folder, link))
        wait_for(port)
        count = int(settings["devices"])
        for number in range(count):
            stack.enter_context(device(number, port, folder, count))
        run(command, limit, FLWR_HOME=str(home))
        listed = run(["flwr", "list", "local", "--format", "json"], FLWR_HOME=str(home))
    (told,) = json.loads(listed[listed.index("{") :])["runs"]
    log = (folder / "superlink.log").read_text()[-3000:]
    assert status(out) == "complete", log
    moved = told["network-traffic"]
    return Done(out, moved["inbound-bytes"], moved["outbound-bytes"])


def status(out: Path) -> str:
    """Return how the run in `out` ended."""
    text: str = json.loads((out / "summary.json").read_text())["status"]
    return text


def toml(value: Any) -> str:
    """Return a value as Flower's overrides want it."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    plain = text in ("true", "false") or text.replace(".", "", 1).replace("e-", "", 1).isdigit()
    return text if plain else f"'{text}'"


def run(command: list[str], limit: float = 600, **environment: str) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        command,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@contextmanager
def process(name: str, folder: Path, command: list[str], **environment: str) -> Iterator[None]:
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
            yield
        finally:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


def device(number: int, port: int, folder: Path, count: int = 2) -> AbstractContextManager[None]:
    """Run a SuperNode, device `number` of `count`."""
    config = f"partition-id={number} num-partitions={count} cache='{folder / 'cache'}-{number}'"
    command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    command += ["--port", str(free_port()), "--node-config", config]
    return process(f"device-{number}", folder, command)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Wait until somebody listens on a port."""
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"nothing listens on {port}")
