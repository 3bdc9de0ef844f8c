"""The operator's two processes: a SuperLink for months, and a run on it.

The SuperLink's port carries the Control API, which has no login, beside what devices need. So it
listens on loopback alone, always; devices come in by the reverse proxy of ``deploy/nginx``.

Everything that the SuperLink keeps is in one folder::

    STATE/superlink.db         nodes, keys, runs
    STATE/flwr/config.toml     the operator's connection, called fallow
    STATE/work/                the SuperLink's (empty) working folder
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import ConfigError, DiskError, FallowError, StoreError

_CONNECTION = "fallow"
_LOOPBACK = "127.0.0.1"
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Without it the SuperLink would build an environment of its own for every run.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


def serve(state: Path, certs: Path | None, port: int) -> None:
    """Become a SuperLink on loopback; does not return.

    Parameters
    ----------
    state : Path
        Folder of what it keeps; one SuperLink at a time.
    certs : Path, optional
        Folder with ``ca.crt``, ``server.crt`` and ``server.key`` (``deploy/certs``). With it,
        TLS is on and only devices whose key is registered get in; None: neither.
    port : int
        On 127.0.0.1.

    Raises
    ------
    ConfigError
        If a certificate is missing or the port is taken.
    StoreError
        If another SuperLink works in `state`.
    """
    flags, connection = ["--insecure"], "insecure = true"
    if certs is not None:
        ca, certificate, key = (
            _certificate(certs, n) for n in ("ca.crt", "server.crt", "server.key")
        )
        flags = [f"--ssl-ca-certfile={ca}", f"--ssl-certfile={certificate}"]
        flags += [f"--ssl-keyfile={key}", "--enable-supernode-auth"]
        connection = f"root-certificates = {json.dumps(str(ca))}"
    state = state.resolve()
    with _disk(state):
        for folder in ("work", "flwr"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        os.chmod(state, 0o700)  # whoever reads the connection can run code
        handle = os.open(state / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    _lock(handle, state)
    _check_free(port)
    address = f"localhost:{port}" if certs is not None else f"{_LOOPBACK}:{port}"
    with _disk(state):
        (state / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "{address}"\n{connection}\n'
        )
    program = _program("flower-superlink")
    command = [program, *flags, f"--host={_LOOPBACK}", f"--port={port}"]
    command += [f"--database={state / 'superlink.db'}"]
    os.chdir(state / "work")
    print(
        f"SuperLink on {address}, keys {'off' if certs is None else 'on'}, in {state}", flush=True
    )
    # One process: what a service manager stops, watches and restarts is the SuperLink itself, and
    # the lock, whose handle it inherits, ends with it.
    os.execve(program, command, _environment(state))


def start_run(state: Path, out: Path, settings: Mapping[str, Any]) -> None:
    """Start a run on the SuperLink of `state`, or go on with it, and wait for its end.

    Parameters
    ----------
    state : Path
        Folder of the SuperLink.
    out : Path
        Folder of the run; what is there already is gone on with.
    settings : mapping
        Kebab-case settings; the others have their defaults.

    Raises
    ------
    ConfigError
        If a setting is wrong.
    FallowError
        If there is no SuperLink, or the run did not complete; called again, it goes on.
    """
    config = Config.parse(settings)
    state, out = state.resolve(), out.resolve()
    _check_answers(state)
    given = {key.replace("_", "-") for key in settings}
    chosen = {key: _place(key, value) for key, value in config.flat().items() if key in given}
    chosen |= {"out": str(out), "resume": True}
    file = state / "work" / f"run-{os.getpid()}.toml"
    with _disk(state):
        file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in chosen.items()))
    try:
        answer = _flwr(state, "run", str(_app()), _CONNECTION, f"--run-config={file}")
    finally:
        file.unlink()
    run = str(answer["run-id"])
    print(f"run {run}", flush=True)
    try:
        subprocess.run(
            _command("log", run, _CONNECTION, "--stream"), env=_environment(state), check=False
        )
        status = _status(state, run)
    except KeyboardInterrupt:
        _flwr(state, "stop", run, _CONNECTION)
        raise
    # Flower calls a run completed whenever its ServerApp returned: fallow's own word counts too.
    summary = out / "summary.json"
    told = json.loads(summary.read_text()) if summary.exists() else {}
    if status != "finished:completed" or told.get("status") != "complete":
        why = told.get("error") or "see the SuperLink's log"
        raise FallowError(
            f"run {run} is {status}, fallow says {told.get('status', 'nothing')}: {why}; "
            "the same command goes on with it"
        )
    print(f"report  {out / 'report.html'}")


def _place(key: str, value: Any) -> Any:
    """Return a path as one that holds in any folder: the ServerApp works in another."""
    if key in ("data", "prior", "proxy", "calibration") and value != "digits":
        return str(Path(value).resolve()) if value and Path(value).exists() else value
    return value


def _status(state: Path, run: str) -> str:
    """Return what the SuperLink says of a run; the log's stream may end before the run does."""
    while True:
        answer = _flwr(state, "list", _CONNECTION, f"--run-id={run}")
        status: str = answer["runs"][0]["status"]
        if status.startswith("finished"):
            return status
        time.sleep(2)


@contextmanager
def _disk(state: Path) -> Iterator[None]:
    """As `common.store.disk_errors`, without torch, which a SuperLink has no use for."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write in {state}: {error.strerror or error}") from None


def _lock(handle: int, state: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StoreError(
            f"another SuperLink works in {state}: stop it or choose another folder"
        ) from None
    os.set_inheritable(handle, True)


def _certificate(folder: Path, name: str) -> Path:
    path = folder.resolve() / name
    if not path.is_file():
        raise ConfigError(
            f"certs is {folder}, which has no {name}: make one with deploy/certs init, or name "
            "its server folder"
        )
    return path


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError as problem:
            raise ConfigError(
                f"port is {port}: {os.strerror(problem.errno or 0).lower()}; choose another"
            ) from None


def _check_answers(state: Path) -> None:
    if not (state / "flwr" / "config.toml").is_file():
        raise ConfigError(f"state is {state}, no SuperLink's folder: start `fallow serve {state}`")
    deadline = time.monotonic() + 60
    while True:
        try:
            _flwr(state, "list", _CONNECTION, "--limit=1")
            return
        except FallowError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


def _flwr(state: Path, *arguments: str) -> dict[str, Any]:
    """Run flwr, asked for JSON, and return its answer."""
    done = subprocess.run(
        _command(*arguments, "--format=json"),
        env=_environment(state),
        capture_output=True,
        text=True,
        check=False,
    )
    start = done.stdout.find("{")
    answer = json.loads(done.stdout[start:]) if start >= 0 else {}
    if done.returncode != 0 or not answer.get("success", True):
        said = (answer.get("error-message") or done.stdout + done.stderr).strip().splitlines()
        raise FallowError(f"flwr {arguments[0]}: {said[-1] if said else done.returncode}")
    return answer


def _command(*arguments: str) -> list[str]:
    return [_program("flwr"), *arguments]


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not there: install fallow with its dependencies")
    return found


def _environment(state: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **_QUIET, "PATH": path, "FLWR_HOME": str(state / "flwr")}


def _app() -> Path:
    """Return the folder whose code the server and the devices are to run."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise ConfigError(
            f"fallow is installed in {root} without its pyproject.toml: run it from a checkout"
        )
    return root
