"""``fallow-device train``: Flower's SuperNode with the flags and environment that fallow needs."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from client.index import Index
from client.settings import read_settings
from common.errors import ConfigError


@dataclass(frozen=True)
class Connection:
    """How the device reaches its fleet.

    Attributes
    ----------
    superlink : str
        ``HOST:PORT`` of the SuperLink, or of the proxy before it.
    root_certificates : Path or None
        The CA that signed the server's certificate; None = those of the system.
    key : Path or None
        The device's private key, registered at the server.
    insecure : bool
        No TLS and no key; on loopback only.
    port : int
        Of the SuperNode's own service on loopback; 0 = any that is free.
    """

    superlink: str
    root_certificates: Path | None = None
    key: Path | None = None
    insecure: bool = False
    port: int = 0

    def check(self) -> None:
        """Raise ConfigError if the device must not or cannot connect so."""
        host, port = self.address()
        if self.insecure:
            if self.root_certificates or self.key:
                raise ConfigError(
                    "--insecure goes with neither --root-certificates nor --key: leave it out"
                )
            if not is_loopback(host):
                raise ConfigError(
                    f"--insecure with {host}:{port}: without TLS only loopback is allowed; give "
                    "--root-certificates and --key"
                )
            return
        if self.key is None:
            raise ConfigError(
                "no --key: give the device's private key (deploy/certs makes one), or "
                "--insecure on loopback"
            )
        for name, path in (("--root-certificates", self.root_certificates), ("--key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{name} is {path}: no such file")
        mode = self.key.stat().st_mode & 0o077
        if mode:
            raise ConfigError(f"--key is {self.key}: others can read it; chmod 600 {self.key}")

    def address(self) -> tuple[str, int]:
        """Return host and port of the SuperLink.

        Raises
        ------
        ConfigError
            If it is not ``HOST:PORT``.
        """
        host, colon, port = self.superlink.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--superlink is '{self.superlink}': give HOST:PORT, without https://"
            )
        return host, int(port)


def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine, by name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def supernode_command(store: Path, connection: Connection) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts the SuperNode, and its environment.

    Raises
    ------
    FallowError
        If the connection is not allowed, the store or its settings cannot be used, or Flower is
        not installed.
    """
    connection.check()
    settings = read_settings(store)
    with Index.open(store):
        pass
    executable = shutil.which(
        "flower-supernode", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if executable is None:
        raise ConfigError("flower-supernode is not installed: install fallow with its dependencies")
    if "'" in str(store.resolve()):
        raise ConfigError(f"--store is {store}: Flower cannot take a path with a quote; move it")
    command = [executable, "--superlink", connection.superlink]
    if connection.insecure:
        command.append("--insecure")
    if connection.root_certificates is not None:
        command += ["--root-certificates", str(connection.root_certificates.resolve())]
    if connection.key is not None:
        command += ["--auth-supernode-private-key", str(connection.key.resolve())]
    command += ["--host", "127.0.0.1", "--port", str(connection.port or free_port())]
    command += ["--node-config", f"store='{store.resolve()}'"]
    if settings.limits.keep_warm:
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(_secret(store))]
    threads = str(settings.limits.threads)
    environment = {
        # the ClientApp's process is looked up by name
        "PATH": f"{Path(executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(store.resolve() / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # without it each run would fetch its dependencies anew
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    return command, environment


def become_supernode(store: Path, connection: Connection) -> None:
    """Replace this process by the SuperNode: it gets the service manager's signals itself."""
    command, environment = supernode_command(store, connection)
    work = store.resolve() / "flower"
    work.mkdir(exist_ok=True)
    # The app's process imports from its working folder: one in which no other checkout lies.
    os.chdir(work)
    environment = {**os.environ, **environment}
    if "--superexec-auth-secret-file" in command:
        _start_warm(command[command.index("--port") + 1], _secret(store), environment)
    os.execve(command[0], command, environment)


def _secret(store: Path) -> Path:
    return store.resolve() / "flower" / "superexec-secret"


def _start_warm(port: str, secret: Path, environment: dict[str, str]) -> None:
    """Start what forks a process for each message (`client.warm`), as a child of the SuperNode."""
    secret.unlink(missing_ok=True)
    # Nobody else on the device may take the SuperNode's tasks.
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    command = [sys.executable, "-c", "from client.warm import main; main()"]
    command += ["--runtime-api-address", f"127.0.0.1:{port}", "--secret-file", str(secret)]
    subprocess.Popen(command, env=environment)


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
