"""The same run on three engines, and with real server and device processes."""

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from processes import BIN, ROOT, free_port, process, run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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


def device(number: int, port: int, folder: Path) -> AbstractContextManager[Any]:
    config = f"partition-id={number} num-partitions=2 cache='{folder / 'cache'}-{number}'"
    command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    command += ["--port", str(free_port()), "--node-config", config]
    return process(f"device-{number}", folder, command)
