"""The same run on three engines, and with real server and device processes."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = {
    "net": "resnet8",
    "width": "8",
    "devices": "2",
    "steps": "1",
    "rounds": "2",
    "prior-epochs": "3",
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


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(simulate("inline", tmp_path_factory.mktemp("inline") / "out"))


def test_flowers_simulation_gives_the_inline_engines_bytes(
    inline: dict[str, str], tmp_path: Path
) -> None:
    assert digests(simulate("flower", tmp_path / "out")) == inline


def test_flwr_run_gives_the_inline_engines_bytes(inline: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pairs = [f"{key}={value}" for key, value in TINY.items()]
    run([str(ROOT / "deploy" / "flwr-run.sh"), str(out), "digits", *pairs])
    assert digests(out) == inline


def test_a_superlink_and_two_supernodes_give_the_inline_engines_bytes(
    inline: dict[str, str], tmp_path: Path
) -> None:
    port, out = free_port(), tmp_path / "out"
    home = tmp_path / "operator"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n'
        f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    overrides = " ".join(f"{key}={toml(value)}" for key, value in TINY.items() if key != "devices")
    overrides += f" devices=2 out='{out}' data='digits'"
    with process("superlink", tmp_path, ["flower-superlink", "--insecure", "--port", str(port)]):
        wait_for(port)
        with device(0, port, tmp_path), device(1, port, tmp_path):
            run(
                ["flwr", "run", str(ROOT), "local", "--stream", "--run-config", overrides],
                FLWR_HOME=str(home),
            )
    assert status(out) == "complete", (tmp_path / "superlink.log").read_text()[-3000:]
    assert digests(out) == inline


def simulate(engine: str, out: Path) -> Path:
    given = [f"--{key}={TINY[key]}" for key in ("net", "width", "devices", "steps", "rounds")]
    others = [f"--set={k}={v}" for k, v in TINY.items() if f"--{k}={v}" not in given]
    command = [str(BIN / "fallow"), "simulate", "--data=digits", f"--engine={engine}"]
    run([*command, *given, *others, "--out", str(out)])
    return out


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


def toml(value: str) -> str:
    return f"'{value}'" if value[0].isalpha() else value


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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


def device(number: int, port: int, folder: Path) -> AbstractContextManager[None]:
    config = f"partition-id={number} num-partitions=2 cache='{folder / 'cache'}-{number}'"
    command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    command += ["--port", str(free_port()), "--node-config", config]
    return process(f"device-{number}", folder, command)


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
